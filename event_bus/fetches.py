"""Fetches: what of the journal is read by whom, at once or when the next event comes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import msgspec

from event_bus import ports, protocol
from event_bus.allow_list import UNLIMITED, Rights, readable_part
from event_bus.consumers import MAX_CONSUMERS, Consumer, Consumers
from event_bus.event_schema import Registry
from event_bus.journal import DamagedBatch, Journal
from event_bus.protocol import BatchHead, FetchReply, FetchRequest
from event_bus.replies import Replies
from event_bus.zap import Zap

MAX_WAITING_FETCHES = 10_000
"""Of one connection at most `ports.MAX_UNREAD_REPLIES`: the answers to more could be dropped."""

MAX_WAIT_MS = 30_000
MAX_REPLY_BYTES = 1 << 20

_decode_fetch = msgspec.json.Decoder(FetchRequest).decode
_encode = msgspec.json.Encoder().encode


class _Waiting(msgspec.Struct):
    """A fetch that waits for its first event."""

    route: list[bytes]
    from_seq: int
    max_bytes: int
    deadline: float
    key: str


class Fetches:
    """Answers fetches, and keeps those that wait. `found_damaged` hears of each batch that cannot
    be served."""

    def __init__(
        self,
        journal: Journal,
        registry: Registry,
        consumers: Consumers,
        replies: Replies,
        zap: Zap | None,
        found_damaged: Callable[[DamagedBatch], None],
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._registry = registry
        self._consumers = consumers
        self._replies = replies
        self._zap = zap
        self._found_damaged = found_damaged
        self._clock = clock
        self._monotonic = monotonic
        self._waiting: dict[tuple[bytes, ...], _Waiting] = {}
        self._waiting_of: Counter[bytes] = Counter()

    @property
    def due(self) -> float:
        """When the next of those that wait must be answered, in seconds of `monotonic`."""
        return min((w.deadline for w in self._waiting.values()), default=math.inf)

    def take(self, route: list[bytes], body: bytes, key: str, rights: Rights) -> None:
        """Answer a fetch, or have it wait for its first event."""
        try:
            request = _decode_fetch(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            self._replies.fail(route, "bad_request", f"fetch: {e}")
            return
        if request.consumer and not rights.reads_all:
            self._replies.forbid(route, key, "a durable consumer needs the right to read all")
            return
        from_seq = request.from_seq
        if from_seq is None:
            if request.from_time is None:
                from_seq = self._journal.last_seq + 1
            else:
                from_seq = max(self._journal.seq_at(request.from_time), self._journal.first_seq)
        if from_seq < self._journal.first_seq:
            self._replies.fail(
                route,
                "trimmed",
                f"events before {self._journal.first_seq} are no longer in the journal;"
                f" asked for {from_seq}",
                first_seq=self._journal.first_seq,
            )
            return
        if from_seq > self._journal.last_seq + 1:
            self._replies.fail(
                route,
                "ahead",
                f"the journal ends at {self._journal.last_seq}, asked for {from_seq}: it is another"
                " journal, or an older copy of it was restored",
            )
            return
        if request.consumer:
            if self._consumers.is_full_for(request.consumer):
                self._replies.fail(
                    route, "busy", f"there are {MAX_CONSUMERS} durable consumers already"
                )
                return
            stored_seq = from_seq if request.stored_seq is None else request.stored_seq
            self._consumers[request.consumer] = Consumer(
                min(stored_seq, from_seq), self._clock(), request.problem
            )
        waiting = _Waiting(
            route,
            from_seq,
            min(request.max_bytes, MAX_REPLY_BYTES),
            self._monotonic() + min(request.wait_ms, MAX_WAIT_MS) / 1000,
            key,
        )
        if from_seq <= self._journal.last_seq or request.wait_ms <= 0:
            self._answer(waiting)
        elif len(self._waiting) >= MAX_WAITING_FETCHES:
            self._replies.fail(route, "busy", f"{MAX_WAITING_FETCHES} fetches are waiting already")
        elif self._waiting_of[route[0]] >= ports.MAX_UNREAD_REPLIES:
            self._replies.fail(
                route,
                "busy",
                f"{ports.MAX_UNREAD_REPLIES} fetches of this connection are waiting already",
            )
        else:
            self._waiting_of[route[0]] += tuple(route) not in self._waiting
            self._waiting[tuple(route)] = waiting

    def serve_waiting(self) -> None:
        """Answer those whose event has come, or whose time is over."""
        if not self._waiting:
            return
        now = self._monotonic()
        last = self._journal.last_seq
        due = [k for k, w in self._waiting.items() if w.from_seq <= last or w.deadline <= now]
        for key in due:
            self._waiting_of[key[0]] -= 1
            if not self._waiting_of[key[0]]:
                del self._waiting_of[key[0]]
            self._answer(self._waiting.pop(key))

    def _answer(self, waiting: _Waiting) -> None:
        rights = UNLIMITED if self._zap is None else self._zap.rights(waiting.key)
        if rights is None:
            self._replies.forbid(waiting.route, waiting.key, "this key is not allowed any more")
            return
        try:
            batches = self._journal.read(waiting.from_seq, waiting.max_bytes)
        except DamagedBatch as e:
            self._found_damaged(e)
            self._replies.fail(waiting.route, "damaged", str(e), first_seq=e.next_seq)
            return
        reply = FetchReply(
            from_seq=waiting.from_seq,
            batches=[BatchHead(b.first_seq, b.count, b.received_at) for b in batches],
            first_seq=self._journal.first_seq,
            last_seq=self._journal.last_seq,
            journal_id=self._journal.journal_id,
            epoch=self._journal.epoch,
        )
        bodies = [b.body for b in batches]
        if not rights.reads_all:
            bodies = [readable_part(body, rights, self._registry) for body in bodies]
        self._replies.send(waiting.route, protocol.BATCHES, _encode(reply), *bodies)
