"""What a process loses as it ends, with the bus away and its disk full, is told all the same."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import System, wait_until
from disks import small_disk
from test_orphans import leave

from collector.audit import audit
from event_bus import envelope
from event_bus.adopt import SpoolAdopter
from event_bus.last_loss import LastLoss, notes
from event_bus.spool import open_locked

TOKEN = "0123456789abcdef0000"

EMIT = """
import atexit, sys
if "again" in sys.argv:  # handlers run in reverse order: this one after the bridge has closed
    atexit.register(lambda: [event_bridge.user_action({"action": "late"}) for _ in range(3)])
from event_bus import event_bridge
for i in range(int(sys.argv[1])):
    event_bridge.user_action({"action": "count", "details": {"i": i}})
"""


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.fixture
def rested(tmp_path: Path) -> Iterator[System]:
    """A home on a small disk, whose bus and collector ran and ended."""
    with small_disk(tmp_path / "disk", 12) as disk:
        system = System(disk / "home")
        daemons = [system.start_bus(), system.start_collector()]
        system.wait_stored()
        for process in daemons:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        yield system
        system.close()


def lose(system: System, *argv: str, room: int = 0) -> str:
    """Have a process end with `room` bytes left on its disk; what it said."""
    ballast = fill(system.home.parent)
    os.truncate(ballast, ballast.stat().st_size - room)
    done = system.script(EMIT, *argv, env={"BITTEN_SOURCE": "short"})
    ballast.unlink()
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_events_lost_at_the_end_of_a_process_on_a_full_disk_are_counted(rested: System) -> None:
    said = lose(rested, "5")
    assert "5 events are lost as this process ends" in said
    doctor = rested.bitten("doctor")
    assert "dropped: short dropped 5 events in the last day" in doctor.stdout
    for _ in range(2):  # while the bus is away, and after it has taken the account in
        done = rested.bitten("audit")
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1] == (
            "5 lost: 5 dropped before they reached the bus (5 of short)"
        )
        rested.start_bus()
        rested.start_collector()
        wait_until(lambda: not notes(rested.settings.spool), "the account is taken in")
        rested.wait_stored()
        for process in rested.processes[-2:]:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
    ((source, dropped, total, reason),) = rested.sql(
        "SELECT source, dropped, dropped_total, reason FROM bridge_loss"
    )
    assert (source, dropped, total) == ("short", 5, 5)
    assert "could not be written" in reason


def test_what_is_spooled_before_the_disk_is_full_arrives_and_the_rest_is_counted(
    rested: System,
) -> None:
    lose(rested, "20000", room=1 << 20)
    ledger = audit(rested.settings)
    assert ledger.in_spool > 1_000
    assert ledger.lost == 20_000 - (ledger.in_spool - 1)  # the account itself waits, too
    rested.start_bus()
    rested.start_collector()
    wait_until(lambda: not list(rested.settings.spool.iterdir()), "the spool is taken in")
    rested.wait_stored()
    after = audit(rested.settings)
    assert (after.lost, after.waiting) == (ledger.lost, 0)
    assert rested.sql("SELECT count(*) FROM user_action") == [(ledger.in_spool - 1,)]


def test_events_lost_after_the_bridge_has_closed_are_in_the_same_account(rested: System) -> None:
    lose(rested, "5", "again")
    assert len(notes(rested.settings.spool)) == 1
    assert audit(rested.settings).lost == 8


def test_bridge_without_a_bus_of_its_home_delivers_the_account(bus: System, tmp_path: Path) -> None:
    remote = System(tmp_path / "remote")
    remote.environ |= {k: bus.environ[k] for k in ("BITTEN_EVENTS_URL", "BITTEN_INGRESS_URL")}
    left = leave(remote, 3)
    leave_note(remote.settings.spool, account(4, 7, 9, token=left.stem))
    assert remote.bitten("emit", "user_action", "action=own").returncode == 0
    assert not list(remote.settings.spool.iterdir())
    bus.start_collector()
    bus.wait_stored()
    rows = bus.sql("SELECT event_id, source FROM events WHERE event_type = 'bridge_loss'")
    assert rows == [(f"{left.stem}-4", "a/b.ndjson")]


def account(n: int, dropped: int, total: int, *, token: str = TOKEN) -> bytes:
    data = {"producer": token, "dropped": dropped, "dropped_total": total, "reason": "full"}
    return envelope.encode(
        envelope.Envelope(
            event_id=f"{token}-{n}",
            event_type="bridge_loss",
            timestamp=1.0,
            source="a/b.ndjson",
            data=data,
        )
    )


def leave_note(spool: Path, line: bytes) -> None:
    """As a process that ended."""
    loss = LastLoss(spool)
    assert loss.make(line)
    loss.release()


def test_account_taken_in_again_after_a_crash_is_recognised(bus: System, tmp_path: Path) -> None:
    bus.start_collector()
    bus.wait_stored()
    spool = bus.settings.spool
    for _ in range(2):
        bus_away = tmp_path / "elsewhere"
        bus_away.mkdir(exist_ok=True)
        leave_note(bus_away, account(4, 7, 9))
        (note,) = notes(bus_away)
        os.utime(note.path, (1_000.0, 1_000.0))
        note.path.rename(spool / note.path.name)
        wait_until(lambda: not notes(spool), "the account is taken in")
    bus.wait_stored()
    assert bus.sql("SELECT dropped FROM bridge_loss") == [(7,)]
    status = bus.status()
    assert status is not None
    assert (status["duplicates"], status["conflicts"]) == (1, 0)


def test_account_is_kept_until_it_is_in_the_journal(tmp_path: Path) -> None:
    leave_note(tmp_path, account(4, 7, 9))
    adopter = SpoolAdopter(tmp_path)
    adopter.look()
    adopter.done()  # of a turn that had no room for it
    line = adopter.read()
    adopter.rewind()
    adopter.done()
    assert notes(tmp_path)
    assert adopter.read() == line
    adopter.done()
    assert not notes(tmp_path)
    event = envelope.decode(line)
    assert (event.event_id, event.source) == (f"{TOKEN}-4", "a/b.ndjson")


def test_account_of_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    loss = LastLoss(tmp_path)
    assert loss.make(account(4, 7, 9))
    (note,) = notes(tmp_path)
    with pytest.raises(BlockingIOError):
        open_locked(note.path)
    assert loss.add(account(6, 2, 11))
    (note,) = notes(tmp_path)
    assert (note.n, note.dropped, note.total) == (4, 9, 11)
    loss.release()


@pytest.mark.parametrize("name", [f"{TOKEN}-1-x.lost-1-", "x.lost-1-1", f"{TOKEN}-0-x.lost-1-1"])
def test_file_of_another_name_is_no_account(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert notes(tmp_path) == []
