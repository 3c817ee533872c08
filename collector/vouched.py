"""What the last audit vouched for, kept in audit.json beside the journal.

Deleting the file only makes the next audit read everything again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector.layout import LAST_SEQ
from collector.tally import Tally

FILE = "audit.json"
VERSION = 2

Opening = tuple[int, str]
"""Number and token of one opening of the database for writing."""


class Mark(msgspec.Struct, kw_only=True):
    """`tally` was counted in the database that had `opening` as its last, filled from that
    journal."""

    version: int
    journal_id: str
    opening: Opening
    tally: Tally


def load(home: Path, db: apsw.Connection, journal_id: str) -> Tally:
    """The tally to go on from: an empty one if there is none that holds for this database."""
    try:
        mark = msgspec.json.decode((home / FILE).read_bytes(), type=Mark)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Tally()
    if (mark.version, mark.journal_id) != (VERSION, journal_id) or not _holds(mark, db):
        return Tally()
    return mark.tally


def _holds(mark: Mark, db: apsw.Connection) -> bool:
    """False for another database, and for an older copy: its collector began lower again."""
    if last_opening(db) is None:
        return False
    row: Any = db.execute(
        "SELECT (SELECT token FROM _opening WHERE id = ?1) = ?2"
        " AND NOT EXISTS (SELECT 1 FROM _opening WHERE id > ?1 AND last_seq < ?3)"
        f" AND ({LAST_SEQ}) >= ?3",
        (*mark.opening, mark.tally.seq),
    ).fetchone()
    return bool(row[0])


def last_opening(db: apsw.Connection) -> Opening | None:
    """None for a database whose collector does not note its openings yet."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = '_opening'").fetchone():
        return None
    row: Any = db.execute("SELECT id, token FROM _opening ORDER BY id DESC LIMIT 1").fetchone()
    return (row[0], row[1]) if row else None


def save(home: Path, opening: Opening | None, journal_id: str, tally: Tally) -> None:
    """Keep a tally for the next audit; without it, that one is slower and no worse."""
    if opening is None or not tally.is_small:
        return
    mark = Mark(version=VERSION, journal_id=journal_id, opening=opening, tally=tally)
    with contextlib.suppress(OSError):  # a home that only others may write
        fd, name = tempfile.mkstemp(dir=home, prefix=FILE)  # 0600
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(mark))
            Path(name).replace(home / FILE)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
