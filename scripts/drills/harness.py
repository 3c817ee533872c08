"""How drills are written, registered and run.

A drill is a function that takes a `Trial`, registered in the table `DRILLS` by `@drill(…)`:

    @drill(
        row=7,                                  # of the table of faults
        name="journal-disk-full",
        fault="the journal's disk is full",
        long="20 times",                        # what --length multiplies; a word for the list
        needs=("root",),                        # "root" or programs; else it is listed as not run
        plant="a broker that acknowledges what it could not write",
        breaks="acknowledged events",           # part of what is then said; see `run`
    )
    def journal_disk_full(trial: Trial) -> None:
        trial.start(fault="ack-before-fsync" if trial.planted else "")   # `bitten up`
        trial.publish()                         # the reference load; more in load.py
        …                                       # inject the fault, by trial.rng where it is random
        trial.expect(condition, "what is said if it does not hold")
        trial.expect_within(10, condition, "status shows storage_full")  # the announcement
        trial.note("resumed s", 1.7)            # a figure of this drill alone

After the function returns, the runner calls `trial.settle()` (publishers flush and end, spools are
adopted, all is stored, daemons stop) and `trial.check()` (INV, invariant.py), unless the drill
did so itself. A drill that cannot run here raises `NotRun(reason)`. What else is raised counts
as broken. Seeds: `trial.rng` is all the randomness there is, and `--seed` sets it.

Lengths: `trial.count(short, full)` and `trial.seconds(short, full)` give what fits: the first
with `--short`, else the second times `--length`.

Faults inside the product's processes are put there from outside: `faults.py`.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from daemons import Up, with_fault
from invariant import Lost, Verdict, check
from load import Load
from system import System, wait_until

SETTLE_S = 120.0
NOT_RUN = "not run"


class NotRun(Exception):
    """This drill cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    row: int
    name: str
    fault: str
    long: str
    plant: str
    breaks: str
    needs: tuple[str, ...] = ()
    run: Callable[[Trial], None]


DRILLS: list[Drill] = []


def drill(**about: Any) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        DRILLS.append(Drill(run=function, **about))
        DRILLS.sort(key=lambda d: d.row)
        return function

    return register


def last_stored(system: System) -> int:
    """The last seq that a system's database has dealt with."""
    return int(
        system.sql(
            "SELECT max(coalesce((SELECT max(seq) FROM events), 0),"
            " coalesce((SELECT max(last_seq) FROM _gap), 0))"
        )[0][0]
    )


def all_stored(system: System) -> bool:
    """True once a system's database has all that its bus has."""
    status = system.status(1.0)
    try:
        return status is not None and last_stored(system) >= status["last_seq"]
    except sqlite3.Error:  # being made, moved or locked just now
        return False


