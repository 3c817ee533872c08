"""What a copy of the database or the journal holds, read from end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from collector.layout import LAST_SEQ, check_version
from collector.manifest import DatabaseFacts, JournalFacts
from collector.seqs import Seqs, merged
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
        last_event: Any = db.execute(
            "SELECT seq, event_id FROM events ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        return DatabaseFacts(
            journal_id=journal_id[0],
            last_seq=last_seq,
            events=events,
            gaps=gaps,
            holes=last_seq - events - gaps,
            held=[(1, events)] if 0 < events == last_seq else _stretches(db),
            last_event=last_event,
        )


def _stretches(db: apsw.Connection) -> Seqs:
    """The seqs of all events in a database."""
    edges = (
        db.execute(
            "SELECT seq FROM _event AS e WHERE NOT EXISTS"
            f" (SELECT 1 FROM _event WHERE seq = e.seq {side} 1) ORDER BY seq"
        )
        for side in "-+"
    )
    return [(first, last) for (first,), (last,) in zip(*edges, strict=True)]


def journal_facts(path: Path, source: Path, *, stored_seq: int) -> JournalFacts:
    """Of a copy of `source`, which errors name, beside a database that goes to `stored_seq`.

    Raises BackupError if it is damaged: the file, or a batch that the database does not have
    either and that is not recorded as lost.
    """
    with _checked(path, source) as db:
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise BackupError(f"{source} is not a journal of this bus", hint="move it aside")
        meta: dict[Any, Any] = dict(db.execute("SELECT key, value FROM meta"))
        first_seq = next_seq = meta["trimmed_seq"] + 1
        events = damaged_end = 0
        held = []
        excused = [(1, stored_seq), *_recorded(db)]
        for seq, count, received_at, crc, body in db.execute(
            "SELECT first_seq, count, received_at, crc32, body FROM batch ORDER BY first_seq"
        ):
            if not is_intact(seq, count, received_at, crc, body):
                damaged_end = max(damaged_end, seq + count - 1)
                continue
            _excuse(source, next_seq, seq - 1, excused)
            next_seq = seq + count
            events += count
            held.append((seq, next_seq - 1))
        _excuse(source, next_seq, damaged_end, excused)
        last_seq = max([next_seq - 1, damaged_end, *(end for _, end in excused[1:])])
        return JournalFacts(
            journal_id=meta["journal_id"],
            first_seq=first_seq,
            last_seq=last_seq,
            events=events,
            lost=last_seq - first_seq + 1 - events,
            held=merged(held),
        )


def _recorded(db: apsw.Connection) -> list[tuple[int, int]]:
    """Ranges that the bus itself knows to be lost."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'lost_range'").fetchone():
        return []
    rows: Any = db.execute("SELECT first_seq, coalesce(last_seq, first_seq - 1) FROM lost_range")
    return list(rows)


def _excuse(source: Path, first: int, last: int, excused: list[tuple[int, int]]) -> None:
    """Raise BackupError unless every seq from first to last is in one of the ranges."""
    for a, b in sorted(excused):
        if a <= first:
            first = max(first, b + 1)
    if first <= last:
        raise damaged(source, f"its events from seq {first} on (CRC-32)")


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
