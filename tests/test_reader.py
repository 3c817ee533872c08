"""Reading the database from a script: DataCollector() without a bus."""

from __future__ import annotations

import contextlib
import gc
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import apsw
import pytest
from test_store import JOURNAL, REGISTRY, by_program, event, tick, write

from collector import DataCollector
from collector.store import Store
from event_bus import database
from event_bus.errors import DatabaseError, DatabaseMissing
from event_bus.subscriber import Batch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with a few events of one trade and ticks around them."""
    path = tmp_path / "events.db"
    store = Store(path, REGISTRY)
    fire = {"fire_id": "F1", "symbol": "EURUSD", "direction": "BUY", "lot_size": 0.1}
    trade = {"fire_id": "F1", "ticket": 7, "symbol": "EURUSD", "volume": 0.1, "open_price": 1.5}
    write(
        store,
        event("market_data", tick().data, timestamp=100.0, source="feed"),
        event(
            "fire_command",
            fire,
            timestamp=200.0,
            source="engine",
            user_id="7",
            correlation_id="c1",
            causation_id="cause",
        ),
        event("trade_executed", trade, timestamp=300.0, source="broker", correlation_id="c1"),
        event("market_data", tick(symbol="GBPUSD").data, timestamp=300.0, source="feed"),
        event("user_action", {"action": "x", "symbol": "EURUSD"}, timestamp=400.0),
        event("unheard_of", {"symbol": "EURUSD"}, timestamp=500.0),
    )
    store.close()
    return path


@pytest.mark.parametrize(
    ("filters", "seqs"),
    [
        ({}, [6, 5, 4, 3, 2, 1]),
        ({"limit": 2}, [6, 5]),
        ({"limit": 0}, []),
        ({"event_type": "market_data"}, [4, 1]),
        ({"event_type": "nothing"}, []),
        ({"start_time": 300}, [6, 5, 4, 3]),
        ({"end_time": 300.0}, [2, 1]),
        ({"start_time": 200.0, "end_time": 400.0}, [4, 3, 2]),
        ({"source": "feed"}, [4, 1]),
        ({"user_id": "7"}, [2]),
        ({"user_id": 7}, [2]),
        ({"correlation_id": "c1"}, [3, 2]),
        ({"symbol": "EURUSD"}, [3, 2, 1]),
        ({"symbol": "GBPUSD"}, [4]),
        ({"symbol": "EURUSD", "event_type": "trade_executed"}, [3]),
        ({"symbol": "EURUSD", "event_type": "user_action"}, []),
        ({"symbol": "EURUSD", "start_time": 200.0, "limit": 1}, [3]),
        ({"symbol": "EURUSD", "source": "engine", "user_id": "7", "correlation_id": "c1"}, [2]),
        ({"source": "' OR 1 --"}, []),
    ],
)
def test_query_gives_the_newest_events_that_match(
    path: Path, filters: dict[str, Any], seqs: list[int]
) -> None:
    assert [e["seq"] for e in DataCollector(path).query_events(**filters)] == seqs


def test_event_is_a_dictionary_of_its_envelope(path: Path) -> None:
    (found,) = DataCollector(path).query_events(event_type="fire_command")
    assert found.pop("event_id").startswith("0123456789abcdef0123-")
    assert found == {
        "seq": 2,
        "event_type": "fire_command",
        "timestamp": 200.0,
        "source": "engine",
        "user_id": "7",
        "correlation_id": "c1",
        "causation_id": "cause",
        "received_at": 1763695678.5,
        "data": {"fire_id": "F1", "symbol": "EURUSD", "direction": "BUY", "lot_size": 0.1},
    }


def test_stats_count_what_came_and_what_is_stored_over_restarts(path: Path) -> None:
    store = Store(path, REGISTRY)
    again = [tick(), tick()]
    store.write([Batch(7, 1.0, again)], JOURNAL)
    store.write([Batch(7, 1.0, again)], JOURNAL)
    store.record_gap(9, 19, JOURNAL, "trimmed")
    write(store, tick())
    store.close()
    stats = DataCollector(path).get_stats()
    assert (stats["events_received"], stats["events_stored"]) == (11, 9)
    assert stats["last_seq"] == 20
    assert stats["by_type"]["market_data"] == 5
    assert sum(stats["by_type"].values()) == stats["events_stored"]
    (gap,) = stats["gaps"]
    assert (gap["first_seq"], gap["last_seq"]) == (9, 19)
    assert stats["database_bytes"] == path.stat().st_size


def test_stats_of_an_empty_database_are_zero(tmp_path: Path) -> None:
    Store(tmp_path / "events.db", REGISTRY).close()
    stats = DataCollector(tmp_path / "events.db").get_stats()
    assert (stats["events_received"], stats["events_stored"], stats["last_seq"]) == (0, 0, 0)
    assert (stats["by_type"], stats["gaps"], stats["events_rejected"]) == ({}, [], 0)


def test_rejections_are_counted(path: Path) -> None:
    store = Store(path, REGISTRY)
    data = {"reason": "r", "rule": "r", "raw": "", "raw_bytes": 0}
    write(store, event("event_rejected", data))
    store.close()
    assert DataCollector(path).get_stats()["events_rejected"] == 1


@pytest.mark.parametrize("content", [None, b""])
def test_missing_or_unfinished_database_says_how_to_start_one(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "events.db"
    if content is not None:
        path.write_bytes(content)
    for ask in (DataCollector(path).get_stats, DataCollector(path).query_events):
        with pytest.raises(DatabaseMissing, match=r"; start the collector"):
            ask()


def test_corrupt_or_foreign_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(DatabaseError, match=r"cannot read .*not a database; it is damaged, or"):
        DataCollector(path).get_stats()
    path.unlink()
    with pytest.raises(apsw.CantOpenError) as caught:
        database.connect(path, database.READ_ONLY)
    assert database.reading_hint(caught.value) == "check its owner and rights"
    by_program(path, "CREATE TABLE x (y)")
    with pytest.raises(DatabaseError, match="another program"):
        DataCollector(path).get_stats()


def test_reading_does_not_change_the_database(path: Path) -> None:
    before = path.read_bytes()
    DataCollector(path).get_stats()
    DataCollector(path).query_events(symbol="EURUSD")
    assert path.read_bytes() == before


def test_asking_leaves_no_descriptor_open(path: Path) -> None:
    def ask() -> None:
        collector = DataCollector(path)
        collector.get_stats()
        collector.query_events()

    descriptors = Path("/proc/self/fd")
    ask()
    gc.collect()
    before = len(list(descriptors.iterdir()))
    for _ in range(10):
        ask()
    gc.collect()  # an unclosed socket warns here, and warnings are errors
    assert len(list(descriptors.iterdir())) == before


@pytest.mark.parametrize(
    ("directory", "statement"),
    [
        (".", "from event_bus.data_collector import DataCollector"),
        ("event_bus", "from data_collector import DataCollector"),
        ("/", "from event_bus.data_collector import DataCollector"),
        ("/", "from collector import DataCollector"),
    ],
)
def test_data_collector_is_there_under_the_names_of_the_handbook(
    path: Path, directory: str, statement: str
) -> None:
    code = f"{statement}\nprint(DataCollector().get_stats()['events_stored'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY / directory,
        env=os.environ | {"BITTEN_DB": str(path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("6\n", "")


def test_database_that_is_being_made_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    Store(path, REGISTRY).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DROP VIEW events")  # the last that a new database gets
    with pytest.raises(DatabaseMissing, match="no database at"):
        DataCollector(path).get_stats()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limit": None}, "Expected `int`, got `null` in `limit`"),
        ({"limit": "5"}, "Expected `int`, got `str` in `limit`"),
        ({"limit": -1}, "Expected `int` >= 0 in `limit`"),
        ({"start_time": "yesterday"}, "got `str` in `start_time`"),
        ({"symbol": 5}, "got `int` in `symbol`"),
    ],
)
def test_odd_argument_of_a_query_is_named(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    path = tmp_path / "events.db"
    Store(path, REGISTRY).close()
    with pytest.raises(ValueError, match=f"^cannot query: .*{words}$"):
        DataCollector(path).query_events(**given)
