"""What changes as the database grows: rate, latency, queries, memory, and the next start."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import latency
from running import Bench, answer, bench, let_begin, sqlite_bytes

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


@contextlib.contextmanager
def grown(size: int) -> Iterator[Bench]:
    """A home that was filled by publishing."""
    with bench() as b:
        b.stored_rate(size, "--first", "0", "--days", DAYS, timeout_s=FILL_TIMEOUT_S)
        yield b


def growth(
    b: Bench, size: int, *, on_top: int, rounds: int, query_runs: int, latency_s: float
) -> dict[str, Any]:
    """Queries in ms, memory, and rates of more events there and in an empty home, in turn.

    Where `b` is a grown home. What comes on top is of now, as in life: indexes grow at their ends.
    """
    queries = answer(b.start("queries.py", str(b.db), str(query_runs)))
    bytes_an_event = sqlite_bytes(b.db) / b.stored()
    count = min(on_top, size)
    rates, empty_rates = [], []
    for _ in range(rounds):
        with bench() as empty:
            empty_rates.append(empty.stored_rate(count, "--first", "0"))
        rates.append(b.stored_rate(count, "--first", str(b.stored())))
    return {
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


def startup(b: Bench, times: int) -> list[dict[str, float]]:
    """Seconds that bus and collector take after a crash of both in the middle of publishing."""
    return [_crash(b) for _ in range(times)]


def _crash(b: Bench) -> dict[str, float]:
    """Kill both while events come, and start both again, as their supervisor does."""
    publisher = b.start_ready("publisher.py", "1000000000")
    let_begin(publisher)
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
