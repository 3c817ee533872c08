"""The journal as a file: opened, checked, copied, put back; errors told apart."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw

from event_bus import database
from event_bus.errors import JournalDamaged, JournalError, JournalFailed, JournalFull
from event_bus.journal_format import (
    APPLICATION_ID,
    LOST_RANGE,
    PAGE_BYTES,
    SCHEMA,
    VERSION,
    WAL_HOLDS_MORE,
    is_damage,
)

SUFFIXES = ("", "-wal", "-shm")
CHECKPOINT_PAGES = 4_000
CHECKPOINT_BUSY_MS = 500
PROBE_BYTES = 64 << 10
"""More than opening needs: a WAL, and the index of it."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DAMAGE_HINT = "the next start makes a new one of all that can be read of it"


def has_wal(path: Path) -> bool:
    """Whether there is a -wal that holds something; one that is empty is a lost one."""
    try:
        return Path(f"{path}-wal").stat().st_size > 0
    except OSError:
        return False


def check_rights(path: Path) -> None:
    """Raise JournalError if a file of the journal is there and may not be read and written."""
    for suffix in SUFFIXES:
        file = Path(f"{path}{suffix}")
        if file.exists() and not os.access(file, os.R_OK | os.W_OK):
            raise JournalError(
                f"cannot open {file}: {os.strerror(errno.EACCES)}",
                hint="check its owner and rights",
            )


def check_version(db: apsw.Connection, path: Path) -> None:
    """Raise JournalError unless this is a journal of the version known here; JournalDamaged if
    only its header says that it is not. Of a file with tables."""
    application = db.execute("PRAGMA application_id").fetchone()
    version = db.execute("PRAGMA user_version").fetchone()
    if application != (APPLICATION_ID,):
        tables = db.execute(
            "SELECT count(*) FROM sqlite_master WHERE name IN ('batch', 'opaque_id', 'run')"
        ).fetchone()
        if tables == (3,):
            raise JournalDamaged(f"{path}: its header is damaged", hint=DAMAGE_HINT)
        raise JournalError(f"{path} is not a journal of this bus", hint="move it aside")
    if version != (VERSION,):
        raise JournalError(
            f"{path} has version {version and version[0]}, this program knows {VERSION}",
            hint="install the bitten-event-bus that wrote it, or move it aside",
        )


