"""Arithmetic on ranges of seqs, compared with that on sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from collector.seqs import between, count, merged, text, without

PAIRS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)).map(lambda t: (t[0], sum(t))))


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {seq for first, last in ranges for seq in range(first, last + 1)}


@given(PAIRS, PAIRS)
def test_ranges_are_what_sets_of_their_seqs_are(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    one, other = merged(a), merged(b)
    assert members(one) == members(a)
    assert one == merged(reversed(one))
    left = without(one, other)
    assert members(left) == members(a) - members(b)
    assert left == merged(left)
    assert count(left) == len(members(left))


@given(PAIRS, st.integers(0, 45), st.integers(0, 10))
def test_part_of_ranges_is_what_is_within(a: list[tuple[int, int]], first: int, more: int) -> None:
    part = between(merged(a), first, first + more)
    assert part == merged(part)
    assert members(part) == members(a) & set(range(first, first + more + 1))


def test_many_ranges_are_cut_short_for_people() -> None:
    assert text([(1, 3), (5, 5)]) == "1-3, 5"
    assert text([(n, n) for n in range(1, 20, 2)]) == "1, 3, 5, 7, 9, …"
