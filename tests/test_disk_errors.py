"""A disk that fails, a place that cannot be written: one line with the reason, no false ack."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import small_disk
from system import System, wait_until
from test_broker import line

from event_bus.errors import BusRefused
from event_bus.protocol import Client

NOBODY = 65_534

# Python itself may be where only root can read it, so it is loaded before the change of user.
START_AS_ANOTHER = """
import os, sys
from event_bus.broker import Broker
from event_bus.errors import JournalError, StartError
from event_bus.settings import Settings
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
try:
    Broker(Settings.load())
except (StartError, JournalError) as e:
    print(e)
"""


@contextlib.contextmanager
def failing(bus: System, *which: str) -> Iterator[None]:
    """Each fsync of the running bus fails within; `which` narrows it, as strace's options do."""
    if shutil.which("strace") is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed")
        pytest.skip("strace is not installed")
    pid = bus.processes[0].pid
    log = bus.home / "strace.log"
    strace = subprocess.Popen(
        [
            *("strace", "-f", "-qq", "-p", str(pid), "-o", log, *which),
            *("-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO"),
        ],
        stderr=subprocess.PIPE,
    )

    def attached() -> bool:
        assert strace.poll() is None, strace.communicate()[1]
        return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()

    wait_until(attached, "strace is attached")
    yield
    if strace.poll() is None:
        strace.send_signal(signal.SIGTERM)
    strace.communicate()


@pytest.fixture
def failing_fsync(bus: System) -> Iterator[System]:
    """A running bus each of whose fsyncs fails from now on."""
    with failing(bus):
        yield bus


def test_failed_fsync_is_never_acknowledged_and_ends_the_bus(failing_fsync: System) -> None:
    bus = failing_fsync
    client = Client(bus.settings)
    with pytest.raises(BusRefused, match=r"cannot write .*journal\.db: disk I/O error") as caught:
        client.publish(line("during"))
    assert caught.value.code == "storage_failed"
    output, _ = bus.processes[0].communicate(timeout=10)
    assert bus.processes[0].returncode == 5
    complaint = output.splitlines()[-1]
    assert complaint.startswith("bitten: cannot write")
    assert "check the disk" in complaint
    assert "Traceback" not in output
    bus.start_bus()
    ack = client.publish(line("during") + line("after"))
    assert ack["accepted"] + ack["duplicates"] == 2
    assert client.publish(line("during"))["duplicates"] == 1
    client.close()


def test_read_only_file_system_is_named_in_one_line(system: System) -> None:
    system.start_bus()
    system.processes[0].terminate()
    system.processes[0].wait()
    home = system.home
    for options in (["--bind", home, home], ["-o", "remount,bind,ro", home]):
        mounted = subprocess.run(["mount", *options], check=False, capture_output=True)
        if mounted.returncode:
            if os.geteuid() == 0 and os.environ.get("CI"):
                pytest.fail(mounted.stderr.decode())
            pytest.skip("mounting is not allowed here")
    try:
        done = system.bitten("bus")
    finally:
        subprocess.run(["umount", "-l", home], check=True)
    assert done.returncode in (2, 4)
    (complaint,) = done.stderr.splitlines()
    assert f"{home} is not writable; make it writable" in complaint


@pytest.mark.parametrize("name", ["journal.db", "bus.lock", "journal.db.damaged"])
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_file_of_another_user_is_named_in_one_line(name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are root's alone
        Path(directory).chmod(0o755)
        system = System(Path(directory) / "home")
        system.settings.make_home()
        os.chown(system.home, NOBODY, NOBODY)
        (system.home / "spool").chmod(0o777)
        (system.home / name).touch(0o600)
        done = system.script(START_AS_ANOTHER, str(NOBODY))
    assert done.stderr == ""
    (complaint,) = done.stdout.splitlines()
    assert f"{system.home / name}: Permission denied" in complaint


def test_start_on_a_full_disk_says_so_in_one_line_and_is_tried_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 6) as disk:
        system = System(disk / "home")
        system.start_bus().terminate()
        system.processes[0].wait()
        with (
            pytest.raises(OSError, match="No space left"),
            (disk / "ballast").open("wb") as ballast,
        ):
            while True:
                ballast.write(bytes(4096))
                ballast.flush()
        done = system.bitten("bus")
        (complaint,) = done.stderr.splitlines()
        assert "no space left for" in complaint
        assert done.returncode == 5
        done = system.bitten("audit")
        assert done.returncode == 4
        assert "make room on its disk" in done.stderr
        (disk / "ballast").unlink()
        system.start_bus()
        system.close()


def test_sync_that_fails_when_the_wal_is_copied_ends_the_bus(bus: System) -> None:
    journal = bus.settings.journal
    with failing(bus, "-P", str(journal)):  # the file itself; the -wal beside it is well
        client = Client(bus.settings)
        with pytest.raises(BusRefused, match=r"cannot write .*journal\.db: disk I/O error"):
            for n in range(60):  # the WAL is copied after 32 MB
                client.publish(line(f"{n}", action="x" * 900_000), 20.0)
        client.close()
        output, _ = bus.processes[0].communicate(timeout=10)
    assert bus.processes[0].returncode == 5, output
