"""The database damaged, removed, replaced, locked and held: what the collector makes of it."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import System, wait_until
from test_collector import collected, publish, said

from event_bus import protocol
from event_bus.errors import BusUnavailable
from event_bus.protocol import Client, FetchRequest
from event_bus.subscriber import Subscriber

__all__ = ["collected"]


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
    with Subscriber(start=1, settings=system.settings, timeout_s=0.5) as subscriber:
        published = [
            (e.seq, e.event_id, e.event_type, e.timestamp, e.source, e.received_at, e.data)
            for e in subscriber
        ]
    stored_events = [
        (*row, json.loads(data))
        for *row, data in system.sql(
            "SELECT seq, event_id, event_type, timestamp, source, received_at, data FROM events"
            " ORDER BY seq"
        )
    ]
    assert stored_events == published[: len(stored_events)]
    assert len(stored_events) >= len(published) - 5  # a stored health event may have come since
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
    client = Client(bus.settings.ingress_url)
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
