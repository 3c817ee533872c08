"""What changes as the database grows: rate, latency, queries, memory, and the next start."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import latency
from running import Bench, answer, bench, sqlite_bytes

from event_bus.errors import BusUnavailable
from event_bus.protocol import Client
from event_bus.settings import Settings

DAYS = "30"
"""Over which the stored events lie, so that the last day is a thirtieth at every size."""

LATENCY_RATE = 1_000.0
FILL_TIMEOUT_S = 1_800.0
STATUS_S = 0.02
"""How long a bus that starts is given to answer before it is asked on a new connection."""

CRASH_AFTER_EVENTS = 20_000


class Grown:
    """A home that is filled by publishing, further and further."""

    def __init__(self, running: Bench) -> None:
        self.running = running

    def grow(self, size: int) -> None:
        missing = size - self.running.stored()
        if missing > 0:
            self.running.stored_rate(missing, "--days", DAYS, timeout_s=FILL_TIMEOUT_S)


@contextlib.contextmanager
def grown() -> Iterator[Grown]:
    with bench() as b:
        yield Grown(b)


def growth(
    home: Grown,
    sizes: Sequence[int],
    *,
    on_top: int,
    rounds: int,
    query_runs: int,
    latency_s: float,
) -> dict[str, Any]:
    """By size: queries in ms, memory, rates of more events there and in an empty home, in turn."""
    found = {}
    for size in sizes:
        home.grow(size)
        b = home.running
        count = min(on_top, size)
        queries = answer(b.start("queries.py", str(b.db), str(query_runs)))
        bytes_an_event = sqlite_bytes(b.db) / b.stored()
        rates, empty_rates = [], []
        for _ in range(rounds):
            with bench() as empty:
                empty_rates.append(empty.stored_rate(count, "--days", DAYS))
            rates.append(b.stored_rate(count, "--days", DAYS))
        found[str(size)] = {
            "rates": rates,
            "empty_rates": empty_rates,
            "stored_ms": latency.one(b, "stored", int(latency_s * LATENCY_RATE), LATENCY_RATE),
            "queries_ms": {
                kind: {name: statistics.median(ms) for name, ms in timed.items()}
                for kind, timed in queries.items()
            },
            "bytes": bytes_an_event,
            **b.rss_mb(),
        }
    return found


def startup(home: Grown, size: int, times: int) -> dict[str, Any]:
    """Seconds that bus and collector take after a crash of both in the middle of publishing."""
    home.grow(size)
    return {"events": size, "crashes": [_crash(home.running) for _ in range(times)]}


def _crash(b: Bench) -> dict[str, float]:
    """Kill both while events come, and start both again, as their supervisor does."""
    publisher = b.start("publisher.py", "1000000000")
    b.wait_stored(b.stored() + CRASH_AFTER_EVENTS)
    for daemon in b.daemons.values():
        daemon.kill()
    publisher.kill()
    for process in (*b.daemons.values(), publisher):
        process.wait()
    stored = b.stored()
    begin = time.monotonic()
    for name in ("bus", "collect"):
        b.start_daemon(name)
    last_seq = _wait_ready(b)
    ready_s = time.monotonic() - begin
    b.wait_stored(last_seq)
    return {
        "ready_s": ready_s,
        "caught_up_s": time.monotonic() - begin,
        "behind": last_seq - stored,
    }


def _wait_ready(b: Bench) -> int:
    client = Client(Settings.load(environ=b.environ))
    try:
        while True:
            with contextlib.suppress(BusUnavailable):
                return int(client.status(STATUS_S)["last_seq"])
    finally:
        client.close()
