"""Bytes an event takes, in the database with all its indexes and in the journal."""

from __future__ import annotations

from collections.abc import Iterable

from running import bench, sqlite_bytes


def storage(types: Iterable[str], count: int) -> dict[str, dict[str, float]]:
    """By type, each in a home of its own, and in the mix. What empty files take is not counted."""
    return {event_type or "mix": _one(event_type, count) for event_type in (*types, "")}


def _one(event_type: str, count: int) -> dict[str, float]:
    with bench() as b:
        files = {"database": b.db, "journal": b.home / "journal.db"}
        empty = {name: sqlite_bytes(path) for name, path in files.items()}
        b.stored_rate(count, "--type", event_type)
        return {name: (sqlite_bytes(path) - empty[name]) / count for name, path in files.items()}
