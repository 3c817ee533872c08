"""The bus and its peers in turn, so that a slow minute slows all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peers import PEERS

MANY = 4

Round = Callable[[int, int], dict[str, float]]
"""Of a count of events and of publishers; what it returns has a `rate` in events/s."""


def measure(end_to_end: Round, count: int, rounds: int) -> dict[str, Any]:
    """`publishers` has the bus's rates by their number, `peers` those of each other system, and
    `missing` why others could not be run."""
    missing = {peer.name: reason for peer in PEERS if (reason := peer.missing())}
    there = [peer for peer in PEERS if peer.name not in missing]
    publishers: dict[str, list[float]] = {"1": [], str(MANY): []}
    peers: dict[str, list[float]] = {peer.name: [] for peer in there}
    systems: list[tuple[list[float], Callable[[], dict[str, float]]]] = [
        *((rates, partial(end_to_end, count, int(n))) for n, rates in publishers.items()),
        *((peers[peer.name], partial(peer.run, count, 1)) for peer in there),
    ]
    for _ in range(rounds):
        for rates, run in systems:
            rates.append(run()["rate"])
        systems.reverse()  # so that none always comes after the same other one
    return {"publishers": publishers, "peers": peers, "missing": missing}
