"""Subscribers: events in order, from now, from a seq or from a time, without gap or repeat.

Events are fetched from the journal with a long poll, so replay and live are one stream, and a
slow subscriber slows nobody and misses nothing that the journal still holds.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from event_bus import envelope, keys, protocol
from event_bus.envelope import Envelope
from event_bus.errors import BusRefused, BusUnavailable
from event_bus.protocol import BatchHead, Client, FetchReply, FetchRequest
from event_bus.settings import Settings

POLL_MS = 1_000
PATIENCE_S = POLL_MS / 1000 + 2.0
"""When an answer is later than this, the question is asked again on a new connection."""

_decode_reply = msgspec.json.Decoder(FetchReply).decode


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event as the bus holds it. What its producer left out is None.

    `timestamp` (when it happened) and `received_at` (when the broker took it in) are Unix
    seconds; `seq` counts all events of the bus from 1 without holes.
    """

    seq: int
    event_id: str
    event_type: str
    timestamp: float
    received_at: float
    source: str | None = None
    user_id: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    data: dict[str, Any]


def as_event(e: Envelope, seq: int, received_at: float) -> Event:
    given = {name: getattr(e, name) for name in e.__struct_fields__}
    present = {k: v for k, v in given.items() if v is not msgspec.UNSET}
    return Event(seq=seq, received_at=received_at, **present)


class Batch(msgspec.Struct, frozen=True):
    """Consecutive events; event i of `events` has seq `first_seq` + i."""

    first_seq: int
    received_at: float
    events: list[Envelope]


class Cursor:
    """What to ask the broker next, and what its answers mean. No sockets.

    `next_seq` is None until the first answer when the start is a time or now. A durable `consumer`
    has everything before `stored_seq` for good; `problem` is what it says keeps it from storing
    more, empty if nothing does.
    """

    def __init__(
        self,
        *,
        next_seq: int | None = None,
        from_time: float | None = None,
        consumer: str | None = None,
        wait_ms: int = POLL_MS,
    ) -> None:
        self.next_seq = next_seq
        self.stored_seq = next_seq
        self.wait_ms = wait_ms
        self.last_seq = 0
        self.journal_id = ""
        self.problem = ""
        self._from_time = from_time
        self._consumer = consumer

    def request(self) -> bytes:
        return msgspec.json.encode(
            FetchRequest(
                from_seq=self.next_seq,
                from_time=self._from_time if self.next_seq is None else None,
                wait_ms=self.wait_ms if self.next_seq is not None else 0,
                consumer=self._consumer,
                stored_seq=self.stored_seq if self._consumer else None,
                problem=self.problem[: protocol.MAX_PROBLEM],
            )
        )

    def take(self, frames: list[bytes]) -> list[Batch]:
        """The events of an answer that were not seen yet, and step past them.

        Raises BusRefused, and stays where it was, if the answer is not what was asked for.
        """
        try:
            reply = _decode_reply(frames[0])
            next_seq, batches = self._read(reply, frames[1:])
        except (ValueError, IndexError, RecursionError) as e:
            raise BusRefused(
                f"the bus's answer makes no sense: {e}",
                code="bad_answer",
                hint="is it another program that listens there?",
            ) from e
        self.journal_id = reply.journal_id
        self.last_seq = reply.last_seq
        self.next_seq = next_seq
        return batches

    def _read(self, reply: FetchReply, bodies: list[bytes]) -> tuple[int, list[Batch]]:
        """What comes after the answer, and its events. Raises ValueError."""
        if self.next_seq is None:  # that was only to learn where to begin
            return reply.from_seq, []
        next_seq = self.next_seq
        batches: list[Batch] = []
        for head, body in zip(reply.batches, bodies, strict=True):
            skip = max(0, next_seq - head.first_seq)
            events: Sequence[Envelope | None]
            try:
                events = whole = envelope.decode_lines(body)
            except msgspec.ValidationError:  # or it has events that our key may not read
                events, whole = envelope.decode_readable_lines(body), None
            if head.first_seq > next_seq:
                raise ValueError(f"event {next_seq} is missing before {head.first_seq}")
            if len(events) != head.count:
                raise ValueError(f"{len(events)} events where {head.count} were announced")
            if whole is None:
                batches += _readable(head, events[skip:], head.first_seq + skip)
            else:
                batches.append(Batch(head.first_seq + skip, head.received_at, whole[skip:]))
            next_seq = max(next_seq, head.first_seq + head.count)
        return next_seq, batches


def _readable(head: BatchHead, events: Sequence[Envelope | None], first_seq: int) -> list[Batch]:
    """The stretches between the events that came as `null`."""
    batches = []
    stretch: list[Envelope] = []
    for seq, event in enumerate(events, first_seq):
        if event is not None:
            stretch.append(event)
        elif stretch:
            batches.append(Batch(seq - len(stretch), head.received_at, stretch))
            stretch = []
    if stretch:
        batches.append(Batch(first_seq + len(events) - len(stretch), head.received_at, stretch))
    return batches


