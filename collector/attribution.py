"""Whose the events of lost ranges were, where the journal has forgotten it: told by the numbers of
processes that are nowhere. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from collector.journal_view import ProducerRow
from collector.ledger import LEFT_OUT, Account, Held, Range, Skip, Span
from collector.seqs import Seqs, between, count, merged, without
from collector.tally import Tally

Claim = tuple[int, int, int, Account]
"""First and last seq between which so many of a process's events may be."""


def unowned(
    tally: Tally,
    ranges: list[Range],
    spans: dict[str, list[Span]],
    stored_seq: int,
    left_out: Seqs,
) -> Seqs:
    """All that is lost and by the journal was nobody's."""
    not_to_come = (
        (max(r.first_seq, stored_seq + 1), r.last_seq or 0)
        for r in ranges
        if r.events and r.kind != LEFT_OUT
    )
    ahead = merged(lost for lost in not_to_come if lost[0] <= lost[1])
    owned = merged((first, last) for found in spans.values() for _, first, last in found)
    return without(merged([*tally.unowned, *without(ahead, owned)]), left_out)


def skips(
    tally: Tally, producers: list[ProducerRow], spans: dict[str, list[Span]], end_seq: int
) -> dict[str, list[Skip]]:
    """Where numbers of each process are nowhere. Of one that has events on their way to the
    database these may tell more."""
    found = {token: held.skips for token, held in tally.producers.items()}
    for p in producers:
        held = tally.producers.get(p.token, Held())
        if p.token not in spans and p.last_n > held.last_n:
            last = (p.last_n - held.last_n, held.last_seq, end_seq + 1)
            found[p.token] = [*held.skips, last]
    return found


def settle_missing(
    accounts: Iterable[Account], unowned: Seqs, skips: Mapping[str, list[Skip]]
) -> int:
    """Explain numbers that are nowhere by `unowned` seqs: lost, and nobody knows any more whose.

    The seqs of a process go up as its numbers do, so only what is lost between the neighbours of a
    number can be that number's event. Where more numbers were skipped around lost seqs than these
    are, whose they were is not known, and they are laid to nobody. Returns how many of the
    unaccounted may be among such seqs.
    """
    claims: list[Claim] = []
    for a in accounts:
        left = a.overtaken + a.skipped
        for numbers, after_seq, before_seq in skips.get(a.producer, ()) if left else ():
            lost_there = between(unowned, after_seq + 1, before_seq - 1)
            if lost_there and left:
                claims.append((lost_there[0][0], lost_there[-1][1], min(numbers, left), a))
                left -= min(numbers, left)
    open_ = []
    for these in _overlapping(claims):
        lost = count(between(unowned, these[0][0], max(last for _, last, *_ in these)))
        if sum(numbers for *_, numbers, _ in these) <= lost:
            for *_, numbers, a in these:
                _lay(a, numbers)
        else:
            open_.append((lost, these))
    contested = 0
    free = {a.producer: a.unaccounted for _, these in open_ for *_, a in these}
    for lost, these in open_:
        for *_, numbers, a in these:
            among = min(lost, numbers, free[a.producer])
            free[a.producer] -= among
            lost -= among
            contested += among
    return contested


def _overlapping(claims: list[Claim]) -> list[list[Claim]]:
    """Claims to the same seqs together."""
    found: list[list[Claim]] = []
    end = 0
    for claim in sorted(claims, key=lambda claim: claim[:2]):
        if not found or claim[0] > end:
            found.append([])
        found[-1].append(claim)
        end = max(end, claim[1])
    return found


def _lay(a: Account, found: int) -> None:
    """So many of its numbers were acknowledged events that the database does not have."""
    a.missing += found
    a.acked += found
    overtaken = min(found, a.overtaken)
    a.overtaken -= overtaken
    a.skipped -= found - overtaken
    a.published += found - overtaken
    for name in ("unaccounted", "undecided", "in_memory"):
        part = min(overtaken, getattr(a, name))
        setattr(a, name, getattr(a, name) - part)
        overtaken -= part
