"""The bridge's half in its own thread: carries queued events to the broker, or to the spool.

Order is kept by one rule: while the spool holds events, only the spool is sent, and what is
queued meanwhile waits in memory or goes to the spool's end.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from event_bus import protocol
from event_bus.errors import BittenError
from event_bus.spool import Spool

if TYPE_CHECKING:
    from event_bus.bridge import Bridge

log = logging.getLogger("event_bus.bridge")

BATCH_EVENTS = 2_000
BATCH_BYTES = 512 << 10
WINDOW = 4
"""Batches on their way at once: enough to keep the broker busy during one fsync."""

ACK_TIMEOUT_S = 2.0
SPILL_AFTER_S = 0.25
RETRY_S = 0.5


class _Flight(msgspec.Struct):
    """A batch that was sent and not acknowledged yet. `lines` is None if it came from the spool."""

    request_id: bytes
    lines: list[bytes] | None
    events: int
    size: int


class Delivery:
    """Owns the socket and the spool. `run` is the thread's body."""

    def __init__(self, bridge: Bridge, wake_fd: int) -> None:
        self._bridge = bridge
        self._wake_fd = wake_fd
        self._token = bridge.token
        self._flights: deque[_Flight] = deque()
        self._requests = 0
        self._retry_at = 0.0
        self._progress_at = 0.0
        self._stuck_since: float | None = None
        self._losses_reported = 0
        settings = bridge.settings
        self._spool = Spool(settings.spool / f"{bridge.token}.ndjson", settings.spool_max_bytes)

    def run(self) -> None:
        """Deliver until the bridge closes; what cannot be delivered by then is in the spool."""
        bridge = self._bridge
        context: zmq.Context[Any] = zmq.Context()
        self._connect(context)
        try:
            while bridge.token == self._token:
                self._wait()
                self._receive()
                self._check_stall(context)
                self._send()
                self._spill_if_stuck()
                if bridge.closing_at is not None and self._is_finished():
                    break
        finally:
            self._socket.close()
            context.destroy(linger=0)
            self._spool.release()

    def _connect(self, context: zmq.Context[Any]) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.immediate = True  # queue for a broker that is there, not for the next one
        self._socket.reconnect_ivl = 50
        self._socket.reconnect_ivl_max = 500
        self._socket.connect(self._bridge.settings.ingress_url)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)
        self._progress_at = time.monotonic()

    def _wants_to_send(self) -> bool:
        has_more = self._spool.unread if self._spool else bool(self._bridge.queue)
        return has_more and len(self._flights) < WINDOW and time.monotonic() >= self._retry_at

    def _wait(self) -> None:
        """Sleep until there is an event, an answer, a connection or something due."""
        bridge = self._bridge
        now = time.monotonic()
        wants = self._wants_to_send()
        self._poller.modify(self._socket, zmq.POLLIN | (zmq.POLLOUT if wants else 0))
        due: float | None = None
        if self._flights:
            due = self._progress_at + ACK_TIMEOUT_S
        if self._stuck_since is not None or self._retry_at > now or self._spool:
            due = min(due or now + RETRY_S, max(self._retry_at, now + SPILL_AFTER_S))
        if bridge.closing_at is not None:
            due = min(due or bridge.closing_at, bridge.closing_at, now + 0.05)
        bridge.idle = not wants
        if not wants and bridge.queue and self._wants_to_send():
            bridge.idle = False
            return
        timeout_ms = None if due is None else max(0, int((due - now) * 1000) + 1)
        ready = dict(self._poller.poll(timeout_ms))
        bridge.idle = False
        if self._wake_fd in ready:
            os.read(self._wake_fd, 4096)
        self._writable = bool(ready.get(self._socket, 0) & zmq.POLLOUT)
        if self._writable:
            bridge.connected = True
        elif wants and self._stuck_since is None:
            self._stuck_since = now

    def _receive(self) -> None:
        while True:
            try:
                verb, request_id, body = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._progress_at = time.monotonic()
            if not self._flights or self._flights[0].request_id != request_id:
                continue  # an answer to something sent again since
            if verb == protocol.ACK:
                self._acknowledged(self._flights.popleft(), msgspec.json.decode(body))
            else:
                self._bridge.last_error = msgspec.json.decode(body)["message"]
                self._recall()
                self._retry_at = time.monotonic() + RETRY_S

    def _acknowledged(self, flight: _Flight, receipt: dict[str, Any]) -> None:
        bridge = self._bridge
        if flight.lines is None:
            self._spool.delivered(flight.size, flight.events)
            bridge.spooled = self._spool.events
        bridge.acked += flight.events
        bridge.refused_by_bus += receipt["rejected"] + receipt["conflicts"]
        for refusal in receipt["refusals"][:3]:
            log.warning("refused by the bus: %s", refusal["reason"])
        self._stuck_since = None
        if bridge.losses is not None:
            bridge.report_losses(self._losses_reported)
            self._losses_reported = bridge.dropped
        bridge.settle(flight.events)

    def _check_stall(self, context: zmq.Context[Any]) -> None:
        """No answer for too long: the broker is gone or hangs. Begin again on a new connection."""
        if self._flights and time.monotonic() - self._progress_at > ACK_TIMEOUT_S:
            self._bridge.last_error = f"no acknowledgement within {ACK_TIMEOUT_S:g} s"
            self._recall()
            self._socket.close()
            self._connect(context)
            self._writable = False
            self._stuck_since = time.monotonic() - SPILL_AFTER_S

    def _recall(self) -> None:
        """Take back what was sent and not acknowledged, to be sent again in the same order."""
        bridge = self._bridge
        bridge.connected = False
        self._spool.rewind()
        with bridge.lock:
            while self._flights:
                flight = self._flights.pop()
                if flight.lines is not None:
                    bridge.queue.extendleft(reversed(flight.lines))
                    bridge.queue_bytes += flight.size

    def _send(self) -> None:
        while self._writable and self._wants_to_send():
            if self._spool:
                body = self._spool.read(BATCH_BYTES)
                lines, events = None, body.count(b"\n")
            else:
                lines = self._take_lines()
                body, events = b"\n".join(lines) + b"\n", len(lines)
            self._requests += 1
            request_id = b"%d" % self._requests
            if not self._flights:
                self._progress_at = time.monotonic()
            self._flights.append(_Flight(request_id, lines, events, len(body)))
            try:
                self._socket.send_multipart(
                    [protocol.PUBLISH, request_id, body, self._report()], zmq.NOBLOCK
                )
            except zmq.Again:
                self._recall()
                self._writable = False

    def _take_lines(self) -> list[bytes]:
        bridge = self._bridge
        queue = bridge.queue
        lines = []
        size = 0
        while queue and size < BATCH_BYTES and len(lines) < BATCH_EVENTS:
            line = queue.popleft()
            lines.append(line)
            size += len(line) + 1
        with bridge.lock:
            bridge.queue_bytes -= size
        return lines

    def _report(self) -> bytes:
        bridge = self._bridge
        return msgspec.json.encode(
            {
                "source": bridge.source,
                "pid": os.getpid(),
                "emitted": bridge.emitted,
                "acked": bridge.acked,
                "spooled": bridge.spooled,
                "dropped": bridge.dropped,
                "refused": bridge.refused,
            }
        )

    def _spill_if_stuck(self) -> None:
        """Put the queue on disk when the broker is away, or when it outgrows half its bound."""
        bridge = self._bridge
        settings = bridge.settings
        stuck = (
            self._stuck_since is not None
            and time.monotonic() - self._stuck_since >= SPILL_AFTER_S
        )
        if stuck and not self._writable:
            bridge.connected = False
        crowded = (
            len(bridge.queue) > settings.outbox_max_events // 2
            or bridge.queue_bytes > settings.outbox_max_bytes // 2
        )
        if bridge.queue and (stuck or (crowded and (self._spool or self._flights))):
            self._spill()

    def _spill(self) -> None:
        bridge = self._bridge
        if self._flights and not self._spool:
            if self._stuck_since is None:
                return  # they are older than the queue and on their way
            self._recall()
        while bridge.queue:
            lines = self._take_lines()
            try:
                bridge.settings.make_home()
                fits = self._spool.append(b"\n".join(lines) + b"\n", len(lines))
                problem = "spool full"
            except (OSError, BittenError) as e:
                fits, problem = False, str(e)
            if not fits:
                with bridge.lock:
                    bridge.queue.extendleft(reversed(lines))
                    bridge.queue_bytes += sum(map(len, lines)) + len(lines)
                if bridge.last_error != problem:
                    bridge.last_error = problem
                    log.warning("events wait in memory: %s", problem)
                return
        bridge.spooled = self._spool.events

    def _is_finished(self) -> bool:
        """Closing: all is acknowledged, or time is up and the rest is in the spool."""
        bridge = self._bridge
        if not bridge.queue and not self._flights:
            return True
        closing_at = bridge.closing_at or 0.0
        if time.monotonic() < closing_at and not self._spool and self._stuck_since is None:
            return False
        self._stuck_since = self._stuck_since or time.monotonic()
        if any(f.lines is not None for f in self._flights):
            self._recall()
        self._spill()
        return True
