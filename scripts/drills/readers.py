"""Rows 10 and 11: analysts who hold the database."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from harness import Trial, drill
from system import wait_until

ANNOUNCED_S = 10.0
CAUGHT_UP_S = 60.0
TRUNCATED_S = 60.0
WAL_ALARM_BYTES = 64 << 20


@drill(
    row=10,
    name="database-locked",
    fault="an analyst's BEGIN IMMEDIATE holds the database",
    long="3 times for 2 minutes",
    plant="the bus finds nothing wrong",
    breaks="status says that the database is locked",
)
def database_locked(trial: Trial) -> None:
    up = trial.start(fault="never-red" if trial.planted else "")
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    collector = up.child("collect")
    for _ in range(trial.count(1, 3)):
        analyst = sqlite3.connect(trial.system.db, isolation_level=None)
        analyst.execute("BEGIN IMMEDIATE")
        told_s = trial.expect_within(
            ANNOUNCED_S,
            lambda: "locked" in trial.problems(),
            "status says that the database is locked",
        )
        time.sleep(trial.seconds(3, 120))
        analyst.execute("ROLLBACK")
        analyst.close()
        freed_at = time.time()
        caught_up_s = trial.expect_within(
            CAUGHT_UP_S,
            lambda at=freed_at: trial.next_stored(at),  # type: ignore[misc]
            "the collector has caught up",
        )
        trial.expect_within(ANNOUNCED_S, lambda: not trial.problems(), "status says ok again")
        trial.note("announced s", round(told_s, 1))
        trial.note("caught up s", round(caught_up_s, 1))
    trial.expect(up.child("collect") == collector, "the collector ended")


@drill(
    row=11,
    name="endless-reader",
    fault="an open SELECT keeps the write-ahead log from being reset",
    long="once, to twice the alarm's size",
    plant="the collector does not cut its log",
    breaks="the WAL is cut",
)
def endless_reader(trial: Trial) -> None:
    trial.start(fault="wal-uncut" if trial.planted else "")
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    wal = Path(f"{trial.system.db}-wal")
    reader = sqlite3.connect(f"file:{trial.system.db}?mode=ro", uri=True)
    rows = reader.execute("SELECT * FROM events")
    rows.fetchone()
    grown = WAL_ALARM_BYTES * (1 if trial.short else 2)
    wait_until(lambda: wal.stat().st_size > grown, f"the WAL is over {grown >> 20} MB", 300)
    trial.expect_within(
        ANNOUNCED_S, lambda: "-wal has" in trial.problems(), "status says that the WAL grows"
    )
    rows.close()
    reader.close()
    took = trial.expect_within(
        TRUNCATED_S, lambda: wal.stat().st_size <= WAL_ALARM_BYTES, "the WAL is cut"
    )
    trial.expect_within(ANNOUNCED_S, lambda: not trial.problems(), "status says ok again")
    trial.note("WAL MB", grown >> 20)
    trial.note("cut after s", round(took, 1))
