"""`bitten doctor` on disk, clock, memory, open ports and pm2."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import System
from disks import small_disk
from doctors import findings, only

from collector.doctor import disk, machine, pm2
from collector.doctor.disk import Growth, days_left
from collector.doctor.processes import Process, lock_owner
from collector.store import Store
from event_bus.envelope import Envelope, decode_lines, encode_lines
from event_bus.event_schema import Registry
from event_bus.journal import Journal
from event_bus.subscriber import Batch

CONFIG = Path(__file__).parent.parent / "pm2_config.json"


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Iterator[System]:
    with small_disk(tmp_path / "disk", 40) as path:
        system = System(path / "home")
        system.settings.make_home()
        yield system
        system.close()


def test_full_disk_is_a_fault(on_small_disk: System) -> None:
    finding = only(on_small_disk, "disk")
    assert finding.level == "fault"
    assert "are free at" in finding.what


def test_days_left_are_reckoned_from_the_last_days_growth(on_small_disk: System) -> None:
    settings = on_small_disk.settings
    now = time.time()
    journal = Journal(settings.journal)
    store = Store(settings.db, Registry())
    for i in range(20):
        body = "x" * 100_000
        event = Envelope(
            event_id=f"0123456789abcdef0123-{i + 1}",
            event_type="user_action",
            timestamp=now,
            data={"action": "x", "note": body},
        )
        line = encode_lines([event])
        at = now - 7_200 + i * 360
        journal.append([line], 1, at, runs=[], opaque_ids=[])
        store.write([Batch(i + 1, at, decode_lines(line))], journal.journal_id)
    journal.close()
    store.close()
    finding = only(on_small_disk, "disk")
    # Two files of 2 MB in two hours are some 48 MB a day, of which 35 are left.
    assert "enough for 0." in finding.what
    assert "MB a day" in finding.why


def test_read_only_file_system_is_a_fault(on_small_disk: System) -> None:
    path = on_small_disk.home.parent
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    found = [f.what for f in findings(on_small_disk, "disk")]
    assert f"{on_small_disk.home} is mounted read-only" in found


def test_disk_without_inodes_is_a_fault(on_small_disk: System) -> None:
    path = on_small_disk.home.parent
    subprocess.run(["mount", "-o", "remount,nr_inodes=50", str(path)], check=True)
    assert any("inodes left" in f.what for f in findings(on_small_disk, "disk"))


def test_home_in_memory_is_a_warning(on_small_disk: System) -> None:
    finding = only(on_small_disk, "file-system")
    assert finding.level == "warning"
    assert f"is on tmpfs (mounted at {on_small_disk.home.parent})" in finding.what


MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:40 / /mnt/my\040share rw - nfs4 server:/share rw
41 22 0:41 / /mnt/host rw - 9p host rw
42 22 0:42 / /home/u/cloud rw - fuse.sshfs u@h: rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "level"),
    [
        ("/mnt/my share/bitten", "nfs4", "fault"),
        ("/mnt/host/bitten", "9p", "fault"),
        ("/home/u/cloud/bitten", "fuse.sshfs", "fault"),
        ("/mnt/hosts/bitten", "ext4", "ok"),
    ],
)
def test_file_system_that_sqlite_cannot_trust_is_a_fault(path: str, kind: str, level: str) -> None:
    found, point = disk.mounted(Path(path), MOUNTS.strip())
    assert found == kind
    assert disk.judge_file_system(Path(path), found, point).level == level


def test_space_that_a_bounded_journal_takes_is_not_endless() -> None:
    assert days_left(100, Growth(endless=10)) == 10
    assert days_left(100, Growth(bounded=10, bound_bytes=1_000)) == 10
    assert days_left(100, Growth(bounded=10, bound_bytes=50)) == math.inf
    assert days_left(100, Growth(endless=5, bounded=5, bound_bytes=20)) == 16
    assert days_left(100, Growth()) == math.inf


def test_little_memory_is_a_warning_and_hardly_any_a_fault() -> None:
    assert machine.judge_memory(60, 1_000).level == "ok"
    assert machine.judge_memory(40, 1_000).level == "warning"
    assert machine.judge_memory(10, 1_000).level == "fault"


def test_clock_that_nobody_keeps_right_is_a_warning(system: System) -> None:
    assert machine.judge_clock(is_synchronised=True).level == "ok"
    assert machine.judge_clock(is_synchronised=False).level == "warning"
    done = system.bitten("doctor", "--all")
    assert "clock: the clock " in done.stdout


def test_descriptors_are_judged_by_share_and_limit() -> None:
    def level(count: int, limit: int) -> str:
        facts = machine.Descriptors(process=Process(pid=1), open=count, limit=limit)
        return machine.judge_descriptors(facts).level

    assert [level(10, 1_024), level(10, 128), level(900, 1_024)] == ["ok", "warning", "fault"]


def test_port_open_to_others_without_keys_is_a_fault(system: System) -> None:
    system.environ["BITTEN_INGRESS_URL"] = "tcp://0.0.0.0:5999"
    finding = only(system, "exposure")
    assert finding.level == "fault"
    assert finding.command.endswith(" keys new")
    keys = system.home / "keys"
    keys.mkdir(parents=True)
    (keys / "bus.key_secret").touch()
    assert findings(system, "exposure") == []


# pm2


@pytest.fixture
def checkout(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with what pm2 needs of ours, and a pm2 of its own that ends with the test."""
    if shutil.which("pm2") is None:
        if os.environ.get("CI"):
            pytest.fail("pm2 is not installed: npm install --global pm2")
        pytest.skip("pm2 is not installed: npm install --global pm2")
    directory = tmp_path / "checkout"
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "bitten").symlink_to(Path(sys.executable).parent / "bitten")
    system.environ["PM2_HOME"] = str(directory / "pm2")
    monkeypatch.setenv("PM2_HOME", str(directory / "pm2"))
    yield directory
    call_pm2(system, directory, "kill")


