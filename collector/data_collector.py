"""The collector as a service and as a reader's tool."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from collector.reader import Reader
from collector.store import Store
from event_bus import protocol
from event_bus.errors import (
    BusRefused,
    BusUnavailable,
    DatabaseError,
    DatabaseUnavailable,
    StartError,
    TrimmedRange,
)
from event_bus.event_schema import Registry
from event_bus.lock import FileLock
from event_bus.protocol import Client
from event_bus.settings import Settings
from event_bus.subscriber import PATIENCE_S, POLL_MS, Batch, Cursor

log = logging.getLogger(__name__)

CONSUMER = "data_collector"
"""When an answer is later than this, the bus is away and is asked again on a new connection."""

RETRY_S = 1.0
ALARM_S = 30.0

_Result = TypeVar("_Result")


class DataCollector:
    """Reads the events database; `run` makes it the process that fills it.

    `db_path` is the database (default BITTEN_DB, then `$BITTEN_HOME/bitten_events.db`).
    """

    def __init__(
        self, db_path: str | Path | None = None, *, settings: Settings | None = None
    ) -> None:
        self._settings = settings or Settings.load(db=db_path)
        self._stop = threading.Event()
        self._wake: socket.socket | None = None
        self._said: set[str] = set()
        self.stored = 0
        """Events stored by `run` of this object."""

    def get_stats(self) -> dict[str, Any]:
        """Counts over the database's life, and its sizes in bytes.

        `events_stored` are in the database; `events_received` are those and the ones that came
        once more and were left out. `events_rejected` are the bus's refusals among them, `by_type`
        has the stored ones of each type. `gaps` lists the ranges (`first_seq`, `last_seq`,
        `found_at`) that the journal no longer had when the collector asked for them. Raises
        DatabaseError if there is no database yet.
        """
        with Reader(self._settings.db) as reader:
            return reader.stats()

    def query_events(
        self,
        event_type: str | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        source: str | None = None,
        user_id: str | None = None,
        correlation_id: str | None = None,
        symbol: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """The newest `limit` events that match everything given, newest first.

        Times are Unix seconds of when an event happened, `start_time` included and `end_time` not.
        An event is a dictionary of its envelope, `data` a dictionary within. Raises DatabaseError
        if there is no database yet.
        """
        with Reader(self._settings.db) as reader:
            return reader.query(
                event_type=event_type,
                start_time=start_time,
                end_time=end_time,
                source=source,
                user_id=user_id,
                correlation_id=correlation_id,
                symbol=symbol,
                limit=limit,
            )

    def stop(self) -> None:
        """Make `run` return once what it has fetched is stored, or at once if that has to wait."""
        self._stop.set()
        if self._wake is not None:
            with contextlib.suppress(OSError):  # full or closed: it is awake
                self._wake.send(b"\0")

    def run(self, *, on_ready: Callable[[], None] = lambda: None) -> None:
        """Store events until `stop`, or SIGINT or SIGTERM in the main thread.

        `on_ready` is called once the database is open. Raises StartError if another collector
        fills this database, DatabaseError if it cannot be used.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: self.stop())
            # Events hold no cycles; looking for some cost a third of decoding (`scripts/bench`).
            gc.freeze()
            gc.set_threshold(100_000)
        settings = self._settings
        settings.make_home()
        if not settings.db.parent.is_dir():
            raise StartError(
                f"there is no directory {settings.db.parent} for the database",
                hint="create it, or set BITTEN_DB to a file elsewhere",
            )
        with contextlib.ExitStack() as closing:
            lock = FileLock(Path(f"{settings.db}.lock"), "a collector")
            closing.callback(lock.close)
            wake, self._wake = socket.socketpair()
            self._wake.setblocking(False)
            closing.enter_context(wake)
            closing.enter_context(self._wake)
            registry = Registry(settings.schemas)
            self._verify(registry)
            store = self._persist(partial(Store, settings.db, registry))
            if store is None:
                return
            closing.callback(store.close)
            client = Client(settings.ingress_url, interrupt_fd=wake.fileno())
            closing.callback(client.close)
            on_ready()
            self._collect(client, store, registry)

    def _collect(self, client: Client, store: Store, registry: Registry) -> None:
        if not self._meet_bus(client):
            return
        cursor = Cursor(next_seq=store.last_seq + 1, consumer=CONSUMER, wait_ms=POLL_MS)
        request = client.send(protocol.FETCH, cursor.request())
        alarm_at = 0.0
        while not self._stop.is_set():
            store.check_file()
            batches: list[Batch] = []
            try:
                batches = self._receive(client, request, cursor, store)
            except InterruptedError:
                return
            except (BusUnavailable, BusRefused) as e:
                if time.monotonic() >= alarm_at:
                    log.warning("%s", e)
                    alarm_at = time.monotonic() + ALARM_S
                if isinstance(e, BusRefused):
                    self._stop.wait(RETRY_S)
            else:
                if alarm_at:
                    log.info("the event bus answers again")
                alarm_at = 0.0
            # Asked for before this batch is stored: the broker reads while we write.
            request = client.send(protocol.FETCH, cursor.request())
            if batches:
                if registry.refresh():
                    self._verify(registry)
                    self._persist(partial(store.learn, registry))
                stored = self._persist(partial(store.write, batches, cursor.journal_id))
                if stored is None:
                    return
                self.stored += stored

    def _meet_bus(self, client: Client) -> bool:
        """Wait for the bus; False if stopped first. Raises StartError if it is another home's."""
        alarm_at = 0.0
        while not self._stop.is_set():
            try:
                home = Path(client.status(PATIENCE_S)["home"])
            except InterruptedError:
                break
            except BusUnavailable as e:
                if time.monotonic() >= alarm_at:
                    log.warning("%s", e)
                    alarm_at = time.monotonic() + ALARM_S
                continue
            if home.resolve() != self._settings.home.resolve():
                raise StartError(
                    f"the bus at {self._settings.ingress_url} keeps its files in {home}, this"
                    f" collector in {self._settings.home}",
                    hint="set BITTEN_HOME to the bus's, or BITTEN_INGRESS_URL and"
                    " BITTEN_EVENTS_URL to ports of this home's own bus",
                )
            if alarm_at:
                log.info("the event bus answers again")
            return True
        return False

    def _receive(self, client: Client, request: bytes, cursor: Cursor, store: Store) -> list[Batch]:
        """The next batches. Raises DatabaseError if they do not belong into this database."""
        try:
            return cursor.take(client.receive(request, PATIENCE_S))
        except BusRefused as e:
            if not isinstance(e, TrimmedRange) and e.code != "ahead":
                raise
            journal_id = client.status(PATIENCE_S)["journal_id"]
            store.check_journal(journal_id)
            if not isinstance(e, TrimmedRange):
                raise DatabaseError(
                    f"{store.path} has events up to seq {store.last_seq}, but {e}",
                    hint="restore the newer journal.db, or move the database aside to begin a new"
                    " one",
                ) from e
            self._skip(e, cursor, store, journal_id)
            return []

    def _skip(self, gone: TrimmedRange, cursor: Cursor, store: Store, journal_id: str) -> None:
        """Go on at the first event that there is, and keep account of those that there are not."""
        first, last = store.last_seq + 1, gone.first_seq - 1
        if self._persist(partial(store.record_gap, first, last, journal_id)):
            cursor.next_seq = gone.first_seq
            log.error("events %d to %d can no longer be stored: %s", first, last, gone)

    def _persist(self, action: Callable[[], _Result]) -> _Result | None:
        """Try until it succeeds: an analyst's lock or a full disk passes. None after `stop`."""
        since = time.monotonic()
        alarm_at = since
        while True:
            try:
                result = action()
            except DatabaseUnavailable as e:
                now = time.monotonic()
                if now >= alarm_at:
                    log.warning("%s (for %.0f s now)", e, now - since)
                    alarm_at = now + ALARM_S
                if self._stop.wait(RETRY_S):
                    return None
            else:
                if alarm_at > since:
                    log.info("the database can be written again")
                return result

    def _verify(self, registry: Registry) -> None:
        """Leave out own types that cannot be used, and say once which."""
        registry.verify()
        for problem in map(str, registry.problems):
            if problem not in self._said:
                self._said.add(problem)
                log.error("event type left out: %s", problem)
