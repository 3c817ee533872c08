"""The database damaged, removed, replaced, locked and held: what the collector makes of it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from conftest import System, wait_until
from disks import small_disk
from test_collector import PROMPT_S, collected, publish, refused, said, stop

from collector import DataCollector
from event_bus import protocol
from event_bus.errors import BusUnavailable
from event_bus.journal import Journal
from event_bus.protocol import Client, FetchRequest
from event_bus.subscriber import Subscriber

__all__ = ["collected"]


def everything(system: System) -> list[tuple[Any, ...]]:
    return system.sql("SELECT * FROM events ORDER BY seq")


def assert_database_is_the_journal(system: System) -> None:
    """Wait until all is stored, and compare it with what the bus hands out, event by event."""

    def stored() -> bool:
        status = system.status()
        try:
            last = system.sql("SELECT max(seq) FROM events")[0][0]
        except sqlite3.Error:  # between two files
            return False
        return status is not None and last == status["last_seq"]

    wait_until(stored, "the database holds all of the journal")
    stored_events = [
        (*row, json.loads(data))
        for *row, data in system.sql(
            "SELECT seq, event_id, event_type, timestamp, source, received_at, data FROM events"
            " ORDER BY seq"
        )
    ]
    with Subscriber(start=1, settings=system.settings, timeout_s=0.5) as subscriber:
        published = [
            (e.seq, e.event_id, e.event_type, e.timestamp, e.source, e.received_at, e.data)
            for e in subscriber
        ]
    assert stored_events == published[: len(stored_events)]
    assert len(stored_events) >= len(published) - 5  # a health event may have come since
    assert system.sql("PRAGMA integrity_check") == [("ok",)]


def files(system: System, kind: str) -> list[Path]:
    """Databases put aside, without their -wal and -shm."""
    return [p for p in system.home.glob(f"bitten_events.db.{kind}-*") if p.name.endswith("Z")]


def remove(db: Path) -> None:
    db.unlink()


def remove_all(db: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{db}{suffix}").unlink()


def remove_wal(db: Path) -> None:
    Path(f"{db}-wal").unlink()


def move(db: Path) -> None:
    db.rename(f"{db}.old")


def garbage_in_its_place(db: Path) -> None:
    new = db.with_name("new")
    new.write_bytes(b"garbage!" * 5_000)
    new.replace(db)


@pytest.mark.parametrize("fault", [remove, remove_all, remove_wal, move, garbage_in_its_place])
def test_database_removed_while_it_is_open_is_there_again(
    collected: System, fault: Callable[[Path], None]
) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    publish(collected, 100)
    collected.wait_stored()
    fault(collected.db)
    publish(collected, 100)
    said(collector, "was removed or replaced")
    publish(collected, 100)
    assert_database_is_the_journal(collected)
    assert collector.poll() is None


def test_killed_bus_is_noticed_before_the_patience_ends(bus: System) -> None:
    (process,) = bus.processes
    client = Client(bus.settings)
    last = client.status()["last_seq"]
    body = msgspec.json.encode(FetchRequest(from_seq=last + 1, wait_ms=30_000))
    request = client.send(protocol.FETCH, body)
    killer = threading.Timer(0.2, process.kill)
    killer.start()
    with pytest.raises(BusUnavailable, match="ended its connection"):
        client.receive(request, 60.0)
    bus.start_bus()
    assert client.status()["last_seq"] >= last
    client.close()


def problem(system: System) -> str:
    """What the collector says on the bus keeps it from storing."""
    status = system.status()
    consumer = status and status["consumers"].get("data_collector")
    return str(consumer["problem"]) if consumer else ""


def overwrite_all(db: Path) -> None:
    db.write_bytes(b"garbage!" * (db.stat().st_size // 8))


def overwrite_first_page(db: Path) -> None:
    with db.open("r+b") as f:
        f.write(b"\xa5" * 4096)


def overwrite_middle(db: Path) -> None:
    with contextlib.closing(apsw.Connection(str(db))) as connection:
        pages: list[Any] = connection.execute(
            "SELECT pageno FROM dbstat WHERE name = '_event' AND pagetype = 'leaf' ORDER BY path"
        ).fetchall()
    with db.open("r+b") as f:
        for (page,) in pages[len(pages) // 2 :][:4]:
            f.seek((page - 1) * 4096)
            f.write(b"\xa5" * 4096)


def truncate(db: Path) -> None:
    with db.open("r+b") as f:
        f.truncate(db.stat().st_size // 2)


def drop_table(db: Path) -> None:
    with sqlite3.connect(db) as connection:
        connection.execute("DROP TABLE _batch")


def spoil_definitions(db: Path) -> None:
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE _relation SET definition = 'no JSON'")


DAMAGES = [overwrite_all, overwrite_first_page, overwrite_middle, truncate]


@pytest.mark.parametrize("damage", [*DAMAGES, drop_table, spoil_definitions])
def test_database_damaged_at_the_start_is_kept_and_made_anew(
    collected: System, damage: Callable[[Path], None]
) -> None:
    publish(collected, 2_000)
    collector = collected.start_collector()
    collected.wait_stored()
    stop(collector)
    damage(collected.db)
    damaged = collected.db.read_bytes()
    collector = collected.start_collector()
    said(collector, "a new one is filled from the journal")
    publish(collected, 100)
    assert_database_is_the_journal(collected)
    (kept,) = files(collected, "corrupt")
    assert kept.read_bytes() == damaged
    told = wait_until(lambda: problem(collected), "it is told")
    assert "filled from the journal" in told
    assert "bitten restore --only database" in told


@pytest.mark.parametrize("damage", DAMAGES)
def test_database_damaged_in_flight_is_kept_and_made_anew(
    collected: System, damage: Callable[[Path], None]
) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    publish(collected, 5_000)
    collected.wait_stored()
    stop(collector)  # all of it is in the file, and not beside it
    collector = collected.start_collector()
    publish(collected, 100)
    damage(collected.db)
    publish(collected, 5_000)
    said(collector, "a new one is filled from the journal")
    publish(collected, 100)
    assert_database_is_the_journal(collected)
    assert len(files(collected, "corrupt")) == 1
    assert collector.poll() is None


@pytest.mark.parametrize("left", ["-wal", "-shm", "empty"])
def test_what_is_left_beside_a_missing_database_is_moved_aside(
    collected: System, left: str
) -> None:
    collected.db.unlink()
    file = collected.db if left == "empty" else Path(f"{collected.db}{left}")
    file.write_bytes(b"" if left == "empty" else b"x" * 5_000)
    collector = collected.start_collector()
    said(collector, "is empty or missing")
    assert_database_is_the_journal(collected)
    kept = list(collected.home.glob("bitten_events.db.corrupt-*"))
    assert [k.name.endswith("" if left == "empty" else left) for k in kept] == [True]


def test_lock_is_told_with_its_holder_and_cleared_when_it_ends(collected: System) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    code = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
        " db.execute('BEGIN IMMEDIATE'); print('locked', flush=True); input()"
    )
    analyst = collected.popen("-c", code, str(collected.db), stdin=subprocess.PIPE)
    said(analyst, "locked")
    publish(collected, 10)
    line = said(collector, "database is locked")
    assert f"process {analyst.pid} (python" in line
    told = wait_until(lambda: problem(collected), "the bus knows", timeout_s=10)
    assert "database is locked" in told
    analyst.communicate("\n")
    assert_database_is_the_journal(collected)
    wait_until(lambda: not problem(collected), "it is cleared")


def test_collector_that_waits_at_its_start_reports_too(collected: System) -> None:
    before = collected.status()
    assert before is not None
    with sqlite3.connect(collected.db) as analyst:
        analyst.execute("BEGIN IMMEDIATE")
        collected.start_collector()
        assert "locked" in wait_until(lambda: problem(collected), "the bus knows", timeout_s=15)
        status = collected.status()
        assert status is not None
        seq = "next_seq"
        assert (
            status["consumers"]["data_collector"][seq] == before["consumers"]["data_collector"][seq]
        )
    assert_database_is_the_journal(collected)


def test_log_held_by_a_reader_is_told_and_truncated_when_it_ends(collected: System) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    code = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
        " rows = db.execute('SELECT * FROM _event');"
        " next(rows); print('reads', flush=True); input()"
    )
    reader = collected.popen("-c", code, str(collected.db), stdin=subprocess.PIPE)
    said(reader, "reads")
    wal = Path(f"{collected.db}-wal")
    while wal.stat().st_size < 70 << 20:
        publish(collected, 10_000)
        collected.wait_stored()
    told = wait_until(lambda: problem(collected), "the bus knows", timeout_s=10)
    assert f"a query of process {reader.pid} (python" in told
    assert stop(collector) < PROMPT_S
    collector = collected.start_collector()
    assert f"a query of process {reader.pid}" in said(collector, "grows")
    reader.communicate("\n")
    wait_until(lambda: wal.stat().st_size < 1 << 20, "the log is small", timeout_s=60)
    wait_until(lambda: not problem(collected), "it is cleared")


def bus_of(system: System) -> subprocess.Popen[str]:
    (process,) = [p for p in system.processes if p.args[-1] == "bus" and p.poll() is None]  # type: ignore[index]
    return process


def trim(system: System, keep: int) -> int:
    """Let the journal forget all but about the last `keep` events; its first seq then.

    The bus is stopped; it is started again.
    """
    stop(bus_of(system))
    journal = Journal(system.settings.journal)
    journal.trim(journal.last_seq - keep, max_batches=100_000)
    first_seq = journal.first_seq
    journal.close()
    assert first_seq > 1
    system.start_bus()
    return first_seq


@pytest.fixture
def older(bus: System) -> System:
    """A bus whose journal has forgotten most of what a collector, now stopped, has stored."""
    collector = bus.start_collector()
    for _ in range(30):
        publish(bus, 100)
    bus.wait_stored()
    stop(collector)
    trim(bus, 500)
    return bus


@pytest.mark.parametrize("fault", [remove, remove_all, remove_wal, move, garbage_in_its_place])
def test_rows_that_only_a_removed_database_had_are_kept(
    older: System, fault: Callable[[Path], None]
) -> None:
    collector = older.start_collector()
    said(collector, "storing into")
    publish(older, 10)
    older.wait_stored()
    before = everything(older)
    fault(older.db)
    said(collector, "was removed or replaced")
    said(collector, "nothing is lost: what it held is there again")
    publish(older, 10)
    older.wait_stored()
    assert everything(older)[: len(before)] == before
    assert DataCollector(older.db).get_stats()["gaps"] == []


def test_rows_are_taken_from_a_damaged_database_and_the_rest_is_a_gap(older: System) -> None:
    before = {row[0]: row for row in everything(older)}
    overwrite_middle(older.db)
    collector = older.start_collector()
    said(collector, "were taken from a database that was put aside")
    older.wait_stored()
    after = {row[0]: row for row in everything(older)}
    gaps = DataCollector(older.db).get_stats()["gaps"]
    missing = {seq for gap in gaps for seq in range(gap["first_seq"], gap["last_seq"] + 1)}
    assert missing | set(after) >= set(before)
    assert not missing & set(after)
    assert 0 < len(missing) < len(before) / 2
    assert all("no longer in the journal" in gap["reason"] for gap in gaps)
    assert {seq: after[seq] for seq in before if seq in after} == {
        seq: row for seq, row in before.items() if seq not in missing
    }


def test_damaged_database_of_another_journal_gives_no_rows(older: System) -> None:
    with sqlite3.connect(older.db) as db:
        db.execute("UPDATE _meta SET value = 'another' WHERE key = 'journal_id'")
    db.close()
    overwrite_middle(older.db)
    # As it lies there after it was found damaged: found later, it is refused for its journal.
    older.db.rename(f"{older.db}.corrupt-20260101T000000.000000Z")
    first_seq = (older.status() or {})["first_seq"]
    collector = older.start_collector()
    assert f"events 1 to {first_seq - 1} can" in said(collector, "can no longer be stored")
    older.wait_stored()
    assert everything(older)[0][0] == first_seq


def test_older_copy_put_in_its_place_gets_what_only_the_newer_one_had(bus: System) -> None:
    collector = bus.start_collector()
    publish(bus, 500)
    bus.wait_stored()
    copy = bus.home / "copy.db"
    with sqlite3.connect(bus.db) as db, sqlite3.connect(copy) as there:
        db.backup(there)
    db.close()
    there.close()
    for _ in range(20):
        publish(bus, 100)
    bus.wait_stored()
    trim(bus, 500)
    publish(bus, 10)
    bus.wait_stored()
    before = everything(bus)
    copy.replace(bus.db)
    assert "going on with what is there now" in said(collector, "going on with")
    publish(bus, 10)
    wait_until(lambda: len(everything(bus)) >= len(before) + 10, "all is there")
    assert everything(bus)[: len(before)] == before
    assert len(files(bus, "replaced")) == 1


def test_complete_copy_put_in_its_place_is_gone_on_with(collected: System) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    collected.wait_stored()
    copy = collected.home / "copy.db"
    with sqlite3.connect(collected.db) as db, sqlite3.connect(copy) as there:
        db.backup(there)
    db.close()
    there.close()
    copy.replace(collected.db)
    said(collector, "going on with what is there now")
    publish(collected, 10)
    assert_database_is_the_journal(collected)


def test_database_of_another_program_in_its_place_ends_the_collector(collected: System) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    before = everything(collected)
    with sqlite3.connect(collected.home / "new") as db:
        db.execute("CREATE TABLE orders (id)")
    db.close()
    (collected.home / "new").replace(collected.db)
    said(collector, "of another program; move it aside (mv ")
    assert collector.wait(timeout=10) == 4
    (kept,) = files(collected, "replaced")
    kept.replace(collected.db)
    assert everything(collected)[: len(before)] == before


def lose_journal(system: System, origin_seq: int) -> None:
    """Put a new journal in the place of the old one, begun at that seq."""
    stop(bus_of(system))
    for path in system.home.glob("journal.db*"):
        path.unlink()
    Journal(system.settings.journal).close()
    with sqlite3.connect(system.settings.journal) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'trimmed_seq'", (origin_seq - 1,))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('origin_seq', ?)", (origin_seq,))
    db.close()
    system.start_bus()


def test_journal_begun_after_a_lost_one_is_followed_and_the_loss_recorded(
    collected: System,
) -> None:
    collector = collected.start_collector()
    said(collector, "storing into")
    before = collected.wait_stored()
    lose_journal(collected, before + 41)
    publish(collected, 10)
    said(collector, "was lost")
    last = collected.wait_stored()
    assert last > before + 41
    (gap,) = DataCollector(collected.db).get_stats()["gaps"]
    assert (gap["first_seq"], gap["last_seq"]) == (before + 1, before + 40)
    stop(collector)
    collector = collected.start_collector()
    publish(collected, 10)
    collected.wait_stored()
    assert collector.poll() is None


def test_journal_that_begins_among_stored_events_is_refused(collected: System) -> None:
    before = everything(collected)
    lose_journal(collected, before[-1][0])
    publish(collected, 100)
    assert "was filled from journal" in refused(collected)
    assert everything(collected) == before


def test_full_disk_is_told_and_cleared(bus: System, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 2) as disk:
        bus.environ["BITTEN_DB"] = str(disk / "events.db")
        collector = bus.start_collector()
        bus.wait_stored()
        filler = disk / "filler"
        filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 16_384))
        publish(bus, 2_000)
        assert "is full" in wait_until(lambda: problem(bus), "the bus knows", timeout_s=15)
        filler.unlink()
        assert_database_is_the_journal(bus)
        wait_until(lambda: not problem(bus), "it is cleared")
        assert stop(collector) < PROMPT_S


def test_file_size_limit_is_waited_for_like_a_full_disk(collected: System) -> None:
    limited = collected.popen(
        "-c",
        "import resource, runpy, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY));"
        " sys.argv = ['bitten', 'collect']; runpy.run_module('event_bus', run_name='__main__')",
    )
    said(limited, "storing into")
    stored = collected.stored()
    publish(collected, 10_000)
    assert "ulimit -f" in said(limited, "disk I/O error")
    assert collected.stored() >= stored
    wait_until(lambda: problem(collected), "the bus knows", timeout_s=15)
    resource.prlimit(limited.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert_database_is_the_journal(collected)
    assert limited.poll() is None


def test_damage_is_found_though_nothing_is_written(collected: System) -> None:
    publish(collected, 5_000)
    collector = collected.start_collector()
    collected.wait_stored()
    stop(collector)  # all of it is in the file, and not beside it
    collector = collected.start_collector()
    said(collector, "storing into")
    overwrite_middle(collected.db)
    told = said(collector, "a new one is filled from the journal")
    assert "is damaged" in told
    assert "`bitten audit` says whether anything is lost" in told
    assert "***" not in told
    assert_database_is_the_journal(collected)
