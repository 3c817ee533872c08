"""The demo's processes: daemons and publishers in a temporary home that is theirs alone."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from event_bus.demo import queries
from event_bus.demo.result import Result, gather
from event_bus.errors import BittenError, BusUnavailable, MissingExtra, StartError
from event_bus.protocol import Client
from event_bus.settings import Settings
from event_bus.supervisor import dying_with_parent

ROLES = ("market_feed", "strategy")
TIME_LIMIT_S = 60.0
STOP_S = 12.0
TURN_S = 0.05
LOG = "demo.log"


class Demo:
    """A home with a bus, a collector and two publishers of its own. Use as a context manager:
    leaving it stops the processes and removes the home unless `keep`.

    The user's own settings play no part: neither home, ports nor variables. Raises MissingExtra
    if the candles' package is missing, BittenError if a process fails or time runs out.
    """

    def __init__(self, *, candles: int | None = None, keep: bool = False) -> None:
        if importlib.util.find_spec("backtesting") is None:
            raise MissingExtra(
                "the demo's candles are in the package backtesting, which is not installed",
                hint="pip install 'bitten-event-bus[demo]'",
            )
        self._candles = candles
        self._keep = keep
        self._deadline = time.monotonic() + TIME_LIMIT_S
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Demo:
        self.home = Path(tempfile.mkdtemp(prefix="bitten-demo-"))
        events_port, ingress_port = _free_ports()
        self._environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("BITTEN_")},
            "BITTEN_HOME": str(self.home),
            "BITTEN_EVENTS_URL": f"tcp://127.0.0.1:{events_port}",
            "BITTEN_INGRESS_URL": f"tcp://127.0.0.1:{ingress_port}",
        }
        self.settings = Settings.load(environ=self._environ)
        self._client = Client(self.settings)
        return self

    def __exit__(self, *exception: object) -> None:
        with _interrupts_held():
            self._client.close()
            for process in reversed(self._processes):
                process.terminate()
            for process in reversed(self._processes):
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                if process.stdout:
                    process.stdout.close()
            if not self._keep:
                shutil.rmtree(self.home, ignore_errors=True)

    def start(self) -> None:
        """Start `bitten up` and wait until the bus answers and the collector has asked it."""
        up = self._popen("-m", "event_bus", "up")
        while not self._is_up():
            self._turn(up, "bus or collector did not start")

    def replay(self, on_progress: Callable[[int, int], None]) -> Result:
        """Publish from two processes and wait until all is stored.

        `on_progress` is called with the number of events stored and planned (0 until known), some
        20 times a second and once at the end.
        """
        up = self._processes[0]
        began = time.monotonic()
        until = time.time()
        publishers = {role: self._publisher(role, until) for role in ROLES}
        lines: dict[str, list[bytes]] = {role: [] for role in ROLES}
        planned = 0
        with selectors.DefaultSelector() as selector:
            for role, process in publishers.items():
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, role)
            while selector.get_map():
                for key, _ in selector.select(TURN_S):
                    line = publishers[key.data].stdout.readline()  # type: ignore[union-attr]
                    if line:
                        lines[key.data].append(line)
                    else:
                        selector.unregister(key.fileobj)
                if not planned and all(lines.values()):
                    planned = sum(msgspec.json.decode(got[0])["events"] for got in lines.values())
                on_progress(self._stored(), planned)
                self._check(up, "the bus stopped")
        for role, process in publishers.items():
            if process.wait(STOP_S) or len(lines[role]) != 2:
                raise BittenError(f"the publisher {role} failed: {self._last_log_line()}")
        last_seq = self._client.status()["last_seq"]
        while (stored := self._stored()) < last_seq:
            on_progress(stored, planned)
            self._turn(up, "the collector did not store all")
        on_progress(stored, planned)
        seconds = time.monotonic() - began
        plan = msgspec.json.decode(lines[ROLES[0]][0])
        reports = [msgspec.json.decode(lines[role][1]) for role in ROLES]
        return gather(self.settings.db, plan, reports, self._audit(), seconds)

    def _audit(self) -> dict[str, Any]:
        """The audit, again while an event is on its way: the bus reports its health."""
        while True:
            process = self._popen("-m", "event_bus", "audit", "--json", stdout=subprocess.PIPE)
            try:
                output, _ = process.communicate(timeout=STOP_S)
                ledger: dict[str, Any] = msgspec.json.decode(output)
            except (msgspec.DecodeError, subprocess.TimeoutExpired) as e:
                raise BittenError(f"the audit failed: {self._last_log_line()}") from e
            if not ledger["unstored"]:
                return ledger
            self._turn(self._processes[0], "the collector did not store all")

    def _popen(
        self, *argv: str, stdout: int | None = None, source: str = ""
    ) -> subprocess.Popen[bytes]:
        with (self.home / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", *argv],  # -P: legacy folders are called event_bus too
                env=self._environ | {"BITTEN_SOURCE": source},
                stdin=subprocess.DEVNULL,
                stdout=stdout or log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us; we tell the others
                preexec_fn=dying_with_parent(),
            )
        self._processes.append(process)
        return process

    def _publisher(self, role: str, until: float) -> subprocess.Popen[bytes]:
        argv = ["-m", "event_bus.demo.publisher", role, "--until", repr(until)]
        if self._candles:
            argv += ["--candles", str(self._candles)]
        return self._popen(*argv, stdout=subprocess.PIPE, source=role)

    def _is_up(self) -> bool:
        try:
            return bool(self._client.status(timeout_s=0.5)["consumers"])
        except BusUnavailable:
            return False

    def _stored(self) -> int:
        """The last seq in the database."""
        rows = queries.run(
            self.settings.db, "SELECT seq FROM events ORDER BY seq DESC LIMIT 1"
        ).rows
        return int(rows[0][0]) if rows else 0

    def _turn(self, up: subprocess.Popen[bytes], problem: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            up.wait(TURN_S)
        self._check(up, problem)

    def _check(self, up: subprocess.Popen[bytes], problem: str) -> None:
        if up.poll() is not None:
            raise StartError(f"{problem}: {self._last_log_line()}")
        if time.monotonic() > self._deadline:
            raise BusUnavailable(
                f"{problem} within {TIME_LIMIT_S:g} s: {self._last_log_line()}",
                hint=f"`bitten demo --keep` leaves its log, {LOG}, in the home it names",
            )

    def _last_log_line(self) -> str:
        lines = (self.home / LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it left no message"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let nothing cut the cleaning up short; it ends by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_ports() -> tuple[int, int]:
    """Two loopback ports that nobody listens on."""
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return a.getsockname()[1], b.getsockname()[1]
