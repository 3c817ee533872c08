"""What the bus is to reach, and whether it did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]

AT_LARGEST = "10000000"
"""Events stored, at which the targets of growth hold."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """`read` finds the figure in the results; KeyError if it was not measured."""

    name: str
    read: Callable[[Results], float]
    least: float | None = None
    most: float | None = None
    wanted: float | None = None

    @property
    def limit(self) -> str:
        sign, limit = ("≥", self.least) if self.least is not None else ("≤", self.most)
        return f"{sign} {limit:g}" + (f", wanted {self.wanted:g}" if self.wanted else "")

    def is_reached(self, figure: float) -> bool:
        is_enough = self.least is None or figure >= self.least
        return is_enough and (self.most is None or figure <= self.most)


def judged(results: Results) -> Iterator[tuple[Target, float | None]]:
    """Every target with its figure; None where that was not measured."""
    for target in TARGETS:
        try:
            yield target, target.read(results)
        except KeyError:
            yield target, None


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Of interleaved rounds: the median of the ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def rates(results: Results) -> list[float]:
    return [run["rate"] for run in results["end_to_end"]]


def _against_peer(*words: str) -> Callable[[Results], float]:
    """The ratio to the fastest of the peers whose names have all these words."""

    def read(results: Results) -> float:
        ours = results["publishers"]["1"]
        found = [
            ratio(ours, theirs)
            for name, theirs in results["peers"].items()
            if all(word in name.lower() for word in words)
        ]
        if not found:
            raise KeyError(words)
        return min(found)

    return read


def _call(percentile: str, pace: str, *states: str) -> Callable[[Results], float]:
    def read(results: Results) -> float:
        found = [results["calls"][pace][state][percentile] for state in states]
        if any(map(math.isnan, found)):  # there was no such call
            raise KeyError(states)
        return max(found)

    return read


def _latency(kind: str, percentile: str) -> Callable[[Results], float]:
    return lambda r: float(r["latency"][kind]["1000"][percentile])


def _at_largest(name: str) -> Callable[[Results], float]:
    return lambda r: float(r["growth"][AT_LARGEST][name])


def _growth_ratio(results: Results) -> float:
    largest = results["growth"][AT_LARGEST]
    return ratio(largest["rates"], largest["empty_rates"])


def _slowest_seed_query(results: Results) -> float:
    return max(results["growth"][AT_LARGEST]["queries_ms"]["seed"].values())


def _ready(results: Results) -> float:
    if str(results["startup"]["events"]) != AT_LARGEST:
        raise KeyError(AT_LARGEST)
    return statistics.median(crash["ready_s"] for crash in results["startup"]["crashes"])


def _call_targets() -> Iterator[Target]:
    for pace, words in {"back_to_back": "back to back", "paced": "at 5,000/s"}.items():
        for where, states in {"up": ("up",), "away": ("away", "filling")}.items():
            for percentile, most in {"p50": 5.0, "p99.9": 500.0}.items():
                yield Target(
                    name=f"bridge call {words}, bus {where}: {percentile}, µs",
                    read=_call(percentile, pace, *states),
                    most=most,
                )


TARGETS = (
    Target(
        name="end to end / Redis Streams, AOF everysec",
        read=_against_peer("redis", "everysec"),
        least=2.0,
        wanted=3.0,
    ),
    Target(
        name="end to end / NATS JetStream, default sync",
        read=_against_peer("nats", "default"),
        least=4.0,
        wanted=6.0,
    ),
    Target(name="end to end / the plain way", read=_against_peer("plain"), least=20.0, wanted=40.0),
    Target(
        name="end to end / store alone from memory",
        read=lambda r: ratio(rates(r), r["store_alone"]),
        least=0.6,
        wanted=0.8,
    ),
    Target(name="rate at ten million stored / empty", read=_growth_ratio, least=0.8, wanted=0.95),
    Target(
        name="four publishers / one",
        read=lambda r: ratio(r["publishers"]["4"], r["publishers"]["1"]),
        least=1.0,
    ),
    *_call_targets(),
    Target(
        name="publish to SUB socket at 1,000/s: p50, ms", read=_latency("socket", "p50"), most=0.4
    ),
    Target(
        name="publish to SUB socket at 1,000/s: p99, ms", read=_latency("socket", "p99"), most=2.0
    ),
    Target(
        name="publish to Subscriber at 1,000/s: p50, ms",
        read=_latency("subscriber", "p50"),
        most=0.4,
    ),
    Target(
        name="publish to Subscriber at 1,000/s: p99, ms",
        read=_latency("subscriber", "p99"),
        most=2.0,
    ),
    Target(name="publish to stored at 1,000/s: p99, ms", read=_latency("stored", "p99"), most=20.0),
    Target(
        name="database, bytes an event of the mix",
        read=lambda r: float(r["storage"]["mix"]["database"]),
        most=100.0,
    ),
    Target(name="bus at ten million, MB", read=_at_largest("bus_mb"), most=50.0),
    Target(name="collector at ten million, MB", read=_at_largest("collect_mb"), most=70.0),
    Target(
        name="bus at 200 events/s, % of a core",
        read=lambda r: float(r["load"]["usual"]["bus_percent"]),
        most=5.0,
    ),
    Target(
        name="collector at 200 events/s, % of a core",
        read=lambda r: float(r["load"]["usual"]["collect_percent"]),
        most=5.0,
    ),
    Target(name="handbook's slowest query at ten million, ms", read=_slowest_seed_query, most=50.0),
    Target(name="ready after a crash at ten million, s", read=_ready, most=3.0),
)
