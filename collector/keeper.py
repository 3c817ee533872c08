"""Keeps the database there to be written: waits for what passes, puts right what does not."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from collector import wal
from collector.aside import CORRUPT, REPLACED, AsideReader, move_aside, name_aside
from collector.inspection import Inspection
from collector.reports import Reports
from collector.store import Store
from event_bus.errors import (
    DatabaseCorrupt,
    DatabaseError,
    DatabaseReplaced,
    DatabaseUnavailable,
)
from event_bus.event_schema import Registry
from event_bus.lock import FileLock
from event_bus.watchdog import Watchdog

log = logging.getLogger(__name__)

RETRY_S = 1.0
REPORT_AFTER_S = 5.0
"""What keeps the database from being written for this long is told the bus."""

ALARM_S = 30.0
LOOK_S = 1.0
WAL_S = 5.0

NOTHING_LOST = "nothing is lost: what it held is there again"

_Result = TypeVar("_Result")


class Stopped(Exception):
    """The collector was told to stop while it waited."""


class Renewed(Exception):
    """The database is another file now: go on after what that one holds."""


_AUDIT = "`bitten audit` says whether anything is lost"


class Keeper:
    """Owns the store. `problem` is what keeps the collector from storing more, or what was wrong
    lately; empty if nothing is. The watchdog hears of every turn and every wait; it expects nothing
    of a call into SQLite, which takes as long as the disk does (an index over all rows, the copy of
    a long log), and begins from the front if it is killed.
    """

    def __init__(
        self,
        path: Path,
        registry: Registry,
        lock: FileLock,
        *,
        stop: threading.Event,
        watchdog: Watchdog,
        reports: Reports,
    ) -> None:
        self._path = path
        self._registry = registry
        self._lock = lock
        self._stop = stop
        self._watchdog = watchdog
        self._reports = reports
        self._store: Store | None = None
        self._inspection: Inspection | None = None
        self._waits_for = ""
        self._wal_problem = ""
        self._news = ""
        self._news_until = 0.0
        self._look_due = self._wal_due = 0.0

    @property
    def store(self) -> Store:
        assert self._store is not None, "open was not called"
        return self._store

    @property
    def stored_seq(self) -> int | None:
        """Everything before is stored for good; None while no database is open."""
        return None if self._store is None else self._store.synced_seq + 1

    @property
    def problem(self) -> str:
        return self._waits_for or self._news or self._wal_problem

    def open(self) -> None:
        """Open the database, a new one if it is damaged. Raises Stopped, DatabaseError."""
        if not self._is_there():
            moved = self._move_aside(CORRUPT)
            if moved is not None:
                self._tell(f"{self._path} is empty or missing; what was beside it is {moved}*")
        try:
            self._retry(self._open)
        except DatabaseCorrupt as e:
            self._begin_anew(e)

    def do(self, action: Callable[[Store], _Result]) -> _Result:
        """What `action` returns, after as many tries as it takes.

        Raises Renewed if the database had to be replaced instead, Stopped, or DatabaseError where
        the database is not the collector's to replace.
        """
        try:
            return self._retry(lambda: action(self.store))
        except DatabaseCorrupt as e:
            self._begin_anew(e)
        except DatabaseReplaced as e:
            self._put_back(e)
        raise Renewed

    def look(self, lag: int) -> None:
        """What is due to be looked at, with `lag` events not stored yet. Raises like `do`."""
        self._watchdog.alive()
        now = time.monotonic()
        if now < self._look_due:
            return
        self._look_due = now + LOOK_S
        self.do(self._look_at_files)
        self._lock.keep()
        if self._news and not lag and now >= self._news_until:
            log.info("the database has all that the journal has again; %s", _AUDIT)
            self._news = ""
        if now >= self._wal_due:
            self._wal_due = now + WAL_S
            self._look_at_wal()

    def alive(self) -> None:
        """Say that the collector is at work, though nothing may come of it."""
        self._watchdog.alive()
        self._reports.send(self.stored_seq, self.problem)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """For reading a database that is not the store's; not around calls of this object."""
        return self._watchdog.paused()

    def close(self) -> None:
        if self._inspection is not None:  # the last connection to close removes the log
            self._inspection.close()
            self._inspection = None
        # A long log would take longer to copy than a stop may; the next start goes on with it.
        if self._store is not None and wal.wal_bytes(self._path) <= wal.MAX_WAL_BYTES:
            with self.paused():
                self._store.close()
            self._store = None
        self._let_go()

    def _open(self) -> None:
        self._store = Store(self._path, self._registry)
        self._inspection = Inspection(self._path)

    def _is_there(self) -> bool:
        try:
            return self._path.stat().st_size > 0
        except FileNotFoundError:
            return False
        except OSError:
            return True  # and opening it says what is wrong

    def _retry(self, action: Callable[[], _Result]) -> _Result:
        """Try until it succeeds: an analyst's lock or a full disk passes."""
        since = time.monotonic()
        said_at = None
        try:
            while True:
                try:
                    with self.paused():
                        result = action()
                except DatabaseUnavailable as e:
                    message = self._with_holder(e)
                    now = time.monotonic()
                    if said_at is None:
                        log.warning("%s", message)
                        said_at = now
                    elif now >= said_at + ALARM_S:
                        log.error("%s (for %.0f s now)", message, now - since)
                        said_at = now
                    if now >= since + REPORT_AFTER_S:
                        self._waits_for = message
                    self.alive()
                    if self._stop.wait(RETRY_S):
                        raise Stopped from e
                else:
                    if said_at is not None:
                        log.info("the database can be written again")
                    return result
        finally:
            self._waits_for = ""

    def _with_holder(self, error: DatabaseUnavailable) -> str:
        holders = wal.holders(self._path, wal.WRITE_LOCK)
        return f"{error} ({', '.join(holders)} holds its lock)" if holders else str(error)

    def _look_at_files(self, store: Store) -> None:
        store.check_file()
        if self._inspection is not None and self._inspection.damage:
            raise DatabaseCorrupt(
                f"{self._path} is damaged (SQLite says: {self._inspection.damage})"
            )

    def _look_at_wal(self) -> None:
        size = wal.wal_bytes(self._path)
        # The first commit after the query may have cut the file itself, but only to the limit.
        is_small = size <= wal.MAX_WAL_BYTES and not self._wal_problem
        if is_small or self.do(Store.shrink_wal):
            if self._wal_problem:
                log.info("the -wal file is small again")
            self._wal_problem = ""
            return
        readers = ", ".join(wal.holders(self._path, wal.READ_LOCKS)) or "a process not seen here"
        problem = f"{self._path}-wal has {size >> 20} MB and grows: a query of {readers} does not"
        problem += " end; end it"
        if not self._wal_problem:
            log.error("%s", problem)
        self._wal_problem = problem

    def _begin_anew(self, error: DatabaseError) -> None:
        """The database is damaged: put it aside and make a new one."""
        self._let_go()
        moved = self._move_aside(CORRUPT)
        self._tell(  # without the error's hint: that is done now
            f"{error.args[0]}; it was put aside as {moved}, and a new one is filled from the"
            f" journal; {_AUDIT}; if so, a backup may have it: `bitten restore --only database`"
        )
        self._retry(self._open)

    def _put_back(self, error: DatabaseReplaced) -> None:
        """Write out what is still open, and put it where nothing else was put."""
        store = self.store
        ours = store.is_at_path()
        spare: Path | None = Path(f"{self._path}.part")
        if not ours:
            # SQLite would read what is left of our -wal as part of the file that is there now.
            for left in store.left_behind():
                with contextlib.suppress(FileNotFoundError):
                    left.rename(f"{name_aside(self._path, REPLACED, time.time())}{left.name[-4:]}")
        if not ours and self._is_there() and self._is_complete_without(store):
            spare = None
        else:
            log.error("%s; writing out what it held", error)
            try:
                self._retry(self._copy)
            except DatabaseCorrupt as e:
                log.error("%s: the journal gives what it still has", e)
                spare = None
        self._let_go()
        if spare is None:
            self._tell(f"{error}; going on with what is there now; {_AUDIT}")
        elif ours or not self._is_there():
            # What is left of it beside the file would not fit the copy.
            self._move_aside(REPLACED)
            spare.replace(self._path)
            self._tell(f"{error}; {NOTHING_LOST}; find out what removes files there")
        else:
            kept = name_aside(self._path, REPLACED, time.time())
            spare.replace(kept)
            self._tell(
                f"{error}; going on with what is there now; what it held is kept as {kept}, and"
                f" fetched from there if the journal no longer has it; {_AUDIT}"
            )
        self.open()

    def _copy(self) -> None:
        directory = self._path.parent
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # it went with the rest
        except OSError as e:
            raise DatabaseUnavailable(f"cannot create {directory}: {e.strerror}") from e
        self.store.copy_to(Path(f"{self._path}.part"), self.alive)

    def _is_complete_without(self, store: Store) -> bool:
        """True if the file that is at the path now has all that the open one has.

        One that is damaged is put aside.
        """
        try:
            with self.paused():
                there = AsideReader(self._path)
        except DatabaseCorrupt:
            self._move_aside(CORRUPT)
            return False
        except DatabaseError:
            return False
        try:
            return there.journal_id == store.journal_id and there.last_seq >= store.last_seq
        finally:
            there.close()

    def _let_go(self) -> None:
        """Close the store and leave its files as they are."""
        if self._inspection is not None:
            self._inspection.close()
            self._inspection = None
        if self._store is not None:
            with self.paused():
                self._store.abandon()
            self._store = None

    def _move_aside(self, kind: str) -> Path | None:
        return move_aside(self._path, kind, time.time())

    def _tell(self, news: str) -> None:
        log.error("%s", news)
        self._news = news
        self._news_until = time.monotonic() + ALARM_S
