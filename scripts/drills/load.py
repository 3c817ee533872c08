"""The reference load: eight publisher processes, together 1,000 events/s, each with its record."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

from daemons import with_fault
from publisher import FLUSH_S
from record import Record
from system import System, wait_until

from event_bus.supervisor import dying_with_parent

PUBLISHERS = 8
RATE = 1_000.0


class Load:
    """Starts at once. A publisher that is killed can be started again; its record stays."""

    def __init__(
        self,
        system: System,
        directory: Path,
        rng: random.Random,
        *,
        publishers: int = PUBLISHERS,
        rate: float = RATE,
        lie: bool = False,
    ) -> None:
        self._system = system
        self._directory = directory
        self._rng = rng
        self._rate = rate / publishers
        self._lie = lie
        self._paths: list[Path] = []
        self.processes: list[subprocess.Popen[str]] = [self._start() for _ in range(publishers)]

    def _start(self, **environ: str) -> subprocess.Popen[str]:
        path = self._directory / f"publisher-{len(self._paths) + 1}"
        self._paths.append(path)
        with path.with_suffix(".log").open("w") as log:
            return self._system.popen(
                str(Path(__file__).parent / "publisher.py"),
                *(str(path), str(self._rate), str(self._rng.randrange(1 << 30))),
                *(["--lie"] if self._lie else []),
                stdout=log,
                env=environ,
                preexec_fn=dying_with_parent(),
            )

    def wait_started(self) -> None:
        """Wait until every publisher takes signals."""
        wait_until(lambda: all(p.exists() for p in self._paths), "the publishers are there")

    def kill_one(self) -> None:
        """SIGKILL a publisher and start another in its place."""
        place = self._rng.randrange(len(self.processes))
        self.processes[place].kill()
        self.processes[place].wait()
        self.processes[place] = self._start()

    def one_more(self, *, fault: str = "", **environ: str) -> subprocess.Popen[str]:
        """A publisher beside the load, with a fault of faults.py or settings of its own; it is
        the drill's to end, and its record is checked with the others."""
        extra = with_fault(self._system.environ, fault) | environ
        process = self._start(**extra)
        self.wait_started()
        return process

    def burst(self) -> None:
        """Each publisher emits 2,500 events at once."""
        self.wait_started()
        for process in self.processes:
            process.send_signal(signal.SIGUSR1)

    def pause(self) -> None:
        """Have the publishers emit nothing; call it again to let them go on."""
        self.wait_started()
        for process in self.processes:
            process.send_signal(signal.SIGUSR2)

    def stop(self) -> None:
        """Let every publisher flush and end."""
        self.wait_started()
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            code = process.wait(FLUSH_S + 10)
            logs = "".join(p.with_suffix(".log").read_text() for p in self._paths)
            assert code == 0, f"a publisher ended with {code}: {logs[-2000:]}"

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def acked(self) -> int:
        """Events acknowledged so far, all publishers together."""
        return sum(r["acked"] for r in self.records())

    def waiting(self) -> int:
        """Events that no publisher has heard of yet, as they last said."""
        return sum(r["waiting"] for r in self.records())

    def attempted(self) -> int:
        return sum(r["attempted"] for r in self.records())

    def records(self) -> list[Record]:
        return [Record(p) for p in self._paths if p.exists()]
