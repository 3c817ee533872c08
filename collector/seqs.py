"""Ranges of seqs: first and last of each, in order, none touching another. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from operator import itemgetter

Seqs = list[tuple[int, int]]


def merged(ranges: Iterable[tuple[int, int]]) -> Seqs:
    """Any ranges, in order and joined."""
    found: Seqs = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found


def without(ranges: Seqs, others: Seqs) -> Seqs:
    """What of `ranges` is in none of `others`."""
    left: Seqs = []
    at = 0
    for first, last in ranges:
        while at < len(others) and others[at][1] < first:
            at += 1
        for low, high in others[at:]:
            if low > last:
                break
            if low > first:
                left.append((first, low - 1))
            first = high + 1
        if first <= last:
            left.append((first, last))
    return left


def between(ranges: Seqs, first: int, last: int) -> Seqs:
    """What of `ranges` lies from `first` to `last`."""
    found: Seqs = []
    at = bisect_left(ranges, first, key=itemgetter(1))
    while at < len(ranges) and ranges[at][0] <= last:
        found.append((max(ranges[at][0], first), min(ranges[at][1], last)))
        at += 1
    return found


def count(ranges: Seqs) -> int:
    return sum(last - first + 1 for first, last in ranges)


def text(ranges: Seqs, most: int = 5) -> str:
    """For people: 1-7, 9."""
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:most]]
    return ", ".join([*shown, "…"] if len(ranges) > most else shown)
