"""The collector as a service and as a reader's tool."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collector.reader import Reader
from collector.store import Store
from event_bus import protocol
from event_bus.errors import BusRefused, BusUnavailable, DatabaseError
from event_bus.event_schema import Registry
from event_bus.lock import FileLock
from event_bus.protocol import Client
from event_bus.settings import Settings
from event_bus.subscriber import PATIENCE_S, Batch, Cursor

log = logging.getLogger(__name__)

CONSUMER = "data_collector"
RETRY_S = 1.0
ALARM_S = 30.0


class DataCollector:
    """Reads the events database; `run` makes it the process that fills it.

    `db_path` is the database (default BITTEN_DB, then `$BITTEN_HOME/bitten_events.db`).
    """

    def __init__(self, db_path: str | Path | None = None, *, settings: Settings | None = None) -> None:
        self._settings = settings or Settings.load(db=db_path)
        self._stop = threading.Event()
        self._wake_receive, self._wake_send = socket.socketpair()
        self._wake_send.setblocking(False)
        self.stored = 0

    def get_stats(self) -> dict[str, Any]:
        """Counts over the database's life: `events_received`, `events_stored`,
        `events_rejected`, `last_seq`, `by_type`, and the sizes in bytes of database and WAL.

        Raises DatabaseError if there is no database yet.
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
        """Make `run` return once what it has fetched is stored."""
        self._stop.set()
        with contextlib.suppress(BlockingIOError):
            self._wake_send.send(b"\0")

    def run(self, *, on_ready: Callable[[], None] = lambda: None) -> None:
        """Store events until `stop`, or SIGINT or SIGTERM in the main thread.

        `on_ready` is called once the database is open. Raises StartError if another collector
        fills this database, DatabaseError if it cannot be used.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: self.stop())
        settings = self._settings
        settings.make_home()
        lock = FileLock(Path(f"{settings.db}.lock"), "a collector")
        registry = Registry(settings.schemas)
        registry.verify()
        store = Store(settings.db, registry)
        client = Client(settings.ingress_url, interrupt_fd=self._wake_receive.fileno())
        try:
            on_ready()
            self._collect(client, store, registry)
        finally:
            client.close()
            store.close()
            lock.close()

    def _collect(self, client: Client, store: Store, registry: Registry) -> None:
        cursor = Cursor(next_seq=store.last_seq + 1, consumer=CONSUMER, wait_ms=1_000)
        request = client.send(protocol.FETCH, cursor.request())
        away = False
        while not self._stop.is_set():
            try:
                frames = client.receive(request, PATIENCE_S)
                batches = cursor.take(frames)
            except InterruptedError:
                return
            except (BusUnavailable, BusRefused) as e:
                if not away:
                    log.warning("%s", e)
                away = True
                self._stop.wait(0 if isinstance(e, BusUnavailable) else RETRY_S)
                batches = []
            else:
                if away:
                    log.info("the event bus answers again")
                away = False
            # Asked for before this batch is stored: the broker reads while we write. The
            # cursor that the broker keeps for us lags one answer behind what is stored.
            request = client.send(protocol.FETCH, cursor.request())
            if batches:
                if registry.refresh():
                    registry.verify()
                    store.learn(registry)
                self._store(store, batches, cursor.journal_id)

    def _store(self, store: Store, batches: list[Batch], journal_id: str) -> None:
        """Write until it succeeds: an analyst's lock or a full disk passes."""
        since = alarm_at = time.monotonic()
        while True:
            try:
                self.stored += store.write(batches, journal_id)
                return
            except DatabaseError as e:
                if store.journal_id not in (None, journal_id):
                    raise
                now = time.monotonic()
                if now >= alarm_at:
                    log.warning("%s (for %.0f s now)", e, now - since)
                    alarm_at = now + ALARM_S
                if self._stop.wait(RETRY_S):
                    return
