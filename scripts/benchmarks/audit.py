"""Time `bitten audit` and `bitten doctor` over a large database: …/audit.py [--events N]

Makes the database with the collector's own store, and a journal that knows the same events (its
batches are empty of text: the audit reads none of it). Then runs the audit as cron would: the first
time, again, and again after more events came; and the doctor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mix

from collector.store import Store
from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.event_schema import Registry
from event_bus.journal import Journal
from event_bus.subscriber import Batch

PROCESSES = 12
BATCH = 400
BATCHES_A_WRITE = 10
POOL = 20_000


class Home:
    """A home directory whose journal and database are filled without a bus."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path / "journal.db")
        self.store = Store(path / "bitten_events.db", Registry())
        self.tokens = [envelope.new_producer() for _ in range(PROCESSES)]
        self.turns = itertools.cycle(range(PROCESSES))
        self.ns = [0] * PROCESSES
        self.pool = mix.events(POOL)

    def fill(self, count: int) -> float:
        """Store that many events; seconds it took."""
        began = time.monotonic()
        for _ in range(count // (BATCH * BATCHES_A_WRITE)):
            self.store.write(list(self._batches()), self.journal.journal_id)
        return time.monotonic() - began

    def _batches(self) -> Iterator[Batch]:
        for which in itertools.islice(self.turns, BATCHES_A_WRITE):
            first_n, now = self.ns[which] + 1, time.time()
            self.ns[which] += BATCH
            producer = self.journal.producer(self.tokens[which])
            producer.last_n = self.ns[which]
            report = {
                "source": f"publisher_{which}",
                "pid": os.getpid(),
                "emitted": producer.last_n,
            }
            producer.report = json.dumps(report)
            runs = [(producer, first_n, producer.last_n, 0)]
            seq = self.journal.append([b"\n" * BATCH], BATCH, now, runs=runs, opaque_ids=[])
            events = [
                Envelope(
                    event_id=f"{producer.token}-{first_n + i}",
                    event_type=event_type,
                    timestamp=now,
                    source=report["source"],
                    data=data,
                    **fields,
                )
                for i, (event_type, data, fields) in enumerate(
                    self.pool[(seq + i) % POOL] for i in range(BATCH)
                )
            ]
            yield Batch(seq, now, events)

    def close(self) -> None:
        self.journal.close()
        self.store.close()

    def bitten(self, *arguments: str) -> tuple[float, Any]:
        """Seconds of the whole command, and its answer."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "event_bus", *arguments, "--json"],
            env={**os.environ, "BITTEN_HOME": str(self.path)},
            capture_output=True,
            check=arguments[0] == "audit",  # the doctor finds that no bus runs here
        )
        return time.monotonic() - began, json.loads(done.stdout)


DROP_CACHES = """
import os, pathlib, sys
os.sync()
for file in pathlib.Path(sys.argv[1]).iterdir():
    os.posix_fadvise(os.open(file, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
"""


def drop_caches(path: Path) -> None:
    """Let the system forget the files' pages, as after a restart; no rights are needed for it.

    In a process of its own: closing a file here would undo the locks of the open database.
    """
    subprocess.run([sys.executable, "-c", DROP_CACHES, str(path)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--short", action="store_true", help="40,000 events")
    options = parser.parse_args()
    count = 40_000 if options.short else options.events
    with tempfile.TemporaryDirectory(prefix="bitten-bench-") as directory:
        home = Home(Path(directory))
        seconds = home.fill(count)
        print(f"{home.journal.last_seq:,} events stored in {seconds:.1f} s")
        rounds = [("first run, cold", True, 0), ("second run, cold", True, 0)]
        rounds += [("second run, warm", False, 0), ("after 100,000 more", False, 100_000)]
        rounds += [("--full, warm", False, 0)]
        for name, cold, more in rounds:
            home.fill(min(more, count))
            if cold:
                drop_caches(home.path)
            seconds, answer = home.bitten("audit", *(["--full"] if "full" in name else []))
            counted = answer["stored_seq"] - answer["counted_from_seq"] + 1
            print(f"{name:<20} {seconds:6.2f} s  {answer['verdict']}, {counted:,} counted")
        for name in ("doctor, cold", "doctor, warm"):
            if "cold" in name:
                drop_caches(home.path)
            seconds, findings = home.bitten("doctor", "--all")
            print(f"{name:<20} {seconds:6.2f} s  {len(findings)} checks")
        home.close()


main()
