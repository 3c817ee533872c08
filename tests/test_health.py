"""The health of the bus: from facts to words, and from a fault to everybody who should know."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest
from conftest import System, wait_until
from disks import small_disk
from test_broker import Start, line, start  # noqa: F401 — a fixture

from event_bus import database
from event_bus.consumers import Consumer, Consumers
from event_bus.errors import BusRefused
from event_bus.health import STALLED_AFTER_S, ConsumerFacts, Facts, Health, LossFacts, find_problems
from event_bus.journal import Journal
from event_bus.protocol import Client

WELL = ConsumerFacts(lag=5, silent_s=29.0, problem="")
EVERYTHING = Facts(
    now=100.0,
    latest=3_700.0,
    storage_full_since=90.0,
    storage_full_reason="no space left for /home/journal.db",
    storage="/home/journal.db",
    losses=[
        LossFacts("events 3 to 4", 50.0, "CRC-32 is wrong", "journal.db"),
        LossFacts("events 1 to 8", 50.0, "neither is there", ""),
        LossFacts("event 9", 100.0 - 86_400, "as old as a day", ""),
    ],
    recovered="it is empty; what it was is journal.db.corrupt-1",
    put_back_at=60.0,
    journal_held_by="slow",
    wal_bytes=65 << 20,
    consumers={
        "well": WELL,
        "idle": ConsumerFacts(lag=0, silent_s=99.0, problem=""),
        "slow": ConsumerFacts(lag=7, silent_s=30.0, problem=""),
        "sick": ConsumerFacts(lag=1, silent_s=0.0, problem="database is locked"),
    },
    keys_problem="allowed.yaml, line 2: not YAML",
    schema_problems=["news.json: not JSON"],
)


def test_nothing_wrong_is_ok() -> None:
    health = Health()
    assert not health.look(Facts(now=100.0, latest=101.0, consumers={"well": WELL}))
    assert (health.state, health.problems) == ("ok", [])


def test_each_problem_is_named_with_a_remedy_and_the_gravest_comes_first() -> None:
    found = {p.code: p for p in find_problems(EVERYTHING)}
    assert list(found) == [
        "storage_full",
        "journal_damaged",
        "journal_gone",
        "journal_recovered",
        "consumer_problem",
        "consumer_stalled",
        "journal_held",
        "journal_read",
        "clock_back",
        "keys_problem",
        "schema_problem",
        "journal_put_back",
    ]
    assert "/home/journal.db" in found["storage_full"].message
    assert found["storage_full"].since == 90.0
    assert "events 3 to 4: CRC-32 is wrong" in found["journal_damaged"].message
    assert found["journal_put_back"].since == 60.0
    assert find_problems(Facts(now=700.0, latest=700.0, put_back_at=60.0)) == []
    assert "sick: database is locked" in found["consumer_problem"].message
    assert "slow has stopped asking: 7 events" in found["consumer_stalled"].message
    assert found["consumer_stalled"].since == 70.0
    assert "3600 s ahead" in found["clock_back"].message
    assert all(p.remedy for p in found.values())


def test_every_code_is_in_the_operators_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    assert [p.code for p in find_problems(EVERYTHING) if f"| `{p.code}` |" not in page] == []


def test_problem_that_stays_keeps_its_time_and_one_that_comes_back_gets_a_new_one() -> None:
    health = Health()
    sick = {"c": ConsumerFacts(lag=1, silent_s=0.0, problem="disk full")}
    assert health.look(Facts(now=1.0, latest=1.0, consumers=sick))
    assert not health.look(Facts(now=2.0, latest=2.0, consumers=sick))
    assert health.problems[0].since == 1.0
    assert health.look(Facts(now=3.0, latest=3.0))
    assert health.look(Facts(now=4.0, latest=4.0, consumers=sick))
    assert (health.state, health.problems[0].since) == ("consumer_problem", 4.0)


def test_consumer_that_stops_asking_is_reported_and_stored_at_once_and_cleared(
    start: Start,  # noqa: F811
) -> None:
    bus = start()
    bus.publish(line("1"))
    bus.fetch(from_seq=1, consumer="sleeper")
    for _ in range(29):
        bus.later(1.0)
        wait_until(lambda: bus.client.status()["uptime_s"], "a turn of the loop")
    assert bus.client.status()["state"] == "ok"
    for _ in range(2):
        bus.later(1.0)
    wait_until(lambda: bus.client.status()["state"] == "consumer_stalled", "it is missed")
    status = bus.client.status()
    (problem,) = status["problems"]
    assert "sleeper has stopped asking" in problem["message"]
    next_seq = status["last_seq"]
    bus.fetch(from_seq=next_seq, consumer="sleeper")
    bus.later(1.0)
    wait_until(lambda: bus.client.status()["state"] == "ok", "it is back")

    def told() -> list[str]:
        _, events = bus.fetch(from_seq=1)
        return [e["data"]["status"] for e in events if e["event_type"] == "system_health"]

    wait_until(lambda: told()[-2:] == ["consumer_stalled", "ok"], "both changes are stored")


def test_consumers_own_words_reach_status_and_its_exit_code(bus: System) -> None:
    assert bus.bitten("status").returncode == 0
    client = Client(bus.settings)
    report = {"consumer": "c", "stored_seq": 1, "problem": "database is locked\x1b[2J"}
    client.receive(client.send(b"fetch", json.dumps(report).encode()), 5.0)
    client.close()
    wait_until(lambda: (bus.status() or {})["state"] != "ok", "the next look")
    shown = bus.bitten("status")
    assert shown.returncode == 1
    assert "consumer_problem" in shown.stdout
    assert "consumer c: database is locked\\x1b[2J; see its log" in shown.stdout
    as_json = bus.bitten("status", "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["problems"][0]["code"] == "consumer_problem"


def test_full_disk_is_over_by_itself_when_there_is_room_and_is_told_afterwards(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        system = System(disk / "home")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(2_000_000))
        try:
            system.start_bus()
            client = Client(system.settings)
            with pytest.raises(BusRefused, match="no space left"):
                for n in range(100):
                    client.publish(line(str(n), action="x" * 100_000))
            status = client.status()
            assert status["state"] == status["problems"][0]["code"] == "storage_full"
            ballast.unlink()
            wait_until(lambda: client.status()["state"] == "ok", "nobody publishes", 5.0)
            before = status["last_seq"]
            wait_until(lambda: client.status()["last_seq"] > before, "it is an event")
            client.close()
        finally:
            system.close()


def test_endless_reader_of_the_journal_is_told_and_cleared_when_it_ends(start: Start) -> None:  # noqa: F811
    bus = start()
    reader = database.connect(bus.settings.journal, database.READ_ONLY)
    rows = reader.execute("SELECT 1 FROM meta")
    next(rows)
    ids = map(str, itertools.count())

    def codes() -> list[str]:
        """What is wrong after a megabyte more."""
        bus.publish(line(next(ids), action="a", details={"text": "x" * 1_000_000}))
        return [p["code"] for p in bus.client.status()["problems"]]

    for _ in range(50):
        assert codes() == []
    wait_until(lambda: codes() == ["journal_read"], "it is told")
    reader.close()
    wait_until(lambda: codes() == [], "it is cleared")


def test_problem_of_a_consumer_that_has_ended_is_no_problem_for_ever(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path / "journal.db")) as journal:
        consumers = Consumers(journal)
        consumers["data_collector"] = Consumer(1, 0.0, problem="its disk is full")
        consumers.pass_time(STALLED_AFTER_S - 1)
        assert consumers.status()["data_collector"]["problem"] == "its disk is full"
        consumers.pass_time(1)
        assert consumers.status()["data_collector"]["problem"] == ""
