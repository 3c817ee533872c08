"""Bytes an event takes, in the database with all its indexes and in the journal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from running import bench


def storage(types: Iterable[str], count: int) -> dict[str, dict[str, float]]:
    """By type, each in a home of its own, and in the mix. What empty files take is not counted."""
    return {event_type or "mix": _one(event_type, count) for event_type in (*types, "")}


def _one(event_type: str, count: int) -> dict[str, float]:
    with bench() as b:
        files = {"database": b.db, "journal": b.home / "journal.db"}
        b.close()  # what is in a -wal goes to its file
        empty = {name: path.stat().st_size for name, path in files.items()}
        for name in ("bus", "collect"):
            b.start_daemon(name)
        b.stored_rate(count, "--type", event_type)
        b.close()
        return {name: _grown(path, empty[name]) / count for name, path in files.items()}


def _grown(path: Path, before: int) -> int:
    return path.stat().st_size - before
