"""`bitten up` and its two children, as a user has them: found, signalled, timed."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import psutil
from system import System, wait_until

from event_bus.supervisor import dying_with_parent

INJECT = Path(__file__).parent / "inject"
NAMES = ("bus", "collect")


def with_fault(environ: dict[str, str], fault: str) -> dict[str, str]:
    """What to add to the environment of a process that is to have a fault of faults.py in it."""
    if not fault:
        return {}
    path = os.pathsep.join(filter(None, (str(INJECT), environ.get("PYTHONPATH", ""))))
    return {"DRILL_FAULT": fault, "PYTHONPATH": path}


class Up:
    """`bitten up` in a system's home; its output goes to the file `log`."""

    def __init__(self, system: System, directory: Path, *, fault: str = "") -> None:
        self._system = system
        self.log = directory / "up.log"
        with self.log.open("a") as log:
            self.process = system.popen(
                *("-m", "event_bus", "up"),
                stdout=log,
                env=with_fault(system.environ, fault),
                preexec_fn=dying_with_parent(),
            )

    def wait_serving(self) -> None:
        def serving() -> Any:
            assert self.process.poll() is None, self.log.read_text()
            return self._system.status(0.2) is not None and self._system.db.exists()

        wait_until(serving, "bus and collector serve")

    def child(self, name: str) -> psutil.Process | None:
        """The running `bus` or `collect`."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    if child.cmdline()[-1:] == [name] and child.status() != psutil.STATUS_ZOMBIE:
                        return child
        return None

    def signal(self, name: str, number: int) -> int:
        """Signal a child, waiting for there to be one; its pid."""
        child = wait_until(lambda: self.child(name), f"`bitten {name}` runs")
        child.send_signal(number)
        return int(child.pid)

    def stop(self) -> None:
        """As Ctrl-C does; fails if anything ends badly."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(30) == 0, self.log.read_text()[-2000:]

    def kill(self) -> None:
        """Whatever state they are in."""
        for name in NAMES:
            child = self.child(name)
            if child is not None:
                with contextlib.suppress(psutil.Error):
                    child.send_signal(signal.SIGCONT)
                    child.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
