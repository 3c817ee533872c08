"""What a bridge call takes in the caller's thread."""

from __future__ import annotations

from typing import Any

from running import bench, percentiles

PACED = 5_000.0
BACK_TO_BACK = 1e9
PACES = {"back_to_back": BACK_TO_BACK, "paced": PACED}
PER_CALL = (50, 99, 99.9)
TIGHT_CALLS = 100_000
MIN_PACED = 2_500
"""In one process while the bus is away: half a second of calls, of which the spool fills in the
second half."""


def calls(count: int, processes: int) -> dict[str, Any]:
    """Percentiles in µs by pace and by where the bus is: `up`, `away` (events stay in memory), and
    `filling`, when they go to the spool meanwhile."""
    with bench() as b:
        up = {pace: b.publish(str(count), str(rate)) for pace, rate in PACES.items()}
    found: dict[str, Any] = {}
    for pace, rate in PACES.items():
        each = max(count // processes, MIN_PACED) if rate == PACED else max(count, TIGHT_CALLS)
        away, filling, dropped = [], [], 0
        for _ in range(processes):
            with bench(daemons=()) as b:
                run = b.publish(str(each), str(rate), "--away")
            away += run["call_ns"][: run["spooling_from"]]
            filling += run["call_ns"][run["spooling_from"] :]
            dropped += run["stats"]["dropped"]
        found[pace] = {
            "up": percentiles(up[pace]["call_ns"], *PER_CALL, scale=1e-3),
            "away": percentiles(away, *PER_CALL, scale=1e-3),
            "filling": percentiles(filling, *PER_CALL, scale=1e-3),
            "dropped_while_away": dropped,
        }
    return found
