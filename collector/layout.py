"""What the file bitten_events.db is: its tables, its version, and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import apsw
import msgspec

from collector.relations import Relation
from event_bus.errors import (
    DatabaseCorrupt,
    DatabaseError,
    DatabaseMissing,
    DatabaseUnavailable,
)

APPLICATION_ID = 0x42495445  # "BITE"
VERSION = 3
READABLE_VERSIONS = 1, 2, 3
"""All have the same views. 1 had neither decimals nor inline types; 1 and 2 kept ids with the
events, in columns that are NULL since."""

SUFFIXES = ("", "-wal", "-shm")
"""Of the files that make up one database."""

TABLES = """
CREATE TABLE _meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE _name (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE _relation (type INTEGER PRIMARY KEY, definition TEXT NOT NULL);
CREATE TABLE _count (type INTEGER PRIMARY KEY, stored INTEGER NOT NULL);
CREATE TABLE _batch (
    first_seq INTEGER PRIMARY KEY, received_at REAL NOT NULL, producer INTEGER, n);
CREATE TABLE _gap (
    first_seq INTEGER PRIMARY KEY, last_seq INTEGER NOT NULL, found_at REAL NOT NULL, reason TEXT);
CREATE TABLE _event (
    seq INTEGER PRIMARY KEY, type INTEGER NOT NULL, timestamp REAL NOT NULL, source INTEGER,
    user_id TEXT, correlation_id TEXT, causation_id TEXT, data TEXT);
CREATE INDEX _event_type ON _event (type);
CREATE INDEX _event_timestamp ON _event (timestamp);
CREATE INDEX _event_source ON _event (source);
CREATE INDEX _event_user_id ON _event (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX _event_correlation_id ON _event (correlation_id) WHERE correlation_id IS NOT NULL;
"""

_COLUMNS = {
    "_meta": "key, value",
    "_name": "id, name",
    "_relation": "type, definition",
    "_count": "type, stored",
    "_batch": "first_seq, received_at",
    "_gap": "first_seq, last_seq, found_at",
    "_event": "seq, type, timestamp, source, user_id, correlation_id, causation_id, data",
}

LAST_SEQ = (
    "SELECT max(coalesce((SELECT max(seq) FROM _event), 0),"
    " coalesce((SELECT max(last_seq) FROM _gap), 0))"
)

_ROWS_PER_VALUE = {
    "_event_type": 20_000,
    "_event_source": 50_000,
    "_event_user_id": 500,
    "_event_correlation_id": 5,
    "_event_timestamp": 1,
}
"""Of a million events: so that a query looks in the index that leaves least, however many events
there are and whoever analysed what (https://sqlite.org/optoverview.html, fixed results of ANALYZE).
"""

_OPENING = (
    "CREATE TABLE IF NOT EXISTS _opening"
    " (id INTEGER PRIMARY KEY, token TEXT NOT NULL, last_seq INTEGER NOT NULL)"
)


_NUMBER_BATCHES = """
ALTER TABLE _batch ADD COLUMN producer INTEGER;
ALTER TABLE _batch ADD COLUMN n;
CREATE TEMP TABLE numbered AS
SELECT seq, received_at, producer, n FROM (
    SELECT e.seq, e.producer, e.n,
        coalesce((SELECT received_at FROM _batch WHERE first_seq <= e.seq
         ORDER BY first_seq DESC LIMIT 1), e.timestamp) AS received_at,
        typeof(e.n) = 'integer' AND lag(e.producer) OVER by_seq IS e.producer
            AND lag(e.n - e.seq) OVER by_seq IS e.n - e.seq
            AND (SELECT max(first_seq) FROM _batch WHERE first_seq <= e.seq)
                <= lag(e.seq) OVER by_seq AS continues
    FROM _event e WINDOW by_seq AS (ORDER BY e.seq))
WHERE continues IS NOT 1;
INSERT OR REPLACE INTO _batch SELECT * FROM temp.numbered;
DROP TABLE temp.numbered;
"""
"""Gives the ids, which version 1 and 2 kept with each event, to the batches."""


def create(path: Path) -> None:
    """Make an empty file for its owner alone. Raises FileExistsError, DatabaseError."""
    try:
        # SQLite gives the files beside it the same rights.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise
    except OSError as e:
        kind = DatabaseUnavailable if e.errno in (errno.ENOSPC, errno.EDQUOT) else DatabaseError
        raise kind(
            f"cannot create {path}: {e.strerror}",
            hint="make its directory writable, or set BITTEN_DB to a file elsewhere",
        ) from e


def insert_event_sql(inline: list[str]) -> str:
    """Into `_event` and these columns of inline types."""
    names = [*_COLUMNS["_event"].split(", "), *inline]
    columns = ", ".join(f'"{name}"' for name in names)
    return f"INSERT INTO _event ({columns}) VALUES ({','.join('?' * len(names))})"


def make_tables(db: apsw.Connection) -> None:
    """Within the caller's transaction."""
    db.execute(TABLES)
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")


def bring_up_to_date(db: apsw.Connection) -> None:
    """Add what an earlier program did not make. Within the caller's transaction."""
    if not _has_column(db, "_batch", "n"):
        db.execute(_NUMBER_BATCHES)
    db.execute(f"PRAGMA user_version={VERSION}")
    db.execute(_OPENING)
    db.execute("ANALYZE sqlite_schema")  # makes the table of statistics
    for table in ("sqlite_stat1", "sqlite_stat4"):
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            db.execute(f"DELETE FROM {table} WHERE tbl = '_event'")
    db.executemany(
        "INSERT INTO sqlite_stat1 VALUES ('_event', ?, ?)",
        [(index, f"1000000 {rows}") for index, rows in _ROWS_PER_VALUE.items()],
    )
    if not _has_column(db, "_gap", "reason"):
        db.execute("ALTER TABLE _gap ADD COLUMN reason TEXT")


def _has_column(db: apsw.Connection, table: str, column: str) -> bool:
    found = db.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column))
    return found.fetchone() is not None


def note_opening(db: apsw.Connection) -> None:
    """An older copy of the database begins lower again: so an audit knows what it may rely on."""
    db.execute(
        f"INSERT INTO _opening (token, last_seq) VALUES (?, ({LAST_SEQ}))", (secrets.token_hex(8),)
    )


def is_blank(db: apsw.Connection) -> bool:
    """True if nothing was ever stored here: a new file, or one whose making was cut short."""
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    application = db.execute("PRAGMA application_id").fetchone()
    return tables == (0,) and application == (0,)


def check_version(db: apsw.Connection, path: Path) -> None:
    """Raise DatabaseError unless this is an events database of the version known here;
    DatabaseMissing, one of them, if it holds nothing at all."""
    (application,) = db.execute("PRAGMA application_id").fetchone() or (0,)
    (version,) = db.execute("PRAGMA user_version").fetchone() or (0,)
    if application != APPLICATION_ID:
        if is_blank(db):
            raise DatabaseMissing(
                f"{path} holds nothing: it is new, was cut, or its -wal is gone",
                hint="start the collector: it fills it from the journal",
            )
        raise DatabaseError(
            f"{path} is an SQLite database of another program",
            hint=f"{aside(path)} or set BITTEN_DB to another file",
        )
    if version not in READABLE_VERSIONS:
        raise DatabaseError(
            f"{path} has version {version}, this program knows {VERSION}",
            hint=f"install the bitten-event-bus that wrote it, or {aside(path)};"
            " a new one is filled from the journal",
        )


def check_is_current(db: apsw.Connection, path: Path) -> None:
    """Raise DatabaseError unless its tables, and not its views alone, are as described here."""
    (version,) = db.execute("PRAGMA user_version").fetchone() or (0,)
    if version != VERSION:
        raise DatabaseError(
            f"{path} has version {version}, this needs {VERSION}",
            hint="start the collector again: it brings the database up to date",
        )


def check_tables(db: apsw.Connection, path: Path) -> None:
    """Raise DatabaseCorrupt if a table is missing or what it says of event types is unreadable.

    Reads both ends of each table and no more: a bad page between them is found by `Inspection`.
    """
    try:
        for table, columns in _COLUMNS.items():
            db.execute(f"SELECT {columns} FROM {table} ORDER BY 1 LIMIT 1").fetchone()
            db.execute(f"SELECT {columns} FROM {table} ORDER BY 1 DESC LIMIT 1").fetchone()
        for (definition,) in db.execute("SELECT definition FROM _relation"):
            msgspec.json.decode(definition, type=Relation)
    except (apsw.SQLError, msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise DatabaseCorrupt(f"{path} is damaged: {e}", hint=_CORRUPT_HINT) from e


@contextlib.contextmanager
def errors(verb: str, path: Path) -> Iterator[None]:
    """Turn what SQLite raises into DatabaseUnavailable, DatabaseCorrupt or DatabaseError."""
    try:
        yield
    except apsw.Error as e:
        kind = DatabaseError
        if isinstance(e, apsw.BusyError | apsw.FullError | apsw.IOError):
            kind = DatabaseUnavailable
        elif isinstance(e, apsw.NotADBError | apsw.CorruptError | apsw.ConstraintError):
            # Of a constraint too: seq counts up and names are looked up before they are added,
            # so only rows that are not where they belong can be in the way.
            kind = DatabaseCorrupt
        raise kind(f"cannot {verb} {path}: {e}", hint=_hint(e, path)) from e


def aside(path: Path) -> str:
    return f"move it aside (mv {path} {path}.old)"


_CORRUPT_HINT = "the collector moves it aside and fills a new one from the journal"


def _hint(error: apsw.Error, path: Path) -> str:
    if isinstance(error, apsw.BusyError):
        return "end the other program's transaction; nothing is lost, events wait in the journal"
    if isinstance(error, apsw.FullError):
        return "free some disk space; nothing is lost, events wait in the journal"
    if isinstance(error, apsw.NotADBError | apsw.CorruptError | apsw.ConstraintError):
        return _CORRUPT_HINT
    if isinstance(error, apsw.IOError):
        return "check the disk and the limit of file sizes (ulimit -f); events wait in the journal"
    return "check that the file and its directory are writable, and the disk"
