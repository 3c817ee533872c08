"""The loss ledger: from what is known of each process to its account, and a verdict. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec

from collector.seqs import Seqs, merged, without
from event_bus import journal_format

Count = Annotated[int, msgspec.Meta(ge=0)]

Skip = tuple[int, int, int]
"""How many numbers of a process are nowhere, between which two seqs it was."""

Span = tuple[int, int, int]
"""A process's consecutive events in the journal: first number, first seq, last seq."""

MAX_SHOWN_RANGES = 20
LEFT_OUT = "left_out"


class Report(msgspec.Struct, frozen=True):
    """What a process last said of itself. `emitted` are all the events it was given, `overflowed`
    those of them that got no number, because memory was full; `dropped` includes these."""

    source: str = ""
    pid: Count = 0
    emitted: Count = 0
    acked: Count = 0
    dropped: Count = 0
    overflowed: Count | None = None
    refused: Count = 0

    @property
    def last_n(self) -> int:
        """The highest number that was given to an event, as far as the report tells."""
        without = self.dropped if self.overflowed is None else self.overflowed
        return max(0, self.emitted - without)


class Held(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the database holds of one process, or says of it.

    `rejected` counts its numbers that the bus refused, `rejected_n` is the highest of them;
    `refused` are its own bridge's refusals. `missing` are events that the journal has or had at a
    place where the database has none, or another one. `dropped` is what its bridge told last.
    `last_n` is its highest number, `last_seq` where its last event is; `skips` are those between
    which events of unknown processes are lost.
    """

    source: str = ""
    stored: int = 0
    rejected: int = 0
    rejected_n: int = 0
    conflicts: int = 0
    refused: int = 0
    missing: int = 0
    dropped: int = 0
    reason: str = ""
    last_n: int = 0
    last_seq: int = 0
    skips: list[Skip] = []


class Known(msgspec.Struct, kw_only=True):
    """All that is known of one process. `last_n` is the highest number that the bus took in,
    `spooled` the events in its spool file that the bus has not, up to number `spooled_n`; `lost`
    are not to come from the journal, which knows that they were this one's;
    `dropped_at_end` is what it had lost in all, by an account that the bus has not taken in."""

    producer: str
    held: Held
    report: Report | None = None
    last_n: int = 0
    last_seen: float | None = None
    alive: bool = False
    unstored: int = 0
    lost: int = 0
    spooled: int = 0
    spooled_n: int = 0
    dropped_at_end: int = 0
    reason_at_end: str = ""


class Account(msgspec.Struct, kw_only=True):
    """One process's events, or a source's.

    published = acked + in_memory + in_spool + dropped + unaccounted + undecided, and
    acked = stored + unstored + rejected + conflicts + missing. `unaccounted` are nowhere, and
    nobody said that they were dropped; `undecided` are nowhere yet, but the database lacks events
    of the journal that may tell. `overtaken` of these, or of those in memory, were published before
    others that the bus has. `refused` were refused by the bridge and are not published; nor are
    those `skipped`: numbers that are nowhere, of a process that never reported that they were used.
    """

    producer: str = ""
    source: str = ""
    processes: int = 1
    pid: int = 0
    alive: bool = False
    last_seen: float | None = None
    published: int = 0
    acked: int = 0
    in_memory: int = 0
    in_spool: int = 0
    dropped: int = 0
    refused: int = 0
    rejected: int = 0
    conflicts: int = 0
    stored: int = 0
    unstored: int = 0
    missing: int = 0
    unaccounted: int = 0
    overtaken: int = 0
    skipped: int = 0
    undecided: int = 0
    reason: str = ""

    @property
    def lost(self) -> int:
        return self.dropped + self.missing + self.unaccounted


class Range(msgspec.Struct, kw_only=True):
    """Events `first_seq` to `last_seq`, of which `events` are not in the database as they should.

    `kind` is `gap` (gone from the journal before they were stored, and recorded), `hole` (not in
    the database, and nothing says why), `differs` (stored as another event than the journal's),
    `journal` (lost by the journal: those that are not stored become a gap; without `last_seq`
    nobody knows how many there were) or `left_out` (not given out after a recovery of the journal:
    most or all of them never were an event's, so that they do not count as lost).
    """

    kind: str
    first_seq: int
    last_seq: int | None
    events: int = 0
    at: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.first_seq == self.last_seq:
            return str(self.first_seq)
        return f"{self.first_seq}-{'?' if self.last_seq is None else self.last_seq}"


def lost_by_journal(first_seq: int, last_seq: int | None, at: float | None, reason: str) -> Range:
    kind = LEFT_OUT if reason.startswith(journal_format.LEFT_OUT) else "journal"
    return Range(kind=kind, first_seq=first_seq, last_seq=last_seq, at=at, reason=reason)


def left_out(losses: Iterable[Range], origin_seq: int) -> Seqs:
    """What was left out, as journals told: by its range, or by where a journal began that follows
    one of which nobody knows the end."""
    ends = ((r, origin_seq - 1 if r.last_seq is None else r.last_seq) for r in losses)
    return merged(
        (r.first_seq, end)
        for r, end in ends
        if r.first_seq <= end and (r.kind == LEFT_OUT or r.last_seq is None)
    )


def tell_apart(r: Range, left_out: Seqs) -> list[Range]:
    """A range as what of it was left out and the rest, as if nothing of it were stored."""
    whole = [(r.first_seq, r.last_seq or r.first_seq)]
    lost = without(whole, left_out)
    kinds = [(r.kind, lost), (LEFT_OUT, without(whole, lost))]
    pieces = [
        msgspec.structs.replace(r, kind=kind, first_seq=a, last_seq=b, events=b - a + 1)
        for kind, seqs in kinds
        for a, b in seqs
    ]
    return sorted(pieces, key=lambda piece: piece.first_seq)


SUMMED = (
    *("processes", "published", "acked", "in_memory", "in_spool", "dropped", "refused"),
    *("rejected", "conflicts", "stored", "unstored", "missing", "unaccounted", "undecided"),
)


def account(known: Known, *, doubt: int) -> Account:
    """One process's account.

    Its events are numbered 1, 2, 3, …, so each number must be somewhere. One that is nowhere was
    dropped, as far as drops were told, or waits in the memory of a process that lives. `doubt`
    events that the database has not stored yet may say more.
    """
    held = known.held
    report = known.report or Report()
    missing = held.missing + known.lost
    taken = held.stored + known.unstored + held.rejected + missing
    top = max(known.last_n, taken)
    highest = max(top + known.spooled, known.spooled_n, report.last_n)
    dropped = max(report.dropped, held.dropped, known.dropped_at_end)
    nowhere = highest - taken - known.spooled
    # What was dropped had a number, but for what found memory full.
    numbered = max(0, min(nowhere, dropped - (report.emitted - report.last_n)))
    nowhere -= numbered
    overtaken = min(nowhere, max(0, top - taken - numbered))
    skipped = 0
    if known.report is None:  # nobody says that these numbers were ever given to an event
        skipped, overtaken = overtaken, 0
        highest, nowhere = highest - nowhere, 0
    in_memory = 0
    if known.alive:  # what it does not call acknowledged or dropped, it still has
        in_memory = max(0, nowhere - max(0, report.acked - taken))
        nowhere -= in_memory
    undecided = nowhere if known.unstored else min(nowhere, doubt)
    unaccounted = nowhere - undecided
    return Account(
        producer=known.producer,
        source=report.source or held.source,
        pid=report.pid,
        alive=known.alive,
        last_seen=known.last_seen,
        published=highest + dropped - numbered + held.conflicts,
        acked=taken + held.conflicts,
        in_memory=in_memory,
        in_spool=known.spooled,
        dropped=dropped,
        refused=max(report.refused, held.refused),
        rejected=held.rejected,
        conflicts=held.conflicts,
        stored=held.stored,
        unstored=known.unstored,
        missing=missing,
        unaccounted=unaccounted,
        overtaken=overtaken,
        skipped=skipped,
        undecided=undecided,
        reason=known.reason_at_end if known.dropped_at_end > held.dropped else held.reason,
    )


def total(accounts: Iterable[Account], source: str = "") -> Account:
    """The sum of accounts in one."""
    sums = Account(source=source, processes=0)
    for a in accounts:
        for name in SUMMED:
            setattr(sums, name, getattr(sums, name) + getattr(a, name))
        sums.alive = sums.alive or a.alive
        sums.last_seen = max(sums.last_seen or 0, a.last_seen or 0) or None
    return sums


def by_source(accounts: Iterable[Account]) -> list[Account]:
    """A total for each source."""
    found: dict[str, list[Account]] = {}
    for a in accounts:
        found.setdefault(a.source, []).append(a)
    return [total(of_source, name) for name, of_source in sorted(found.items())]


def verdict(
    accounts: Sequence[Account], ranges: Sequence[Range], *, contested: int
) -> tuple[int, str]:
    """How many events are lost at least, and in words which ones and by whom. Up to `contested` of
    the unaccounted are among those of the ranges."""
    parts = []
    dropped = sum(a.dropped for a in accounts)
    if dropped:
        whose = [f"{a.dropped} of {_name(a)}" for a in by_source(accounts) if a.dropped]
        parts.append(f"{dropped} dropped before they reached the bus ({_some(whose)})")
    words = {
        "gap": "gone from the journal before they were stored",
        "hole": "missing in the database",
        "differs": "stored as another event than the journal's",
        "journal": "lost by the journal and not stored",
    }
    lost = dropped
    for kind, text in words.items():
        of_kind = [r for r in ranges if r.kind == kind and r.events]
        events = sum(r.events for r in of_kind)
        if events:
            lost += events
            parts.append(f"{events} {text} (seq {_some(map(str, of_kind))})")
    nowhere = sum(a.unaccounted for a in accounts)
    if nowhere:
        whose = [f"{a.unaccounted} of {_name(a)}" for a in by_source(accounts) if a.unaccounted]
        lost += nowhere - contested
        among = f", of which up to {contested} are among those" if contested else ""
        parts.append(f"{nowhere} unaccounted for ({_some(whose)}){among}")
    endless = [str(r.first_seq) for r in ranges if r.last_seq is None]
    if endless:
        parts.append(f"an unknown number from seq {_some(endless)} on, lost with the journal")
    spare = [r for r in ranges if r.kind == LEFT_OUT and str(r.first_seq) not in endless]
    if any(r.events for r in spare):
        parts.append(
            f"perhaps some of seq {_some(str(r) for r in spare if r.events)}, which were left out"
            " when the journal was recovered: most or all of them never were an event's"
        )
    return lost, f"{lost} lost" + (f": {'; '.join(parts)}" if parts else "")


def note(a: Account, moment: Any) -> str:
    """What is not in order with a process, in words; empty if all is. `moment` shows a time."""
    parts = []
    if a.dropped:
        parts.append(f"{a.dropped} dropped" + (f": {a.reason}" if a.reason else ""))
    if a.missing:
        parts.append(f"{a.missing} acknowledged, but not in the database")
    if a.unaccounted and a.alive:
        parts.append(f"{a.unaccounted} neither waiting nor with the bus")
    elif a.unaccounted:
        parts.append(
            f"process {a.pid or '?'} is gone; at {moment(a.last_seen)} it had up to"
            f" {a.unaccounted} events in memory"
        )
    if a.undecided:
        parts.append(f"{a.undecided} not decided before the database has all of the journal")
    if a.in_spool and not a.alive:
        parts.append(f"{a.in_spool} wait in its spool until the bus takes them in")
    return "; ".join(parts)


def _name(a: Account) -> str:
    return a.source or "unknown source"


def _some(items: Iterable[str]) -> str:
    shown = list(items)
    more = len(shown) - MAX_SHOWN_RANGES
    return ", ".join(shown[:MAX_SHOWN_RANGES]) + (f" and {more} more" if more > 0 else "")
