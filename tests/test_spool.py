"""The spool file, the outbox before it, and the broker's adoption of what dead processes left."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import msgspec
import pytest
from conftest import System, wait_until

from event_bus.adopt import SpoolAdopter
from event_bus.outbox import Outbox
from event_bus.settings import Settings
from event_bus.spool import Spool, open_locked

SPILL = """
import os, sys
from event_bus import event_bridge as b
for n in range(int(sys.argv[1])):
    b.user_action({'action': 'n', 'n': n})
"""
SPILL_AND_DIE = (
    SPILL
    + """
import time
deadline = time.monotonic() + 10
while b.stats()['spooled'] < int(sys.argv[1]) and time.monotonic() < deadline:
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
)


def spool_files(system: System) -> list[Path]:
    return sorted(system.settings.spool.glob("*"))


def wait_adopted(system: System) -> None:
    wait_until(lambda: not spool_files(system), "the spool is empty")


def stored_numbers(system: System) -> list[int]:
    rows = system.sql("SELECT data FROM events WHERE event_type = 'user_action' ORDER BY seq")
    return [msgspec.json.decode(data)["n"] for (data,) in rows]


def test_lines_come_out_in_order_in_whole_lines(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.ndjson", 1_000)
    assert not spool
    assert spool.append(b"one\ntwo\n", 2)
    assert spool.append(b"three\n", 1)
    assert spool.read(5) == b"one\n"
    assert spool.read(2) == b"two\n"
    assert spool.unread
    spool.rewind()
    assert spool.read(100) == b"one\ntwo\nthree\n"
    assert not spool.unread
    assert spool.events == 3


def test_file_goes_with_its_last_line_and_comes_back_with_the_next(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.ndjson", 1_000)
    spool.append(b"one\n", 1)
    spool.read(100)
    spool.delivered(4, 1)
    assert not spool.path.exists()
    assert not spool
    spool.append(b"two\n", 1)
    assert spool.path.read_bytes() == b"two\n"
    assert spool.path.stat().st_mode & 0o777 == 0o600
    spool.release()


def test_limit_refuses_without_writing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.ndjson", 10)
    assert spool.append(b"12345678\n", 1)
    assert not spool.append(b"xx\n", 1)
    assert spool.path.read_bytes() == b"12345678\n"
    assert spool.append(b"report\n", 1, over_limit=True)
    spool.release()


def test_limit_counts_only_what_is_not_delivered_yet(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.ndjson", 40)
    waiting: list[bytes] = []
    for n in range(100):
        line = b"line %03d\n" % n
        assert spool.append(line, 1)
        waiting.append(line)
        if len(waiting) == 4:
            assert spool.read(10) == waiting[0]
            spool.delivered(len(waiting.pop(0)), 1)
        assert spool.path.stat().st_size <= 60
    assert not spool.append(b"x" * 20, 1)
    spool.rewind()
    assert spool.read(100) == b"".join(waiting)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ndjson"]
    adopter = SpoolAdopter(tmp_path)
    adopter.look()
    assert not adopter.pending
    spool.release()


def test_what_was_read_ahead_is_still_where_it_was_when_space_is_given_back(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path / "a.ndjson", 40)
    assert spool.append(b"".join(b"line %03d\n" % n for n in range(4)), 4)
    assert spool.read(30) == b"line 000\nline 001\nline 002\n"
    spool.delivered(27, 3)
    assert spool.path.stat().st_size == 9
    assert spool.append(b"line 004\n", 1)
    assert spool.read(30) == b"line 003\nline 004\n"
    spool.delivered(18, 2)
    assert not list(tmp_path.iterdir())


def test_file_read_by_its_own_process_stays_locked(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.ndjson", 1_000)
    spool.append(b"one\n", 1)
    assert spool.path.read_bytes() == b"one\n"
    own, other = SpoolAdopter(tmp_path), SpoolAdopter(tmp_path)
    own.look()
    other_process = (
        "import sys, pathlib\nfrom event_bus.adopt import SpoolAdopter\n"
        "a = SpoolAdopter(pathlib.Path(sys.argv[1])); a.look(); print(a.pending)"
    )
    done = System(tmp_path / "home").script(other_process, str(tmp_path))
    assert (own.pending, done.stdout) == (False, "False\n")
    spool.release()
    other.look()
    assert other.pending


def test_file_that_somebody_cut_is_noticed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.ndjson", 1_000)
    spool.append(b"one\ntwo\n", 2)
    os.truncate(spool.path, 0)
    with pytest.raises(OSError, match="2 events are gone"):
        spool.read(100)
    spool.release()


def test_outbox_spills_in_order_and_keeps_in_memory_what_does_not_fit(tmp_path: Path) -> None:
    outbox = Outbox(Settings(home=tmp_path, spool_max_bytes=20), "t")
    for n in range(5):
        outbox.put(b"line-%d" % n)
    assert outbox.spill(2, 1_000) == "spool full"
    assert outbox.spool.path.read_bytes() == b"line-0\nline-1\n"
    assert list(outbox.lines) == [b"line-2", b"line-3", b"line-4"]
    assert outbox.size_bytes == 21
    outbox.spool.release()


def test_home_that_cannot_be_made_keeps_events_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outbox = Outbox(Settings(home=tmp_path / "file" / "home"), "t")
    outbox.put(b"line")
    assert "cannot create" in outbox.spill(10, 1_000)
    assert list(outbox.lines) == [b"line"]


def test_spool_of_a_process_that_ended_is_adopted_and_removed(system: System) -> None:
    done = system.script(SPILL, "300")
    assert done.returncode == 0, done.stderr
    assert len(spool_files(system)) == 1
    system.start_bus()
    wait_adopted(system)
    system.start_collector()
    system.wait_stored()
    assert stored_numbers(system) == list(range(300))


def test_spool_of_a_process_that_was_killed_is_adopted_and_removed(system: System) -> None:
    done = system.script(SPILL_AND_DIE, "300")
    assert done.returncode == -signal.SIGKILL, done.stderr
    system.start_bus()
    wait_adopted(system)
    system.start_collector()
    system.wait_stored()
    assert stored_numbers(system) == list(range(300))


def test_last_line_cut_short_by_a_crash_is_rejected_visibly_and_alone(system: System) -> None:
    system.script(SPILL, "20")
    (path,) = spool_files(system)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    system.start_bus()
    wait_adopted(system)
    system.start_collector()
    system.wait_stored()
    assert stored_numbers(system) == list(range(19))
    ((reason, raw),) = system.sql("SELECT reason, raw FROM rejected_events")
    assert "not JSON" in reason
    assert raw in (whole.splitlines()[-1][:-9], whole.splitlines()[-1][:-9].decode())


def test_spool_of_a_living_process_is_left_to_it(system: System) -> None:
    spool = Spool(system.settings.spool / "living.ndjson", 1_000)
    system.settings.make_home()
    spool.append(b"{}\n", 1)
    system.script(SPILL, "5")
    system.start_bus()
    wait_until(lambda: spool_files(system) == [spool.path], "the other spool is adopted")
    status = system.status()
    assert status is not None
    assert status["rejected"] == 0
    spool.release()


def test_unreadable_spool_does_not_keep_others_from_being_adopted(system: System) -> None:
    system.settings.make_home()
    directory = system.settings.spool / "000.ndjson"
    directory.mkdir()
    system.script(SPILL, "5")
    system.start_bus()
    wait_until(lambda: spool_files(system) == [directory], "the other spool is adopted")


def test_file_that_its_process_replaced_during_adoption_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ndjson"
    path.write_bytes(b"delivered\n")
    lock = fcntl.flock

    def lock_too_late(fd: int, operation: int) -> None:
        path.unlink()
        path.write_bytes(b"new\n")
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    adopter = SpoolAdopter(tmp_path)
    adopter.look()
    assert not adopter.pending
    assert path.read_bytes() == b"new\n"


def test_file_that_cannot_be_locked_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="no locks available"):
        Spool(tmp_path / "a.ndjson", 1_000).append(b"x\n", 1)


def test_copy_that_a_dead_process_left_half_made_is_removed_and_others_are_not(
    tmp_path: Path,
) -> None:
    stale, fresh, held = (tmp_path / f"{name}.new" for name in ("stale", "fresh", "held"))
    for path in (stale, fresh, held):
        path.write_bytes(b"half")
    for path in (stale, held):
        os.utime(path, (1.0, 1.0))
    fd = open_locked(held)
    SpoolAdopter(tmp_path).look()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh.new", "held.new"]
    os.close(fd)
