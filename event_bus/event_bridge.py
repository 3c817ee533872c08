"""Emit events from existing code: import a function, call it, go on.

    from event_bus.event_bridge import signal_generated
    signal_generated({"signal_id": "S1", "symbol": "EURUSD", "direction": "BUY",
                      "confidence": 85.0, "pattern_type": "LIQUIDITY_SWEEP_REVERSAL"})

A call never raises, never waits for network or disk, and returns the event's id, or None when
the event was refused (the log and the table `rejected_events` say why) or the bridge is
disabled. Events wait in bounded memory, then in a bounded file, while the bus is away. Safe in
threads, after fork and at interpreter exit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

if __package__ in (None, ""):  # `from event_bridge import …` from inside the folder
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from event_bus.correlation import correlation
from event_bus.this_process import process_bridge

__all__ = [
    "balance_update",
    "correlation",
    "disable",
    "emit",
    "enable",
    "fire_command",
    "flush",
    "market_data",
    "pattern_detected",
    "signal_generated",
    "stats",
    "system_health",
    "trade_executed",
    "user_action",
]

_bridge = process_bridge()


class EmitFunction(Protocol):
    """Emit one event of a fixed type.

    `data` is the event's own content, a JSON object. `user_id`, `correlation_id` (default: that
    of the enclosing `correlation`), `causation_id` (the id of the event that led to this one)
    and `source` (default BITTEN_SOURCE or the script's name) are at most 255 characters;
    `timestamp` is Unix seconds, default now. Returns the event's id, or None.
    """

    def __call__(
        self,
        data: Any,
        *,
        user_id: Any = None,
        correlation_id: Any = None,
        causation_id: Any = None,
        source: Any = None,
        timestamp: float | None = None,
    ) -> str | None: ...


def emit(*args: Any, **fields: Any) -> str | None:
    """Emit one event of any type: `emit("my_event", data, user_id=…)`, as `EmitFunction` says."""
    try:
        return _bridge.emit(*args, **fields)
    except TypeError as e:  # called with other arguments than there are: still no reason to raise
        sent = {"args": args, "fields": fields}
        _bridge.refuse(e, args[0] if args else fields.get("event_type", ""), sent, {})
        return None


def _function(event_type: str) -> EmitFunction:
    def function(*args: Any, **fields: Any) -> str | None:
        try:
            return _bridge.emit(event_type, *args, **fields)
        except TypeError as e:
            _bridge.refuse(e, event_type, {"args": args, "fields": fields}, {})
            return None

    function.__name__ = function.__qualname__ = event_type
    function.__doc__ = f"Emit a {event_type} event; see `EmitFunction` and docs/events.md."
    return function


signal_generated = _function("signal_generated")
fire_command = _function("fire_command")
trade_executed = _function("trade_executed")
balance_update = _function("balance_update")
system_health = _function("system_health")
user_action = _function("user_action")
market_data = _function("market_data")
pattern_detected = _function("pattern_detected")


def flush(timeout: float = 5.0) -> bool:
    """Wait until the bus has acknowledged all events emitted so far.

    False after `timeout` seconds, and if events were dropped since the last flush: as with
    fsync, a loss is told once.
    """
    return _bridge.flush(timeout)


def stats() -> dict[str, Any]:
    """Counts of this process: emitted = acked + waiting + dropped.

    `waiting` events are in memory (`queued_bytes`), on their way, or on disk (`spooled`);
    `refused` were no valid events, `refused_by_bus` were refused by the broker alone.
    """
    return _bridge.stats()


def enable() -> None:
    """Emit events again after `disable`."""
    _bridge.enabled = True


def disable() -> None:
    """Make every call return None at once, as BITTEN_ENABLED=0 does."""
    _bridge.enabled = False
