"""What is kept of an event that was refused: the data of an `event_rejected`."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from event_bus.errors import RejectedEvent

MAX_RAW_BYTES_A_MINUTE = 64 << 10
"""Of one key, of what it may not publish at all."""


def rejection(
    raw: bytes,
    error: RejectedEvent,
    *,
    event_type: str = "",
    event_id: str = "",
    source: str = "",
    max_raw_bytes: int | None = None,
) -> dict[str, Any]:
    """The reason, and of the bytes that were sent at most `max_raw_bytes` (default: all)."""
    fields = {
        "reason": str(error),
        "rule": error.rule,
        "path": error.path,
        "value": error.value,
        "event_type": event_type,
        "event_id": event_id,
        "source": source,
    }
    return {
        **{name: value for name, value in fields.items() if value},
        "raw": base64.b64encode(raw[:max_raw_bytes]).decode(),
        "raw_bytes": len(raw),
    }


class RawAllowance:
    """How much is kept of what keys may not publish. `monotonic` gives seconds."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._kept: Counter[str] = Counter()
        self._minute_ends = 0.0

    def spend(self, key: str, size: int) -> int:
        """How many of `size` bytes that this key sent are kept."""
        now = self._monotonic()
        if now >= self._minute_ends:
            self._kept.clear()
            self._minute_ends = now + 60.0
        kept = min(size, MAX_RAW_BYTES_A_MINUTE - self._kept[key])
        self._kept[key] += kept
        return kept
