"""The collector as a process: exactly once through kills, locks, full disks and restarts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import System, wait_until

from collector import DataCollector
from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.journal import Journal
from event_bus.protocol import Client
from event_bus.traces import END

PROMPT_S = 2.0
"""A stop takes no longer."""


def publish(system: System, count: int, event_type: str = "market_data") -> None:
    """Publish that many acknowledged events, as one group of the journal."""
    data = {"symbol": "EURUSD", "bid": 1.5, "ask": 1.75}
    token = envelope.new_producer()
    events = [
        Envelope(event_id=f"{token}-{n}", event_type=event_type, timestamp=float(n), data=data)
        for n in range(1, count + 1)
    ]
    client = Client(system.settings)
    try:
        ack = client.publish(envelope.encode_lines(events))
    finally:
        client.close()
    assert ack["accepted"] == count, ack


def said(process: subprocess.Popen[str], words: str) -> str:
    """Read a daemon's output up to a line with these words; that line."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the process ended without saying {words!r}")


def stop(process: subprocess.Popen[str]) -> float:
    """Send SIGTERM; the seconds until the exit, which is a clean one."""
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0
    return time.monotonic() - began


def refused(system: System) -> str:
    """What `bitten collect` says when it cannot start: one line, exit code 4."""
    done = system.bitten("collect")
    assert done.returncode == 4, done.stderr
    *log, line = done.stderr.splitlines()
    assert line.startswith("bitten: ")
    assert not [x for x in log if "Traceback" in x]
    return line


def seqs(system: System) -> tuple[int, int, int]:
    """Count, distinct ids and highest seq of what is stored."""
    ((count, ids, last),) = system.sql(
        "SELECT count(*), count(DISTINCT event_id), max(seq) FROM events"
    )
    return count, ids, last


@pytest.fixture
def collected(bus: System) -> System:
    """A bus whose first events a collector has stored, which then stopped."""
    publish(bus, 10)
    collector = bus.start_collector()
    bus.wait_stored()
    stop(collector)
    return bus


def test_collector_killed_again_and_again_stores_everything_once(bus: System) -> None:
    collector = bus.start_collector()
    bus.wait_stored()
    publishers = []

    def stores_more(before: int) -> bool:
        return bus.stored() > before

    def publish_groups() -> None:
        for _ in range(5):
            publish(bus, 500)

    for _ in range(8):
        publishers.append(threading.Thread(target=publish_groups))
        publishers[-1].start()
        before = bus.stored()
        wait_until(partial(stores_more, before), "the collector stores")
        collector.kill()
        collector.wait()
        collector = bus.start_collector()
    for publisher in publishers:
        publisher.join()
    last = bus.wait_stored()
    assert last >= 20_000
    assert seqs(bus) == (last, last, last)
    assert DataCollector(bus.db).get_stats()["events_stored"] == last


def test_collector_goes_on_when_the_bus_is_back(bus: System) -> None:
    (process,) = bus.processes
    collector = bus.start_collector()
    publish(bus, 10)
    bus.wait_stored()
    process.kill()
    process.wait()
    bus.start_bus()
    publish(bus, 10)
    last = bus.wait_stored()
    assert seqs(bus) == (last, last, last)
    assert collector.poll() is None


def test_collector_waits_for_a_bus_that_is_not_there_yet(system: System) -> None:
    collector = system.start_collector()
    assert "bitten up" in said(collector, "no answer from the event bus")
    system.start_bus()
    publish(system, 3)
    system.wait_stored()
    said(collector, "the event bus answers again")


def test_locked_database_is_waited_for_and_said(collected: System) -> None:
    analyst = sqlite3.connect(collected.db)
    analyst.execute("BEGIN IMMEDIATE")
    collector = collected.start_collector()
    publish(collected, 10)
    line = said(collector, "database is locked")
    assert "end the other program's transaction; nothing is lost" in line
    analyst.rollback()
    analyst.close()
    last = collected.wait_stored()
    assert seqs(collected) == (last, last, last)
    said(collector, "can be written again")


def test_lock_in_the_middle_is_waited_for_and_the_bus_keeps_what_is_not_stored(
    collected: System,
) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    analyst = sqlite3.connect(collected.db)
    analyst.execute("BEGIN IMMEDIATE")
    stored = collected.stored()
    publish(collected, 10)
    said(collector, "database is locked")
    publish(collected, 10)
    status = collected.status()
    assert status is not None
    assert status["consumers"]["data_collector"]["next_seq"] <= stored + 1
    analyst.rollback()
    analyst.close()
    collected.wait_stored()
    wait_until(
        lambda: (collected.status() or {})["consumers"]["data_collector"]["lag"] == 0,
        "the bus knows what is stored",
    )


