"""Rows 7, 8 and 9: no room for the journal, for the database, for the spool."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from harness import NotRun, Trial, drill
from system import wait_until

DISK_MB = 48
PAGE_BYTES = 4_096
ANNOUNCED_S = 10.0
RESUMED_S = 5.0


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of DISK_MB at `path`."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotRun(f"cannot mount a file system: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room there is; remove the file to give it back."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return ballast


@drill(
    row=7,
    name="journal-disk-full",
    fault="the journal's disk is full for seconds at a time",
    long="20 times",
    needs=("root",),
    plant="the bus acknowledges what it could not write",
    breaks="acknowledged events",
)
def journal_disk_full(trial: Trial) -> None:
    system = trial.system
    with small_disk(system.home):
        system.environ["BITTEN_DB"] = str(trial.directory / "bitten_events.db")
        up = trial.start(fault="ack-what-is-refused" if trial.planted else "")
        trial.publish()
        wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
        announced_s, resumed_s = [], []
        for _ in range(trial.count(1, 20)):
            bus = up.child("bus")
            ballast = fill(system.home)
            announced_s.append(
                trial.expect_within(
                    ANNOUNCED_S,
                    lambda: (system.status() or {}).get("state") == "storage_full",
                    "status says storage_full",
                )
            )
            time.sleep(trial.rng.uniform(1.0, 4.0))
            freed_at = time.time()
            ballast.unlink()
            resumed_s.append(
                trial.expect_within(
                    RESUMED_S,
                    lambda at=freed_at: trial.next_stored(at),  # type: ignore[misc]
                    "events are stored again after there is room",
                )
            )
            trial.expect(up.child("bus") == bus, "the bus ended on a full disk")
        trial.expect_within(
            RESUMED_S, lambda: (system.status() or {}).get("state") == "ok", "status says ok again"
        )
        trial.note("announced max s", round(max(announced_s), 2))
        trial.note("resumed max s", round(max(resumed_s), 2))
        trial.settle()
        trial.check()


@drill(
    row=8,
    name="database-disk-full",
    fault="the database's disk is full, or its file may not grow (ulimit -f)",
    long="10 times each",
    needs=("root",),
    plant="the bus finds nothing wrong",
    breaks="status says that the collector cannot write",
)
def database_disk_full(trial: Trial) -> None:
    system = trial.system
    disk = trial.directory / "disk"
    with small_disk(disk):
        system.environ["BITTEN_DB"] = str(disk / "bitten_events.db")
        up = trial.start(fault="never-red" if trial.planted else "")
        load = trial.publish()
        wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
        resumed_s = []
        for round_ in range(2 * trial.count(1, 10)):
            collector = wait_until(lambda: up.child("collect"), "the collector runs")
            with _full(disk) if round_ % 2 == 0 else _limited(collector):
                trial.expect_within(
                    ANNOUNCED_S,
                    lambda: "data_collector" in trial.problems(),
                    "status says that the collector cannot write",
                )
                stored, acked = trial.last_stored(), load.acked()
                wait_until(lambda n=acked: load.acked() > n + 1_000, "the bus goes on")
                now = trial.last_stored()
                trial.expect(
                    now == stored,
                    f"the cursor moved from {stored} to {now} while nothing could be stored,"
                    f" {'the disk being full' if round_ % 2 == 0 else 'the file size limited'}",
                )
                freed_at = time.time()
            resumed_s.append(
                trial.expect_within(
                    ANNOUNCED_S,
                    lambda at=freed_at: trial.next_stored(at),  # type: ignore[misc]
                    "events are stored again after there is room",
                )
            )
            trial.expect(up.child("collect") == collector, "the collector ended")
        trial.note("resumed max s", round(max(resumed_s), 2))
        trial.settle()
        trial.check()


@contextlib.contextmanager
def _full(disk: Path) -> Iterator[None]:
    ballast = fill(disk)
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def _limited(process: psutil.Process) -> Iterator[None]:
    """`ulimit -f`, set on a running process: less than one page of any file can be written, so that
    it is no way out to begin the WAL anew."""
    before = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES, before[1]))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, before)


@drill(
    row=9,
    name="spool-full",
    fault="the bus is away until the spool and the memory of every publisher are full",
    long="5 times",
    plant="bridges do not count what they drop",
    breaks="the bus was told of",
)
def spool_full(trial: Trial) -> None:
    system = trial.system
    system.environ |= {
        "BITTEN_SPOOL_MAX_BYTES": "100_000",
        "BITTEN_OUTBOX_MAX_EVENTS": "500",
    }
    if trial.planted:
        system.environ |= trial.fault_environ("uncounted-drops")
    up = trial.start()
    load = trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    for _ in range(trial.count(1, 5)):
        up.stop()
        attempted = load.attempted()
        # Each has room for about 800 events of some 150 bytes each; twice that comes.
        wait_until(lambda n=attempted: load.attempted() > n + 8 * 1_600, "the bounds are reached")
        up = trial.start()
        back_at = time.time()
        wait_until(lambda at=back_at: trial.next_stored(at), "events are stored again")
    trial.settle()
    figures = trial.check().figures
    # By what is not there, and not by what the bridges say of it.
    dropped = load.attempted() - figures.refused - figures.stored
    trial.expect(dropped > 0, "nothing was dropped: the bounds were not reached")
    told = trial.system.sql(
        "SELECT sum(n) FROM (SELECT max(dropped_total) AS n FROM bridge_loss GROUP BY producer)"
    )[0][0]
    trial.expect(told == dropped, f"{dropped} events were dropped, the bus was told of {told}")
    trial.note("dropped and told", told)
