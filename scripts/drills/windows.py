"""Row 3: SIGKILL inside each critical window, by processes that kill themselves there."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from daemons import Up
from harness import Trial, drill
from invariant import check
from killpoints import POINTS, Point
from system import System, wait_until

REACHED_S = 60.0
QUICK = ("append", "fsync", "ack", "store")
SMALL_JOURNAL_BYTES = 1 << 20
SMALL_SPOOL_BYTES = 700_000


@drill(
    row=3,
    name="windows",
    fault="SIGKILL inside append, fsync, publish, ack, cursor, trim, store and spool",
    long=f"{len(POINTS)} points",
    plant="the bus acknowledges before its fsync",
    breaks="acknowledged events",
)
def windows(trial: Trial) -> None:
    trial.system.environ["BITTEN_JOURNAL_MAX_BYTES"] = str(SMALL_JOURNAL_BYTES)
    points = _chosen(trial)
    trial.start()
    load = trial.publish()
    load.wait_started()
    reached = []
    for point in points:
        hit = trial.rng.randint(1, point.most)
        once = trial.directory / "once"
        once.touch()
        print(f"  {point.program} at {point.name}, hit {hit}", file=sys.stderr, flush=True)
        fault = f"kill:{point.name}:{hit}:{once}"
        if trial.planted:
            fault = f"ack-before-fsync;{fault}"
        try:
            _die_at(trial, point, fault, once)
            reached.append(point.name)
        except AssertionError as e:
            once.unlink(missing_ok=True)
            trial.breach(f"{point.name} (hit {hit}): {e}")
    trial.note("points covered", f"{len(reached)} of {len(points)}")
    if trial.short:
        trial.note("they are", ", ".join(reached))


def _chosen(trial: Trial) -> list[Point]:
    """All; in the quick form one each of some windows, in the planted one where it shows."""
    if trial.planted:
        return [p for p in POINTS if p.name == "append-before"]
    if not trial.short:
        return POINTS * trial.count(1, 1)
    quick = [[p for p in POINTS if p.window == w and not p.needs] for w in QUICK]
    return [trial.rng.choice(points) for points in quick]


def _die_at(trial: Trial, point: Point, fault: str, once: Path) -> None:
    assert trial.up is not None
    assert trial.load is not None
    if point.needs == "new":
        _die_in_a_new_home(trial, fault, once)
        return
    trial.up.stop()
    if point.needs == "orphan":
        _leave_orphan(trial)
    if point.program == "publisher.py":
        victim = trial.load.one_more(fault=fault, BITTEN_SPOOL_MAX_BYTES=str(SMALL_SPOOL_BYTES))
        if point.needs == "full":
            for _ in range(2):
                victim.send_signal(signal.SIGUSR1)
                time.sleep(0.5)  # bursts are counted by signal, which do not queue
        trial.start()
    else:
        trial.start(fault=fault)
    wait_until(lambda: not once.exists(), f"{point.program} comes to {point.name}", REACHED_S)
    if point.program == "publisher.py":
        assert victim.wait(10) == -signal.SIGKILL
    died_at = time.time()
    wait_until(lambda: trial.next_stored(died_at), f"events are stored after {point.name}")


def _leave_orphan(trial: Trial) -> None:
    """A publisher that is killed while the bus is away and its events wait in its spool."""
    assert trial.load is not None
    spool = trial.system.settings.spool
    before = set(spool.glob("*.ndjson"))
    process = trial.load.one_more()
    token = wait_until(lambda: trial.load and trial.load.records()[-1].token, "it has emitted")
    wait_until(lambda: (spool / f"{token}.ndjson") in set(spool.glob("*.ndjson")) - before, "spool")
    process.kill()
    process.wait()


def _die_in_a_new_home(trial: Trial, fault: str, once: Path) -> None:
    """While the files themselves are made; then an event must get through."""
    system = System(trial.directory / f"new-{time.monotonic_ns()}")
    up = Up(system, trial.directory, fault=fault)
    try:
        wait_until(lambda: not once.exists(), "the file is being made", REACHED_S)
        up.wait_serving()
        done = system.bitten("emit", "user_action", "action=x")
        assert done.returncode == 0, done.stderr
        system.wait_stored()
        up.stop()
    finally:
        up.kill()
        system.close()
    settings = system.settings
    verdict = check(journal=settings.journal, db=settings.db, spool=settings.spool, records=None)
    for text in verdict.breaches:
        trial.breach(text)
