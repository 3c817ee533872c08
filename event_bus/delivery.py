"""The bridge's half in its own thread: carries queued events to the broker, or to the spool.

Order is kept by two rules. While the spool holds events, only the spool is sent, and what is
queued meanwhile waits in memory or goes to the spool's end. And a socket is one connection: it
never reconnects by itself, for what was on its way then is lost while later events would pass.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from event_bus import keys, protocol
from event_bus.bridge import BATCH_BYTES, BATCH_EVENTS
from event_bus.errors import KeysError
from event_bus.orphans import PREFIX, Orphans
from event_bus.words import events

if TYPE_CHECKING:
    from event_bus.bridge import Bridge

WINDOW = 4
"""Batches on their way at once: enough to keep the broker busy during one fsync. Far below
libzmq's high-water mark, so that a socket that cannot take more has no connection."""

ACK_TIMEOUT_S = 2.0
SPILL_AFTER_S = 0.25
RETRY_S = 0.5
CONNECT_S = 0.25
MAX_CONNECT_S = 1.0
SPILL_EVENTS = 50_000
SPILL_BYTES = 8 << 20
"""In one write: with a busy caller, each costs the interpreter's switch interval several times."""

CHECK_S = 0.005
"""A look at connection and memory while something is on its way. Nobody wakes the thread then: what
comes meanwhile goes out with the next answer."""

AWAY_CHECK_S = 0.02
SPARE_DESCRIPTORS = 16
"""Free before a socket is made. libzmq needs about half, and aborts the process without them."""

LOSS_REPORT_S = 1.0
REFRESH_S = 1.0


class _Flight(msgspec.Struct):
    """A batch that was sent and not acknowledged yet. `lines` is None if it came from the spool."""

    request_id: bytes
    lines: list[bytes] | None
    events: int
    size: int


