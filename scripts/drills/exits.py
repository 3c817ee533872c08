"""Row 26: processes that fork, that have threads, and that end in every way."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

from harness import Trial, drill
from leaver import SOURCE, THREADS
from system import wait_until
from waits import waited_ns

LEAVER = str(Path(__file__).parent / "leaver.py")
NORMAL = ("return", "exception", "sys.exit", "fork", "threads")
ABRUPT = ("os._exit", "SIGKILL", "flush and SIGKILL")
COUNT = 100
EXIT_S = 2.0


@drill(
    row=26,
    name="exits",
    fault="fork after use, 20 threads, return, exception, os._exit and SIGKILL right after"
    " publishing, with the bus up and away",
    long="20 rounds",
    plant="a process takes three seconds to end",
    breaks="to end",
)
def exits(trial: Trial) -> None:
    slowest_s = 0.0
    expected: dict[tuple[str, int], int] = {}
    allowed: dict[tuple[str, int], int] = {}
    for i in range(trial.count(1, 20)):
        for bus_is in ("up", "away"):
            if bus_is == "up":
                trial.start()
            for way in NORMAL + ABRUPT:
                name = f"{i} {bus_is} {way}"
                slowest_s = max(slowest_s, _leave(trial, name, way))
                sure = way in NORMAL or (way == "flush and SIGKILL" and bus_is == "up")
                for key in _writers(name, way):
                    (expected if sure else allowed)[key] = COUNT
            if bus_is == "up" and trial.up is not None:
                trial.wait_all_stored()
                trial.up.stop()
    trial.start()
    trial.settle()
    trial.check()
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for (text,) in trial.system.sql(
        "SELECT data FROM events WHERE source = ? ORDER BY seq", SOURCE
    ):
        data = json.loads(text)
        found[data["process"], data["thread"]].append(data["n"])
    for key, count in expected.items():
        if found[key] != list(range(count)):
            trial.breach(
                f"{key[0]}: {len(found[key])} of {count} events are stored, or not in order"
            )
    gone = 0
    for key, count in allowed.items():
        gone += count - len(found[key])
        if found[key] != list(range(len(found[key]))):
            trial.breach(f"{key[0]}: the events that are stored have a hole or no order")
    trial.note("normal ends", f"{len(expected)} writers of {COUNT} events")
    trial.note("of abrupt ends lost", f"{gone} of {COUNT * len(allowed)} (not promised)")
    trial.note("slowest end s", f"{slowest_s:.2f}")
    trial.expect(slowest_s < EXIT_S, f"a process took {slowest_s:.1f} s to end")


def _writers(name: str, way: str) -> list[tuple[str, int]]:
    more = {
        "fork": [(f"{name} child", 0), (f"{name} after", 0)],
        "threads": [(f"{name} threads", i) for i in range(THREADS)],
    }
    return [(name, 0), *more.get(way, [])]


def _leave(trial: Trial, name: str, way: str) -> float:
    """Run one to its end; how long it took from its last line on, less its waits for a CPU."""
    path = trial.directory / "leaver"
    with path.open("w") as out:
        process = trial.system.popen(
            *(LEAVER, name, way, str(COUNT)),
            stdout=out,
            env=trial.fault_environ("slow-exit") if trial.planted else {},
        )
    wait_until(lambda: path.read_text() or process.poll() is not None, "it has published")
    waited = waited_ns(process.pid)
    at_end = waited
    while process.poll() is None:
        at_end = max(at_end, waited_ns(process.pid))
        time.sleep(0.005)
    ended = time.monotonic()
    text = path.read_text()
    begun = float(text.split()[0]) if text.split() else ended
    return ended - begun - (at_end - waited) / 1e9
