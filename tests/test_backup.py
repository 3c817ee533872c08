"""Backups made under load and in trouble, and what comes back from them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import System, wait_until
from disks import small_disk

from collector.backup_schedule import KEPT, BackupSchedule
from collector.manifest import Manifest
from collector.restore import restore
from event_bus import database
from event_bus.errors import BackupError
from event_bus.settings import Settings

PUBLISH = """
import sys
from event_bus import event_bridge
first, count = int(sys.argv[1]), int(sys.argv[2])
for i in range(first, first + count):
    assert event_bridge.market_data({"symbol": "P", "bid": 1.0, "ask": 2.0, "volume": i})
    while event_bridge.stats()["waiting"] > 2_000:
        event_bridge.flush(0.05)
assert event_bridge.flush(60), event_bridge.stats()
"""

STREAM = """
import itertools, time
from event_bus import event_bridge
for i in itertools.count():
    event_bridge.market_data({"symbol": "S", "bid": 1.0, "ask": 2.0, "volume": i})
    if i % 20 == 0:
        time.sleep(0.005)
"""


@pytest.fixture
def running(system: System) -> System:
    """A home with bus and collector."""
    system.start_bus()
    system.start_collector()
    system.wait_stored()  # a database without tables yet is not backed up
    return system


@pytest.fixture
def other(tmp_path: Path) -> Iterator[System]:
    """An empty home, to restore into."""
    made = System(tmp_path / "other")
    yield made
    made.close()


def publish(system: System, first: int, count: int) -> None:
    done = system.script(PUBLISH, str(first), str(count), timeout=90)
    assert done.returncode == 0, done.stderr


def codes(system: System) -> set[str]:
    status = system.status() or {"problems": []}
    return {problem["code"] for problem in status["problems"]}


def make(system: System, *argv: str) -> dict[str, Any]:
    done = system.bitten("backup", "--json", *argv)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def volumes(system: System, symbol: str) -> list[int]:
    rows = system.sql("SELECT volume FROM market_data WHERE symbol = ? ORDER BY seq", symbol)
    return [n for (n,) in rows]


def in_journal(path: Path) -> tuple[int, int]:
    """The first and last seq of a journal; fails if there is a hole or an error between."""
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = db.execute("SELECT first_seq, count FROM batch ORDER BY first_seq").fetchall()
    finally:
        db.close()
    for (first, count), (following, _) in itertools.pairwise(rows):
        assert first + count == following
    return rows[0][0], rows[-1][0] + rows[-1][1] - 1


def in_wal_mode(path: Path) -> bool:
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return bool(db.execute("PRAGMA journal_mode").fetchone() == ("wal",))
    finally:
        db.close()


def names(folder: Path) -> list[str]:
    """What lies in a directory of backups, its lock left out."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock") if folder.exists() else []


def test_backup_under_load_is_restored_and_goes_on_in_an_empty_home(
    running: System, other: System
) -> None:
    stream = running.popen("-c", STREAM)
    wait_until(lambda: running.stored() > 500, "the stream flows")
    publish(running, 0, 3_000)
    made = make(running)
    stream.kill()

    shown = other.bitten("restore", made["path"])
    assert shown.returncode == 0, shown.stderr
    assert "start bus and collector" in shown.stdout
    last_seq = in_journal(other.settings.journal)[1]
    assert last_seq == made["manifest"]["journal"]["last_seq"]
    assert in_wal_mode(other.db) and in_wal_mode(other.settings.journal)
    other.start_bus()
    other.start_collector()
    publish(other, 3_000, 500)
    end = other.wait_stored()
    # What was acknowledged before the backup began is there once, and new events come after it.
    assert volumes(other, "P") == list(range(3_500))
    streamed = volumes(other, "S")
    assert streamed == list(range(len(streamed)))
    ((newer,),) = other.sql("SELECT min(seq) FROM market_data WHERE volume = 3000 AND symbol = 'P'")
    assert newer > last_seq
    assert other.sql("SELECT count(*), min(seq), max(seq) FROM events") == [(end, 1, end)]
    audit = other.bitten("audit")
    assert (audit.returncode, audit.stdout.splitlines()[-1]) == (0, "0 lost")


