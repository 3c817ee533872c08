"""A publisher process: `python publisher.py COUNT [RATE] [OPTION …]`; prints as JSON what it
measured.

Without a rate it publishes as fast as the bus acknowledges; its calls are not timed. With a rate
(events/s) it is paced, and each bridge call is timed. It looks at the clock every half millisecond:
above 2,000/s events come in bursts.

It says "ready" once it is warm, after an event of its own, and begins when it is sent a line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator

import mix

import event_bus.delivery  # noqa: F401 - at its first event a bridge would import it meanwhile
from event_bus import event_bridge

MAX_WAITING = 40_000
"""Events ahead of the acknowledgements: the bridge does not block, so the caller must."""

DAY_S = 86_400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("rate", type=float, nargs="?", default=0.0)
    parser.add_argument("--away", action="store_true", help="there is no bus: wait for nothing")
    parser.add_argument("--type", default="", help="events of that type alone")
    parser.add_argument("--first", type=int, help="new trades, from that event's on")
    parser.add_argument(
        "--days", type=float, default=0.0, help="timestamps of so many days up to now"
    )
    options = parser.parse_args()
    count, rate = options.count, options.rate
    pool = mix.events(min(count, 20_000), event_type=options.type)
    events: Iterator[mix.Event] = itertools.cycle(pool)
    if options.first is not None:
        events = mix.endless(pool, options.first)
    if options.days:
        events = dated(events, count, options.days * DAY_S)
    emit = event_bridge.emit
    emit("user_action", {"action": "warm_up"}, source="warm_up")
    if rate:  # the first call of each type compiles its schema
        for event_type, data, fields in {e[0]: e for e in pool}.values():
            emit(event_type, data, **fields, source="warm_up")
    if not options.away:
        event_bridge.flush(2.0)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # nobody wants it any more
    call_ns: list[int] = []
    spooling_from = count
    started = time.time()
    begin = time.monotonic()
    cpu = time.process_time()
    for i, (event_type, data, fields) in enumerate(itertools.islice(events, count)):
        if rate:
            while time.monotonic() - begin < i / rate:
                time.sleep(0.0005)
            before = time.perf_counter_ns()
            emit(event_type, data, **fields)
            call_ns.append(time.perf_counter_ns() - before)
            if i % 100 == 99 and spooling_from == count and event_bridge.stats()["spooled"]:
                spooling_from = i
        else:
            emit(event_type, data, **fields)
            if i % 2_000 == 0:
                while event_bridge.stats()["waiting"] > MAX_WAITING:
                    time.sleep(0.001)
    called_after_s = time.monotonic() - begin
    if not options.away:
        event_bridge.flush(60.0)
    acked_after_s = time.monotonic() - begin
    print(
        json.dumps(
            {
                "started": started,
                "called_after_s": called_after_s,
                "acked_after_s": acked_after_s,
                "cpu_s": time.process_time() - cpu,
                "call_ns": call_ns,
                "spooling_from": spooling_from,
                "stats": event_bridge.stats(),
            }
        )
    )


def dated(events: Iterable[mix.Event], count: int, seconds: float) -> Iterator[mix.Event]:
    """The events, evenly over the last `seconds`; the last one is now."""
    begin = time.time() - seconds
    for i, (event_type, data, fields) in enumerate(events, 1):
        yield event_type, data, {**fields, "timestamp": begin + seconds * i / count}


main()
