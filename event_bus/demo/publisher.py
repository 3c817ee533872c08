"""One publisher process: `python -m event_bus.demo.publisher market_feed --until 1763695677`.

Stands for a legacy process that imports the bridge and calls it. Writes two lines of JSON to
standard output: what it is going to publish, and when all of that is acknowledged, what became of
it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from event_bus import event_bridge
from event_bus.demo import market, strategy
from event_bus.demo.market import Planned
from event_bus.errors import BittenError

MAX_WAITING = 10_000
"""A bridge never blocks; a producer that can wait does so here, well below the bridge's bound."""

PACE_EVERY = 250
FLUSH_S = 30.0

EMIT = {
    "market_data": event_bridge.market_data,
    "pattern_detected": event_bridge.pattern_detected,
    "signal_generated": event_bridge.signal_generated,
    "fire_command": event_bridge.fire_command,
    "trade_executed": event_bridge.trade_executed,
    "balance_update": event_bridge.balance_update,
}


def publish(events: Sequence[Planned]) -> dict[str, Any]:
    """Publish the events in order and wait for the bus; returns counts.

    `published` by type counts what the bridge took, `acked` what the bus has on disk.
    """
    published: Counter[str] = Counter()
    ids: list[str | None] = []
    for n, event in enumerate(events, 1):
        event_id = EMIT[event.event_type](
            event.data,
            user_id=event.user_id,
            correlation_id=event.correlation_id,
            causation_id=None if event.cause is None else ids[event.cause],
            timestamp=event.timestamp,
        )
        ids.append(event_id)
        published[event.event_type] += event_id is not None
        if n % PACE_EVERY == 0 and event_bridge.stats()["waiting"] > MAX_WAITING:
            event_bridge.flush(FLUSH_S)
    event_bridge.flush(FLUSH_S)
    stats = event_bridge.stats()
    counts = {name: stats[name] for name in ("acked", "waiting", "dropped", "refused")}
    return {"source": stats["source"], "published": dict(published), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m event_bus.demo.publisher")
    parser.add_argument("role", choices=("market_feed", "strategy"))
    parser.add_argument("--until", type=float, required=True, help="when the last candle closes")
    parser.add_argument("--candles", type=int, help="use the last so many")
    options = parser.parse_args()
    try:
        original = market.load(options.candles)
    except BittenError as e:
        sys.exit(str(e))
    candles = market.shifted(original, options.until)
    make = market.ticks if options.role == "market_feed" else strategy.trades
    events = list(make(candles))
    plan = {
        "events": len(events),
        "candles": len(candles),
        "first": original[0].time,
        "last": original[-1].time,
    }
    for document in (plan, publish(events)):
        sys.stdout.buffer.write(msgspec.json.encode(document) + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