class JournalFile:
    """Opens the journal at `path`, or creates it with `origin_seq` as its first seq.

    Raises JournalError, also from every method; JournalDamaged, one of them, if the file is not
    what was written. With `create` False a file without tables is damaged too.
    """

    def __init__(self, path: Path, *, create: bool = True, origin_seq: int = 1) -> None:
        self.path = path
        check_rights(path)
        self._had_wal = has_wal(path)  # whoever reads without one makes an empty one
        try:
            if create:
                path.touch(0o600)  # the WAL beside it takes over these rights
            self._connect()
        except (apsw.Error, OSError) as e:
            raise self._open_error(e) from e
        try:
            self._prepare(origin_seq if create else None)
        except apsw.Error as e:
            self.close()
            raise self._open_error(e) from e
        except JournalError:
            self.close()
            raise
        self._files = self._identities()

    def _prepare(self, origin_seq: int | None) -> None:
        # By what it holds, not by its size: a start may have died while creating it.
        if self._row("SELECT count(*) FROM sqlite_master")[0] == 0:
            if origin_seq is None:
                raise JournalDamaged(f"{self.path} is empty", hint=DAMAGE_HINT)
            self._create(origin_seq)
        try:
            check_version(self._db, self.path)
        except apsw.Error as e:
            raise self._read_error(e) from e
        try:
            self._load()
        except TypeError as e:  # a row of meta is not there, or not a number
            raise JournalDamaged(f"{self.path} is damaged: {e}", hint=DAMAGE_HINT) from e

    def _load(self) -> None:
        """Learn what the file holds, once it is known to be a journal."""
        raise NotImplementedError

    def _open_error(self, error: Exception) -> JournalError:
        if isinstance(error, apsw.FullError):
            return self._write_error(error)
        if isinstance(error, apsw.Error) and is_damage(error):
            return JournalDamaged(f"{self.path} is damaged: {error}", hint=DAMAGE_HINT)
        # For want of room SQLite may also say that it cannot open or write a file.
        if self._probe(PROBE_BYTES) in _NO_SPACE:
            return self._write_error(apsw.FullError())
        reason = error.strerror if isinstance(error, OSError) else error
        return JournalError(
            f"cannot open {self.path}: {reason}", hint="check the disk and its rights"
        )

    def _connect(self) -> None:
        self._db = database.connect(self.path)
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA cache_size=-500")  # batches are read once
        # SQLite's own checkpoints after a commit do not tell of a sync that failed.
        self._wal_pages, self._checkpoint_at = 0, CHECKPOINT_PAGES
        self._notes_more = False
        self._db.set_wal_hook(self._note_wal)
        self._db.execute("PRAGMA journal_size_limit=67108864")

    def _create(self, origin_seq: int) -> None:
        self._db.execute(f"PRAGMA page_size={PAGE_BYTES}")
        self._db.execute("PRAGMA journal_mode=WAL")
        with database.transaction(self._db):
            self._db.execute(SCHEMA)
            self._db.execute(LOST_RANGE)
            self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version={VERSION}")
            self._db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [
                    ("journal_id", secrets.token_hex(8)),
                    ("epoch", 0),
                    ("trimmed_seq", origin_seq - 1),
                    ("origin_seq", origin_seq),
                ],
            )

    def is_in_place(self) -> bool:
        """False if the file, its -wal or its -shm was removed or replaced since it was opened:
        what is committed then would go with this process."""
        now = self._identities()
        return now == self._files and None not in now  # removed even before it was looked at

    def _identities(self) -> list[tuple[int, int] | None]:
        return [_identity(f"{self.path}{suffix}") for suffix in SUFFIXES]

    def copy_to(self, path: Path) -> None:
        """Write all that the open file holds to a new one, and sync it."""
        try:
            path.touch(0o600)
            copy = database.connect(path)
            try:
                with copy.backup("main", self._db, "main") as backup:
                    while not backup.done:
                        backup.step()
            finally:
                copy.close()
        except apsw.Error as e:
            raise self._write_error(e) from e

    def reopen(self, put_in_place: Callable[[], None]) -> None:
        """Go on with the file that `put_in_place` puts at the same path; it holds the same."""
        self._db.close()
        put_in_place()
        try:
            self._connect()
            self._checkpoint("FULL")
        except apsw.Error as e:
            raise JournalFailed(f"cannot open {self.path}: {e}") from e
        self._files = self._identities()

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Commits within are not synced one by one; at the end all of it is, at once."""
        try:
            self._db.execute("PRAGMA synchronous=OFF")
            yield
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except apsw.Error as e:
            raise self._write_error(e) from e

    def size_bytes(self) -> int:
        """Bytes in use, free pages not counted."""
        pages = self._row("PRAGMA page_count")[0] - self._row("PRAGMA freelist_count")[0]
        return int(pages * self._row("PRAGMA page_size")[0])

    @property
    def wal_bytes(self) -> int:
        """Bytes of the -wal that cannot be overwritten yet: not copied so far, or being read."""
        return self._wal_pages * PAGE_BYTES

    def has_room(self, size_bytes: int) -> bool:
        """Whether the journal's disk has that much space now, and its files may grow so much."""
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and not self._fits(limit - size_bytes):
            return False
        return self._probe(size_bytes) == 0

    def _probe(self, size_bytes: int) -> int:
        """The errno of taking that much space; 0 if it can be had."""
        probe = self.path.with_suffix(".probe")
        try:
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            finally:
                os.close(fd)
                probe.unlink()
        except OSError as e:
            return e.errno or errno.EIO
        return 0

    def _fits(self, size_bytes: int) -> bool:
        try:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return all(Path(f"{self.path}{s}").stat().st_size <= size_bytes for s in ("", "-wal"))
        except (apsw.Error, OSError):
            return False

    def _note_wal(self, _: apsw.Connection, name: str, pages: int) -> int:
        if pages < self._wal_pages:  # it has begun anew
            self._checkpoint_at = CHECKPOINT_PAGES
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def _keep_wal_short(self) -> None:
        """Copy a long WAL into the file. Raises JournalFailed if that cannot be synced."""
        if self._wal_pages < self._checkpoint_at:
            return
        # Tried again later if a reader is in the way: the WAL goes on then.
        self._checkpoint_at = self._wal_pages + CHECKPOINT_PAGES
        try:
            self._checkpoint("PASSIVE")
        except apsw.Error as e:
            error = self._write_error(e)
            if not isinstance(error, JournalFull):  # what is committed is in the WAL
                raise error from e

    def checkpoint(self) -> None:
        """Have what is committed in the file itself, unless a reader is in the way. Raises
        JournalError."""
        try:
            self._checkpoint("FULL")
        except apsw.Error as e:
            raise self._write_error(e) from e

    def _checkpoint(self, mode: str) -> None:
        """Write and sync what is committed; readers may keep it from doing all of it.

        Never by TRUNCATE: killed then, it would leave an empty -wal, and that is a lost one.
        """
        self._note_wal_holds_more(1)
        self._db.set_busy_timeout(CHECKPOINT_BUSY_MS)
        self._db.execute(f"PRAGMA wal_checkpoint({mode})")
        self._db.set_busy_timeout(database.BUSY_TIMEOUT_MS)
        self._note_wal_holds_more(0)

    def _note_wal_holds_more(self, value: int) -> None:
        self._notes_more = True  # until it is known not to
        with database.transaction(self._db):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (WAL_HOLDS_MORE, value))
        self._notes_more = bool(value)

    def close(self) -> None:
        if self._notes_more:  # the disk was full, or failed, when it was to be taken back
            try:
                self._note_wal_holds_more(0)
            except apsw.Error:  # then the -wal stays: without it the file would be lacking it
                self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._notes_more = False
        self._db.close()

    def _meta(self, key: str, default: Any = None) -> Any:
        row = self._row("SELECT value FROM meta WHERE key = ?", key)
        return default if row is None else row[0]

    def _row(self, sql: str, *values: Any) -> Any:
        try:
            return self._db.execute(sql, values).fetchone()
        except apsw.Error as e:
            raise self._read_error(e) from e

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except apsw.Error as e:
            raise self._read_error(e) from e

    def _read_error(self, error: apsw.Error) -> JournalError:
        kind = JournalDamaged if is_damage(error) else JournalFailed
        return kind(f"cannot read {self.path}: {error}", hint=DAMAGE_HINT)

    def _write_error(self, error: apsw.Error) -> JournalError:
        if isinstance(error, apsw.IOError) and self._db.system_errno == errno.EFBIG:
            return JournalFull(
                f"{self.path} has reached the limit of file sizes (ulimit -f)",
                hint="raise it and restart the bus; events wait meanwhile",
            )
        if isinstance(error, apsw.FullError):
            return JournalFull(
                f"no space left for {self.path}", hint="free some; events wait meanwhile"
            )
        if is_damage(error):
            return JournalDamaged(f"{self.path} is damaged: {error}", hint=DAMAGE_HINT)
        return JournalFailed(
            f"cannot write {self.path}: {error}", hint="check the disk and its rights"
        )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
