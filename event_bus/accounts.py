"""A bridge's accounts of what was not taken: events that were refused, and events it dropped."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from event_bus.plain import as_rejection, as_sent, as_text, printable
from event_bus.rejection import rejection

MAX_RAW_BYTES = 700 << 10
"""What is kept of a refused event: it travels in base64 within the limit of an event."""


class Loss(msgspec.Struct):
    """Events dropped since the bus was last told, for the first one's reason."""

    reason: str
    first_at: float = msgspec.field(default_factory=time.time)
    last_at: float = 0.0
    events: int = 0

    def add(self, events: int) -> None:
        self.events += events
        self.last_at = time.time()

    def account(self, producer: str, dropped_total: int) -> dict[str, Any]:
        """Data of a `bridge_loss`."""
        return {
            "producer": producer,
            "dropped": self.events,
            "dropped_total": dropped_total,
            "reason": self.reason[:255],
            "first_at": self.first_at,
            "last_at": self.last_at,
        }


def refusal(
    error: Exception, event_type: Any, data: Any, fields: dict[str, Any], source: str
) -> dict[str, Any]:
    """Data of an `event_rejected`, from what a call was given, whatever that is.

    `source` is that of an event that names none.
    """
    name = event_type if isinstance(event_type, str) else as_text(event_type)
    return rejection(
        as_sent({"event_type": event_type, **fields, "data": data}),
        as_rejection(error),
        event_type=printable(name)[:64],
        source=printable(fields.get("source", source))[:255],
        max_raw_bytes=MAX_RAW_BYTES,
    )
