"""Patterns in candles, and the trades made of them. Pure.

Not a strategy to trade: simple, deterministic and stated, so that the events it gives can be
checked. A pattern is seen when its candle has closed. One of enough confidence becomes a signal;
every user whose own bar it clears fires; the order fills at the open of the next candle and is
closed at the open `HOLD_CANDLES` later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from event_bus.demo.market import CANDLE_S, SYMBOL, TIMEFRAME, Candle, Planned, ask

FAST, SLOW = 20, 50
RSI_LENGTH = 14
OVERSOLD, OVERBOUGHT = 30.0, 70.0
PIP = 0.0001

SIGNAL_CONFIDENCE = 65.0
HOLD_CANDLES = 12
FIRE_DELAY_S = 0.25
FILL_DELAY_S = 0.5
CONTRACT_SIZE = 100_000
LEVERAGE = 30
FIRST_TICKET = 70_000_000
START_BALANCE = 10_000.0


class User(NamedTuple):
    """Fires `lots` on signals of at least `confidence` percent."""

    user_id: str
    lots: float
    confidence: float


USERS = (User("u_101", 0.10, 65.0), User("u_202", 0.25, 75.0), User("u_303", 0.50, 85.0))


class Pattern(NamedTuple):
    """Seen at the close of candle `at`; `confidence` in percent."""

    at: int
    name: str
    direction: str
    confidence: float


class Trade(NamedTuple):
    """`fill` is the position of its trade_executed event; it closes at the open of `close_at`."""

    user: User
    direction: str
    open_price: float
    close_at: int
    fill: int
    correlation_id: str

    def profit(self, bid: float) -> float:
        """Profit in US dollars if closed now: long sells at the bid, short buys at the ask."""
        move = bid - self.open_price if self.direction == "BUY" else self.open_price - ask(bid)
        return move * self.user.lots * CONTRACT_SIZE


def sma(values: Sequence[float], length: int) -> list[float | None]:
    """Simple moving average; None until there are `length` values."""
    return [
        None if i + 1 < length else sum(values[i + 1 - length : i + 1]) / length
        for i in range(len(values))
    ]


def rsi(closes: Sequence[float], length: int = RSI_LENGTH) -> list[float | None]:
    """Relative strength index, 0-100, with Wilder's smoothing (New Concepts in Technical Trading
    Systems, 1978); None until there are `length` changes."""
    gain = loss = 0.0
    result: list[float | None] = [None] * min(1, len(closes))
    for n, (before, after) in enumerate(pairwise(closes), 1):
        weight = 1 / min(n, length)
        gain += (max(after - before, 0.0) - gain) * weight
        loss += (max(before - after, 0.0) - loss) * weight
        flat = gain + loss == 0
        result.append(None if n < length else 50.0 if flat else 100 * gain / (gain + loss))
    return result


def patterns(candles: Sequence[Candle]) -> Iterator[Pattern]:
    """Moving averages that cross, RSI that turns extreme, bodies that engulf the one before.

    Confidence starts at 60, plus: for a cross 20 per pip between the averages, for the RSI 4 per
    point beyond its limit, for an engulfing body 10 for each time it is as large as the one before
    again; at most 95.
    """
    closes = [c.close for c in candles]
    fast, slow, strength = sma(closes, FAST), sma(closes, SLOW), rsi(closes)

    def pattern(at: int, name: str, buy: bool, extra: float) -> Pattern:
        return Pattern(at, name, "BUY" if buy else "SELL", round(min(60 + extra, 95.0), 1))

    for i in range(1, len(candles)):
        f0, s0, f1, s1 = fast[i - 1], slow[i - 1], fast[i], slow[i]
        if f0 and s0 and f1 and s1 and (f0 > s0) != (f1 > s1):
            name = "SMA_CROSS_UP" if f1 > s1 else "SMA_CROSS_DOWN"
            yield pattern(i, name, f1 > s1, 20 * abs(f1 - s1) / PIP)
        r0, r1 = strength[i - 1], strength[i]
        if r0 is not None and r1 is not None:
            if r1 < OVERSOLD <= r0:
                yield pattern(i, "RSI_OVERSOLD", True, 4 * (OVERSOLD - r1))
            elif r1 > OVERBOUGHT >= r0:
                yield pattern(i, "RSI_OVERBOUGHT", False, 4 * (r1 - OVERBOUGHT))
        a, b = candles[i - 1], candles[i]
        body0, body1 = a.close - a.open, b.close - b.open
        if body0 * body1 < 0 and abs(body1) >= 2 * abs(body0) and abs(body0) >= 2 * PIP:
            name = "BULLISH_ENGULFING" if body1 > 0 else "BEARISH_ENGULFING"
            yield pattern(i, name, body1 > 0, 10 * (abs(body1 / body0) - 1))


def trades(candles: Sequence[Candle]) -> list[Planned]:
    """The events of a strategy that watches these candles, in the order they happen.

    All events of a signal have one correlation id; its signal is caused by its pattern, a fire
    command by the signal, an execution by the command, a balance by the execution.
    """
    events: list[Planned] = []
    fires: list[tuple[int, User]] = []
    running: list[Trade] = []
    balances = {user.user_id: START_BALANCE for user in USERS}
    seen: dict[int, list[Pattern]] = defaultdict(list)
    for pattern in patterns(candles):
        seen[pattern.at].append(pattern)

    for i, candle in enumerate(candles):
        moment = candle.time + FILL_DELAY_S
        for trade in [t for t in running if t.close_at == i]:
            running.remove(trade)
            events.append(_balance(trade, candle.open, moment, balances, running))
        for fire, user in fires:
            execution = _execution(events[fire], fire, candle.open, moment)
            price, direction = execution.data["open_price"], execution.data["direction"]
            signal = str(execution.correlation_id)
            running.append(Trade(user, direction, price, i + HOLD_CANDLES, len(events), signal))
            events.append(execution)
        fires.clear()
        for pattern in seen[i]:
            is_signal = pattern.confidence >= SIGNAL_CONFIDENCE and i + 1 < len(candles)
            fires += _seen(events, pattern, candle.time + CANDLE_S, is_signal=is_signal)
    return events


def _seen(
    events: list[Planned], pattern: Pattern, moment: float, *, is_signal: bool
) -> list[tuple[int, User]]:
    """Add a pattern and what it leads to; returns the position and user of each fire command."""
    number = f"{SYMBOL}-{len(events) + 1:05d}"
    correlation_id = number if is_signal else None
    found = {
        "pattern_type": pattern.name,
        "symbol": SYMBOL,
        "confidence": pattern.confidence,
        "timeframe": TIMEFRAME,
    }
    events.append(Planned("pattern_detected", moment, found, None, correlation_id))
    if not is_signal:
        return []
    signal = {
        "signal_id": f"SIG_{number}",
        "symbol": SYMBOL,
        "direction": pattern.direction,
        "confidence": pattern.confidence,
        "pattern_type": pattern.name,
    }
    cause = len(events)
    events.append(Planned("signal_generated", moment, signal, None, number, cause - 1))
    fires = []
    for user in USERS:
        if pattern.confidence >= user.confidence:
            command = {
                "fire_id": f"FIRE_{number}_{user.user_id}",
                "signal_id": signal["signal_id"],
                "symbol": SYMBOL,
                "direction": pattern.direction,
                "lot_size": user.lots,
            }
            fires.append((len(events), user))
            at = moment + FIRE_DELAY_S
            events.append(Planned("fire_command", at, command, user.user_id, number, cause))
    return fires


def _execution(fire: Planned, position: int, bid: float, moment: float) -> Planned:
    """The fill of a command: bought at the ask, sold at the bid."""
    data = {
        "fire_id": fire.data["fire_id"],
        "ticket": FIRST_TICKET + position,
        "symbol": SYMBOL,
        "direction": fire.data["direction"],
        "volume": fire.data["lot_size"],
        "open_price": ask(bid) if fire.data["direction"] == "BUY" else bid,
        "execution_time": moment,
    }
    return Planned("trade_executed", moment, data, fire.user_id, fire.correlation_id, position)


def _balance(
    trade: Trade, bid: float, moment: float, balances: dict[str, float], running: list[Trade]
) -> Planned:
    """The account after closing a trade; equity and margin come of those still running.

    `profit` is no field of the schema: unknown fields are kept.
    """
    user_id = trade.user.user_id
    profit = round(trade.profit(bid), 2)
    balances[user_id] = round(balances[user_id] + profit, 2)
    others = [t for t in running if t.user.user_id == user_id]
    data = {
        "balance": balances[user_id],
        "equity": round(balances[user_id] + sum(t.profit(bid) for t in others), 2),
        "margin": round(sum(t.user.lots for t in others) * CONTRACT_SIZE * bid / LEVERAGE, 2),
        "profit": profit,
    }
    return Planned("balance_update", moment, data, user_id, trade.correlation_id, trade.fill)
