"""The bridge's half in the caller's thread: check, number, encode, queue. Nothing here waits."""

from __future__ import annotations

import atexit
import base64
import contextlib
import decimal
import enum
import functools
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import msgspec

from event_bus import envelope
from event_bus.envelope import MAX_EVENT_BYTES, Envelope
from event_bus.errors import BittenError, RejectedEvent
from event_bus.event_schema import Registry
from event_bus.settings import Settings

log = logging.getLogger("event_bus.bridge")

LOG_INTERVAL_S = 60.0
MAX_RAW_BYTES = 700 << 10
"""What is kept of a refused event: it travels in base64 within the limit of an event."""

CLOSE_TIMEOUT_S = 1.5

_correlation: ContextVar[str | None] = ContextVar("bitten_correlation", default=None)


class Bridge:
    """Queue between callers and the delivery thread of one process.

    `emit` may be called from any thread. The thread is started by the first event; a forked child
    starts afresh with a producer token of its own.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.source = settings.source or _script_name()
        self.enabled = settings.enabled
        self.registry = Registry(settings.schemas)
        self._checks: dict[str, Callable[[Any], bool]] = {}
        self._encode = msgspec.json.Encoder(decimal_format="number", enc_hook=_plain_object).encode
        self._last_logged: dict[Any, float] = {}
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self.token = envelope.new_producer()
        self.lock = threading.Lock()
        self.queue: deque[bytes] = deque()
        self.queue_bytes = 0
        self.idle = False
        self.closing_at: float | None = None
        self.settled = 0
        self.settled_changed = threading.Condition()
        self.acked = self.dropped = self.refused = self.refused_by_bus = self.spooled = 0
        self.connected = False
        self.last_error = ""
        self.losses: tuple[str, float, float] | None = None
        self._n = 0
        self._thread: threading.Thread | None = None
        for fd in getattr(self, "_wake_pipe", ()):
            os.close(fd)
        self._wake_pipe: tuple[int, ...] = ()

    @property
    def emitted(self) -> int:
        """Events queued so far, dropped ones among them."""
        return self._n

    def emit(
        self,
        event_type: str,
        data: Any,
        *,
        user_id: Any = None,
        correlation_id: Any = None,
        causation_id: Any = None,
        source: Any = None,
        timestamp: float | None = None,
    ) -> str | None:
        """Queue an event; its id, or None if it was refused or dropped. Never raises."""
        if not self.enabled:
            return None
        try:
            fields: dict[str, Any] = {
                "event_type": event_type,
                "timestamp": time.time() if timestamp is None else float(timestamp),
                "source": self.source if source is None else _name(source, "source"),
            }
            correlation_id = correlation_id or _correlation.get()
            if correlation_id:
                fields["correlation_id"] = _name(correlation_id, "correlation_id")
            if causation_id:
                fields["causation_id"] = _name(causation_id, "causation_id")
            if user_id is None and type(data) is dict:
                user_id = data.get("user_id")
            if user_id is not None and user_id != "":
                fields["user_id"] = _name(user_id, "user_id")
        except Exception as e:
            return self.refuse(e, event_type, data, {"source": self.source})
        try:
            try:
                valid = (self._checks.get(event_type) or self._learn(event_type))(data)
                payload = self._encode(data) if valid else b""
            except ValueError:  # an object that is no JSON: perhaps it has a plain form
                valid = False
            if not valid or b"null" in payload:  # a null may be a NaN in disguise
                payload = self._encode(self._plain(event_type, data))
            return self._append(fields, payload)
        except Exception as e:
            return self.refuse(e, event_type, data, fields)

    def _learn(self, event_type: str) -> Callable[[Any], bool]:
        known = self.registry.get(event_type)
        if known.storage.live_only or event_type in ("event_rejected", "bridge_loss"):
            raise RejectedEvent(f"{event_type} is the bus's own", rule="event_type", path="event_type")
        check: Callable[[Any], bool] = known.is_valid
        self._checks[event_type] = check
        return check

    def _plain(self, event_type: str, data: Any) -> dict[str, Any]:
        """Data as plain JSON values, checked. Raises RejectedEvent.

        Objects with an evident plain form (numpy scalars, decimals, dates, enums, dataclasses)
        take it, and None in an optional field that allows no null means that it is absent.
        """
        envelope.check_value(data, "data")
        plain = msgspec.json.decode(self._encode(data))
        if not isinstance(plain, dict):
            raise RejectedEvent(
                f"data of {event_type} is no JSON object but {type(data).__name__}",
                rule="type",
                path="data",
                value=repr(data)[:80],
            )
        known = self.registry.get(event_type)
        required = known.schema.get("required", ())
        for name, schema in known.properties.items():
            may_be_null = "null" in schema.get("type", "null")
            if name not in required and not may_be_null and plain.get(name, 0) is None:
                del plain[name]
        known.check(plain)
        envelope.check_value(plain, "data")
        return plain

    def _append(self, fields: dict[str, Any], payload: bytes) -> str | None:
        """Number, encode and queue; the event's id, or None if there was no room for it."""
        with self.lock:
            n = self._n + 1
            event_id = f"{self.token}-{n}"
            event = Envelope(event_id=event_id, data=msgspec.Raw(payload), **fields)
            line = envelope.encode(event)
            size = len(line) + 1
            if size > MAX_EVENT_BYTES:
                raise RejectedEvent(
                    f"event of {size} bytes is over the limit of {MAX_EVENT_BYTES}",
                    rule="maxBytes",
                    value=str(size),
                )
            self._n = n
            if (
                len(self.queue) >= self.settings.outbox_max_events
                or self.queue_bytes + size > self.settings.outbox_max_bytes
            ):
                self.drop("memory full")
                return None
            self.queue.append(line)
            self.queue_bytes += size
            if self._thread is None:
                self._start()
            idle = self.idle
            self.idle = False
        if idle:
            self.wake()
        return event_id

    def drop(self, reason: str) -> None:
        """Count one event that nobody will see again; the bus is told when it can be."""
        now = time.time()
        first = self.losses[1] if self.losses else now
        self.losses = (reason, first, now)
        self.dropped += 1
        self._log("dropped", f"an event was dropped: {reason}")

    def report_losses(self, already: int) -> None:
        """Queue a bridge_loss event for the drops since `already`."""
        if self.losses is None:
            return
        reason, first_at, last_at = self.losses
        self.losses = None
        data = {
            "producer": self.token,
            "dropped": self.dropped - already,
            "dropped_total": self.dropped,
            "reason": reason,
            "first_at": first_at,
            "last_at": last_at,
        }
        self._own_event("bridge_loss", data)

    def _own_event(self, event_type: str, data: dict[str, Any]) -> None:
        fields = {"event_type": event_type, "timestamp": time.time(), "source": self.source}
        self._append(fields, self._encode(data))

    def refuse(
        self, error: Exception, event_type: Any, data: Any, fields: dict[str, Any]
    ) -> None:
        """Count, log and send to the bus what was refused; the caller's thread goes on."""
        try:
            if not isinstance(error, RejectedEvent):
                error = RejectedEvent(f"{type(error).__name__}: {error}", rule="encoding", path="data")
            self.refused += 1
            self._log((event_type, error.rule, error.path), f"{event_type} refused: {error}")
            raw = _as_sent(fields | {"event_type": event_type, "data": data})
            rejection = {
                "reason": str(error),
                "rule": error.rule,
                "path": error.path,
                "value": error.value,
                "event_type": str(event_type)[:64],
                "source": fields.get("source", self.source),
            }
            clean = {k: _printable(v) for k, v in rejection.items() if v}
            clean["raw"] = base64.b64encode(raw[:MAX_RAW_BYTES]).decode()
            clean["raw_bytes"] = len(raw)
            self._own_event("event_rejected", clean)
        except Exception:
            log.exception("an event was refused, and its account could not be queued")

    def _log(self, kind: Any, message: str) -> None:
        """Warn once a minute for each kind: a bad event may come a thousand times a second."""
        now = time.monotonic()
        if now - self._last_logged.get(kind, -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
            if len(self._last_logged) > 1_000:
                self._last_logged.clear()
            self._last_logged[kind] = now
            log.warning("%s", message)

    def _start(self) -> None:
        from event_bus.delivery import Delivery

        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        self._wake_pipe = (read, write)
        self._thread = threading.Thread(
            target=Delivery(self, read).run, name="bitten-bridge", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as e:  # no thread to be had, or the interpreter is going down
            self._thread = None
            self._wake_pipe = ()
            os.close(read)
            os.close(write)
            self._log("thread", f"events wait in memory: {e}")
            return
        atexit.register(self.close)
        if "multiprocessing.util" in sys.modules:  # its children end without running atexit
            sys.modules["multiprocessing.util"].Finalize(None, self.close, exitpriority=0)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, IndexError):  # full: it is awake, or will be
            os.write(self._wake_pipe[1], b"\0")

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged what was emitted so far; False after the timeout."""
        target = self._n
        with self.settled_changed:
            return self.settled_changed.wait_for(lambda: self.settled >= target, timeout_s)

    def settle(self, events: int) -> None:
        with self.settled_changed:
            self.settled += events
            self.settled_changed.notify_all()

    def stats(self) -> dict[str, Any]:
        """Counts of this process, as `event_bridge.stats` documents them."""
        return {
            "producer": self.token,
            "source": self.source,
            "enabled": self.enabled,
            "connected": self.connected,
            "emitted": self._n,
            "acked": self.acked,
            "waiting": self._n - self.acked - self.dropped,
            "queued_bytes": self.queue_bytes,
            "spooled": self.spooled,
            "dropped": self.dropped,
            "refused": self.refused,
            "refused_by_bus": self.refused_by_bus,
            "last_error": self.last_error,
        }

    def close(self) -> None:
        """Deliver or spool what waits, within two seconds; called when the interpreter exits."""
        thread = self._thread
        if thread is None or not thread.is_alive() or thread is threading.current_thread():
            return
        self.closing_at = time.monotonic() + CLOSE_TIMEOUT_S
        self.wake()
        thread.join(CLOSE_TIMEOUT_S + 0.4)


@contextlib.contextmanager
def correlation(correlation_id: str | None = None) -> Iterator[str]:
    """Events emitted inside carry this correlation id, a new one if none is given."""
    value = str(correlation_id) if correlation_id else envelope.new_producer()
    token = _correlation.set(value)
    try:
        yield value
    finally:
        _correlation.reset(token)


@functools.cache
def process_bridge() -> Bridge:
    """The one bridge of this process.

    Settings that cannot be used are logged and replaced by the defaults: an import must not fail.
    """
    try:
        settings = Settings.load()
    except BittenError as e:
        log.error("%s; the bridge goes on with the defaults", e)
        settings = Settings(home=Path(os.environ.get("BITTEN_HOME") or Path.home() / ".bitten"))
    return Bridge(settings)


def _name(value: Any, what: str) -> str:
    text = str(value)
    if not 0 < len(text) <= 255:
        raise RejectedEvent(
            f"{what} has {len(text)} characters, 1 to 255 are allowed",
            rule="maxLength",
            path=what,
            value=text[:40],
        )
    return text


def _script_name() -> str:
    """What the running process is called: pm2's name for it, or the script's."""
    name = os.environ.get("name") if "pm_id" in os.environ else None
    return name or Path(sys.argv[0] if sys.argv else "").stem.strip("-") or "python"


def _plain_object(value: Any) -> Any:
    """msgspec's hook for what it cannot encode: the plain value of a numpy scalar, or TypeError."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        plain = item()
        if isinstance(plain, float):
            envelope.check_value(plain, "data")
        return plain
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _as_sent(event: dict[str, Any]) -> bytes:
    """What a caller sent, as near to JSON as it comes; never fails."""

    def default(value: Any) -> Any:
        return float(value) if isinstance(value, decimal.Decimal) else repr(value)

    try:
        return json.dumps(event, default=default).encode()
    except (TypeError, ValueError, RecursionError):
        return repr(event).encode("utf-8", "backslashreplace")


def _printable(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()
