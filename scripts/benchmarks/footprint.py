"""Memory and processor time of each daemon: idle, at a usual rate, and at full speed."""

from __future__ import annotations

import time
from typing import Any

from running import answer, bench, let_begin

USUAL = 200.0
"""Events/s of a trading system."""


def load(seconds: float, count: int) -> dict[str, Any]:
    """MB and percent of one core, by what goes on."""
    publishing = {
        "idle": [],
        "usual": [str(int(USUAL * seconds)), str(USUAL)],
        "full": [str(count)],
    }
    found = {}
    with bench() as b:
        for name, arguments in publishing.items():
            publisher = b.start_ready("publisher.py", *arguments) if arguments else None
            stored = b.stored()
            before, begin = b.cpu_s(), time.monotonic()
            if publisher is None:
                time.sleep(seconds)
            else:
                let_begin(publisher)
                b.wait_stored(stored + int(arguments[0]))
            elapsed, after = time.monotonic() - begin, b.cpu_s()
            found[name] = b.rss_mb() | {
                f"{daemon}_percent": 100 * (after[daemon] - before[daemon]) / elapsed
                for daemon in before
            }
            if publisher is not None:
                answer(publisher)
    return found
