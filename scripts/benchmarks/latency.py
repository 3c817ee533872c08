"""How long after the bridge call an event is where it is wanted, at several rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from running import Bench, answer, bench, percentiles

KINDS = ("socket", "subscriber", "stored")
"""A plain SUB socket on port 5570, event_bus.subscriber, and a row that another process reads."""


def latency(rates: Iterable[int], seconds: float, min_events: int) -> dict[str, Any]:
    """Percentiles in ms, the rate that was achieved, and how many events were missed."""
    found: dict[str, Any] = {kind: {} for kind in KINDS}
    for rate in rates:
        count = max(int(rate * seconds), min_events)
        with bench() as b:
            for kind in KINDS:  # one after the other: each reader takes its share of the cores
                found[kind][str(rate)] = one(b, kind, count, rate)
    return found


def one(b: Bench, kind: str, count: int, rate: float) -> dict[str, float]:
    """The same at one rate, on a bus that runs."""
    reader = b.start_ready("subscriber.py", kind, str(count))
    published = b.publish(str(count), str(rate))
    seconds = answer(reader)
    return {
        **percentiles(seconds, 50, 99, scale=1e3),
        "rate": count / published["called_after_s"],
        "missed": count - len(seconds),
    }