def test_every_backup_under_load_is_a_contiguous_prefix(running: System, tmp_path: Path) -> None:
    running.popen("-c", STREAM)
    wait_until(lambda: running.stored() > 500, "the stream flows")
    ends = []
    for i in range(5):
        acked = running.status()
        assert acked is not None
        made = make(running, "--to", str(tmp_path / "to"))
        home = System(tmp_path / f"home{i}")
        assert home.bitten("restore", made["path"]).returncode == 0
        first, last = in_journal(home.settings.journal)
        assert (first, last >= acked["last_seq"]) == (1, True)
        ((count, low, high),) = home.sql("SELECT count(*), min(seq), max(seq) FROM events")
        assert (count, low, high <= last) == (high, 1, True)
        assert home.sql("PRAGMA integrity_check") == [("ok",)]
        ends.append(last)
    assert ends == sorted(set(ends))


def test_backup_names_what_it_verified_and_is_for_its_owner_only(running: System) -> None:
    publish(running, 0, 10)
    last = running.wait_stored()
    (running.home / "config.yaml").write_text("source: desk\n")
    (running.home / "schemas").mkdir()
    shutil.copy(Path(__file__).parent.parent / "schemas" / "user_action.json", running.home)
    (running.home / "user_action.json").rename(running.home / "schemas" / "desk_note.json")
    old = os.umask(0)
    try:
        done = running.bitten("backup")
    finally:
        os.umask(old)
    assert done.returncode == 0, done.stderr
    assert f"{last} events up to seq {last}; journal integrity and CRC-32" in done.stdout
    assert "not in it: keys/ and spool/" in done.stdout
    (name,) = names(running.home / "backup")
    folder = running.home / "backup" / name
    found = {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*")}
    assert found == {
        "bitten_events.db": 0o600,
        "journal.db": 0o600,
        "config.yaml": 0o600,
        "manifest.json": 0o600,
        "schemas": 0o700,
        "schemas/desk_note.json": 0o600,
    }
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    listed = running.bitten("backup", "--list").stdout
    assert name in listed and str(last) in listed


def test_restore_takes_config_and_schemas_along_and_puts_the_database_where_they_say(
    running: System, other: System, tmp_path: Path
) -> None:
    publish(running, 0, 10)
    running.wait_stored()
    elsewhere = tmp_path / "elsewhere.db"
    (running.home / "config.yaml").write_text(f"db: {elsewhere}\n")
    running.environ["BITTEN_DB"] = str(running.home / "bitten_events.db")  # beats config.yaml
    made = make(running)
    done = other.bitten("restore", made["path"])
    assert done.returncode == 0, done.stderr
    assert str(elsewhere) in done.stdout
    assert (other.home / "config.yaml").read_text() == f"db: {elsewhere}\n"
    assert other.db == elsewhere
    assert volumes(other, "P") == list(range(10))


def test_damaged_database_is_restored_alone_and_filled_up_from_the_journal(
    running: System,
) -> None:
    publish(running, 0, 500)
    running.wait_stored()
    make(running)
    publish(running, 500, 500)
    running.wait_stored()
    collector = running.processes[1]
    refused = running.bitten("restore", "--only", "database")
    assert refused.returncode == 4 and "a collector is already running here" in refused.stderr
    collector.terminate()
    collector.wait()
    for suffix in ("", "-wal", "-shm"):
        path = Path(f"{running.db}{suffix}")
        if path.exists():
            path.rename(f"{path}.old")
    done = running.bitten("restore", "--only", "database")
    assert done.returncode == 0, done.stderr
    assert volumes(running, "P") == list(range(500))
    running.start_collector()
    running.wait_stored()
    assert volumes(running, "P") == list(range(1_000))


def test_restore_touches_nothing_that_is_there(running: System, other: System) -> None:
    publish(running, 0, 10)
    made = make(running)
    busy = running.bitten("restore", made["path"])
    assert busy.returncode == 4
    assert "is already running here" in busy.stderr
    unknown = running.bitten("restore", "nosuch")
    assert unknown.returncode == 4
    assert "nosuch is not a backup" in unknown.stderr
    # The last three a starting bus would take for the state of the restored journal.
    for name in (
        *("journal.db", "bitten_events.db-wal"),
        *("journal.recovered", "journal.recovering", "journal.db.damaged"),
    ):
        there = other.home / name
        other.home.mkdir(exist_ok=True)
        there.write_text("mine")
        refused = other.bitten("restore", made["path"])
        assert refused.returncode == 4
        assert f"{there} is there already; nothing was restored; move it aside" in refused.stderr
        assert there.read_text() == "mine"
        there.unlink()
    assert other.bitten("restore", made["path"]).returncode == 0


def test_restore_that_fails_half_way_leaves_neither_file(
    running: System, other: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(running, 0, 10)
    made = make(running)
    in_the_way, connect = other.settings.journal, database.connect

    def connect_late(path: Path, *args: Any, **options: Any) -> Any:
        if path.name.startswith("journal.db"):  # somebody is quicker
            in_the_way.mkdir(exist_ok=True)
            (in_the_way / "mine").touch()
        return connect(path, *args, **options)

    monkeypatch.setattr(database, "connect", connect_late)
    with pytest.raises(BackupError, match="neither database nor journal was put there"):
        restore(Path(made["path"]), other.settings)
    assert [n for n in names(other.home) if ".db" in n and "lock" not in n] == ["journal.db"]


@pytest.mark.parametrize("name", ["bitten_events.db", "journal.db", "manifest.json"])
def test_backup_that_was_changed_is_not_restored(running: System, other: System, name: str) -> None:
    publish(running, 0, 200)
    running.wait_stored()
    path = Path(make(running)["path"]) / name
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x80]))
    refused = other.bitten("restore", str(path.parent))
    assert refused.returncode == 4
    assert len(refused.stderr.splitlines()) == 1
    assert name in refused.stderr
    assert not other.home.exists()


