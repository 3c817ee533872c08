"""Intake: decides what becomes of received batches, and hands the journal whole groups.

No sockets here. `take` validates a batch and recognises events seen before; `commit` writes all
that was taken since the last commit as one journal batch and returns it for publishing. An
event is acknowledged only after the commit that holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from event_bus import envelope
from event_bus.envelope import NATIVE_ID, NATIVE_LINE, Envelope
from event_bus.errors import JournalDamaged, JournalError, RejectedEvent
from event_bus.event_schema import JOURNAL_LOSS, REJECTION, EventType, Registry
from event_bus.journal import Journal
from event_bus.journal_format import Producer, Run
from event_bus.rejection import RawAllowance, rejection

if TYPE_CHECKING:
    from event_bus.allow_list import Rights

SOURCE = "event_bus"
TURN_S = 10.0
MAX_BATCH_LINES = 20_000
MAX_REPORT_BYTES = 4_096


class Refusal(msgspec.Struct, frozen=True):
    """Why line `line` (from 0) of a published batch was not accepted."""

    line: int
    reason: str


class Receipt(msgspec.Struct):
    """What became of one published batch; every line is in exactly one of the counts."""

    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    conflicts: int = 0
    refusals: list[Refusal] = []


class Committed(msgspec.Struct, frozen=True):
    """One commit: the first event's seq, the time, and the canonical batches in order."""

    first_seq: int
    received_at: float
    bodies: list[bytes]
    count: int


