"""Losses that the owner knows of: `bitten audit --accept` notes them; only others are news."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from collector.ledger import LEFT_OUT, Account, Range
from collector.seqs import Seqs, between, merged

FILE = "audit-accepted.json"


class Accepted(msgspec.Struct, kw_only=True, frozen=True):
    """Losses by what they are, so that one that is put right makes no room for another.

    `seqs` are of the journal `journal_id`, `endless` the first seqs of losses whose end nobody
    knows, the rest are counts by process.
    """

    journal_id: str = ""
    seqs: Seqs = []
    endless: list[int] = []
    dropped: dict[str, int] = {}
    unaccounted: dict[str, int] = {}

    @classmethod
    def of(cls, journal_id: str, accounts: Iterable[Account], ranges: Iterable[Range]) -> Accepted:
        """All that is lost."""
        accounts, ranges = list(accounts), list(ranges)
        return cls(
            journal_id=journal_id,
            seqs=_seqs(ranges),
            endless=sorted({r.first_seq for r in ranges if r.last_seq is None}),
            dropped={a.producer: a.dropped for a in accounts if a.dropped},
            unaccounted={a.producer: a.unaccounted for a in accounts if a.unaccounted},
        )

    def still(self, accounts: Sequence[Account], ranges: Sequence[Range]) -> Accepted:
        """Without what is lost no more: should it be lost again, that is news."""
        # What is undecided for a moment is not found.
        found = {a.producer: a.unaccounted + a.undecided for a in accounts}
        dropped = {a.producer: a.dropped for a in accounts}
        endless = {r.first_seq for r in ranges if r.last_seq is None}
        return Accepted(
            journal_id=self.journal_id,
            seqs=[piece for a, b in _seqs(ranges) for piece in between(self.seqs, a, b)],
            endless=[seq for seq in self.endless if seq in endless],
            dropped=_at_most(self.dropped, dropped),
            unaccounted=_at_most(self.unaccounted, found),
        )

    def compare(self, accounts: Iterable[Account], ranges: Iterable[Range]) -> tuple[int, bool]:
        """How many of the events lost are accepted, and whether there is a loss that is not."""
        known, news = 0, False
        for r in ranges:
            if r.last_seq is None:
                news |= r.first_seq not in self.endless
            elif r.events:
                covered = sum(b - a + 1 for a, b in between(self.seqs, r.first_seq, r.last_seq))
                known += min(covered, r.events) if r.kind != LEFT_OUT else 0
                news |= covered <= r.last_seq - r.first_seq
        for account in accounts:
            for lost, accepted in (
                (account.dropped, self.dropped.get(account.producer, 0)),
                (account.unaccounted, self.unaccounted.get(account.producer, 0)),
            ):
                known += min(lost, accepted)
                news |= lost > accepted
        return known, news


def load(home: Path) -> Accepted:
    """Nothing if the file is not there or cannot be read: then every loss counts again."""
    try:
        return msgspec.json.decode((home / FILE).read_bytes(), type=Accepted)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Accepted()


def save(home: Path, accepted: Accepted) -> None:
    """Raises OSError."""
    new = home / f"{FILE}.new"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(accepted))
    new.replace(home / FILE)


def reconcile(
    home: Path,
    journal_id: str,
    accounts: Sequence[Account],
    ranges: Sequence[Range],
    *,
    accept: bool,
) -> Accepted:
    """What of the losses found is accepted; with `accept` all of it. Raises OSError then."""
    before = load(home)
    if accept:
        now = Accepted.of(journal_id, accounts, ranges)
        save(home, now)
        return now
    if before.journal_id != journal_id:  # its seqs are other events
        return Accepted()
    now = before.still(accounts, ranges)
    if now != before:
        with contextlib.suppress(OSError):  # a home that only others may write
            save(home, now)
    return now


def _seqs(ranges: Iterable[Range]) -> Seqs:
    return merged((r.first_seq, r.last_seq or 0) for r in ranges if r.events)


def _at_most(counts: dict[str, int], found: dict[str, int]) -> dict[str, int]:
    kept = {token: min(n, found.get(token, 0)) for token, n in counts.items()}
    return {token: n for token, n in kept.items() if n}