def test_reader_that_never_ends_blocks_nothing(collected: System) -> None:
    reader = sqlite3.connect(collected.db)
    endless = reader.execute("SELECT seq FROM events")
    before = collected.stored()
    assert endless.fetchone()
    collector = collected.start_collector()
    publish(collected, 100)
    collected.wait_stored()
    assert stop(collector) < PROMPT_S
    assert len(endless.fetchall()) == before - 1
    reader.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_full_disk_rolls_the_batch_back_and_is_waited_for(bus: System, small_disk: Path) -> None:
    bus.environ["BITTEN_DB"] = str(small_disk / "events.db")
    collector = bus.start_collector()
    bus.wait_stored()
    filler = small_disk / "filler"
    with filler.open("wb") as f:
        room = shutil.disk_usage(small_disk).free
        f.write(b"x" * (room - 16_384))
    before = bus.stored()
    publish(bus, 2_000)
    assert "free some disk space" in said(collector, "is full")
    assert bus.stored() == before
    filler.unlink()
    last = bus.wait_stored()
    assert seqs(bus) == (last, last, last)
    assert bus.sql("PRAGMA integrity_check") == [("ok",)]


def test_second_collector_is_refused_and_the_first_one_named(collected: System) -> None:
    first = collected.start_collector()
    said(first, "storing into")
    assert f"process {first.pid} holds" in refused(collected)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("PRAGMA user_version=0", "has version 0, this program knows 3; install"),
        ("PRAGMA user_version=4", "has version 4, this program knows 3; install"),
        ("PRAGMA application_id=5", "of another program; move it aside (mv "),
    ],
)
def test_database_that_is_not_ours_ends_the_start(system: System, damage: str, words: str) -> None:
    system.settings.make_home()
    db = sqlite3.connect(system.db)
    db.execute("CREATE TABLE something (x)")
    db.execute(f"PRAGMA application_id={0x42495445}")
    db.execute(damage)
    db.commit()
    db.close()
    assert words in refused(system)


def test_missing_directory_ends_the_start(system: System, tmp_path: Path) -> None:
    system.environ["BITTEN_DB"] = str(tmp_path / "nowhere" / "events.db")
    assert f"no directory {tmp_path}/nowhere for the database; create it" in refused(system)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that nobody can write to, root included."""
    path = tmp_path / "read_only"
    path.mkdir()
    path.chmod(0o500)
    mounted = False
    if os.access(path, os.W_OK):
        command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        if not mounted:
            pytest.skip("a file system that root cannot write needs mount")
    yield path
    if mounted:
        subprocess.run(["umount", "-l", path], check=True)


def test_read_only_directory_ends_the_start(system: System, read_only: Path) -> None:
    system.environ["BITTEN_DB"] = str(read_only / "events.db")
    line = refused(system)
    assert str(read_only / "events.db") in line
    assert "writable" in line


def test_journal_of_another_home_ends_the_collector_and_changes_nothing(
    collected: System, tmp_path: Path
) -> None:
    (bus,) = [p for p in collected.processes if p.poll() is None]
    stop(bus)
    before = collected.sql("SELECT * FROM events")
    other = System(tmp_path / "other")
    bus = other.start_bus()
    publish(other, len(before) + 50)
    stop(bus)
    for path in collected.home.glob("journal.db*"):
        path.unlink()
    (other.home / "journal.db").rename(collected.home / "journal.db")
    collected.start_bus()
    line = refused(collected)
    assert "was filled from journal" in line
    assert "restore that journal.db, or move it aside (mv " in line
    assert collected.sql("SELECT * FROM events") == before


def test_journal_that_went_back_is_gone_on_with_behind_what_is_stored(bus: System) -> None:
    (process,) = bus.processes
    publish(bus, 10)
    stop(process)
    journal = bus.home / "journal.db"
    backup = journal.read_bytes()
    process = bus.start_bus()
    publish(bus, 10)
    collector = bus.start_collector()
    last = bus.wait_stored()
    stop(collector)
    stop(process)
    before = bus.sql("SELECT * FROM events ORDER BY seq")
    journal.write_bytes(backup)
    bus.start_bus()
    publish(bus, 10)
    bus.start_collector()
    assert bus.wait_stored() > last + 10
    after = bus.sql("SELECT * FROM events ORDER BY seq")
    assert after[: len(before)] == before
    assert bus.sql("SELECT count(*) FROM market_data") == [(30,)]
    assert bus.sql("SELECT count(*) > 0 FROM journal_loss") == [(1,)]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (50, "an older copy of the journal was put back"),
        (2, "asked for"),  # it ends before what is stored
    ],
)
def test_older_journal_is_refused_however_far_it_has_grown(
    bus: System, events: int, said: str
) -> None:
    (process,) = bus.processes
    publish(bus, 10)
    stop(process)
    backup = (bus.home / "journal.db").read_bytes()
    process = bus.start_bus()
    publish(bus, 10)
    collector = bus.start_collector()
    bus.wait_stored()
    stop(collector)
    stop(process)
    before = bus.sql("SELECT * FROM events ORDER BY seq")
    # Else the bus would see that both go further.
    away = bus.db.rename(bus.home / "away.db")
    (bus.home / END).unlink()
    (bus.home / "journal.db").write_bytes(backup)
    bus.start_bus()
    publish(bus, events)
    away.rename(bus.db)
    line = refused(bus)
    assert f"seq {before[-1][0]}" in line
    assert said in line
    assert "restore the newer journal.db, or move " in line
    assert bus.sql("SELECT * FROM events ORDER BY seq") == before


def test_events_trimmed_before_they_were_stored_are_a_recorded_gap(collected: System) -> None:
    (bus,) = [p for p in collected.processes if p.poll() is None]
    stored = collected.stored()
    for _ in range(3):
        publish(collected, 10)
    stop(bus)
    journal = Journal(collected.home / "journal.db")
    journal.trim(stored + 21)
    first = journal.first_seq
    journal.close()
    assert stored + 10 < first <= stored + 21
    collected.start_bus()
    publish(collected, 10)
    collector = collected.start_collector()
    line = said(collector, "can no longer be stored")
    assert f"events {stored + 1} to {first - 1} can no longer be stored" in line
    last = collected.wait_stored()
    missing = first - 1 - stored
    assert seqs(collected) == (last - missing, last - missing, last)
    (gap,) = DataCollector(collected.db).get_stats()["gaps"]
    assert (gap["first_seq"], gap["last_seq"]) == (stored + 1, first - 1)
    stop(collector)
    again = collected.start_collector()
    publish(collected, 10)
    collected.wait_stored()
    stop(again)
    assert len(DataCollector(collected.db).get_stats()["gaps"]) == 1


def own_schema(system: System, name: str, **properties: str) -> None:
    """Write an own event type's file the way an editor does, at once."""
    directory = system.home / "schemas"
    directory.mkdir(parents=True, exist_ok=True)
    kinds = {n: {"type": kind} for n, kind in properties.items()}
    draft = directory / f"{name}.draft"
    draft.write_text(json.dumps({"type": "object", "properties": kinds}))
    draft.rename(directory / f"{name}.json")


