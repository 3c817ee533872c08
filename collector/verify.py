"""What a copy of the database or the journal holds, read from end to end."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from collector.layout import LAST_SEQ, check_version
from collector.manifest import DatabaseFacts, JournalFacts
from event_bus import database
from event_bus.errors import BackupError
from event_bus.journal import APPLICATION_ID

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
        for seq, count, crc, body in db.execute(
            "SELECT first_seq, count, crc32, body FROM batch ORDER BY first_seq"
        ):
            whole = isinstance(body, bytes) and (zlib.crc32(body), body.count(b"\n")) == (
                crc,
                count,
            )
            if seq != next_seq or not whole:
                raise damaged(source, f"its events at seq {min(seq, next_seq)} (CRC-32)")
            next_seq += count
            events += count
        return JournalFacts(
            journal_id=meta["journal_id"],
            first_seq=first_seq,
            last_seq=next_seq - 1,
            events=events,
        )


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