class Delivery:
    """Owns the socket, and the outbox's reading end. `run` is the thread's body."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._outbox = bridge.outbox
        self._orphans = bridge.orphans = Orphans(bridge.settings.spool, bridge.no_orphans)
        self._flights: deque[_Flight] = deque()
        self._requests = 0
        self._context: zmq.Context[Any] | None = None
        self._socket: zmq.Socket[Any] | None = None
        self._connected = False
        self._connect_s = CONNECT_S
        self._connect_again_at = self._connected_by = 0.0
        self._away_since: float | None = None
        self._progress_at = self._retry_at = self._loss_report_at = self._refresh_at = 0.0

    def run(self) -> None:
        """Deliver until the bridge closes; what cannot be delivered by then is in the spool."""
        try:
            while not self._is_finished():
                try:
                    self._turn()
                except Exception as e:  # noqa: BLE001 - without this thread nothing is delivered
                    self._fail(f"{type(e).__name__}: {e}")
        finally:
            self._recall()
            self._orphans.let_go()
            if self._context is not None:
                self._context.destroy(linger=0)

    def _turn(self) -> None:
        self._wait()
        if self._bridge.unknown_type and time.monotonic() >= self._refresh_at:
            self._refresh_at = time.monotonic() + REFRESH_S
            self._bridge.unknown_type = False
            self._bridge.registry.refresh()
        self._receive()
        self._check_connection()
        if self._connected and self._bridge.loss and time.monotonic() >= self._loss_report_at:
            self._loss_report_at = time.monotonic() + LOSS_REPORT_S
            self._bridge.report_loss()
        self._send()
        self._spill_if_needed()
        self._send_orphans()

    def _connect(self) -> None:
        """Begin a connection; without the means for one the broker counts as away."""
        self._orphans.let_go()
        self._connected = False
        self._connected_by = time.monotonic() + AWAY_CHECK_S
        self._connect_again_at = time.monotonic() + self._connect_s
        self._connect_s = min(2 * self._connect_s, MAX_CONNECT_S)
        if self._socket is not None:
            old, self._socket = self._socket, None
            old.close()
        if not _descriptors_are_free():
            self._cannot_connect("too few file descriptors are free")
            return
        try:
            self._context = self._context or zmq.Context()
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.immediate = True  # queue for a broker that is there, not for the next one
            self._socket.reconnect_ivl = -1
            settings = self._bridge.settings
            keys.use_client_key(self._socket, settings.keys, settings.ingress_url)
            self._socket.connect(settings.ingress_url)
        except (zmq.ZMQError, KeysError) as e:
            self._cannot_connect(str(e))

    def _cannot_connect(self, problem: str) -> None:
        self._bridge.last_error = problem
        self._bridge.warn("connect", f"events wait: {problem}")

    def _wants_to_send(self) -> bool:
        spool = self._outbox.spool
        has_more = spool.unread if spool else bool(self._outbox.lines)
        return has_more and len(self._flights) < WINDOW and time.monotonic() >= self._retry_at

    def _wait(self) -> None:
        """Sleep until there is an event, an answer, a connection or something due."""
        bridge = self._bridge
        now = time.monotonic()
        due = [self._loss_report_at] if bridge.loss and self._connected else []
        if self._retry_at > now:
            due.append(self._retry_at)
        if bridge.unknown_type:
            due.append(self._refresh_at)
        if bridge.closing_at is not None:
            due += [bridge.closing_at, now + CHECK_S]
        wants = self._wants_to_send()
        if not wants and not self._flights and not self._orphans.on_the_way:
            if not self._outbox.lines and not self._outbox.spool:
                due.append(self._orphans.due)
            self._wait_for_news(min(due) - now if due else None, self._wants_to_send)
            return
        if self._flights or self._connected:
            due.append(now + CHECK_S)
        else:
            due.append(self._connect_again_at)
            if not self._outbox.lines and now >= self._connected_by:
                # All is on disk: nothing to do before the next try, unless more comes.
                self._wait_for_news(min(due) - now, lambda: self._outbox.lines)
                now = time.monotonic()
            due.append(now + AWAY_CHECK_S)
        timeout_s = max(0.0, min(due) - now)
        if self._socket is None:
            bridge.news.acquire(timeout=timeout_s)
        else:
            events = zmq.POLLIN | (zmq.POLLOUT if wants else 0)
            self._socket.poll(int(timeout_s * 1000) + 1, events)

    def _wait_for_news(self, timeout_s: float | None, have_some: Callable[[], Any]) -> None:
        bridge = self._bridge
        bridge.idle = True
        if not have_some():  # or an event came before it could see us idle
            bridge.news.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))
        bridge.idle = False

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                verb, request_id, body, *_ = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if request_id.startswith(PREFIX):
                self._orphans.answered(verb, request_id)
                continue
            self._progress_at = time.monotonic()
            if not self._flights or self._flights[0].request_id != request_id:
                continue  # an answer to something sent again since
            if verb == protocol.ACK:
                self._acknowledged(msgspec.json.decode(body))
            else:
                self._fail(msgspec.json.decode(body)["message"])

    def _acknowledged(self, receipt: dict[str, Any]) -> None:
        bridge = self._bridge
        refused = receipt["rejected"] + receipt["conflicts"]
        if refused:
            reason = receipt["refusals"][0]["reason"]
            bridge.warn("refused by the bus", f"{events(refused)} refused by the bus: {reason}")
        flight = self._flights.popleft()
        if flight.lines is None:
            self._outbox.spool.delivered(flight.size, flight.events)
        bridge.refused_by_bus += refused
        bridge.last_error = ""
        bridge.settle(acked=flight.events)

    def _fail(self, problem: str) -> None:
        """What is on its way is not taken in: send it again after a pause."""
        self._bridge.last_error = problem
        self._bridge.warn("delivery", f"events wait: {problem}")
        self._recall()
        self._retry_at = time.monotonic() + RETRY_S

    def _check_connection(self) -> None:
        """Begin again on a new connection when the old one is gone or nothing is answered on it."""
        now = time.monotonic()
        if self._flights and now - self._progress_at > ACK_TIMEOUT_S:
            self._bridge.last_error = f"no acknowledgement within {ACK_TIMEOUT_S:g} s"
            self._away_since = now - SPILL_AFTER_S
        elif self._socket is not None and self._socket.poll(0, zmq.POLLOUT):
            if not self._connected:
                self._orphans.look_at_once()
            self._connected = self._bridge.connected = True
            self._connect_s = CONNECT_S
            self._away_since = None
            return
        elif not self._outbox.lines and not self._outbox.spool:
            self._away_since = None  # nobody misses it
        elif self._away_since is None:
            self._away_since = now
        self._bridge.connected = False
        if self._connected or now >= self._connect_again_at:
            self._recall()
            self._connect()

    def _recall(self) -> None:
        """Take back what was sent and not acknowledged, to be sent again in the same order."""
        self._outbox.spool.rewind()
        while self._flights:
            flight = self._flights.pop()
            if flight.lines is not None:
                self._outbox.put_back(flight.lines)

    def _send(self) -> None:
        while self._socket is not None and self._connected and self._wants_to_send():
            lines: list[bytes] | None = None
            if self._outbox.spool:
                try:
                    body = self._outbox.spool.read(BATCH_BYTES)
                except OSError as e:
                    self._lose_spool(str(e))
                    return
                events = body.count(b"\n")
            else:
                lines = self._outbox.take(BATCH_EVENTS, BATCH_BYTES)
                body, events = b"\n".join([*lines, b""]), len(lines)
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
                return

    def _send_orphans(self) -> None:
        """What dead processes left goes only while nothing of our own waits."""
        if self._flights or self._outbox.lines or self._outbox.spool:
            return
        try:
            if self._socket is not None and self._connected and self._bridge.closing_at is None:
                self._orphans.proceed(self._socket)
            elif time.monotonic() >= self._orphans.due:
                self._orphans.let_go()  # and look again later
        except OSError as e:
            self._orphans.let_go()
            self._bridge.warn("orphans", f"what other processes left in the spool waits: {e}")

    def _lose_spool(self, problem: str) -> None:
        spool = self._outbox.spool
        self._recall()
        self._bridge.lose(spool.events, problem)
        spool.path.unlink(missing_ok=True)
        spool.release()

    def _report(self) -> bytes:
        stats = self._bridge.stats()
        names = ("source", "emitted", "acked", "spooled", "dropped", "overflowed", "refused")
        return msgspec.json.encode({"pid": os.getpid(), **{name: stats[name] for name in names}})

    def _spill_if_needed(self) -> None:
        """Put memory on disk when the broker is away, or when memory is half full."""
        now = time.monotonic()
        outbox = self._outbox
        away = self._away_since is not None and now - self._away_since >= SPILL_AFTER_S
        if outbox.lines and (away or outbox.crowded):
            self._spill()

    def _spill(self) -> None:
        if any(f.lines is not None for f in self._flights):  # they are older than the rest
            self._recall()
        problem = self._outbox.spill(SPILL_EVENTS, SPILL_BYTES)
        if problem:  # what does not fit whole may fit in part
            problem = self._outbox.spill(BATCH_EVENTS, BATCH_BYTES)
        if problem:
            self._bridge.last_error = problem
            self._bridge.warn("spill", f"events wait in memory: {problem}")

    def _is_finished(self) -> bool:
        """Closing: all is acknowledged, or time is up and `Bridge.close` spools the rest."""
        closing_at = self._bridge.closing_at
        if closing_at is None:
            return False
        now = time.monotonic()
        away = self._away_since is not None and now - self._away_since >= SPILL_AFTER_S
        waiting = bool(self._flights or self._outbox.lines)
        if waiting and not self._outbox.spool and not away and now < closing_at:
            return False
        self._recall()
        return True


def _descriptors_are_free() -> bool:
    taken: list[int] = []
    try:
        while len(taken) < SPARE_DESCRIPTORS:
            taken += os.pipe()
    except OSError:
        return False
    finally:
        for fd in taken:
            os.close(fd)
    return True
