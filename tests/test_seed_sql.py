"""The SQL of the integrators' handbook, unchanged, in the plain `sqlite3` program."""

from __future__ import annotations

import subprocess
import time
from collections import Counter, defaultdict

import pytest
from conftest import System, wait_until

from event_bus.subscriber import Event, Subscriber

COUNT = "SELECT COUNT(*) FROM events;"

SIGNALS = """-- Signal performance by pattern
SELECT 
    pattern_type,
    AVG(confidence) as avg_confidence,
    COUNT(*) as signal_count
FROM signal_events 
GROUP BY pattern_type
ORDER BY avg_confidence DESC;
"""  # noqa: W291

HEALTH = """-- System health overview
SELECT 
    component,
    status,
    COUNT(*) as status_count,
    MAX(created_at) as last_seen
FROM health_events
GROUP BY component, status;
"""  # noqa: W291

VOLUME = """-- Event volume by hour
SELECT 
    strftime('%H', datetime(timestamp, 'unixepoch')) as hour,
    event_type,
    COUNT(*) as event_count
FROM events
WHERE timestamp > strftime('%s', 'now', '-24 hours')
GROUP BY hour, event_type
ORDER BY hour, event_count DESC;
"""  # noqa: W291

PUBLISH_UNTIL_STDIN_ENDS = """
import random, select, sys, time
from event_bus.event_bridge import *
chance = random.Random(4)
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(200):
        at = time.time() - 3600 * chance.choice([0, 1, 2, 5, 11, 20, 30, 49])
        kind = chance.randrange(5)
        if kind == 0:
            signal_generated({
                "signal_id": "S", "symbol": "EURUSD", "direction": "BUY",
                "confidence": chance.choice([50, 61.5, 85.0, 99.9]),
                "pattern_type": chance.choice(["FVG", "ORDER_BLOCK", "SWEEP"])}, timestamp=at)
        elif kind == 1:
            status = chance.choice(["ok", "down"])
            system_health({"component": chance.choice("ab"), "status": status}, timestamp=at)
        else:
            market_data({"symbol": "EURUSD", "bid": 1.1, "ask": 1.2}, timestamp=at)
    assert flush(20)
"""


def tables(system: System, *statements: str) -> list[list[list[str]]]:
    """Rows of each statement, all on one state of the database."""
    marked = "".join(f"{s}\nSELECT '--';\n" for s in statements)
    done = subprocess.run(
        ["/usr/bin/sqlite3", str(system.db)],
        input=f"BEGIN;\n{marked}COMMIT;\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    parts = done.stdout.split("--\n")[:-1]
    return [[line.split("|") for line in part.splitlines()] for part in parts]


def published(system: System, up_to: int) -> list[Event]:
    """What the journal holds, which is where the collector had it from."""
    events = []
    with Subscriber(start=1, settings=system.settings, timeout_s=10.0) as subscriber:
        for event in subscriber:
            events.append(event)
            if event.seq == up_to:
                return events
    pytest.fail(f"the journal has no event {up_to}")


def check_signals(rows: list[list[str]], events: list[Event]) -> None:
    confidences = defaultdict(list)
    for event in events:
        if event.event_type == "signal_generated":
            confidences[event.data["pattern_type"]].append(event.data["confidence"])
    averages = {pattern: sum(c) / len(c) for pattern, c in confidences.items()}
    assert [row[0] for row in rows] == sorted(averages, key=lambda p: -averages[p])
    for pattern, average, count in rows:
        assert float(average) == pytest.approx(averages[pattern], rel=1e-12)
        assert int(count) == len(confidences[pattern])


def check_health(rows: list[list[str]], events: list[Event]) -> None:
    seen = defaultdict(list)
    for event in events:
        if event.event_type == "system_health":
            seen[event.data["component"], event.data["status"]].append(event.timestamp)
    assert [tuple(row[:2]) for row in rows] == sorted(seen)
    for component, status, count, last_seen in rows:
        assert int(count) == len(seen[component, status])
        assert float(last_seen) == pytest.approx(max(seen[component, status]), abs=1e-4)


def check_volume(rows: list[list[str]], events: list[Event], now: float) -> None:
    recent = [e for e in events if e.timestamp > now - 86_400]
    assert len(recent) < len(events)
    hours = [time.strftime("%H", time.gmtime(e.timestamp)) for e in recent]
    expected = Counter(zip(hours, [e.event_type for e in recent], strict=True))
    assert {(hour, kind): int(n) for hour, kind, n in rows} == expected
    assert rows == sorted(rows, key=lambda row: (row[0], -int(row[2])))


def test_handbook_statements_are_right_while_the_collector_writes(bus: System) -> None:
    bus.start_collector()
    bus.wait_stored()
    publisher = bus.popen("-c", PUBLISH_UNTIL_STDIN_ENDS, stdin=subprocess.PIPE)
    seq = 0
    for _ in range(4):

        def grown(seq: int = seq) -> bool:
            assert publisher.poll() is None
            return bus.stored() > seq + 400

        wait_until(grown, "the collector goes on writing")
        ((newest,),), ((count,),), signals, health, volume = tables(
            bus, "SELECT max(seq) FROM events;", COUNT, SIGNALS, HEALTH, VOLUME
        )
        now = time.time()
        assert int(newest) > seq
        seq = int(newest)
        assert int(count) == seq
        events = published(bus, up_to=seq)
        check_signals(signals, events)
        check_health(health, events)
        check_volume(volume, events, now)
    publisher.communicate(timeout=30)
    assert publisher.returncode == 0
