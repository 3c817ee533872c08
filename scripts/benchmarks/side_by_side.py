"""The bus and its peers in turn, so that a slow minute slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from peers import PEERS

OURS = "this bus"
MANY = 4

Run = Callable[[int, int], dict[str, float]]
"""Of a count of events and of publishers; what it returns has a `rate` in events/s."""


def measure(end_to_end: Run, count: int, rounds: int) -> dict[str, Any]:
    """Every run of each system by its name, and why others could not be run."""
    missing = {peer.name: reason for peer in PEERS if (reason := peer.missing())}
    systems: list[tuple[str, Run, int]] = [
        (OURS, end_to_end, 1),
        (f"{OURS}, {MANY} publishers", end_to_end, MANY),
        *((peer.name, peer.run, 1) for peer in PEERS if peer.name not in missing),
    ]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in systems}
    for _ in range(rounds):
        for name, run, publishers in systems:
            runs[name].append(run(count, publishers))
    return {"events": count, "runs": runs, "missing": missing}


def show(results: dict[str, Any]) -> None:
    runs = results["runs"]
    ours = _rates(runs[OURS])
    print(f"\nfirst publish to last commit, {results['events']:,} events, in turn: events/s")
    for name, values in runs.items():
        rates = _rates(values)
        ratio = statistics.median(a / b for a, b in zip(ours, rates, strict=True))
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        print(f"{name:<42} {statistics.median(rates):>9,.0f}  {spread:<22} {ratio:6.2f}")
    for name, reason in results["missing"].items():
        print(f"{name:<42} not measured: {reason}")


def _rates(runs: Sequence[dict[str, float]]) -> list[float]:
    return [run["rate"] for run in runs]
