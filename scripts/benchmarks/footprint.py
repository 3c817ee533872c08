"""Memory and processor time of each daemon: idle, at a usual rate, and at full speed."""

from __future__ import annotations

import time
from typing import Any

from running import Bench, bench

USUAL = 200.0
"""Events/s of a trading system."""


def load(seconds: float, count: int) -> dict[str, Any]:
    """MB and percent of one core, by what goes on."""
    found = {}
    with bench() as b:
        for name in ("idle", "usual", "full"):
            before, begin = b.cpu_s(), time.monotonic()
            _do(b, name, seconds, count)
            elapsed, after = time.monotonic() - begin, b.cpu_s()
            found[name] = b.rss_mb() | {
                f"{daemon}_percent": 100 * (after[daemon] - before[daemon]) / elapsed
                for daemon in before
            }
    return found


def _do(b: Bench, name: str, seconds: float, count: int) -> None:
    match name:
        case "idle":
            time.sleep(seconds)
        case "usual":
            b.publish(str(int(USUAL * seconds)), str(USUAL))
        case _:
            b.stored_rate(count)