def test_bus_does_not_trim_old_events_that_the_restored_database_lacks(
    bus: System, other: System
) -> None:
    publish(bus, 0, 500)
    made = make(bus)
    assert made["manifest"]["database"] is None
    assert other.bitten("restore", made["path"]).returncode == 0
    other.environ["BITTEN_JOURNAL_MAX_AGE_S"] = "1"
    other.start_bus()
    wait_until(lambda: codes(other) & {"journal_held"}, "the bus would trim and is held")
    other.start_collector()
    wait_until(lambda: volumes(other, "P") == list(range(500)) if other.stored() else False, "all")


def test_journal_that_was_backed_up_in_the_midst_of_a_checkpoint_lacks_nothing(
    bus: System, other: System
) -> None:
    publish(bus, 0, 10)
    with contextlib.closing(sqlite3.connect(bus.settings.journal)) as db:
        db.execute("UPDATE meta SET value = 1 WHERE key = 'wal_holds_more'")
        db.commit()
    made = make(bus)
    assert other.bitten("restore", made["path"]).returncode == 0
    other.start_bus()
    assert codes(other) == set()
    assert (other.status() or {})["last_seq"] < 100


def damage_batch(system: System, holding: int) -> int:
    """Change the body of the batch that holds that seq; its first seq."""
    db = sqlite3.connect(system.settings.journal)
    ((seq,),) = db.execute("SELECT max(first_seq) FROM batch WHERE first_seq <= ?", (holding,))
    db.execute(
        "UPDATE batch SET body = CAST(replace(body, 'bid', 'bud') AS BLOB) WHERE first_seq = ?",
        (seq,),
    )
    db.commit()
    db.close()
    return int(seq)