class Trial:
    """One run of one drill, in a home of its own."""

    def __init__(
        self, directory: Path, *, seed: int, short: bool, length: float, planted: bool
    ) -> None:
        self.directory = directory
        self.rng = random.Random(seed)
        self.short = short
        self.planted = planted
        self.system = System(directory / "home")
        self.up: Up | None = None
        self.load: Load | None = None
        self.lost = Lost()
        self.breaches: list[str] = []
        self.notes: dict[str, Any] = {}
        self.verdict: Verdict | None = None
        self._length = length

    def count(self, short: int, full: int) -> int:
        return short if self.short else max(1, round(full * self._length))

    def seconds(self, short: float, full: float) -> float:
        return short if self.short else full * self._length

    def start(self, *, fault: str = "") -> Up:
        """`bitten up` in this home, serving; with a fault of faults.py in its daemons."""
        self.up = Up(self.system, self.directory, fault=fault)
        self.up.wait_serving()
        return self.up

    def fault_environ(self, fault: str) -> dict[str, str]:
        """What puts a fault of faults.py into processes that are not `bitten up`'s."""
        return with_fault(self.system.environ, fault)

    def publish(self, *, lie: bool = False, **load: Any) -> Load:
        """Start the reference load."""
        self.load = Load(self.system, self.directory, self.rng, lie=lie, **load)
        return self.load

    def breach(self, text: str) -> None:
        self.breaches.append(text)

    def expect(self, holds: Any, otherwise: str) -> None:
        if not holds:
            self.breach(otherwise)

    def expect_within(self, timeout_s: float, condition: Callable[[], Any], what: str) -> float:
        """How many seconds it took until `condition` held; a breach if it did not."""
        begin = time.monotonic()
        try:
            wait_until(condition, what, timeout_s)
        except AssertionError as e:
            self.breach(str(e))
        return time.monotonic() - begin

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value

    def next_stored(self, published_after: float) -> bool:
        """True once an event that a publisher emitted after that time is in the database."""
        try:
            return bool(
                self.system.sql(
                    "SELECT 1 FROM events WHERE timestamp > ? AND source = 'drill' LIMIT 1",
                    published_after,
                )
            )
        except sqlite3.Error:  # being made, moved or locked just now
            return False

    def settle(self) -> None:
        """End all publishers in good order, let everything be stored, stop the daemons."""
        if self.load is not None:
            self.load.stop()
        self.wait_all_stored()
        if self.up is not None:
            self.up.stop()

    def wait_all_stored(self) -> None:
        """Wait until the bus has taken in every spool and the database holds all it has."""
        spool = self.system.settings.spool
        wait_until(lambda: not list(spool.glob("*.ndjson")), "the spool is empty", SETTLE_S)
        wait_until(self.all_stored, "the database holds all of the journal", SETTLE_S)

    def all_stored(self) -> bool:
        """True once the database has all that the bus has."""
        return all_stored(self.system)

    def problems(self) -> str:
        """What `bitten status` says is wrong; empty if nothing is."""
        status = self.system.status()
        if status is None:
            return "the bus does not answer"
        return " ".join(p["message"] for p in status["problems"])

    def last_stored(self) -> int:
        """The last seq that the database has dealt with."""
        return last_stored(self.system)

    def check(self) -> Verdict:
        settings = self.system.settings
        self.verdict = check(
            journal=settings.journal,
            db=settings.db,
            spool=settings.spool,
            records=self.load.records() if self.load else None,
            lost=self.lost,
        )
        return self.verdict

    def close(self) -> None:
        if self.load is not None:
            self.load.kill()
        if self.up is not None:
            self.up.kill()
        self.system.close()


@dataclass
class Result:
    row: int
    drill: str
    result: str
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)


def unmet(needs: tuple[str, ...]) -> str:
    """What a drill needs and this machine does not give; empty if it can run."""
    for need in needs:
        if need == "root":
            if os.geteuid() != 0:
                return "needs root"
        elif shutil.which(need) is None:
            return f"needs {need}, which is not installed"
    return ""


def run(chosen: Drill, *, seed: int, short: bool, length: float, planted: bool) -> Result:
    """Run a drill. `held` or `BROKEN`; with the plant BROKEN only by what the plant is there to
    break, and else `missed`."""
    result = Result(chosen.row, chosen.name, NOT_RUN, unmet(chosen.needs))
    if result.reason:
        return result
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bitten-drill-") as directory:
        trial = Trial(Path(directory), seed=seed, short=short, length=length, planted=planted)
        try:
            chosen.run(trial)
            if trial.verdict is None:
                trial.settle()
                trial.check()
        except NotRun as e:
            result.reason = str(e)
            return result
        except Exception as e:  # noqa: BLE001 - a drill that ends badly is a broken one
            traceback.print_exc()
            trial.breach(f"{type(e).__name__}: {e}")
        finally:
            trial.close()
    if trial.verdict is not None:
        result.figures = asdict(trial.verdict.figures)
        result.breaches = trial.verdict.breaches
    result.breaches = trial.breaches + result.breaches
    if planted:
        result.breaches.sort(key=lambda text: chosen.breaks not in text)  # its own words first
        found = result.breaches and chosen.breaks in result.breaches[0]
        result.result = "BROKEN" if found else "missed"
    else:
        result.result = "BROKEN" if result.breaches else "held"
    result.notes = trial.notes
    result.seconds = round(time.monotonic() - begin, 1)
    return result
