"""What a copy of the database or the journal holds, read from end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from collector.layout import LAST_SEQ, check_version
from collector.manifest import DatabaseFacts, JournalFacts
from event_bus import database
from event_bus.errors import BackupError
from event_bus.journal_format import APPLICATION_ID, is_intact

MAX_FAULTS = 3
"""Lines of SQLite's report that are shown."""


def database_facts(path: Path, source: Path) -> DatabaseFacts:
    """Of a copy of `source`, which errors name.

    Raises BackupError if it is damaged, DatabaseError if it is another program's.
    """
    with _checked(path, source) as db:
        check_version(db, source)
        ((last_seq,),) = db.execute(LAST_SEQ)
        ((events,),) = db.execute("SELECT count(*) FROM _event")
        ((gaps,),) = db.execute("SELECT coalesce(sum(last_seq - first_seq + 1), 0) FROM _gap")
        journal_id: Any = db.execute(
            "SELECT (SELECT value FROM _meta WHERE key = 'journal_id')"
        ).fetchone()
        return DatabaseFacts(
            journal_id=journal_id[0],
            last_seq=last_seq,
            events=events,
            gaps=gaps,
            holes=last_seq - events - gaps,
        )


def journal_facts(path: Path, source: Path) -> JournalFacts:
    """Of a copy of `source`, which errors name. Raises BackupError if anything is damaged."""
    with _checked(path, source) as db:
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise BackupError(f"{source} is not a journal of this bus", hint="move it aside")
        meta: dict[Any, Any] = dict(db.execute("SELECT key, value FROM meta"))
        first_seq = next_seq = meta["trimmed_seq"] + 1
        events = 0
        lost = _lost_ranges(db)
        for seq, count, received_at, crc, body in db.execute(
            "SELECT * FROM batch ORDER BY first_seq"
        ):
            next_seq = _after_lost(lost, next_seq, seq)
            whole = is_intact(seq, count, received_at, crc, body)
            if not whole and _after_lost(lost, seq, seq + 1) > seq:
                continue  # the bus has named it: kept as it is, and never served
            if seq != next_seq or not whole:
                raise damaged(source, f"its events at seq {min(seq, next_seq)} (CRC-32)")
            next_seq += count
            events += count
        next_seq = max([next_seq, *(last + 1 for _, last in lost)])
        return JournalFacts(
            journal_id=meta["journal_id"],
            first_seq=first_seq,
            last_seq=next_seq - 1,
            events=events,
        )


def _lost_ranges(db: apsw.Connection) -> list[tuple[int, int]]:
    """Ranges that the journal itself says it has lost; early ones have no such table."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'lost_range'").fetchone():
        return []
    rows: list[Any] = db.execute(
        "SELECT first_seq, last_seq FROM lost_range WHERE last_seq NOT NULL ORDER BY first_seq"
    ).fetchall()
    return rows


def _after_lost(lost: list[tuple[int, int]], seq: int, until: int) -> int:
    """The first seq from `seq` on, before `until`, that is not in a lost range."""
    for first, last in lost:
        if first <= seq <= last and seq < until:
            seq = last + 1
    return seq


def damaged(source: Path, what: object) -> BackupError:
    return BackupError(
        f"{source} is damaged: {what}",
        hint="backups made before are kept; docs/backup.md says how to go on from one",
    )


@contextlib.contextmanager
def _checked(path: Path, source: Path) -> Iterator[apsw.Connection]:
    """A read-only connection to a file that SQLite finds whole."""
    try:
        with contextlib.closing(database.connect(path, database.READ_ONLY)) as db:
            faults = [row[0] for row in db.execute(f"PRAGMA integrity_check({MAX_FAULTS})")]
            if faults != ["ok"]:
                raise damaged(source, " ".join("\n".join(faults).split()))
            yield db
    except (apsw.CorruptError, apsw.NotADBError) as e:
        raise damaged(source, e) from e