def test_damaged_batch_that_the_database_has_does_not_stand_in_the_way(
    running: System, other: System
) -> None:
    publish(running, 0, 5_000)
    running.wait_stored()
    for process in running.processes[:2]:
        process.terminate()
        process.wait()
    damage_batch(running, 2_000)
    done = running.bitten("backup")
    assert done.returncode == 0, done.stderr
    assert "damaged there, in the database or recorded as lost" in done.stdout
    (name,) = names(running.home / "backup")
    assert other.bitten("restore", str(running.home / "backup" / name)).returncode == 0
    assert volumes(other, "P") == list(range(5_000))


def test_damaged_batch_that_the_database_lacks_makes_no_backup(bus: System) -> None:
    publish(bus, 0, 5_000)
    bus.processes[0].terminate()
    bus.processes[0].wait()
    seq = damage_batch(bus, 2_000)
    failed = bus.bitten("backup")
    assert failed.returncode == 4
    assert f"is damaged: its events from seq {seq} on (CRC-32)" in failed.stderr
    assert names(bus.home / "backup") == []


@pytest.mark.parametrize("damage", ["database", "journal", "no database at all"])
def test_damaged_source_makes_no_backup_and_removes_none(system: System, damage: str) -> None:
    bus = system.start_bus()
    collector = system.start_collector()
    publish(system, 0, 5_000)
    system.wait_stored()
    made = [Path(make(system)["path"]).name for _ in range(2)]
    for process in (bus, collector):
        process.terminate()
        process.wait()
    path = system.settings.journal if damage == "journal" else system.db
    if damage == "no database at all":
        path.write_bytes(b"no database at all" * 1_000)
    else:
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 20_000)
    failed = system.bitten("backup")
    assert failed.returncode == 4
    assert f"bitten: {path} is damaged: " in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert names(system.home / "backup") == made


def test_home_without_anything_to_back_up_is_named(system: System) -> None:
    done = system.bitten("backup")
    assert done.returncode == 4
    assert f"there is nothing to back up in {system.home}" in done.stderr
    assert not system.home.exists()


def test_full_disk_leaves_nothing_half_made(running: System, tmp_path: Path) -> None:
    publish(running, 0, 20_000)
    running.wait_stored()
    with small_disk(tmp_path / "small", 1) as disk:
        done = running.bitten("backup", "--to", str(disk))
        assert done.returncode == 4
        assert f"{disk} has 1 MB free, a backup needs " in done.stderr
        assert names(disk) == []


