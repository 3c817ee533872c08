"""The one place where SQLite files are opened, by whatever part: replace `connect` to see or to
fail every read, write and fsync of journal and database."""

from __future__ import annotations

from pathlib import Path

import apsw

READ_ONLY = apsw.SQLITE_OPEN_READONLY
READ_WRITE = apsw.SQLITE_OPEN_READWRITE
BUSY_TIMEOUT_MS = 5_000


def connect(
    path: Path, flags: int = READ_WRITE, *, busy_timeout_ms: int = BUSY_TIMEOUT_MS
) -> apsw.Connection:
    """A connection to an existing file. Raises apsw.Error.

    `busy_timeout_ms` is how long a statement waits for another connection's lock.
    """
    db = apsw.Connection(str(path), flags=flags)
    db.set_busy_timeout(busy_timeout_ms)
    return db
