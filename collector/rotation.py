"""Which backups make room for a new one: the oldest, but none with events that no newer one has."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector import manifest as m
from collector.manifest import Manifest
from collector.seqs import Seqs, merged, without
from event_bus import database
from event_bus.errors import BackupError


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that is kept beyond `backup_keep`, for the events that no newer one has."""

    path: Path
    seqs: Seqs


def rotate(folder: Path, keep: int, made: Path) -> tuple[list[Path], list[Kept]]:
    """Remove all but the newest `keep`; what was removed, and what is kept for its events.

    Never removes `made`, which a clock set back would call the oldest.
    """
    others = [path for path in m.backups(folder) if path != made]
    surplus = max(0, len(others) - (keep - 1))
    newer = [made, *others[surplus:]]
    removed, kept = [], []
    for path in reversed(others[:surplus]):
        only_there = _only_in(path, newer)
        if only_there:
            kept.append(Kept(path=path, seqs=only_there))
            newer.append(path)
            continue
        # Under this name a removal that is cut short leaves no backup that looks whole.
        part = path.rename(path.with_name(path.name + m.PART))
        shutil.rmtree(part)
        removed.append(path)
    return removed[::-1], kept[::-1]


def _only_in(path: Path, newer: list[Path]) -> Seqs:
    """The events of a backup that none of the newer ones has."""
    try:
        manifest = Manifest.read(path)
    except BackupError:
        return []  # nothing can be restored from it
    covered: list[tuple[int, int]] = []
    for other in newer:
        with contextlib.suppress(BackupError):
            if _is_one_history(manifest, other):
                covered += Manifest.read(other).held
    return without(manifest.held, merged(covered))


def _is_one_history(manifest: Manifest, other: Path) -> bool:
    """False if the last event of a backup is another one in `other`, or is not there, and `other`
    is of another journal: one that was begun anew, or that goes on from a restored backup."""
    last = manifest.database.last_event if manifest.database is not None else None
    if last is not None and (other / m.DATABASE).exists():
        seq, event_id = last
        try:
            with contextlib.closing(database.connect(other / m.DATABASE, database.READ_ONLY)) as db:
                row: Any = db.execute(
                    "SELECT event_id FROM events WHERE seq = ?", (seq,)
                ).fetchone()
        except apsw.Error:
            return False
        if row is not None:
            return bool(row[0] == event_id)
    return manifest.journal_id == Manifest.read(other).journal_id
