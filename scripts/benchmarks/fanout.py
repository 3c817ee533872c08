"""The rate end to end while live subscribers read everything."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from running import answer, bench


def subscribers(numbers: Sequence[int], count: int, rounds: int) -> dict[str, Any]:
    """By number of SUB sockets, all in one process on the same cores: events/s of each round, and
    the share of the events that they got. A socket that is too slow misses some, by design."""
    found: dict[str, Any] = {str(number): {"rates": [], "shares": []} for number in numbers}
    for _ in range(rounds):
        for number in numbers:
            rate, share = _one(number, count)
            found[str(number)]["rates"].append(rate)
            found[str(number)]["shares"].append(share)
    return {
        number: {"rates": f["rates"], "received_share": statistics.median(f["shares"])}
        for number, f in found.items()
    }


def _one(number: int, count: int) -> tuple[float, float]:
    with bench() as b:
        if not number:
            return b.stored_rate(count), 1.0
        drain = b.start_ready("drain.py", str(number))
        rate = b.stored_rate(count)
        return rate, min(1.0, float(answer(drain)) / (count * number))
