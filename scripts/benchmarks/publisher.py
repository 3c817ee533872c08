"""A publisher process: `python publisher.py COUNT [RATE]`; prints what it measured as JSON.

Without a rate it publishes as fast as the bus acknowledges; its calls are not timed. With a rate
(events/s) it is paced, and each bridge call is timed. It says "ready" once it is warm, after an
event of its own, and begins when it is sent a line.
"""

from __future__ import annotations

import json
import sys
import time

import mix

from event_bus import event_bridge

MAX_WAITING = 40_000
"""Events ahead of the acknowledgements: the bridge does not block, so the caller must."""


def main() -> None:
    count = int(sys.argv[1])
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    pool = mix.events(min(count, 20_000))
    emit = event_bridge.emit
    emit("user_action", {"action": "warm_up"})
    event_bridge.flush(2.0)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # nobody wants it any more
    call_ns = []
    started = time.time()
    begin = time.monotonic()
    for i in range(count):
        event_type, data, fields = pool[i % len(pool)]
        if rate:
            while time.monotonic() - begin < i / rate:
                time.sleep(0.0005)
            before = time.perf_counter_ns()
            emit(event_type, data, **fields)
            call_ns.append(time.perf_counter_ns() - before)
        else:
            emit(event_type, data, **fields)
            if i % 2_000 == 0:
                while event_bridge.stats()["waiting"] > MAX_WAITING:
                    time.sleep(0.001)
    if "--away" not in sys.argv:
        event_bridge.flush(60.0)
    acked_after_s = time.monotonic() - begin
    print(
        json.dumps(
            {
                "started": started,
                "acked_after_s": acked_after_s,
                "call_ns": sorted(call_ns),
                "stats": event_bridge.stats(),
            }
        )
    )


main()
