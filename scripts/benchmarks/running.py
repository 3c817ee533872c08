"""A bus and a collector that run in a temporary home, to be measured."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent


def free_port() -> int:
    """A port that no connection is given by the kernel meanwhile: those are above 32,767."""
    while True:
        port = secrets.choice(range(10_000, 32_768))
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


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
        self.daemons: dict[str, psutil.Popen] = {}
        for name in daemons:
            self.start_daemon(name)

    def start_daemon(self, name: str) -> None:
        self.daemons[name] = psutil.Popen(
            [sys.executable, "-m", "event_bus", name],
            env=self.environ,
            stderr=subprocess.DEVNULL,
        )

    def start(self, script: str, *argv: str) -> subprocess.Popen[str]:
        """Start a script of this folder, its stdin and stdout piped."""
        return subprocess.Popen(
            [sys.executable, str(HERE / script), *argv],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start_ready(self, script: str, *argv: str) -> subprocess.Popen[str]:
        """Start a script and wait for its first line, which says that it is ready."""
        process = self.start(script, *argv)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"{script} ended before it was ready")
        return process

    def publish(self, *argv: str) -> dict[str, Any]:
        (measured,) = self.publish_together([argv])
        return measured

    def publish_together(self, each: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """What each publisher measured; none of them begins before all are warm."""
        processes = [self.start_ready("publisher.py", *argv) for argv in each]
        for process in processes:
            let_begin(process)
        return [answer(process) for process in processes]

    def stored_rate(self, count: int, *argv: str, timeout_s: float = 120.0) -> float:
        """Publish that many events on top of what is stored; events/s to the last commit."""
        before = self.stored()
        published = self.publish(str(count), *argv)
        return count / (self.wait_stored(before + count + 1, timeout_s) - published["started"])

    def rss_mb(self) -> dict[str, float]:
        return {f"{name}_mb": p.memory_info().rss / 1e6 for name, p in self.daemons.items()}

    def cpu_s(self) -> dict[str, float]:
        """Seconds of a core that each daemon has taken so far."""
        times = {name: p.cpu_times() for name, p in self.daemons.items()}
        return {name: t.user + t.system for name, t in times.items()}

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
            return _number(self.db, "SELECT coalesce(max(seq), 0) FROM _event")
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


def sqlite_bytes(path: Path) -> int:
    """Of that database, with what is in its -wal still."""
    return _number(path, "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")


def _number(path: Path, sql: str) -> int:
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with contextlib.closing(db):
        return int(db.execute(sql).fetchone()[0])


def let_begin(publisher: subprocess.Popen[str]) -> None:
    assert publisher.stdin is not None
    publisher.stdin.write("go\n")
    publisher.stdin.flush()


def answer(process: subprocess.Popen[str]) -> Any:
    """What a script that we started prints at its end."""
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed with exit code {process.returncode}")
    return json.loads(printed)


def percentiles(values: Iterable[float], *which: float, scale: float = 1.0) -> dict[str, float]:
    """Such as {"p50": …, "p99.9": …}; NaN of no values."""
    ordered = sorted(values)
    return {f"p{p:g}": percentile(ordered, p) * scale if ordered else math.nan for p in which}


def percentile(ordered: Sequence[float], p: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))]
