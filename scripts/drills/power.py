"""Row 4: power loss. What was not synced is gone, or there in part, in any combination."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

from daemons import with_fault
from disk import Disk, Op, load
from harness import Trial, drill
from system import System, wait_until

from collector.store import Store
from event_bus import envelope
from event_bus.event_schema import Registry
from event_bus.journal import Journal

SMALL_JOURNAL_BYTES = 200_000
"""It is trimmed right behind the collector then, as a journal that was held past its limits."""


@drill(
    row=4,
    name="power-loss",
    fault="power is lost at any moment: writes that were not synced are dropped or torn",
    long="400 images of the disk",
    plant="a disk that answers a sync before it has done it",
    breaks="acked are gone",
)
def power_loss(trial: Trial) -> None:
    system = trial.system
    system.environ["BITTEN_JOURNAL_MAX_BYTES"] = str(SMALL_JOURNAL_BYTES)
    record = trial.directory / ("ops-lies" if trial.planted else "ops")
    environ = with_fault(system.environ, f"record:{record}")
    bus = system.popen("-m", "event_bus", "bus", env=environ)
    wait_until(lambda: system.status(0.2), "the bus answers")
    collector = system.popen("-m", "event_bus", "collect", env=environ)
    wait_until(lambda: _status(system)["consumers"], "the collector asks for events")
    publishers = trial.publish()
    time.sleep(trial.seconds(2, 8))
    # A collector that was away catches up: the journal is cut right behind it.
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    collector.send_signal(signal.SIGTERM)
    assert collector.wait(10) == 0, collector.communicate()[0]
    away_from = _status(system)["last_seq"]
    time.sleep(trial.seconds(3, 8))
    publishers.stop()
    collector = system.popen("-m", "event_bus", "collect", env=environ)
    wait_until(trial.all_stored, "the database holds all of the journal")
    caught_up_ns = time.monotonic_ns()
    wait_until(lambda: _status(system)["first_seq"] > away_from, "the journal is cut behind it")
    # The bus first: an event of its own must not come between the collector's end and its own.
    bus.send_signal(signal.SIGTERM)
    assert bus.wait(10) == 0, bus.communicate()[0]
    wait_until(lambda: trial.last_stored() == _last_seq(system), "its last event is stored")
    collector.send_signal(signal.SIGTERM)
    assert collector.wait(10) == 0, collector.communicate()[0]
    trial.check()
    _examine(trial, load(sorted(trial.directory.glob(f"{record.name}-*"))), caught_up_ns)


def _status(system: System) -> dict[str, Any]:
    status = system.status()
    assert status is not None, "the bus does not answer"
    return status


def _last_seq(system: System) -> int:
    """Of a journal whose bus has ended."""
    with contextlib.closing(sqlite3.connect(system.settings.journal)) as db:
        return int(db.execute("SELECT max(first_seq + count - 1) FROM batch").fetchone()[0])


def _examine(trial: Trial, ops: list[Op], caught_up_ns: int) -> None:
    """Build what a power loss may have left at random moments, and recover from it.

    Half of the moments are among the few acts after the collector had caught up.
    """
    written = dict(trial.system.sql("SELECT seq, event_id FROM events"))
    late = range(next(i for i, op in enumerate(ops) if op.at_ns > caught_up_ns), len(ops))
    half = trial.count(20, 200)
    moments = sorted({*trial.rng.sample(range(len(ops)), half), *trial.rng.choices(late, k=half)})
    started = set(trial.rng.sample(moments, trial.count(2, 10)))
    disk = Disk()
    acked = done = 0
    for moment in moments:
        for op in ops[done : moment + 1]:
            if op.kind == "mark":
                acked = op.offset
            disk.apply(op)
        done = moment + 1
        image = trial.directory / "image"
        shutil.rmtree(image, ignore_errors=True)
        image.mkdir()
        disk.crash(image, trial.rng)
        try:
            recovered = _start_on(image) if moment in started else _open_on(image)
        except Exception as e:  # noqa: BLE001 - whatever it is, recovery has failed
            trial.breach(f"at act {moment}: recovery fails: {type(e).__name__}: {e}")
            continue
        lost = [s for s in range(1, acked + 1) if recovered.get(s) != written[s]]
        if lost:
            trial.breach(f"at act {moment}: {len(lost)} of {acked} acked are gone, from {lost[0]}")
    trial.note("acts on the disk", len(ops))
    trial.note("images", len(moments))
    trial.note("of them with real daemons", len(started))


def _open_on(image: Path) -> dict[int, str]:
    """Seq to event id, by the product's own opening of both files; integrity is checked."""
    found: dict[int, str] = {}
    if (image / "bitten_events.db").exists():
        store = Store(image / "bitten_events.db", Registry())
        last = store.last_seq
        store.close()
        with sqlite3.connect(image / "bitten_events.db") as db:
            _expect_ok(db, "the database")
            found = dict(db.execute("SELECT seq, event_id FROM events"))
        if sorted(found) != list(range(1, last + 1)):
            raise AssertionError(f"the database says {last} and holds {len(found)} rows")
    if (image / "journal.db").exists():
        journal = Journal(image / "journal.db")
        found |= _journal_ids(journal)
        journal.close()
        with sqlite3.connect(image / "journal.db") as db:
            _expect_ok(db, "the journal")
    return found


def _journal_ids(journal: Journal) -> dict[int, str]:
    found: dict[int, str] = {}
    seq = journal.first_seq
    while seq <= journal.last_seq:
        for batch in journal.read(seq, 1 << 20):
            for number, event in enumerate(envelope.decode_lines(batch.body), batch.first_seq):
                found[number] = event.event_id
            seq = batch.first_seq + batch.count
    return found


def _expect_ok(db: sqlite3.Connection, what: str) -> None:
    result: Any = db.execute("PRAGMA integrity_check").fetchone()[0]
    if result != "ok":
        raise AssertionError(f"{what} is damaged: {result}")


def _start_on(image: Path) -> dict[int, str]:
    """Seq to event id, after the daemons have started on the image and stored everything."""
    system = System(image)
    try:
        system.start_bus()
        system.start_collector()
        system.wait_stored()
        return dict(system.sql("SELECT seq, event_id FROM events"))
    finally:
        system.close()
