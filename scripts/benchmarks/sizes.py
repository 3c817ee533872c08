"""How much each section measures: in full, and to see that it works."""

from __future__ import annotations

from dataclasses import dataclass

import mix


@dataclass(frozen=True, kw_only=True)
class Sizes:
    events: int
    """A round, end to end."""

    side_by_side: int
    """A round of each of the systems that are compared."""

    rounds: int
    calls: int
    call_processes: int
    """The bus is away for a quarter of a second before the spool fills, once in each process."""

    rates: tuple[int, ...]
    latency_s: float
    latency_events: int
    """At the least, at low rates."""

    limits_s: float
    grown: tuple[int, ...]
    on_top: int
    query_runs: int
    subscribers: tuple[int, ...]
    fanned_out: int
    load_s: float
    types: tuple[str, ...]
    of_a_type: int
    restarts: int


FULL = Sizes(
    events=1_000_000,
    side_by_side=300_000,
    rounds=3,
    calls=50_000,
    call_processes=8,
    rates=(100, 1_000, 10_000, 50_000),
    latency_s=8.0,
    latency_events=2_000,
    limits_s=3.0,
    grown=(100_000, 1_000_000, 10_000_000),
    on_top=200_000,
    query_runs=7,
    subscribers=(0, 1, 10, 100),
    fanned_out=200_000,
    load_s=20.0,
    types=tuple(mix.SHARES),
    of_a_type=200_000,
    restarts=3,
)

SHORT = Sizes(
    events=50_000,
    side_by_side=50_000,
    rounds=1,
    calls=5_000,
    call_processes=1,
    rates=(1_000, 50_000),
    latency_s=0.5,
    latency_events=50,
    limits_s=0.3,
    grown=(2_000, 20_000),
    on_top=2_000,
    query_runs=2,
    subscribers=(0, 10),
    fanned_out=5_000,
    load_s=1.0,
    types=("market_data",),
    of_a_type=5_000,
    restarts=1,
)
