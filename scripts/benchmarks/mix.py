"""The standard mix of events: 80 % ticks, the rest what a trading system says besides."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

SYMBOLS = (
    *("EURUSD", "GBPUSD", "USDJPY", "AUDUSD", "USDCAD", "NZDUSD"),
    *("EURJPY", "GBPJPY", "XAUUSD", "XAGUSD", "BTCUSD", "ETHUSD"),
)
PATTERNS = ("LIQUIDITY_SWEEP_REVERSAL", "FAIR_VALUE_GAP", "ORDER_BLOCK", "BREAKOUT_RETEST")
USERS = 5_000

SHARES = {
    "market_data": 80,
    "pattern_detected": 6,
    "signal_generated": 4,
    "fire_command": 3,
    "trade_executed": 2,
    "balance_update": 2,
    "user_action": 1,
    "system_health": 2,
}

Event = tuple[str, dict[str, Any], dict[str, Any]]
"""Event type, data, and the other arguments of a bridge call."""


EVENTS_A_TRADE = 40


def events(count: int, seed: int = 1, *, event_type: str = "") -> list[Event]:
    """`count` events of the mix, or of one type of it; the same for the same seed."""
    rng = random.Random(seed)
    types = rng.choices(list(SHARES), weights=list(SHARES.values()), k=count)
    return [(t, *_event(t, i, rng)) for i, t in enumerate([event_type or t for t in types])]


def endless(pool: Sequence[Event], first: int) -> Iterator[Event]:
    """The pool again and again from event number `first` on, with new trades each time: in a large
    database a correlation id has a handful of events, as in life."""
    for begin in itertools.count(first, step=len(pool)):
        for i, (event_type, data, fields) in enumerate(pool, begin):
            if "correlation_id" in fields:
                trade = i // EVENTS_A_TRADE
                fields = fields | _traced(trade)
                data = data | {name: value for name, value in _ids(trade).items() if name in data}
            yield event_type, data, fields


def _traced(trade: int) -> dict[str, Any]:
    return {"correlation_id": f"trade-{trade:07d}"}


def _ids(trade: int) -> dict[str, Any]:
    return {"signal_id": f"SIG_{trade}", "fire_id": f"FIRE_{trade}"}


def _event(event_type: str, i: int, rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    symbol = rng.choice(SYMBOLS)
    price = round(rng.uniform(0.5, 2.0), 5)
    direction = rng.choice(("BUY", "SELL"))
    trade = i // EVENTS_A_TRADE  # what a trade touches carries the same correlation id
    user = {"user_id": f"u_{rng.randrange(USERS)}"}
    traced = _traced(trade)
    ids = _ids(trade)
    confidence = round(rng.uniform(50, 99), 1)
    match event_type:
        case "market_data":
            ask = round(price + 0.00012, 5)
            return {"symbol": symbol, "bid": price, "ask": ask, "volume": rng.randrange(500)}, {}
        case "pattern_detected":
            pattern = rng.choice(PATTERNS)
            return {"pattern_type": pattern, "symbol": symbol, "confidence": confidence}, {}
        case "signal_generated":
            return {
                "signal_id": ids["signal_id"],
                "symbol": symbol,
                "direction": direction,
                "confidence": confidence,
                "pattern_type": rng.choice(PATTERNS),
            }, traced
        case "fire_command":
            return {
                "fire_id": ids["fire_id"],
                "signal_id": ids["signal_id"],
                "symbol": symbol,
                "direction": direction,
                "lot_size": 0.1,
            }, user | traced
        case "trade_executed":
            return {
                "fire_id": ids["fire_id"],
                "ticket": 88_000_000 + i,
                "symbol": symbol,
                "volume": 0.1,
                "open_price": price,
            }, user | traced
        case "balance_update":
            balance = round(rng.uniform(100, 20_000), 2)
            return {"balance": balance, "equity": round(balance * 0.99, 2), "margin": 108.45}, user
        case "user_action":
            return {"action": "set_risk", "details": {"risk_percent": rng.randrange(1, 5)}}, user
        case _:
            return {
                "component": rng.choice(("signal_engine", "fire_router", "market_feed")),
                "status": "ok",
                "uptime": i,
                "memory_usage": 81.5,
            }, {}