def test_space_that_runs_out_meanwhile_leaves_nothing_half_made(running: System) -> None:
    publish(running, 0, 20_000)
    running.wait_stored()
    done = running.bitten(
        "backup",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert done.returncode == 4
    assert "backup" in done.stderr and len(done.stderr.splitlines()) == 1
    assert names(running.home / "backup") == []


def test_target_that_cannot_be_written_is_named(running: System) -> None:
    publish(running, 0, 1)
    done = running.bitten("backup", "--to", "/proc/nowhere")
    assert done.returncode == 4
    assert "cannot make a backup in /proc/nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_killed_backup_has_no_final_name_and_the_next_one_removes_it(running: System) -> None:
    publish(running, 0, 20_000)
    running.wait_stored()
    process = running.popen("-m", "event_bus", "backup")
    folder = running.home / "backup"
    wait_until(lambda: any(n.endswith(".part") for n in names(folder)), "it has begun")
    process.kill()
    process.wait()
    (left,) = names(folder)
    assert left.endswith(".part")
    assert running.bitten("backup", "--list").stdout == ""
    made = make(running)
    assert names(folder) == [Path(made["path"]).name]


def test_backup_leaves_alone_what_it_did_not_make(running: System, tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    made_earlier = folder / "2026-01-31T04-00-00Z.part"
    for directory in (folder / "video.part", folder / "x-2026-01-31T04-00-00Z.part", made_earlier):
        directory.mkdir(parents=True)
        (directory / "mine").write_text("mine")
    (folder / "movie.mkv.part").write_text("mine")
    (folder / "2026-01-31T04-00-01Z.part").symlink_to(folder / "video.part")
    make(running, "--to", str(folder))
    assert not made_earlier.exists()
    for name in ("video.part/mine", "x-2026-01-31T04-00-00Z.part/mine", "movie.mkv.part"):
        assert (folder / name).read_text() == "mine"


def test_two_backups_at_once_do_not_meet(running: System) -> None:
    publish(running, 0, 20_000)
    running.wait_stored()
    folder = running.home / "backup"
    first = running.popen("-m", "event_bus", "backup")
    wait_until(lambda: any(n.endswith(".part") for n in names(folder)), "it has begun")
    first.send_signal(signal.SIGSTOP)
    second = running.bitten("backup")
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 4
    assert f"a backup is already running here: process {first.pid}" in second.stderr
    output, _ = first.communicate(timeout=30)
    assert first.returncode == 0, output
    assert len(names(folder)) == 1


def test_oldest_backups_go_and_the_newest_stay(running: System, tmp_path: Path) -> None:
    publish(running, 0, 10)
    made = [Path(make(running)["path"]).name for _ in range(4)]
    assert names(running.home / "backup") == made[2:]
    # In a directory of the user's own none is removed.
    for _ in range(3):
        make(running, "--to", str(tmp_path / "to"))
    assert len(names(tmp_path / "to")) == 3


def stop(*daemons: subprocess.Popen[str]) -> None:
    for process in daemons:
        process.terminate()
        process.wait(20)


def test_backup_that_has_what_newer_ones_lack_is_kept_and_named(system: System) -> None:
    daemons = [system.start_bus(), system.start_collector()]
    publish(system, 0, 10)
    last = system.wait_stored()
    whole = Path(make(system)["path"])
    stop(*daemons)
    for path in (system.settings.journal, system.db):
        path.unlink()
    system.start_bus()
    system.start_collector()
    publish(system, 10, 10)
    system.wait_stored()
    made = [Path(make(system)["path"]).name for _ in range(3)]
    assert names(system.home / "backup") == [whole.name, *made[1:]]
    done = system.bitten("backup")
    (said,) = [x for x in done.stdout.splitlines() if x.startswith(KEPT)]
    assert f"{whole.name} has {last} events that no newer backup has (seq 1-{last})" in said
    assert f"rm -r {whole}" in said
    shutil.rmtree(whole)
    assert KEPT not in system.bitten("backup").stdout


def test_backup_of_what_was_given_up_by_a_restore_is_kept(system: System, tmp_path: Path) -> None:
    daemons = [system.start_bus(), system.start_collector()]
    publish(system, 0, 10)
    system.wait_stored()
    older = Path(make(system, "--to", str(tmp_path / "to"))["path"])
    publish(system, 10, 10)
    system.wait_stored()
    given_up = [Path(make(system)["path"]) for _ in range(2)]
    stop(*daemons)
    for path in (system.settings.journal, system.db):
        path.unlink()
    done = system.bitten("restore", str(older))
    assert done.returncode == 0
    (said,) = [x for x in done.stdout.splitlines() if x.startswith("not in it: events ")]
    first, to, last = said.split()[4:7]
    assert (int(first), to) == (Manifest.read(older).last_seq + 1, "to")
    assert int(last.rstrip(",")) >= Manifest.read(given_up[-1]).last_seq
    system.start_bus()
    system.start_collector()
    publish(system, 20, 30)
    system.wait_stored()
    made = [Path(make(system)["path"]).name for _ in range(3)]
    assert names(system.home / "backup") == [given_up[-1].name, *made[1:]]


def test_collector_makes_backups_by_the_clock_and_tells_the_bus_if_it_cannot(
    system: System,
) -> None:
    system.environ |= {"BITTEN_BACKUP_INTERVAL_S": "1", "BITTEN_BACKUP_KEEP": "2"}
    folder = system.home / "backup"
    system.home.mkdir()
    folder.write_text("in the way")
    system.start_bus()
    collector = system.start_collector()

    def said() -> str:
        consumers = (system.status() or {"consumers": {}})["consumers"]
        return str(consumers.get("data_collector", {}).get("problem"))

    wait_until(lambda: "cannot make a backup in" in said(), "the bus knows of the problem")
    wait_until(lambda: "consumer_problem" in codes(system), "and its health says so")
    folder.unlink()
    wait_until(lambda: len([n for n in names(folder) if n.endswith("Z")]) == 2, "two are made")
    wait_until(lambda: said() == "", "the problem is over")
    publish(system, 0, 100)
    assert system.wait_stored() >= 100
    collector.terminate()
    assert collector.wait(10) == 0


class TestSchedule:
    @pytest.fixture
    def settings(self, running: System) -> Settings:
        publish(running, 0, 10)
        running.environ["BITTEN_BACKUP_INTERVAL_S"] = "100"
        return running.settings

    def finish(self, schedule: BackupSchedule, now: float) -> None:
        """Turn as the collector's loop does until the child has ended."""
        schedule.turn(now)
        assert schedule._child is not None

        def ended() -> bool:
            schedule.turn(now)
            return schedule._child is None

        wait_until(ended, "the backup ends")

    def test_first_backup_is_made_at_once_and_the_next_an_interval_later(
        self, settings: Settings
    ) -> None:
        schedule = BackupSchedule(settings)
        schedule.turn(0.0)
        self.finish(schedule, 0.0)
        assert len(names(settings.backup_dir)) == 1
        schedule.turn(99.0)
        assert schedule._child is None
        self.finish(schedule, 100.0)
        assert len(names(settings.backup_dir)) == 2

    def test_restart_does_not_make_it_sooner_nor_a_clock_set_back_later(
        self, settings: Settings
    ) -> None:
        first = BackupSchedule(settings)
        first.turn(0.0)
        self.finish(first, 0.0)
        restarted = BackupSchedule(settings, clock=lambda: time.time() + 60)
        restarted.turn(0.0)
        restarted.turn(30.0)
        assert restarted._child is None
        self.finish(restarted, 41.0)
        set_back = BackupSchedule(settings, clock=lambda: time.time() - 86_400)
        set_back.turn(0.0)
        set_back.turn(99.0)
        assert set_back._child is None
        self.finish(set_back, 100.0)

    def test_failure_is_a_problem_until_one_succeeds(self, settings: Settings) -> None:
        settings.backup_dir.write_text("in the way")
        schedule = BackupSchedule(settings)
        schedule.turn(0.0)
        self.finish(schedule, 0.0)
        assert schedule.problem.startswith("no backup could be made: cannot make a backup in ")
        settings.backup_dir.unlink()
        self.finish(schedule, 101.0)
        assert schedule.problem == ""

    def test_backup_that_does_not_end_is_a_problem_until_it_does(self, settings: Settings) -> None:
        schedule = BackupSchedule(settings)
        schedule.turn(0.0)
        schedule.turn(0.0)
        child = schedule._child
        assert child is not None
        child.send_signal(signal.SIGSTOP)  # as on a network disk that does not answer
        schedule.turn(99.0)
        assert schedule.problem == ""
        schedule.turn(100.0)
        assert schedule.problem.startswith("a backup has not come to its end within 100 s")
        child.send_signal(signal.SIGCONT)
        self.finish(schedule, 101.0)
        assert schedule.problem == ""

    def test_closing_ends_a_backup_that_is_being_made(self, settings: Settings) -> None:
        schedule = BackupSchedule(settings)
        schedule.turn(0.0)
        schedule.turn(0.0)
        child = schedule._child
        assert child is not None
        schedule.close()
        assert child.returncode is not None
        assert subprocess.run(["kill", "-0", str(child.pid)], capture_output=True).returncode
