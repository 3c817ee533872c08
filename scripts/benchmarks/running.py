"""A bus and a collector that run in a temporary home, to be measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Bench:
    """A temporary home with bus and collector running, and what they cost."""

    def __init__(self, home: Path, *, daemons: Sequence[str] = ("bus", "collect")) -> None:
        self.home = home
        self.db = home / "bitten_events.db"
        self.environ = {
            **os.environ,
            "BITTEN_HOME": str(home),
            "BITTEN_EVENTS_URL": f"tcp://127.0.0.1:{free_port()}",
            "BITTEN_INGRESS_URL": f"tcp://127.0.0.1:{free_port()}",
        }
        self.daemons = {
            name: psutil.Popen(
                [sys.executable, "-m", "event_bus", name],
                env=self.environ,
                stderr=subprocess.DEVNULL,
            )
            for name in daemons
        }

    def start(self, script: str, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(HERE / script), *argv],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def publish(self, *argv: str) -> dict[str, Any]:
        (measured,) = self.publish_together([argv])
        return measured

    def publish_together(self, each: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """What each publisher measured; none of them begins before all are warm."""
        processes = [self.start("publisher.py", *argv) for argv in each]
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a publisher did not start")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate()[0]) for process in processes]

    def wait_stored(self, count: int, timeout_s: float = 120.0) -> float:
        """Unix seconds at which the database held that many events."""
        deadline = time.time() + timeout_s
        while True:
            now = time.time()
            if self.stored() >= count:
                return now
            if now > deadline:
                raise SystemExit(f"only {self.stored()} of {count} events were stored")
            time.sleep(0.002)

    def stored(self) -> int:
        try:
            db = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)
            with contextlib.closing(db):
                return int(db.execute("SELECT coalesce(max(seq), 0) FROM _event").fetchone()[0])
        except sqlite3.OperationalError:
            return 0  # not made yet

    def close(self) -> None:
        for process in self.daemons.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.daemons.values():
            process.wait(20)


@contextlib.contextmanager
def bench(*, daemons: Sequence[str] = ("bus", "collect")) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="bitten-bench-") as directory:
        made = Bench(Path(directory), daemons=daemons)
        try:
            if "collect" in daemons:
                made.wait_stored(1)  # the bus's own first event
            yield made
        finally:
            made.close()


def percentile(ordered: Sequence[float], p: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))]
