"""Row 30: backups made under load, each of them restored and served."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import invariant
from daemons import Up
from harness import Trial, drill
from system import System, wait_until


@drill(
    row=30,
    name="backup",
    fault="backups under load, restored into empty homes and served there",
    long="100 restores",
    plant="one event is taken out of the restored database",
    breaks="events up to seq",
)
def backup(trial: Trial) -> None:
    trial.start()
    load = trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    for number in range(trial.count(2, 100)):
        acked = {r.token: r["acked"] for r in load.records() if r.token}
        home = trial.directory / f"restored-{number}"
        home.mkdir()
        restored = System(home / "home")
        _back_up_and_restore(trial.system, restored, trial.directory / "backups")
        if trial.planted:
            _take_one_out(restored.db)
        _check_prefix(trial, restored.db, number)
        _serve(trial, restored, home)
        _check(trial, restored, acked, number)
        shutil.rmtree(home)
        shutil.rmtree(trial.directory / "backups", ignore_errors=True)
    trial.note("restored", number + 1)
    trial.note("acked in the last", sum(acked.values()))


def _back_up_and_restore(source: System, restored: System, directory: Path) -> None:
    made = source.bitten("backup", "--json", "--to", str(directory))
    assert made.returncode == 0, made.stderr
    put = restored.bitten("restore", json.loads(made.stdout)["path"])
    assert put.returncode == 0, put.stderr


def _take_one_out(db: Path) -> None:
    with closing(sqlite3.connect(db)) as database, database:
        database.execute("DELETE FROM _event WHERE seq = (SELECT max(seq) / 2 FROM _event)")


def _check_prefix(trial: Trial, db: Path, number: int) -> None:
    """Before anything is filled up from the journal."""
    with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as database:
        integrity = database.execute("PRAGMA integrity_check").fetchone()[0]
        count, last = database.execute("SELECT count(*), max(seq) FROM _event").fetchone()
    trial.expect(integrity == "ok", f"integrity_check of backup {number}: {integrity}")
    trial.expect(count == (last or 0), f"backup {number} has {count} events up to seq {last}")


def _serve(trial: Trial, restored: System, directory: Path) -> None:
    """Start both daemons, have one more event stored there, and stop them."""
    up = Up(restored, directory)
    try:
        up.wait_serving()
        emitted = restored.bitten("emit", "user_action", "action=restored")
        trial.expect(emitted.returncode == 0, f"a restored bus takes no events: {emitted.stderr}")
        wait_until(
            lambda: restored.sql("SELECT 1 FROM user_action WHERE action = 'restored'"),
            "the restored home stores a new event",
        )
        up.stop()
    finally:
        up.kill()


def _check(trial: Trial, restored: System, acked: dict[str, int], number: int) -> None:
    settings = restored.settings
    found = invariant.check(
        journal=settings.journal, db=settings.db, spool=settings.spool, records=None
    )
    for text in found.breaches:
        trial.breach(f"backup {number}: {text}")
    ids = {i for (i,) in restored.sql("SELECT event_id FROM events")}
    for token, last in acked.items():
        missing = [n for n in range(1, last + 1) if f"{token}-{n}" not in ids]
        trial.expect(
            not missing,
            f"backup {number}: {len(missing)} events acknowledged before it are missing, from"
            f" {token}-{missing[0] if missing else 0}",
        )
