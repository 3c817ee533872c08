"""`bitten up`: both daemons in one foreground process, without pm2."""

from __future__ import annotations

import json
import os
import signal
import socket

import psutil
from conftest import System, wait_until


def children(pid: int) -> dict[str, psutil.Process]:
    """The daemons below a process, by command."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:  # it ended just now
            continue
        if command and command[-1] in ("bus", "collect"):
            found[command[-1]] = child
    return found


def test_up_stores_what_is_emitted_and_ctrl_c_ends_all(system: System) -> None:
    up = system.popen("-m", "event_bus", "up")
    wait_until(lambda: system.status(0.2), "the bus answers")
    daemons = children(up.pid)
    assert set(daemons) == {"bus", "collect"}
    assert system.bitten("emit", "user_action", "action=x").returncode == 0
    system.wait_stored()
    up.send_signal(signal.SIGINT)
    output, _ = up.communicate(timeout=20)
    assert up.returncode == 0, output
    assert not any(d.is_running() for d in daemons.values())


def test_up_starts_again_what_dies(system: System) -> None:
    up = system.popen("-m", "event_bus", "up")
    wait_until(lambda: system.status(0.2), "the bus answers")
    before = wait_until(lambda: d if len(d := children(up.pid)) == 2 else None, "both run")
    for daemon in before.values():
        daemon.kill()

    def started_again() -> bool:
        now = children(up.pid)
        return len(now) == 2 and all(now[n].pid != before[n].pid for n in now)

    wait_until(started_again, "both run again")
    wait_until(lambda: system.status(0.2), "the bus answers again")
    system.bitten("emit", "user_action", "action=x")
    system.wait_stored()
    status = system.status()
    assert status is not None
    assert status["epoch"] == 2


def test_daemons_do_not_outlive_a_killed_supervisor(system: System) -> None:
    up = system.popen("-m", "event_bus", "up")
    wait_until(lambda: system.status(0.2), "the bus answers")
    daemons = children(up.pid)
    os.kill(up.pid, signal.SIGKILL)
    wait_until(lambda: not any(d.is_running() for d in daemons.values()), "both are gone")


def test_up_ends_with_the_reason_when_a_port_is_taken(system: System) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(system.environ["BITTEN_INGRESS_URL"].rpartition(":")[2])))
        taken.listen()
        up = system.popen("-m", "event_bus", "up")
        output, _ = up.communicate(timeout=20)
    assert up.returncode == 4
    assert "cannot listen on" in output
    assert "set BITTEN_INGRESS_URL" in output


def test_status_of_a_running_system_is_json(system: System) -> None:
    system.popen("-m", "event_bus", "up")
    wait_until(lambda: system.status(0.2), "the bus answers")
    assert json.loads(system.bitten("status", "--json").stdout)["state"] == "ok"
