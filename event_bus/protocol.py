"""The wire between clients and the broker's ingress port; docs/protocol.md is its specification.

A client's DEALER sends [verb, request id, …]; the broker answers [verb, request id, …]. Bodies
are JSON, batches newline-delimited JSON.
"""

from __future__ import annotations

import itertools
import time
from typing import Annotated, Any, NoReturn

import msgspec
import zmq
from msgspec import Meta

from event_bus import keys
from event_bus.errors import BusRefused, BusUnavailable, TrimmedRange
from event_bus.settings import Settings

PUBLISH = b"publish"
FETCH = b"fetch"
STATUS = b"status"
FORGET = b"forget"

ACK = b"ack"
BATCHES = b"batches"
FORGOTTEN = b"forgotten"
ERROR = b"error"

MAX_MESSAGE_BYTES = 8 << 20
"""Longest frame the broker takes; a connection that sends a longer one is cut."""


MAX_PROBLEM = 500
"""Characters that a consumer may say its problem in."""


class FetchRequest(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Ask for events from seq `from_seq`, or from the first one received at `from_time`.

    With neither, from the end: only what comes after this request. The answer waits up to
    `wait_ms` for the first event. `consumer` names a durable consumer, which has stored
    everything before `stored_seq` (default: before `from_seq`), and `problem` says what keeps it
    from storing more.
    """

    from_seq: Annotated[int, Meta(ge=0)] | None = None
    from_time: float | None = None
    max_bytes: int = 768 << 10
    wait_ms: int = 0
    consumer: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    stored_seq: Annotated[int, Meta(ge=0)] | None = None
    problem: Annotated[str, Meta(max_length=MAX_PROBLEM)] = ""


class BatchHead(msgspec.Struct, frozen=True, array_like=True):
    """Head of one batch in an answer to fetch; the batch itself is one of the frames after."""

    first_seq: int
    count: int
    received_at: float


class FetchReply(msgspec.Struct, frozen=True, kw_only=True):
    """Heads of the batches that follow, and where the journal begins and ends.

    `from_seq` is where the broker took the request to begin. The first batch may begin before.
    """

    from_seq: int
    batches: list[BatchHead]
    first_seq: int
    last_seq: int
    journal_id: str
    epoch: int


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """`code` is one of the codes in docs/protocol.md. Where events cannot be had any more,
    `first_seq` is the next one that can."""

    code: str
    message: str
    first_seq: int | None = None


def raise_error(body: bytes) -> None:
    """Raise the BusRefused that an error reply stands for; TrimmedRange if one can go on later."""
    error = msgspec.json.decode(body, type=ErrorReply)
    if error.first_seq is not None:
        raise TrimmedRange(error.message, first_seq=error.first_seq, code=error.code)
    raise BusRefused(error.message, code=error.code)


class Client:
    """A connection to the broker's ingress port, for one thread. Close it when done.

    The home's key is used if it has one; without one there is no connection beyond this machine.
    Raises KeysError if the key cannot be used or is missing. While it waits, anything to read from
    the descriptor `interrupt_fd` makes it raise InterruptedError. It notices at once when a bus
    that has answered before is gone.
    """

    def __init__(self, settings: Settings, *, interrupt_fd: int | None = None) -> None:
        self.url = settings.ingress_url
        self._keys = settings.keys
        self._context: zmq.Context[Any] = zmq.Context.instance()
        self._interrupt_fd = interrupt_fd
        self._ids = itertools.count(1)
        self._connect()

    def _connect(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        try:
            keys.use_client_key(self.socket, self._keys, self.url)
        except BaseException:
            self.socket.close()
            raise
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._has_answered = False
        self.socket.connect(self.url)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        if self._interrupt_fd is not None:
            self._poller.register(self._interrupt_fd, zmq.POLLIN)

    def send(self, verb: bytes, *frames: bytes) -> bytes:
        """Send a request and return its id."""
        while self._monitor.get(zmq.EVENTS) & zmq.POLLIN:
            self._monitor.recv_multipart()  # a connection lost before this request takes no harm
        request_id = b"%d" % next(self._ids)
        self.socket.send_multipart([verb, request_id, *frames])
        return request_id

    def receive(self, request_id: bytes, timeout_s: float) -> list[bytes]:
        """The frames after verb and id of that request's answer; answers to others are dropped.

        Raises BusUnavailable after `timeout_s`, and BusRefused for an error reply.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            ready = dict(self._poller.poll(left_ms))
            if self._interrupt_fd in ready:
                raise InterruptedError
            if not ready:
                self._give_up(f"no answer from the event bus at {self.url} within {timeout_s:g} s")
            if self.socket not in ready:
                self._monitor.recv_multipart()
                # Only once a connection: what accepts and hangs up would be asked without a pause.
                if self._has_answered:
                    self._give_up(f"the event bus at {self.url} ended its connection")
                continue
            verb, reply_id, *frames = self.socket.recv_multipart()
            self._has_answered = True
            if reply_id != request_id:
                continue
            if verb == ERROR:
                raise_error(frames[0])
            return list(frames)

    def _give_up(self, reason: str) -> NoReturn:
        # What is queued for a broker that is away would reach the next one as news.
        hint = "start it with `bitten up`, `bitten bus` or `pm2 start pm2_config.json`"
        if self.socket.mechanism == zmq.CURVE:
            hint += "; if it runs, it does not allow this home's key (`bitten keys list` there)"
        self.close()
        self._connect()
        raise BusUnavailable(reason, hint=hint)

    def status(self, timeout_s: float = 2.0) -> dict[str, Any]:
        """The broker's account of itself, as docs/protocol.md lists it."""
        frames = self.receive(self.send(STATUS), timeout_s)
        status: dict[str, Any] = msgspec.json.decode(frames[0])
        return status

    def publish(self, batch: bytes, timeout_s: float = 5.0) -> dict[str, Any]:
        """Publish newline-delimited JSON; returns the ack: counts and refusals."""
        frames = self.receive(self.send(PUBLISH, batch), timeout_s)
        ack: dict[str, Any] = msgspec.json.decode(frames[0])
        return ack

    def forget(self, consumer: str, timeout_s: float = 2.0) -> int | None:
        """Take a durable consumer off the broker's list; the number of events that it had not
        stored, None if it was not there."""
        frames = self.receive(self.send(FORGET, consumer.encode()), timeout_s)
        answer = msgspec.json.decode(frames[0])
        return int(answer.get("lag", 0)) if answer["known"] else None

    def close(self) -> None:
        if not self.socket.closed:
            self.socket.disable_monitor()
            self._monitor.close()
            self.socket.close()
