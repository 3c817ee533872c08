"""Rows 6, 14 and 15: a disk that fails, rights that are missing, ports and homes that are taken."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from harness import Trial, drill
from space import small_disk
from system import System, wait_until

EXIT_S = 1.0
REFUSED_S = 2.0
BOUND = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""root without the right to pass over the rights of files"""


@drill(
    row=6,
    name="fsync-fails",
    fault="fdatasync and fsync of the bus return EIO",
    long="20 times",
    needs=("strace",),
    plant="the bus acknowledges what it could not sync",
    breaks="acknowledgements after a failed sync",
)
def fsync_fails(trial: Trial) -> None:
    """The bus is started again without the fault, as its supervisor does; nothing acked is gone."""
    system = trial.system
    load = trial.publish()
    collector = system.start_collector()
    late = trial.directory / "acked-late"
    late.touch()
    fault = f"watch-acks:{trial.directory}" + (";sync-forgiven" if trial.planted else "")
    environ = trial.fault_environ(fault)
    ended_s = []
    for _ in range(trial.count(2, 20)):
        after = trial.rng.randrange(50, 300)
        log = trial.directory / "bus.log"
        failing = _start_failing(system, log, after, environ)
        wait_until(lambda at=log: "(INJECTED)" in at.read_text(), "the disk fails")
        failed_at = time.monotonic()
        acked = load.acked()
        wait_until(lambda bus=failing: bus.poll() is not None, "the bus ends", 10)
        ended_s.append(time.monotonic() - failed_at)
        said = [line for line in log.read_text().splitlines() if line.startswith("bitten: ")]
        trial.expect(said and "disk I/O error" in said[-1], f"the reason is not on stderr: {said}")
        trial.expect(failing.returncode != 0, "the exit code is 0")
        bus = system.start_bus()
        wait_until(lambda n=acked: load.acked() > n + 500, "the bus goes on")
        bus.send_signal(signal.SIGTERM)
        assert bus.wait(20) == 0, bus.communicate()[0]
    trial.expect(max(ended_s) < EXIT_S, f"the bus took {max(ended_s):.1f} s to end")
    trial.note("ended max s", round(max(ended_s), 2))
    # That they survive says nothing: what was not synced is still in the page cache.
    acked_late = len(late.read_text().splitlines())
    trial.expect(not acked_late, f"{acked_late} acknowledgements after a failed sync")
    trial.note("acknowledgements after a failed sync", acked_late)
    system.start_bus()
    load.stop()
    wait_until(trial.all_stored, "the database holds all of the journal", 60)
    for daemon in (collector, *system.processes):
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)
    trial.check()


def _start_failing(
    system: System, log: Path, after: int, environ: dict[str, str]
) -> subprocess.Popen[str]:
    """The bus under strace, its syncs failing from the `after`th on."""
    log.write_text("")
    inject = f"inject=fdatasync,fsync:error=EIO:when={after}+"
    strace = ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync", "-e", inject]
    with log.open("a") as out:
        process = subprocess.Popen(
            [*strace, sys.executable, "-m", "event_bus", "bus"],
            env=system.environ | environ,
            stdout=out,
            stderr=out,
            text=True,
        )
    system.processes.append(process)
    return process


@drill(
    row=14,
    name="permission-denied",
    fault="home, journal, database or their file system may not be written",
    long="once each",
    needs=("root", "setpriv"),
    plant="the daemons are allowed to pass over the rights",
    breaks="starts all the same",
)
def permission_denied(trial: Trial) -> None:
    system = trial.system
    up = trial.start()
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    trial.settle()
    bound = [] if trial.planted else BOUND
    settings = system.settings
    took = []
    for path, rights in ((settings.home, 0o500), (settings.journal, 0o400), (settings.db, 0o400)):
        usual = path.stat().st_mode
        path.chmod(rights)
        for command in ("bus", "collect"):
            if not (path == settings.db and command == "bus") and not (
                path == settings.journal and command == "collect"
            ):
                took.append(_refused(trial, [*bound, *_bitten(command)], path))
        path.chmod(usual)
    with _read_only(trial.directory / "disk", settings.home) as home:
        for command in ("bus", "collect"):
            took.append(_refused(trial, ["env", f"BITTEN_HOME={home}", *_bitten(command)], home))
    trial.note("refused max s", round(max(took), 2))
    trial.expect(up.process.returncode == 0, "`bitten up` did not end well")
    trial.start()
    trial.settle()
    trial.check()


def _bitten(command: str) -> list[str]:
    return [sys.executable, "-m", "event_bus", command]


@contextlib.contextmanager
def _read_only(mount: Path, home: Path) -> Iterator[Path]:
    with small_disk(mount):
        copy = mount / "home"
        shutil.copytree(home, copy)
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        yield copy


def _refused(trial: Trial, argv: list[str], what: Path) -> float:
    """Run a daemon that must not start; how long it took to say so, in one line.

    The best of three tries, if the first was slow: other processes' load only adds to it.
    """
    name = f"{argv[-1]} without rights to {what.name}"
    took = []
    while len(took) < 3 and min(took, default=REFUSED_S) >= REFUSED_S:
        begin = time.monotonic()
        try:
            daemon = subprocess.run(
                argv, env=trial.system.environ, capture_output=True, text=True, timeout=30
            )
        except subprocess.TimeoutExpired:
            trial.breach(f"{name} starts all the same")
            return 30.0
        took.append(time.monotonic() - begin)
        said = [line for line in daemon.stderr.splitlines() if line.startswith("bitten: ")]
        trial.expect(
            len(said) == 1 and "Traceback" not in daemon.stderr, f"{name}: {daemon.stderr}"
        )
        trial.expect(daemon.returncode in (2, 4), f"{name}: exit code {daemon.returncode}")
    trial.expect(min(took) < REFUSED_S, f"{name}: refused after {min(took):.1f} s")
    return min(took)


@drill(
    row=15,
    name="taken",
    fault="a port is taken; a second bus, a second collector on the same home",
    long="5 times",
    plant="the lock of the home is gone",
    breaks="a second bus on the home",
)
def taken(trial: Trial) -> None:
    system = trial.system
    up = trial.start()
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    for _ in range(trial.count(1, 5)):
        bus = up.child("bus")
        assert bus is not None
        if trial.planted:
            (system.home / "bus.lock").unlink()
        second = _run(system, "bus")
        trial.expect(
            second.returncode == 4 and f"process {bus.pid} holds" in second.stderr,
            f"a second bus on the home: {second.returncode} {second.stderr}",
        )
        second = _run(system, "collect")
        trial.expect(
            second.returncode == 4 and "a collector is already running" in second.stderr,
            f"a second collector: {second.returncode} {second.stderr}",
        )
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            other = System(trial.directory / "other")
            other.environ["BITTEN_INGRESS_URL"] = f"tcp://127.0.0.1:{port}"
            refused = _run(other, "bus")
            trial.expect(
                refused.returncode == 4
                and str(port) in refused.stderr
                and str(os.getpid()) in refused.stderr,
                f"a port that is taken: {refused.returncode} {refused.stderr}",
            )


def _run(system: System, command: str) -> subprocess.CompletedProcess[str]:
    return system.bitten(command, timeout=30)