def call_pm2(system: System, directory: Path, *argv: str) -> None:
    done = subprocess.run(
        ["pm2", *argv],
        cwd=directory,
        env=system.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pm2_with_our_config_is_well_once_it_is_saved(system: System, checkout: Path) -> None:
    shutil.copy(CONFIG, checkout)
    call_pm2(system, checkout, "start", "pm2_config.json")
    finding = only(system, "pm2")
    assert finding.what == "after a reboot pm2 does not start data_collector, event_bus"
    call_pm2(system, checkout, "save")
    assert [f for f in findings(system, "pm2") if "pm2 startup" not in f.why] == []


def test_pm2_settings_that_would_harm_are_each_named(system: System, checkout: Path) -> None:
    apps: list[dict[str, Any]] = json.loads(CONFIG.read_text())["apps"]
    bus = apps[0]
    for key in ("kill_timeout", "exp_backoff_restart_delay"):
        del bus[key]
    bus |= {"max_memory_restart": "300M", "watch": ["nothing"], "cron_restart": "0 4 * * *"}
    (checkout / "bad.json").write_text(json.dumps({"apps": [bus]}))
    call_pm2(system, checkout, "start", "bad.json")
    found = "\n".join(f.what for f in findings(system, "pm2"))
    assert "pm2 kills event_bus 1600 ms after it is told to stop" in found
    assert "pm2 watches files of event_bus" in found
    assert "pm2 restarts event_bus above 315 MB" in found
    assert "pm2 restarts event_bus on a schedule (0 4 * * *)" in found
    assert "pm2 gives event_bus up after a few quick failures" in found
    assert "pm2 runs the bus, but not the collector" in found
    call_pm2(system, checkout, "stop", "event_bus")
    found = "\n".join(f.what for f in findings(system, "pm2"))
    assert "pm2 says that event_bus is stopped" in found


def test_pm2_that_does_not_run_is_not_started(system: System, checkout: Path) -> None:
    assert findings(system, "pm2") == []
    assert not (checkout / "pm2").exists()
    call_pm2(system, checkout, "ping")


GOOD = {
    "name": "event_bus",
    "kill_timeout": 15_000,
    "exp_backoff_restart_delay": 100,
    "status": "online",
}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"exec_mode": "cluster_mode"}, "cluster mode"),
        ({"autorestart": False}, "does not restart"),
        ({"status": "errored"}, "is errored"),
        ({"unstable_restarts": 50}, "50 times in a row"),
    ],
)
def test_app_of_pm2_is_judged_by_its_settings(change: dict[str, Any], what: str) -> None:
    assert list(pm2.judge_app(GOOD)) == []
    (finding,) = pm2.judge_app(GOOD | change)
    assert what in finding.what


def test_two_of_a_kind_under_pm2_are_a_fault() -> None:
    (finding,) = pm2.judge_twins([GOOD, GOOD, GOOD | {"name": "data_collector"}])
    assert finding.what == "pm2 runs 2 of event_bus"


def test_apps_of_another_home_are_not_judged(tmp_path: Path) -> None:
    app = {"name": "event_bus", "BITTEN_HOME": str(tmp_path)}
    assert pm2.is_ours(app, tmp_path)
    assert not pm2.is_ours(app, tmp_path / "other")
    assert not pm2.is_ours({"name": "web", "BITTEN_HOME": str(tmp_path)}, tmp_path)


def test_unit_of_systemd_that_is_missing_is_a_warning() -> None:
    assert list(pm2.judge_reboot([GOOD], {"event_bus"}, is_enabled=True)) == []
    assert list(pm2.judge_reboot([GOOD], {"event_bus"}, is_enabled=None)) == []
    (finding,) = pm2.judge_reboot([GOOD], {"event_bus"}, is_enabled=False)
    assert "pm2 startup" in finding.why


def test_lock_on_another_file_system_with_the_same_inode_is_nobodys(tmp_path: Path) -> None:
    with small_disk(tmp_path / "a", 1) as a, small_disk(tmp_path / "b", 1) as b:
        for disk_ in (a, b):
            (disk_ / "bus.lock").touch()
        assert (a / "bus.lock").stat().st_ino == (b / "bus.lock").stat().st_ino
        with (a / "bus.lock").open("w") as held:
            fcntl.lockf(held, fcntl.LOCK_EX)
            owner = lock_owner(a / "bus.lock")
            assert owner is not None
            assert owner.pid == os.getpid()
            assert lock_owner(b / "bus.lock") is None
