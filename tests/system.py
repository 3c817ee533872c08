"""Homes of their own and real daemons on free ports, for tests and for the drills."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from event_bus.errors import BusUnavailable
from event_bus.protocol import Client
from event_bus.settings import Settings

TIMEOUT_S = 30.0


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> Any:
    """What `condition` returns once it is true; fails with `what` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


def free_port() -> int:
    """A port that no connection is given by the kernel meanwhile: those are above 32,767."""
    while True:
        # Not `random`: that is seeded alike in all processes of a test run.
        port = secrets.choice(range(10_000, 32_768))
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class System:
    """A home of its own with two free ports; daemons and scripts run in it as real processes."""

    def __init__(self, home: Path, *, environ: Mapping[str, str] = os.environ) -> None:
        self.home = home
        self.environ = {
            **{k: v for k, v in environ.items() if not k.startswith("BITTEN_")},
            "BITTEN_HOME": str(home),
            "BITTEN_EVENTS_URL": f"tcp://127.0.0.1:{free_port()}",
            "BITTEN_INGRESS_URL": f"tcp://127.0.0.1:{free_port()}",
        }
        self.processes: list[subprocess.Popen[str]] = []

    @property
    def settings(self) -> Settings:
        return Settings.load(environ=self.environ)

    @property
    def db(self) -> Path:
        return self.settings.db

    def popen(self, *argv: str, **kwargs: Any) -> subprocess.Popen[str]:
        """Start `python argv…` in this home, its output piped as text unless said otherwise."""
        kwargs.setdefault("stdout", subprocess.PIPE)
        process = subprocess.Popen(
            [sys.executable, *argv],
            env=self.environ | kwargs.pop("env", {}),
            stderr=subprocess.STDOUT,
            text=True,
            **kwargs,
        )
        self.processes.append(process)
        return process

    def run(self, *argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run `python argv…` in this home to its end, both outputs captured."""
        kwargs.setdefault("timeout", TIMEOUT_S)
        return subprocess.run(
            [sys.executable, *argv],
            env=self.environ | kwargs.pop("env", {}),
            capture_output=True,
            text=True,
            check=False,
            **kwargs,
        )

    def bitten(self, *argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "event_bus", *argv, **kwargs)

    def on_terminal(self, *argv: str) -> str:
        """What `bitten argv…` prints when its output is a terminal."""
        ours, theirs = os.openpty()
        process = self.popen("-m", "event_bus", *argv, stdout=theirs)
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", 0) as terminal:
            while chunk := terminal.read(65_536):
                printed += chunk
        process.wait(TIMEOUT_S)
        return printed.decode()

    def script(self, code: str, *argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return self.run("-c", code, *argv, **kwargs)

    def start_bus(self) -> subprocess.Popen[str]:
        """Start `bitten bus` and wait until it answers."""
        process = self.popen("-m", "event_bus", "bus")

        def answers() -> bool:
            assert process.poll() is None, process.communicate()[0]
            return self.status(timeout_s=0.2) is not None

        wait_until(answers, "the bus answers")
        return process

    def start_collector(self) -> subprocess.Popen[str]:
        return self.popen("-m", "event_bus", "collect")

    def status(self, timeout_s: float = 5.0) -> dict[str, Any] | None:
        client = Client(self.settings)
        try:
            return client.status(timeout_s)
        except BusUnavailable:
            return None
        finally:
            client.close()

    def sql(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of a query on the events database, read with Python's own sqlite3."""
        db = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)
        try:
            return db.execute(query, values).fetchall()
        finally:
            db.close()

    def stored(self) -> int:
        """How many events the database holds; 0 while it is being made."""
        if not self.db.exists() or not self.sql(
            "SELECT 1 FROM sqlite_master WHERE name = 'events'"
        ):
            return 0
        return int(self.sql("SELECT count(*) FROM events")[0][0])

    def wait_stored(self) -> int:
        """Wait until the database holds all the journal has; returns the last seq."""

        def all_stored() -> int:
            status = self.status()
            if status is None or not self.db.exists():
                return 0
            tables = self.sql("SELECT 1 FROM sqlite_master WHERE name = 'events'")
            seq = self.sql("SELECT max(seq) FROM events")[0][0] if tables else None
            return status["last_seq"] if seq == status["last_seq"] else 0

        return int(wait_until(all_stored, "the database holds all of the journal"))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


ONE_BATCH_AN_EVENT = (
    "INSERT OR IGNORE INTO _batch SELECT e.seq, b.received_at, b.producer,"
    " b.n + e.seq - b.first_seq FROM _event e JOIN _batch b"
    " ON b.first_seq = (SELECT max(first_seq) FROM _batch WHERE first_seq <= e.seq)"
)
"""So that the id of one event can be changed: it is that of its batch."""
