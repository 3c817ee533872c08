"""Candles, and the ticks that stand for them. Pure, but for `load`.

EURUSD, hourly, April 2017 to February 2018, from the package `backtesting`. Prices are bids; the
ask is `SPREAD` above. Times are shifted so that the last candle closes at a given moment, and the
gaps between candles (weekends) stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from event_bus.errors import MissingExtra

SYMBOL = "EURUSD"
TIMEFRAME = "1h"
CANDLE_S = 3_600.0
SPREAD = 0.00010
DIGITS = 5

TICK_OFFSETS_S = (0.0, 1_200.0, 2_400.0, 3_599.0)
"""When in its candle each of the four ticks comes; candles do not say it."""


class Candle(NamedTuple):
    """`time` is when it opens, Unix seconds; prices are bids; `volume` in ticks."""

    time: float
    open: float
    high: float
    low: float
    close: float
    volume: int


class Planned(NamedTuple):
    """One event to publish. `cause` is the position in its list of the event that led to it."""

    event_type: str
    timestamp: float
    data: dict[str, Any]
    user_id: str | None = None
    correlation_id: str | None = None
    cause: int | None = None


def load(count: int | None = None) -> list[Candle]:
    """The last `count` candles, all by default, oldest first.

    Raises MissingExtra naming the extra if the package that has them is not installed.
    """
    try:
        from backtesting.test import EURUSD
    except ImportError as e:
        raise MissingExtra(
            f"the demo's candles are in the package backtesting, and there is {e}",
            hint="pip install 'bitten-event-bus[demo]'",
        ) from e
    rows = EURUSD.iloc[-count:] if count else EURUSD
    return [
        Candle(time.timestamp(), float(o), float(h), float(low), float(c), int(volume))
        for time, o, h, low, c, volume in rows.itertuples()
    ]


def shifted(candles: Sequence[Candle], until: float) -> list[Candle]:
    """The candles as if the last one closed at `until`, Unix seconds."""
    by_s = until - (candles[-1].time + CANDLE_S)
    return [candle._replace(time=candle.time + by_s) for candle in candles]


def ask(bid: float) -> float:
    return round(bid + SPREAD, DIGITS)


def ticks(candles: Sequence[Candle]) -> Iterator[Planned]:
    """Four market_data events a candle: open, its extremes, close.

    A candle that rises visits its low first, one that falls its high: the shortest path. Volume is
    shared out evenly, the close takes the remainder.
    """
    for c in candles:
        extremes = (c.low, c.high) if c.close >= c.open else (c.high, c.low)
        quarter = c.volume // 4
        volumes = (quarter, quarter, quarter, c.volume - 3 * quarter)
        path = zip(TICK_OFFSETS_S, (c.open, *extremes, c.close), volumes, strict=True)
        for offset_s, bid, volume in path:
            data = {"symbol": SYMBOL, "bid": bid, "ask": ask(bid), "volume": volume}
            yield Planned("market_data", c.time + offset_s, data)
