"""The loop that fetches from the bus and stores, batch by batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from collector import aside, layout
from collector.backup_schedule import BackupSchedule
from collector.keeper import ALARM_S, RETRY_S, Keeper, Renewed, Stopped
from collector.store import Store
from event_bus import protocol
from event_bus.errors import (
    BusRefused,
    BusUnavailable,
    DatabaseError,
    StartError,
    TrimmedRange,
)
from event_bus.event_schema import Registry
from event_bus.protocol import Client
from event_bus.settings import Settings
from event_bus.subscriber import PATIENCE_S, POLL_MS, Batch, Cursor

log = logging.getLogger(__name__)

CONSUMER = "data_collector"
FEW_EVENTS = 200
"""With fewer at once, a transaction costs more than its events."""

GATHER_S = 0.01
"""After a few events, before more are asked for, so that those are stored together."""

SYNC_S = 0.25
"""The bus cuts its journal behind what is synced, and counts it as stored."""


class Consumer:
    """Goes on where the database ends, for as long as nobody stops it.

    What the journal does not have any more is taken from databases that were put aside, and
    recorded as a gap where they do not have it either. `on_stored` is told of every new event.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        client: Client,
        keeper: Keeper,
        registry: Registry,
        backups: BackupSchedule,
        stop: threading.Event,
        on_stored: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._client = client
        self._keeper = keeper
        self._registry = registry
        self._backups = backups
        self._stop = stop
        self._on_stored = on_stored
        self._journal_id: str | None = None
        self._alarm_at = 0.0
        self._said: set[str] = set()

    def run(self) -> None:
        """Until the stop is set or the client interrupted.

        Raises StartError if the bus is another home's, DatabaseError if it fills another database.
        """
        try:
            self._meet_bus()
            while not self._stop.is_set():
                try:
                    self._fill()
                except Renewed:
                    self._journal_id = None
                except (BusUnavailable, BusRefused) as e:
                    self._bus_fails(e)
        except (Stopped, InterruptedError):
            pass

    def verify(self) -> None:
        """Leave out own types that cannot be used, and say once which."""
        self._registry.verify()
        for problem in map(str, self._registry.problems):
            if problem not in self._said:
                self._said.add(problem)
                log.error("event type left out: %s", problem)

    def _meet_bus(self) -> None:
        """Wait for the bus."""
        while not self._stop.is_set():
            self._keeper.alive()
            try:
                home = Path(self._status()["home"])
            except (BusUnavailable, BusRefused) as e:
                self._bus_fails(e)
                continue
            if home.resolve() != self._settings.home.resolve():
                raise StartError(
                    f"the bus at {self._settings.ingress_url} keeps its files in {home}, this"
                    f" collector in {self._settings.home}",
                    hint="set BITTEN_HOME to the bus's, or BITTEN_INGRESS_URL and"
                    " BITTEN_EVENTS_URL to ports of this home's own bus",
                )
            self._bus_answers()
            return

    def _fill(self) -> None:
        """Fetch and store from the end of the database on, until the stop is set.

        Raises what the bus and the keeper raise; then it is to be called again.
        """
        keeper = self._keeper
        last_seq = keeper.do(lambda store: store.last_seq)
        self._check_continues(last_seq)
        cursor = Cursor(next_seq=last_seq + 1, consumer=CONSUMER, wait_ms=POLL_MS)
        request = self._ask(cursor)
        sync_due = 0.0
        while not self._stop.is_set():
            self._backups.turn(time.monotonic())
            keeper.look(max(0, cursor.last_seq - last_seq))
            batches = self._receive(request, cursor)
            if not batches or time.monotonic() >= sync_due:
                keeper.do(Store.sync)
                sync_due = time.monotonic() + SYNC_S
            cursor.wait_ms = int(SYNC_S * 1000) if batches else POLL_MS
            few = 0 < sum(len(b.events) for b in batches) < FEW_EVENTS
            if not few:
                # Asked for before this batch is stored: the broker reads while we write.
                request = self._ask(cursor)
            if batches:
                if self._registry.refresh():
                    self.verify()
                    keeper.do(lambda store: store.learn(self._registry))
                self._on_stored(keeper.do(partial(_write, batches, cursor.journal_id)))
                last_seq = batches[-1].first_seq + len(batches[-1].events) - 1
                if few:
                    self._stop.wait(GATHER_S)
                    request = self._ask(cursor)

    def _check_continues(self, last_seq: int) -> None:
        """Raise DatabaseError unless the journal has the last stored event under the same seq.

        An older copy of the journal that was put back has the same identity, and after some time
        it is as long again, with other events.
        """
        stored_id = self._keeper.do(lambda store: store.event_id(last_seq))
        if stored_id is None:  # nothing is stored, or it ends with a gap
            return
        cursor = Cursor(next_seq=last_seq, wait_ms=0)
        try:
            batches = self._take(self._client.send(protocol.FETCH, cursor.request()), cursor)
        except TrimmedRange:
            return
        is_own = cursor.journal_id == self._keeper.do(lambda store: store.journal_id)
        if not (is_own and batches):
            return
        found_id = batches[0].events[0].event_id
        if found_id != stored_id:
            raise DatabaseError(
                f"{self._keeper.store.path} has event {stored_id} at seq {last_seq}, and the"
                f" journal {found_id}: an older copy of the journal was put back, and went on",
                hint=f"restore the newer journal.db, or {layout.aside(self._settings.db)} to begin"
                " a new database of what the journal has",
            )

    def _ask(self, cursor: Cursor) -> bytes:
        cursor.stored_seq = self._keeper.stored_seq
        cursor.problem = self._keeper.problem or self._backups.problem
        return self._client.send(protocol.FETCH, cursor.request())

    def _receive(self, request: bytes, cursor: Cursor) -> list[Batch]:
        try:
            batches = self._take(request, cursor)
        except TrimmedRange as e:
            self._fill_in(e, cursor)
            return []
        self._bus_answers()
        if cursor.journal_id != self._journal_id:
            self._accept(cursor.journal_id)
        return batches

    def _take(self, request: bytes, cursor: Cursor) -> list[Batch]:
        """Raises DatabaseError if what is stored goes beyond the end of the journal."""
        try:
            return cursor.take(self._client.receive(request, PATIENCE_S))
        except BusRefused as e:
            if e.code == "ahead":
                self._refuse(e)
            raise

    def _accept(self, journal_id: str) -> None:
        """Take the journal for the one that fills this database, or for its successor."""
        before = self._keeper.do(lambda store: store.journal_id)
        if before not in (None, journal_id):
            status = self._status()
            origin_seq = status["origin_seq"] if status["journal_id"] == journal_id else 0
            self._keeper.do(lambda store: store.follow(journal_id, origin_seq))
            log.error("journal %s was lost; journal %s goes on after it", before, journal_id)
        self._journal_id = journal_id

    def _refuse(self, error: BusRefused) -> None:
        """What is stored goes beyond the end of the journal."""
        self._accept(self._status()["journal_id"])
        store = self._keeper.store
        raise DatabaseError(
            f"{store.path} has events up to seq {store.last_seq}, but {error}",
            hint="restore the newer journal.db, or move the database aside to begin a new one",
        ) from error

    def _fill_in(self, gone: TrimmedRange, cursor: Cursor) -> None:
        """Go on at the first event that the journal has, and account for those before it."""
        status = self._status()
        journal_id = status["journal_id"]
        self._accept(journal_id)
        keeper = self._keeper
        first, last = keeper.do(lambda store: store.last_seq) + 1, gone.first_seq - 1
        found = 0
        pieces = aside.read_all(
            self._settings.db,
            first,
            last,
            journal_id=journal_id,
            origin_seq=status["origin_seq"],
        )
        while True:
            keeper.alive()
            with keeper.paused():
                piece = next(pieces, None)
            if piece is None:
                break
            if self._stop.is_set():
                raise Stopped
            for batch in aside.batches(piece):
                self._record_gap(batch.first_seq - 1, journal_id, str(gone))
                found += keeper.do(partial(_write, [batch], journal_id))
        self._record_gap(last, journal_id, str(gone))
        if found:
            log.warning("%d events were taken from a database that was put aside", found)
            self._on_stored(found)
        cursor.next_seq = gone.first_seq

    def _record_gap(self, last_seq: int, journal_id: str, reason: str) -> None:
        """Note that what is not stored up to `last_seq` cannot be."""
        first_seq = self._keeper.do(lambda store: store.last_seq) + 1
        if first_seq <= last_seq:
            self._keeper.do(lambda s: s.record_gap(first_seq, last_seq, journal_id, reason))
            log.error("events %d to %d can no longer be stored: %s", first_seq, last_seq, reason)

    def _status(self) -> dict[str, Any]:
        return self._client.status(PATIENCE_S)

    def _bus_fails(self, error: BusUnavailable | BusRefused) -> None:
        if time.monotonic() >= self._alarm_at:
            log.warning("%s", error)
            self._alarm_at = time.monotonic() + ALARM_S
        if isinstance(error, BusRefused):
            self._stop.wait(RETRY_S)

    def _bus_answers(self) -> None:
        if self._alarm_at:
            log.info("the event bus answers again")
        self._alarm_at = 0.0


def _write(batches: list[Batch], journal_id: str, store: Store) -> int:
    return store.write(batches, journal_id)