class Subscriber:
    """Iterate over events: `for event in Subscriber("signal_generated", "market_*")`.

    Patterns are event types with `*` and `?`; none means all. `start` is `"now"`, a seq (int) or
    Unix seconds (float). Both `for` and `async for` work; one subscriber takes one of them at a
    time, and a second loop goes on where the first one stopped. Iteration ends after `timeout_s`
    without a matching event (default: never). While the broker is away it waits and goes on where
    it was. Raises TrimmedRange when what comes next is no longer in the journal, or damaged
    there, and BusRefused when `start` is beyond its end.

    `next_seq` is where another subscriber would go on: everything before it was handed out or not
    asked for. It is None until "now" or a time is known as a seq.
    """

    def __init__(
        self,
        *patterns: str,
        start: str | int | float = "now",
        ignore: Iterable[str] = (),
        timeout_s: float | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._settings = settings or Settings.load()
        self._patterns = tuple(p.removeprefix("bitten.") for p in patterns) or ("*",)
        self._ignored = tuple(p.removeprefix("bitten.") for p in ignore)
        self._wanted: dict[str, bool] = {}
        self._timeout_s = timeout_s
        wait_ms = POLL_MS if timeout_s is None else min(POLL_MS, max(1, int(timeout_s * 1000)))
        if start == "now":
            self._cursor = Cursor(wait_ms=wait_ms)
        elif isinstance(start, float):
            self._cursor = Cursor(from_time=start, wait_ms=wait_ms)
        elif isinstance(start, int):
            self._cursor = Cursor(next_seq=max(1, start), wait_ms=wait_ms)
        else:
            raise ValueError(
                f"start is {start!r}: expected 'now', a seq (int) or Unix seconds (float)"
            )
        self._client: Client | None = None
        self.next_seq = self._cursor.next_seq

    def connect(self) -> None:
        """Fix where "now" is: what is published after this call returns will be seen.

        Without it that is fixed when iteration begins. Raises BusUnavailable.
        """
        if self._cursor.next_seq is None:
            client = self._connected()
            self._cursor.take(
                client.receive(client.send(protocol.FETCH, self._cursor.request()), 5.0)
            )
            self.next_seq = self._cursor.next_seq

    def __iter__(self) -> Iterator[Event]:
        client = self._connected()
        self._cursor.next_seq = self.next_seq
        last_event = time.monotonic()
        request = client.send(protocol.FETCH, self._cursor.request())
        while True:
            try:
                events = self._events(client.receive(request, self._patience_s(last_event)))
            except BusUnavailable:
                events = []
            # Asked before the events are handed out, so that the answer is on its way meanwhile.
            request = client.send(protocol.FETCH, self._cursor.request())
            yield from self._hand_out(events)
            if events:
                last_event = time.monotonic()
            elif self._is_over(last_event):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        socket = self._async_socket()
        self._cursor.next_seq = self.next_seq
        last_event = time.monotonic()
        try:
            while True:
                await socket.send_multipart([protocol.FETCH, b"0", self._cursor.request()])
                # Poll, then receive: a receive that is cancelled half-way loses its message.
                if await socket.poll(int(self._patience_s(last_event) * 1000)):
                    verb, _, *frames = await socket.recv_multipart()
                    if verb == protocol.ERROR:
                        protocol.raise_error(frames[0])
                    events = self._events(frames)
                else:
                    events = []
                    socket.close()
                    socket = self._async_socket()
                for event in self._hand_out(events):
                    yield event
                if events:
                    last_event = time.monotonic()
                elif self._is_over(last_event):
                    return
        finally:
            socket.close()

    def _is_over(self, last_event: float) -> bool:
        return self._timeout_s is not None and time.monotonic() - last_event >= self._timeout_s

    def _patience_s(self, last_event: float) -> float:
        """How long to wait for an answer; a second more than the iteration has left at the most."""
        if self._timeout_s is None:
            return PATIENCE_S
        return min(PATIENCE_S, max(0.0, last_event + self._timeout_s - time.monotonic()) + 1.0)

    def _hand_out(self, events: list[Event]) -> Iterator[Event]:
        for event in events:
            self.next_seq = event.seq + 1
            yield event
        self.next_seq = self._cursor.next_seq

    def _connected(self) -> Client:
        if self._client is None:
            self._client = Client(self._settings)
        return self._client

    def _async_socket(self) -> zmq.asyncio.Socket:
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.linger = 0
        try:
            keys.use_client_key(socket, self._settings.keys, self._settings.ingress_url)
        except BaseException:
            socket.close()
            raise
        socket.connect(self._settings.ingress_url)
        return socket

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _events(self, frames: list[bytes]) -> list[Event]:
        return [
            as_event(e, seq, batch.received_at)
            for batch in self._cursor.take(frames)
            for seq, e in enumerate(batch.events, batch.first_seq)
            if self._is_wanted(e.event_type)
        ]

    def _is_wanted(self, event_type: str) -> bool:
        wanted = self._wanted.get(event_type)
        if wanted is None:
            wanted = any(fnmatch.fnmatchcase(event_type, p) for p in self._patterns) and not any(
                fnmatch.fnmatchcase(event_type, p) for p in self._ignored
            )
            self._wanted[event_type] = wanted
        return wanted