class Intake:
    """`clock` gives Unix seconds. Counts are those since this start."""

    def __init__(
        self, journal: Journal, registry: Registry, clock: Callable[[], float] = time.time
    ) -> None:
        self.journal = journal
        self.registry = registry
        self.totals = Receipt()
        self._clock = clock
        self._token = envelope.new_producer()
        self._n = 0
        self._checks: dict[str, Callable[[Any], bool]] = {}
        self._safe_totals = Receipt()
        self._allowance = RawAllowance()
        self._learn()
        # A producer's token to the first n that was refused, and how long it has its turn.
        self._refused: dict[str, tuple[int, float]] = {}
        self._clear()
        self.committed: list[Committed] = []

    @property
    def pending_bytes(self) -> int:
        return self._bytes

    def take(
        self,
        batch: bytes,
        report: str | None = None,
        rights: Rights | None = None,
    ) -> Receipt:
        """Take in one batch of newline-delimited JSON. It is on disk only after `commit`.

        `report` is the producer's account of itself, kept with the journal's. `rights` are those
        of its key (default: to publish all). Raises JournalError when the journal cannot be read.
        """
        receipt = Receipt()
        if report is not None and len(report) > MAX_REPORT_BYTES:
            report = None
        events = envelope.decode_canonical(batch)
        if events and rights and not all(rights.may_publish(e.event_type) for e in events):
            events = None
        if events and len(events) <= MAX_BATCH_LINES and self._take_whole(batch, events, report):
            receipt.accepted = len(events)
        elif batch.count(b"\n") > MAX_BATCH_LINES:
            self._refuse_whole(batch, receipt)
        else:
            self._take_lines(batch, report, receipt, rights)
        self.totals.accepted += receipt.accepted
        self.totals.duplicates += receipt.duplicates
        self.totals.rejected += receipt.rejected
        self.totals.conflicts += receipt.conflicts
        return receipt

    def out_of_turn(self, batch: bytes) -> str | None:
        """Why a batch must wait: it was on its way when an older one of its producer was refused.

        Both are sent again; taken in now, the newer would pass the older. An older one that does
        not come within TURN_S is not waited for.
        """
        match = NATIVE_LINE.match(batch) if self._refused else None
        if match is None:
            return None
        token, first = match[1].decode(), int(match[2])
        refused, until = self._refused.get(token, (first, 0.0))
        if first > refused and time.monotonic() < until:
            return f"events of {token} from {refused} on have to come first"
        self._refused.pop(token, None)
        return None

    def emit(self, event_type: str, data: dict[str, Any]) -> None:
        """Take in an event of the bus itself."""
        self._n += 1
        event = Envelope(
            event_id=f"{self._token}-{self._n}",
            event_type=event_type,
            timestamp=self._clock(),
            source=SOURCE,
            data=data,
        )
        self.registry.get(event_type).check(data)
        self._runs.append((self._producer(self._token, self._n), self._n, self._n, self._count))
        self._add(envelope.encode(event) + b"\n", 1)

    def commit(self) -> None:
        """Write what is pending as one journal batch; it is then the last of `committed`.

        Raises JournalError; what was pending is then forgotten, as nobody was told it is safe.
        """
        if self._count:
            received_at = self._clock()
            bodies, count = self._bodies, self._count
            try:
                first_seq = self.journal.append(
                    bodies, count, received_at, runs=self._runs, opaque_ids=self._opaque
                )
            except JournalError:
                self.forget()
                raise
            self._clear()
            self.committed.append(Committed(first_seq, received_at, bodies, count))
        self._safe_totals = msgspec.structs.replace(self.totals)

    def forget(self) -> None:
        """Drop what is pending, and know of producers and counts what the last commit left."""
        until = time.monotonic() + TURN_S
        for producer, first, _, _ in self._runs:
            earlier, _ = self._refused.get(producer.token, (first, until))
            self._refused[producer.token] = min(earlier, first), until
        self._clear()
        self.journal.reload_producers()
        self.totals = msgspec.structs.replace(self._safe_totals)

    def _clear(self) -> None:
        self._bodies: list[bytes] = []
        self._count = 0
        self._bytes = 0
        self._runs: list[Run] = []
        self._opaque: list[tuple[str, int]] = []
        # Where a resent event may lie that is not in the journal yet: lines taken one by one, by
        # id, and batches taken whole, as (producer, first n, last n, batch).
        self._lines: dict[str, bytes] = {}
        self._whole: list[tuple[Producer, int, int, bytes]] = []
        self._split: tuple[bytes, list[bytes]] = (b"", [])

    def _add(self, body: bytes, count: int) -> None:
        self._bodies.append(body)
        self._count += count
        self._bytes += len(body)

    def _learn(self) -> None:
        known = {t.name: t.is_valid for t in self.registry if not _is_own(t)}
        known.pop(REJECTION, None)  # looked at one by one: a client's may not be the bus's
        self._checks.update(known)

    def _producer(self, token: str, last_n: int) -> Producer:
        producer = self.journal.producer(token)
        producer.last_n = last_n
        return producer

    def _take_whole(self, batch: bytes, events: list[Envelope], report: str | None) -> bool:
        """The hot path: a batch that is valid throughout and continues one producer's ids."""
        checks = self._checks
        try:
            for event in events:
                if not checks[event.event_type](event.data):
                    return False
        except KeyError:
            return False
        match = NATIVE_ID.fullmatch(events[0].event_id)
        if match is None:
            return False
        token, first = match[1], int(match[2])
        if token == self._token:
            return False
        last = first + len(events) - 1
        producer = self.journal.producers.get(token)
        if producer is not None and producer.last_n >= first:
            return False
        # One comparison of two lists instead of a parse an event: a third of the cost.
        if [e.event_id for e in events] != [f"{token}-{n}" for n in range(first, last + 1)]:
            return False
        producer = self._producer(token, last)
        if report is not None:
            producer.report = report
        self._runs.append((producer, first, last, self._count))
        self._whole.append((producer, first, last, batch))
        self._add(batch, len(events))
        return True

    def _take_lines(
        self,
        batch: bytes,
        report: str | None,
        receipt: Receipt,
        rights: Rights | None,
    ) -> None:
        lines = batch.split(b"\n")
        if not lines[-1]:
            lines.pop()
        reporter = None
        for index, line in enumerate(lines):
            reporter = self._take_line(line, index, receipt, rights) or reporter
        if reporter is not None and report is not None:
            reporter.report = report

    def _refuse_whole(self, batch: bytes, receipt: Receipt) -> None:
        """Kept as one: garbage in short lines would come back as gigabytes of accounts of it."""
        count = batch.count(b"\n")
        error = RejectedEvent(
            f"batch of {count} lines is over the limit of {MAX_BATCH_LINES}",
            rule="maxLines",
            value=str(count),
        )
        receipt.rejected = count + (not batch.endswith(b"\n"))
        receipt.refusals.append(Refusal(0, str(error)))
        self._reject(batch, error)

    def _take_line(
        self,
        line: bytes,
        index: int,
        receipt: Receipt,
        rights: Rights | None,
    ) -> Producer | None:
        """Take one line in, or count what is wrong with it; returns the producer of a native id."""
        event = None
        try:
            event = envelope.read(line)
            if rights is not None and not rights.may_publish(event.event_type):
                raise RejectedEvent(
                    f"the key {rights.name} may not publish {event.event_type}",
                    rule="rights",
                    path="event_type",
                    value=event.event_type,
                )
            self._check(event)
            if event.event_id.startswith(self._token):
                raise RejectedEvent(
                    "an id that begins with the bus's own token is the bus's alone",
                    rule="event_id",
                    path="event_id",
                    value=event.event_id,
                )
            canonical = envelope.encode(event)
            stored = self._stored_line(event)
            if stored is not None and stored not in (canonical, b""):
                raise RejectedEvent(
                    f"id {event.event_id} was seen before with other content", rule="conflict"
                )
        except RejectedEvent as e:
            if e.rule == "conflict":
                receipt.conflicts += 1
            else:
                receipt.rejected += 1
            receipt.refusals.append(Refusal(index, str(e)))
            self._reject(line, e, event, rights)
            return None
        native = NATIVE_ID.fullmatch(event.event_id)
        producer = self.journal.producer(native[1]) if native else None
        if stored is not None:
            receipt.duplicates += 1
            return producer
        if producer is None or native is None:
            self._opaque.append((event.event_id, self._count))
        else:
            n = int(native[2])
            producer.last_n = max(producer.last_n, n)
            self._runs.append((producer, n, n, self._count))
        self._lines[event.event_id] = canonical
        self._add(canonical + b"\n", 1)
        receipt.accepted += 1
        return producer

    def _check(self, event: Envelope) -> None:
        name = event.event_type
        if name not in self._checks and self.registry.refresh():
            self.registry.verify()
            self._learn()
        event_type = self.registry.get(name)
        if _is_own(event_type):
            raise RejectedEvent(
                f"{name} is published by the bus alone",
                rule="event_type",
                path="event_type",
                value=name,
            )
        if name == REJECTION and event.source == SOURCE:
            raise RejectedEvent(
                f"{name} of source {SOURCE} is published by the bus alone",
                rule="source",
                path="source",
                value=SOURCE,
            )
        event_type.check(event.data)

    def _stored_line(self, event: Envelope) -> bytes | None:
        """The line that was taken in under this event's id: None if there is none, empty if it
        cannot be had any more because it was trimmed or damaged."""
        pending = self._lines.get(event.event_id)
        if pending is not None:
            return pending
        forgotten_n = n = 0
        native = NATIVE_ID.fullmatch(event.event_id)
        if native is None:
            seq = self.journal.seq_of_opaque(event.event_id)
        else:
            producer = self.journal.producers.get(native[1])
            n = int(native[2])
            if producer is None or n > producer.last_n:
                return None
            for taker, first, last, batch in self._whole:
                if taker is producer and first <= n <= last:
                    return self._line_of(batch, n - first)
            seq = self.journal.seq_of_native(producer, n)
            forgotten_n = producer.forgotten_n
        if seq is not None:
            line = self.journal.line(seq) or b""
            if line and envelope.decode(line).event_id != event.event_id:
                raise JournalDamaged(
                    f"{self.journal.path}: id {event.event_id} leads to another event, at seq {seq}"
                )
            return line
        return b"" if 0 < n <= forgotten_n else None

    def _line_of(self, batch: bytes, index: int) -> bytes:
        # Kept, because events that are sent again come by the batch.
        if batch is not self._split[0]:
            self._split = batch, batch.split(b"\n")
        return self._split[1][index]

    def _reject(
        self,
        line: bytes,
        error: RejectedEvent,
        event: Envelope | None = None,
        rights: Rights | None = None,
    ) -> None:
        kept = None
        if rights is not None and error.rule == "rights":
            kept = self._allowance.spend(rights.public_key, len(line))
        named = {}
        if event is not None:
            named = {"event_type": event.event_type, "event_id": event.event_id}
            named["source"] = event.source or ""
        self.emit(REJECTION, rejection(line, error, **named, max_raw_bytes=kept))


def _is_own(event_type: EventType) -> bool:
    """Types that a client cannot publish."""
    return event_type.storage.live_only or event_type.name == JOURNAL_LOSS
