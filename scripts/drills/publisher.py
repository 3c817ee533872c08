"""A publisher of the reference load: `python publisher.py RECORD RATE SEED [--lie]`.

Emits the standard mix at RATE events/s by its own clock until SIGTERM, then flushes and ends.
SIGUSR1 makes it emit BURST events at once, SIGUSR2 pause, and go on with the next one. Each event
carries in `causation_id` how many calls came before it, so that order can be told without the
bus's own numbers.

A call is too slow if it takes over 20 ms in which the process was not waiting for a CPU: eight
publishers share the cores with the daemons, and what the kernel's run queue costs is not the
bridge's doing. The kernel says how long each thread waited (/proc/…/schedstat); the waits of the
delivery thread count as well, for the caller waits when that holds the interpreter.

With --lie it claims acknowledgements it has not got: the checker must notice.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import mix
from record import RecordWriter
from waits import OwnWaits

from event_bus import event_bridge

LIMIT_NS = 20_000_000
BURST = 2_500
FLUSH_S = 30.0
PAUSE_S = 0.02
POOL = 4_000
WAITS = OwnWaits()


def main() -> None:
    path, rate, seed = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    pool = mix.events(POOL, seed)
    stopped: list[int] = []
    bursts: list[int] = []
    pauses: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signal.signal(signal.SIGUSR1, lambda *_: bursts.append(1))
    signal.signal(signal.SIGUSR2, lambda *_: pauses.append(1))
    record = RecordWriter(path)  # with it we are there, and may be signalled
    begin = time.monotonic()
    due = 0
    calls = 0
    while not stopped:
        if len(pauses) % 2:
            _note(record)
            time.sleep(PAUSE_S)
            begin = time.monotonic() - due / rate
            continue
        if bursts:
            bursts.pop()
            for _ in range(BURST):
                calls = _call(record, pool, calls)
        while due <= (time.monotonic() - begin) * rate and not stopped:
            calls = _call(record, pool, calls)
            due += 1
        _note(record)
        time.sleep(max(0.0, due / rate - (time.monotonic() - begin)))
    flushed = event_bridge.flush(FLUSH_S)
    _note(record)
    record["flushed"] = int(flushed)
    record["finished"] = 1


def _call(record: RecordWriter, pool: list[mix.Event], calls: int) -> int:
    event_type, data, fields = pool[calls % len(pool)]
    record["attempted"] = calls + 1
    waited = WAITS.total_ns()
    before = time.perf_counter_ns()
    event_id = None
    try:
        event_id = event_bridge.emit(
            event_type, data, source="drill", causation_id=str(calls), **fields
        )
    except Exception:  # noqa: BLE001 - that is what is counted here
        record["raised"] += 1
    took = time.perf_counter_ns() - before
    if calls:  # the first call of a process loads the validator
        blocked = took - (WAITS.total_ns() - waited)
        record["slow"] += took > LIMIT_NS
        record["blocked"] += blocked > LIMIT_NS
        record["slowest_us"] = max(record["slowest_us"], took // 1000)
        record["slowest_blocked_us"] = max(record["slowest_blocked_us"], blocked // 1000)
    if event_id is not None:
        if not record["returned"]:
            record.name(event_id[:20])
        record["returned"] += 1
    return calls + 1


def _note(record: RecordWriter) -> None:
    stats: dict[str, Any] = event_bridge.stats()
    record["waiting"] = stats["waiting"]
    record["dropped"] = stats["dropped"]
    record["refused"] = stats["refused"]
    lie = stats["waiting"] if "--lie" in sys.argv else 0
    record["acked"] = stats["acked"] + lie


if __name__ == "__main__":
    main()
