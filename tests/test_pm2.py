"""`pm2 start pm2_config.json`, with a real pm2 in a home of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import System, wait_until
from pm2_home import CONFIG, Pm2


@pytest.fixture
def pm2(system: System, tmp_path: Path) -> Iterator[Pm2]:
    if shutil.which("pm2") is None:
        if os.environ.get("CI"):
            pytest.fail("pm2 is not installed: npm install --global pm2")
        pytest.skip("pm2 is not installed: npm install --global pm2")
    made = Pm2(system, tmp_path / "checkout")
    yield made
    made("kill")


def test_config_is_strict_json_with_the_two_apps() -> None:
    apps = json.loads(CONFIG.read_text())["apps"]
    assert [(a["name"], a["script"], a["args"]) for a in apps] == [
        ("event_bus", ".venv/bin/bitten", "bus"),
        ("data_collector", ".venv/bin/bitten", "collect"),
    ]


def test_pm2_starts_both_keeps_them_alive_and_stops_them_cleanly(pm2: Pm2) -> None:
    pm2("start", "pm2_config.json")  # returns when both have said that they are ready
    system = pm2.system
    apps = pm2.apps()
    assert {n: a["pm2_env"]["status"] for n, a in apps.items()} == {
        "event_bus": "online",
        "data_collector": "online",
    }
    assert system.status() is not None
    assert system.bitten("emit", "user_action", "action=x").returncode == 0
    system.wait_stored()

    psutil.Process(apps["event_bus"]["pid"]).kill()

    def restarted() -> bool:
        bus = pm2.apps()["event_bus"]
        return bus["pid"] not in (0, apps["event_bus"]["pid"]) and system.status(0.2) is not None

    wait_until(restarted, "pm2 has started the bus again")
    assert system.bitten("emit", "user_action", "action=y").returncode == 0
    system.wait_stored()

    pm2("stop", "all")
    logs = pm2.logs()
    assert "stopped at seq" in logs  # the bus drained and ended by itself, it was not killed
    assert "events stored since the start" in logs
