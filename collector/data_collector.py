"""The collector as a service and as a reader's tool."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collector.backup_schedule import BackupSchedule
from collector.consumer import CONSUMER, Consumer
from collector.keeper import Keeper, Stopped
from collector.reader import Reader
from collector.reports import Reports
from event_bus.errors import StartError
from event_bus.event_schema import Registry
from event_bus.lock import FileLock
from event_bus.memory import collect_rarely
from event_bus.protocol import Client
from event_bus.settings import Settings
from event_bus.watchdog import Watchdog


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
        An event is a dictionary of its envelope, `data` a dictionary within. Raises ValueError for
        an argument of the wrong type, DatabaseError if there is no database yet.
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
            collect_rarely()
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
            reports = Reports(settings, CONSUMER)
            closing.callback(reports.close)
            keeper = Keeper(
                settings.db,
                registry,
                lock,
                stop=self._stop,
                watchdog=closing.enter_context(Watchdog("the collector")),
                reports=reports,
            )
            closing.callback(keeper.close)
            client = Client(settings, interrupt_fd=wake.fileno())
            closing.callback(client.close)
            backups = BackupSchedule(settings)
            closing.callback(backups.close)
            consumer = Consumer(
                settings,
                client=client,
                keeper=keeper,
                registry=registry,
                backups=backups,
                stop=self._stop,
                on_stored=self._count,
            )
            consumer.verify()
            try:
                keeper.open()
            except Stopped:
                return
            on_ready()
            consumer.run()

    def _count(self, stored: int) -> None:
        self.stored += stored
