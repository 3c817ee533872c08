"""One peer: its server, its processes, one round of them, and the check of what was stored."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
LEAST_RATE = 500.0
"""Events/s; what is slower than this is taken to hang."""

GRACE_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """Another system that does the bus's work.

    `module` has its `publish` and `consume`, which run in processes of their own. `serve` runs its
    server on files in a directory and gives its address. `missing` says what keeps it from being
    run on this machine, empty if nothing does. A peer that is too slow for the benchmark's count
    does one event in `share`, and `few` at least.
    """

    name: str
    module: str
    serve: Callable[[Path], AbstractContextManager[str]]
    missing: Callable[[], str]
    share: int = 1
    few: int = 4_000

    def run(self, count: int, publishers: int) -> dict[str, float]:
        """Publish and store that many events: `rate` in events/s from the first publish to the last
        commit, `published_rate` to the last one published, and how many were `stored`.

        Raises SystemExit unless each event is stored once.
        """
        count = max(min(count, self.few), count // self.share)
        each, rest = divmod(count, publishers)
        counts = [each + (i < rest) for i in range(publishers)]
        with tempfile.TemporaryDirectory(prefix="bitten-peer-") as directory:
            home = Path(directory)
            db = home / "events.db"
            with self.serve(home) as address:
                measured = self._round(address, counts, db, home / "workers.log")
            stored = check(db, counts, self.name)
        started = min(m["started"] for m in measured[:-1])
        published_s = max(m["started"] + m["published_after_s"] for m in measured[:-1]) - started
        return {
            "rate": count / (measured[-1]["stored_at"] - started),
            "published_rate": count / published_s,
            "stored": stored,
        }

    def _round(
        self, address: str, counts: list[int], db: Path, log: Path
    ) -> list[dict[str, float]]:
        """What each publisher measured and, last, what the consumer did."""
        timeout_s = sum(counts) / LEAST_RATE + GRACE_S
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(log.open("w"))

            def start(role: str, count: int) -> subprocess.Popen[str]:
                argv = ["-m", "peers.worker", role, self.module, address, str(count), str(db)]
                return stack.enter_context(_process([sys.executable, *argv], stderr))

            consumer = start("consume", sum(counts))
            self._expect_ready(consumer, log)
            publishers = [start("publish", count) for count in counts]
            for publisher in publishers:
                self._expect_ready(publisher, log)
            for publisher in publishers:
                assert publisher.stdin is not None
                publisher.stdin.write("go\n")
                publisher.stdin.flush()
            return [self._result(p, timeout_s, log) for p in (*publishers, consumer)]

    def _expect_ready(self, worker: subprocess.Popen[str], log: Path) -> None:
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            raise SystemExit(f"{self.name}: a process did not start: {_end_of(log)}")

    def _result(self, worker: subprocess.Popen[str], timeout_s: float, log: Path) -> dict[str, Any]:
        try:
            output, _ = worker.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{self.name}: not done after {timeout_s:g} s") from None
        if worker.returncode:
            raise SystemExit(f"{self.name}: a process failed: {_end_of(log)}")
        measured: dict[str, Any] = json.loads(output)
        return measured


@contextlib.contextmanager
def _process(argv: list[str], stderr: Any) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        argv, cwd=BENCHMARKS, stdin=pipe, stdout=pipe, stderr=stderr, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace").strip()[-2_000:] or "it said nothing"


def check(db: Path, counts: list[int], name: str) -> int:
    """How many events are stored. Raises SystemExit unless they are 1 to n of each publisher."""
    sql = "SELECT count(*), count(DISTINCT n), min(n), max(n) FROM ({}) GROUP BY producer"
    source = (
        "SELECT substr(event_id, 1, 20) producer, CAST(substr(event_id, 22) AS INTEGER) n"
        " FROM events WHERE source IS NOT 'event_bus'"
    )
    with contextlib.closing(sqlite3.connect(db)) as connection:
        found = sorted(connection.execute(sql.format(source)))
    if found != sorted((n, n, 1, n) for n in counts if n):
        raise SystemExit(f"{name}: published {counts}, stored (count, distinct, min, max) {found}")
    return sum(row[0] for row in found)
