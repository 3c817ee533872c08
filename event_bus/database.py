"""The one place where SQLite files are opened, by whatever part: replace `connect` to see or to
fail every read, write and fsync of journal and database."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import apsw

READ_ONLY = apsw.SQLITE_OPEN_READONLY
READ_WRITE = apsw.SQLITE_OPEN_READWRITE
BUSY_TIMEOUT_MS = 5_000
_NO_ROOM = (apsw.SQLITE_IOERR_SHMSIZE, apsw.SQLITE_IOERR_SHMOPEN, apsw.SQLITE_IOERR_WRITE)


def connect(
    path: Path, flags: int = READ_WRITE, *, busy_timeout_ms: int = BUSY_TIMEOUT_MS
) -> apsw.Connection:
    """A connection to an existing file. Raises apsw.Error.

    `busy_timeout_ms` is how long a statement waits for another connection's lock. A file that was
    cut to nothing is none while its -wal has something: SQLite would delete that, also to read.
    """
    if _has(path) == 0 and _has(Path(f"{path}-wal")):
        raise apsw.NotADBError("it has 0 bytes, and its -wal has more: it was cut")
    db = apsw.Connection(str(path), flags=flags)
    db.set_busy_timeout(busy_timeout_ms)
    return db


def _has(path: Path) -> int | None:
    """Bytes; None if there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def reading_hint(error: Exception) -> str:
    """What to do about a file that cannot be read, by the kind of the error."""
    if isinstance(error, apsw.CantOpenError | apsw.PermissionsError | apsw.ReadOnlyError):
        return "check its owner and rights"
    if isinstance(error, apsw.NotADBError | apsw.CorruptError | apsw.SQLError | KeyError):
        return "it is damaged, or another file; `bitten doctor` says what to do"
    if isinstance(error, apsw.BusyError):
        return "end the other program's transaction"
    if getattr(error, "extendedresult", 0) in _NO_ROOM:
        return "make room on its disk: reading needs some kB beside the file"
    return "check the disk"


@contextlib.contextmanager
def transaction(db: apsw.Connection) -> Iterator[None]:
    """All that is written within, or nothing. Raises apsw.Error.

    On some full disks SQLite rolls back by itself: `with db` then fails to do so once more and
    raises that, instead of what was the matter.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
