"""The home removed, moved or emptied, with the daemons running in it or stopped."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
from typing import Any

import pytest
from conftest import System, wait_until
from test_broker import line
from test_collector import publish

from event_bus.errors import BusRefused
from event_bus.protocol import Client
from event_bus.traces import AUDIT, END


def codes(system: System) -> list[str]:
    return [p["code"] for p in (system.status() or {"problems": []})["problems"]]


def audit(system: System) -> dict[str, Any]:
    done = system.bitten("audit", "--json")
    assert done.stdout, done.stderr
    ledger: dict[str, Any] = json.loads(done.stdout)
    return ledger


def end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()


def test_home_removed_under_bus_and_collector_is_there_again_with_all_that_was_acknowledged(
    running: System,
) -> None:
    publish(running, 300)
    running.wait_stored()
    before = running.sql("SELECT seq, event_id FROM events ORDER BY seq")
    shutil.rmtree(running.home)
    bus, collector = running.processes
    wait_until(lambda: "journal_put_back" in codes(running), "the journal is there again")
    wait_until(running.db.exists, "the database too")
    publish(running, 10)
    running.wait_stored()
    assert running.sql("SELECT seq, event_id FROM events ORDER BY seq")[: len(before)] == before
    assert bus.poll() is None and collector.poll() is None
    told = running.sql("SELECT data FROM events WHERE event_type = 'system_health'")
    assert any("journal_put_back" in data for (data,) in told)
    ledger = audit(running)
    assert (ledger["lost"], ledger["bus"]) == (0, "journal_put_back")
    locks = [running.home / "bus.lock", running.home / "bitten_events.db.lock"]
    pids = [str(p.pid) for p in (bus, collector)]
    wait_until(lambda: [x.exists() and x.read_text().strip() for x in locks] == pids, "both locks")
    for process in (bus, collector):
        process.kill()
        process.wait()
    running.start_bus()
    running.start_collector()
    running.wait_stored()
    assert running.sql("SELECT seq, event_id FROM events ORDER BY seq")[: len(before)] == before
    assert audit(running)["lost"] == 0


def test_home_moved_away_is_made_again_and_locked_again(bus: System) -> None:
    publish(bus, 100)
    bus.home.rename(bus.home.with_name("moved"))
    wait_until(lambda: "journal_put_back" in codes(bus), "the journal is there again")
    assert (bus.home / "bus.lock").read_text().strip() == str(bus.processes[0].pid)
    second = bus.bitten("bus", timeout=20)
    assert second.returncode == 4
    assert f"process {bus.processes[0].pid} holds" in second.stderr + second.stdout


def test_lock_file_removed_lets_no_second_bus_start_and_audit_finds_the_first(
    running: System,
) -> None:
    lock = running.home / "bus.lock"
    for file in running.home.glob("*.lock"):
        file.unlink()
    second = running.bitten("--ingress-url", "tcp://127.0.0.1:0", "bus", timeout=20)
    assert second.returncode == 4
    assert "an event bus is already running here" in second.stderr + second.stdout
    lock.unlink(missing_ok=True)
    assert audit(running)["bus"] == "ok"
    pid = str(running.processes[0].pid)
    wait_until(lambda: lock.exists() and lock.read_text().strip() == pid, "it is there again")


def test_journal_removed_and_put_back_is_told_for_a_while(bus: System) -> None:
    bus.settings.journal.unlink()
    wait_until(lambda: "journal_put_back" in codes(bus), "status says what happened")
    status = bus.bitten("status")
    assert "is there again" in status.stdout
    assert "nothing is lost" in status.stdout
    doctor = bus.bitten("doctor")
    assert "warning  bus-problems: the bus says journal_put_back" in doctor.stdout


def test_collector_that_cannot_start_does_not_stop_the_bus(system: System) -> None:
    system.home.mkdir()
    system.db.mkdir()
    system.popen("-m", "event_bus", "up", stdout=subprocess.DEVNULL)
    wait_until(lambda: system.status(0.2), "the bus answers")
    publish(system, 5)
    shutil.rmtree(system.db)
    system.wait_stored()


@pytest.mark.parametrize(("trace", "other"), [(AUDIT, END), (END, AUDIT)])
def test_start_without_journal_and_database_goes_on_after_what_is_told_of_them(
    running: System, trace: str, other: str
) -> None:
    publish(running, 50)
    last = running.wait_stored()
    assert audit(running)["lost"] == 0
    for process in running.processes:
        end(process)
    for file in [*running.home.glob("journal.db*"), *running.home.glob("bitten_events.db*")]:
        file.unlink()
    if trace == END:
        last = json.loads((running.home / END).read_text())["journal"]["last_seq"]
    (running.home / other).unlink()
    done = running.bitten("audit")
    assert f"{trace} tells of events up to" in done.stdout + done.stderr
    running.start_bus()
    running.start_collector()
    status = running.status() or {}
    assert status["state"] == "journal_gone"
    assert "bitten restore" in status["problems"][0]["remedy"]
    known = status["origin_seq"] - 1
    assert 50 < known <= last
    publish(running, 5)
    running.wait_stored()
    ledger = audit(running)
    assert (ledger["lost"], ledger["at_least"]) == (known, True)
    assert running.sql("SELECT min(seq) FROM events") == [(known + 1,)]


def test_file_size_limit_is_told_and_lived_with_like_a_full_disk(system: System) -> None:
    bus = system.popen(
        *("-m", "event_bus", "bus"),
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY)
        ),
    )
    wait_until(lambda: system.status(0.2), "the bus answers")
    accepted = 0

    def is_full() -> bool:
        nonlocal accepted
        assert bus.poll() is None
        try:
            accepted += client.publish(line(f"id-{accepted}", action="x" * 20_000))["accepted"]
        except BusRefused as e:
            assert (e.code, "ulimit -f" in str(e)) == ("storage_full", True)
            return system.settings.journal.stat().st_size > 900_000
        return False

    with contextlib.closing(Client(system.settings)) as client:
        wait_until(is_full, "neither journal nor log may grow")
        status = client.status()
        assert status["state"] == "storage_full"
        assert "limit of file sizes" in status["problems"][0]["message"]
        assert status["last_seq"] >= accepted
        resource.prlimit(bus.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        wait_until(lambda: client.status()["state"] != "storage_full", "it goes on by itself")
        assert not is_full()