def test_own_type_gets_its_relation_while_the_collector_runs(bus: System) -> None:
    bus.start_collector()
    bus.wait_stored()
    own_schema(bus, "my_tick", symbol="string", bid="number", ask="number")
    publish(bus, 3, "my_tick")
    bus.wait_stored()
    assert bus.sql("SELECT symbol, bid FROM my_tick") == [("EURUSD", 1.5)] * 3
    assert len(DataCollector(bus.db).query_events(symbol="EURUSD")) == 3


def test_own_type_that_cannot_be_used_is_named_and_disturbs_nothing(bus: System) -> None:
    own_schema(bus, "my_tick", created_at="string")
    collector = bus.start_collector()
    assert "my_tick.json" in said(collector, "event type left out")
    publish(bus, 3)
    bus.wait_stored()
    assert bus.sql("SELECT count(*) FROM market_data") == [(3,)]


def test_collector_refuses_the_bus_of_another_home(bus: System, tmp_path: Path) -> None:
    other = System(tmp_path / "other")
    other.environ["BITTEN_INGRESS_URL"] = bus.environ["BITTEN_INGRESS_URL"]
    done = other.bitten("collect")
    assert done.returncode == 4
    assert f"keeps its files in {bus.home}" in done.stderr
    assert other.stored() == 0
    status = bus.status()
    assert status is not None
    assert not status["consumers"]


def test_stop_is_prompt_while_the_bus_is_away(system: System) -> None:
    collector = system.start_collector()
    said(collector, "no answer from the event bus")
    assert stop(collector) < PROMPT_S


def test_stop_is_prompt_while_the_bus_is_there(collected: System) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    assert stop(collector) < PROMPT_S
    assert not list(collected.home.glob("bitten_events.db-wal"))


def test_stop_is_prompt_while_the_database_is_locked_and_loses_nothing(collected: System) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    analyst = sqlite3.connect(collected.db)
    analyst.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    publish(collected, 10)
    said(collector, "database is locked")
    # While SQLite waits for a lock no signal is handled: that wait has to be short.
    assert time.monotonic() - began < PROMPT_S
    assert stop(collector) < PROMPT_S
    starting = collected.start_collector()
    said(starting, "database is locked")
    assert stop(starting) < PROMPT_S
    analyst.rollback()
    analyst.close()
    collected.start_collector()
    last = collected.wait_stored()
    assert seqs(collected) == (last, last, last)


def test_collector_runs_in_a_thread_until_it_is_stopped(bus: System) -> None:
    collector = DataCollector(settings=bus.settings)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: collector.run(on_ready=ready.set))
    thread.start()
    assert ready.wait(10)
    publish(bus, 10)
    wait_until(lambda: collector.stored >= 10, "the thread stores")
    collector.stop()
    thread.join(PROMPT_S)
    assert not thread.is_alive()
    assert collector.get_stats()["events_stored"] == collector.stored


def test_database_is_for_its_owner_alone(bus: System) -> None:
    previous = os.umask(0)
    try:
        collector = bus.start_collector()
    finally:
        os.umask(previous)
    publish(bus, 1)
    bus.wait_stored()
    files = list(bus.home.glob("bitten_events.db*"))
    assert len(files) == 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    collector.send_signal(signal.SIGINT)
    assert collector.wait(timeout=10) == 0
