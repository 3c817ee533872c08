"""Time queries: `python queries.py DATABASE RUNS`; prints ms of each run by query as JSON.

Read-only, with Python's own sqlite3 and in a process of its own, as an analyst would. The system
has the files' pages in memory as far as they fit.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time

MAX_S = 10.0
"""Of one query's runs together: a slow one is not run as often."""

SEED = {
    "events": "SELECT COUNT(*) FROM events;",
    "signals by pattern": """-- Signal performance by pattern
SELECT 
    pattern_type,
    AVG(confidence) as avg_confidence,
    COUNT(*) as signal_count
FROM signal_events 
GROUP BY pattern_type
ORDER BY avg_confidence DESC;
""",  # noqa: W291
    "health by component": """-- System health overview
SELECT 
    component,
    status,
    COUNT(*) as status_count,
    MAX(created_at) as last_seen
FROM health_events
GROUP BY component, status;
""",  # noqa: W291
    "volume by hour": """-- Event volume by hour
SELECT 
    strftime('%H', datetime(timestamp, 'unixepoch')) as hour,
    event_type,
    COUNT(*) as event_count
FROM events
WHERE timestamp > strftime('%s', 'now', '-24 hours')
GROUP BY hour, event_type
ORDER BY hour, event_count DESC;
""",  # noqa: W291
}
"""Of the integrators' handbook, unchanged."""

_LATEST = "ORDER BY seq DESC LIMIT 20"
LOOKUPS = {
    "by event_id": "SELECT * FROM events WHERE event_id = :event_id",
    "by correlation_id": "SELECT * FROM events WHERE correlation_id = :correlation_id ORDER BY seq",
    "latest of a user": f"SELECT * FROM events WHERE user_id = :user_id {_LATEST}",
    "latest of a symbol": f"SELECT * FROM market_data WHERE symbol = :symbol {_LATEST}",
    "latest of a type": f"SELECT * FROM events WHERE event_type = 'fire_command' {_LATEST}",
    "count of the last hour": """SELECT COUNT(*) FROM events
WHERE timestamp > strftime('%s', 'now', '-1 hour')""",
}

SOMEBODY = """SELECT e.event_id, e.correlation_id, e.user_id, t.symbol
FROM trade_events t JOIN events e ON e.seq = t.seq ORDER BY t.seq LIMIT 1 OFFSET :offset"""
"""An event to look for, of those that were stored early."""


def main() -> None:
    path, runs = sys.argv[1], int(sys.argv[2])
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    found = db.execute(SOMEBODY, {"offset": 10}).fetchone()
    names = ("event_id", "correlation_id", "user_id", "symbol")
    values = dict(zip(names, found, strict=True))
    times: dict[str, dict[str, list[float]]] = {}
    for kind, queries in {"seed": SEED, "lookup": LOOKUPS}.items():
        times[kind] = {name: timed(db, sql, values, runs) for name, sql in queries.items()}
    print(json.dumps(times))


def timed(db: sqlite3.Connection, sql: str, values: dict[str, str], runs: int) -> list[float]:
    ms: list[float] = []
    while len(ms) < runs and sum(ms) < MAX_S * 1000:
        begin = time.perf_counter()
        db.execute(sql, values).fetchall()
        ms.append((time.perf_counter() - begin) * 1000)
    return ms


main()
