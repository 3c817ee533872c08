"""The bridge's half in the caller's thread: check, number, encode, queue. Nothing here waits."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from event_bus import envelope, words
from event_bus.accounts import Loss, refusal
from event_bus.correlation import current as current_correlation
from event_bus.envelope import MAX_EVENT_BYTES, Envelope
from event_bus.errors import RejectedEvent
from event_bus.event_schema import BRIDGE_LOSS, OWN_TYPES, REJECTION, Registry
from event_bus.outbox import Outbox
from event_bus.plain import (
    as_text,
    plain_data,
    plain_name,
    plain_timestamp,
    printable,
)
from event_bus.settings import Settings

if TYPE_CHECKING:
    from event_bus.orphans import Orphans

log = logging.getLogger("event_bus.bridge")

LOG_INTERVAL_S = 60.0
CLOSE_TIMEOUT_S = 1.0
"""For what is on its way when the process ends. pm2 kills 1.6 s after it has asked to stop."""

IMPORT_RETRY_S = 0.5

BATCH_EVENTS = 1_000
BATCH_BYTES = 512 << 10

_BEFORE_ID = b'{"event_id":"'
_NO_ID = _BEFORE_ID + b"-"
_OTHER_NAMES = ("user_id", "correlation_id", "causation_id")
_encode_value = msgspec.json.Encoder().encode


class Bridge:
    """Queue between callers and the delivery thread of one process.

    `emit` may be called from any thread, from signal handlers and from finalizers. The thread is
    started by the first event; a forked child starts afresh with a producer token of its own.
    After `close` every event goes straight to the spool: handlers that run at exit may emit.
    """

    def __init__(self, settings: Settings, *, own_types: bool = True) -> None:
        self.settings = settings
        self.source = printable(settings.source or "python")[:255]
        self.enabled = settings.enabled
        self.registry = Registry(settings.schemas if own_types else None)
        # An event type to its check, and what its lines have between their id and their time.
        self._types: dict[str, tuple[Callable[[Any], bool], bytes]] = {}
        self._names = _encode_names({"source": self.source})
        self._encode = msgspec.json.Encoder(decimal_format="number").encode
        self._last_logged: dict[Any, float] = {}
        self._reset()
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._after_fork_in_child,
        )
        atexit.register(self.close)

    def _reset(self) -> None:
        self.token = envelope.new_producer()
        self.outbox = Outbox(self.settings, self.token)
        self.lock = self.outbox.lock
        self.imports = threading.RLock()
        self.learning = threading.RLock()
        self.unknown_type = False
        self.idle = False
        # What the idle delivery thread waits for. A lock and not a pipe: a write lets go of the
        # interpreter, and the caller then waits for the thread's whole turn (40 µs, not 6).
        self.news = threading.Lock()
        self.news.acquire()
        self.closing_at: float | None = None
        self.settled_changed = threading.Condition()
        self.acked = self.lost = self.overflowed = self.refused = self.refused_by_bus = 0
        self.connected = False
        self.orphans: Orphans | None = None
        self.no_orphans = threading.Event()
        self.last_error = ""
        self.loss: Loss | None = None
        self._n = 0
        self._dropped_at_flush = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    # A fork in the middle of another thread's import would leave the child with a module lock
    # that nobody releases; it waits for the few milliseconds that the imports take, once.

    def _before_fork(self) -> None:
        self.imports.acquire()
        self.learning.acquire()

    def _after_fork_in_parent(self) -> None:
        self.learning.release()
        self.imports.release()

    def _after_fork_in_child(self) -> None:
        self.outbox.release()
        if self.orphans is not None:
            self.orphans.let_go()
        self._reset()

    @property
    def dropped(self) -> int:
        return self.overflowed + self.lost

    def emit(
        self,
        event_type: str,
        data: Any,
        *,
        user_id: Any = None,
        correlation_id: Any = None,
        causation_id: Any = None,
        source: Any = None,
        timestamp: Any = None,
    ) -> str | None:
        """Queue an event; its id, or None if it was refused or dropped. Never raises."""
        if not self.enabled:
            return None
        fields: dict[str, Any] = {"source": self.source}
        try:
            fields["timestamp"] = time.time() if timestamp is None else plain_timestamp(timestamp)
            if source is not None:
                fields["source"] = plain_name(source, "source")
            if correlation_id is None or correlation_id == "":
                correlation_id = current_correlation.get()
            if user_id is None and type(data) is dict:
                user_id = data.get("user_id")
            if user_id is not None and user_id != "":
                fields["user_id"] = plain_name(user_id, "user_id")
            if correlation_id is not None:
                fields["correlation_id"] = plain_name(correlation_id, "correlation_id")
            if causation_id is not None and causation_id != "":
                fields["causation_id"] = plain_name(causation_id, "causation_id")
            return self._append(self._line(event_type, data, fields))
        except Exception as e:  # noqa: BLE001 - whatever is wrong with it, the caller goes on
            self.refuse(e, event_type, data, fields)
            return None

    def _line(self, event_type: str, data: Any, fields: dict[str, Any]) -> bytes:
        """The event as canonical JSON, from the end of its id on. Raises RejectedEvent."""
        check, head = self._types.get(event_type) or self._learn(event_type)
        try:
            if check(data):
                payload = self._encode(data)
                if envelope.is_plain(payload):
                    # Faster than to encode an Envelope.
                    time_ = _encode_value(fields["timestamp"])
                    names = self._names
                    if len(fields) > 2 or fields["source"] is not self.source:
                        names = _encode_names(fields)
                    return b"".join((head, time_, names, payload, b"}"))
        except (ValueError, TypeError, RecursionError):
            pass  # no plain JSON: perhaps it becomes one
        data = plain_data(self.registry.get(event_type), data)
        return _encode_event(event_type, data, fields)

    def _learn(self, event_type: str) -> tuple[Callable[[Any], bool], bytes]:
        if not isinstance(event_type, str):
            raise RejectedEvent("event_type is no string", rule="type", path="event_type")
        if event_type not in self.registry.types:
            self.unknown_type = True  # its schema may be new: the delivery thread looks
        known = self.registry.get(event_type)
        if known.storage.live_only or event_type in OWN_TYPES:
            raise RejectedEvent(
                f"{event_type} is the bus's own", rule="event_type", path="event_type"
            )
        head = b'","event_type":"%b","timestamp":' % event_type.encode()
        try:
            with self.learning:
                check: Callable[[Any], bool] = known.is_valid
        except (ImportError, OSError):  # no file descriptor is free; the broker checks as well
            return lambda data: True, head
        self._types[event_type] = check, head
        return check, head

    def _append(self, line: bytes, *, own: bool = False) -> str | None:
        """Number and queue an event; its id, or None if there was no room for it.

        The bus's own account of losses is let in above the bounds.
        """
        size = len(_NO_ID) + len(line) + len(self.token) + 20
        if size > MAX_EVENT_BYTES:
            raise RejectedEvent(
                f"event of {size} bytes is over the limit of {MAX_EVENT_BYTES}",
                rule="maxBytes",
                value=str(size),
            )
        problem = ""
        with self.lock:
            outbox = self.outbox
            if not own and not outbox.has_room(size):
                self._count_loss(1, "memory full")
                self.overflowed += 1
                event_id = None
            else:
                event_id, numbered = self._number(line)
                outbox.put(numbered)
                if self._closed:
                    problem = self._spill_rest()
                elif self._thread is None:
                    problem = self._start()
            idle = self.idle
            if idle:
                self.idle = False
        if idle:
            self._wake()
        if event_id is None:
            self.warn("dropped", "an event was dropped: memory full")
        if problem:
            self.warn("problem", problem)
        return event_id

    def _count_loss(self, events: int, reason: str) -> None:
        if self.loss is None:
            self.loss = Loss(reason)
        self.loss.add(events)

    def lose(self, events: int, reason: str) -> None:
        """Count queued events that can no longer be delivered; the bus is told when it can be."""
        with self.lock:
            self._count_loss(events, reason)
        self.settle(lost=events)
        self.warn("lost", f"{words.events(events, 'are')} lost: {reason}")

    def _loss_line(self) -> bytes | None:
        """A bridge_loss event for what was dropped since the last one, if anything was."""
        with self.lock:
            loss, self.loss = self.loss, None
            dropped_total = self.dropped
        if loss is None:
            return None
        data = loss.account(self.token, dropped_total)
        fields = {"timestamp": time.time(), "source": self.source}
        return _encode_event(BRIDGE_LOSS, data, fields)

    def report_loss(self) -> None:
        line = self._loss_line()
        if line is not None:
            self._append(line, own=True)

    def refuse(self, error: Exception, event_type: Any, data: Any, fields: dict[str, Any]) -> None:
        """Count, log and send to the bus what was refused; the caller's thread goes on."""
        try:
            with self.lock:
                self.refused += 1
            account = refusal(error, event_type, data, fields, self.source)
            name = account.get("event_type", "")
            kind = (
                name if name in self.registry.types else "",
                account["rule"],
                account.get("path"),
            )
            self.warn(kind, f"{name} refused: {account['reason']}")
            own_fields = {"timestamp": time.time(), "source": self.source}
            self._append(_encode_event(REJECTION, account, own_fields))
        except Exception as e:  # noqa: BLE001 - a refusal must not hurt the caller either
            self.warn("refuse", f"an event was refused, and its account failed: {as_text(e)}")

    def warn(self, kind: Any, message: str) -> None:
        """Warn once a minute for each kind: a bad event may come a thousand times a second."""
        now = time.monotonic()
        if now - self._last_logged.get(kind, -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
            if len(self._last_logged) > 1_000:
                self._last_logged.clear()
            self._last_logged[kind] = now
            with contextlib.suppress(Exception):  # the caller's own handlers may fail
                log.warning("%s", message)

    def _start(self) -> str:
        """Start the delivery thread; why that was not possible, or empty."""
        thread = threading.Thread(target=self._deliver, name="bitten-bridge", daemon=True)
        # A signal handler or a finalizer may emit, and get here, in the middle of either call.
        if self._thread is not None:
            return ""
        self._thread = thread
        try:
            thread.start()
        except RuntimeError as e:  # no thread to be had, or the interpreter is going down
            self._thread = None
            return f"events wait in memory: {e}"
        if "multiprocessing.util" in sys.modules:  # its children end without running atexit
            sys.modules["multiprocessing.util"].Finalize(None, self.close, exitpriority=0)
        return ""

    def _deliver(self) -> None:
        try:
            while self.closing_at is None:
                try:
                    with self.imports:  # 25 ms that no caller waits for
                        from event_bus.delivery import Delivery
                    break
                except (ImportError, OSError) as e:  # no file descriptor is free
                    self.last_error = str(e)
                    self.warn("delivery", f"events wait in memory: {e}")
                    self.news.acquire(timeout=IMPORT_RETRY_S)
            else:
                return
            Delivery(self).run()
        except BaseException:
            self._thread = None  # the next event starts another one
            raise

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # released already: it is awake, or will be
            self.news.release()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was emitted so far is acknowledged, `timeout_s` at the longest.

        False after the timeout, and if events were dropped since the last flush: as with fsync, a
        loss is told once.
        """
        target = self._n
        with self.settled_changed:
            done = self.settled_changed.wait_for(
                lambda: self.acked + self.lost >= target, timeout_s
            )
            dropped, before = self.dropped, self._dropped_at_flush
            self._dropped_at_flush = dropped
        return done and dropped == before

    def settle(self, *, acked: int = 0, lost: int = 0) -> None:
        with self.settled_changed:
            self.acked += acked
            self.lost += lost
            self.settled_changed.notify_all()

    def stats(self) -> dict[str, Any]:
        """Counts of this process, as `event_bridge.stats` documents them."""
        with self.settled_changed, self.lock:
            return {
                "producer": self.token,
                "source": self.source,
                "enabled": self.enabled,
                "connected": self.connected,
                "emitted": self._n + self.overflowed,
                "acked": self.acked,
                "waiting": self._n - self.acked - self.lost,
                "queued_bytes": self.outbox.size_bytes,
                "spooled": self.outbox.spool.events,
                "dropped": self.dropped,
                "overflowed": self.overflowed,
                "refused": self.refused,
                "refused_by_bus": self.refused_by_bus,
                "last_error": self.last_error,
            }

    def close(self) -> None:
        """Deliver or spool what waits, within 1.4 s; called when the interpreter exits."""
        thread = self._thread
        if thread is not None:
            self.closing_at = time.monotonic() + CLOSE_TIMEOUT_S
            self._wake()
            thread.join(CLOSE_TIMEOUT_S + 0.4)
            if thread.is_alive():
                self.warn("close", "events are still being written; the process ends without them")
                return
        with self.lock:
            self._closed = True
            problem = self._spill_rest()
        if problem:
            self.warn("problem", problem)

    def _spill_rest(self) -> str:
        """Nobody will deliver any more: all goes to the spool, and what cannot is lost."""
        outbox = self.outbox
        problem = outbox.spill(BATCH_EVENTS, BATCH_BYTES)
        if problem:
            lines = outbox.take(len(outbox.lines), outbox.size_bytes)
            self._count_loss(len(lines), problem)
            self.lost += len(lines)
            problem = f"{words.events(len(lines), 'are')} lost as this process ends: {problem}"
        line = self._loss_line()
        if line is not None and not outbox.last_loss.add(_NO_ID + line):
            _, report = self._number(line)
            if outbox.spool_lines([report], over_limit=True) and not outbox.last_loss.make(report):
                self.lost += 1
                problem = f"{problem or 'the account of a loss is lost'}; nothing tells the bus"
        return problem

    def _number(self, line: bytes) -> tuple[str, bytes]:
        """The next id, and the line with it."""
        self._n += 1
        event_id = f"{self.token}-{self._n}"
        return event_id, b"".join((_BEFORE_ID, event_id.encode(), line))


def _encode_names(fields: dict[str, Any]) -> bytes:
    """What a line has between its time and its data."""
    names = b',"source":%b' % _encode_value(fields["source"])
    for name in _OTHER_NAMES:
        if name in fields:
            names += b',"%b":%b' % (name.encode(), _encode_value(fields[name]))
    return names + b',"data":'


def _encode_event(event_type: str, data: Any, fields: dict[str, Any]) -> bytes:
    """The line from the end of its id on."""
    event = Envelope(event_id="-", event_type=event_type, data=data, **fields)
    return envelope.encode(event)[len(_NO_ID) :]
