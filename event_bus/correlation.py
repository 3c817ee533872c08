"""What the events of a thread or task belong to, such as one trade from signal to fill."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from event_bus import envelope

current: ContextVar[str | None] = ContextVar("bitten_correlation", default=None)


@contextlib.contextmanager
def correlation(correlation_id: Any = None) -> Iterator[str]:
    """Events emitted inside carry this correlation id, a new one if none is given."""
    value = str(correlation_id) if correlation_id else envelope.new_producer()
    token = current.set(value)
    try:
        yield value
    finally:
        with contextlib.suppress(ValueError):  # a generator that another task or thread closes
            current.reset(token)
