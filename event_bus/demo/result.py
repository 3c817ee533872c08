"""What the demo did, counted anew from the database, and whether it is all there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from event_bus.demo import queries
from event_bus.demo.queries import Answer, Query


@dataclass(frozen=True, kw_only=True)
class Result:
    """`published` and `stored` count the publishers' events by type, as `reports` and the database
    say; `sources` names the publisher of each type, `other` counts by (type, source) what else is
    stored. `audit` is the answer of `bitten audit --json`. `first` and `last` are the candles' own
    times, Unix seconds; `seconds` is from the publishers' start until all was stored."""

    candles: int
    first: float
    last: float
    seconds: float
    published: dict[str, int]
    stored: dict[str, int]
    sources: dict[str, str]
    other: dict[tuple[str, str], int]
    reports: list[dict[str, Any]]
    audit: dict[str, Any]
    answers: list[tuple[Query, Answer]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Events in the database."""
        return sum(self.stored.values()) + sum(self.other.values())

    @property
    def complete(self) -> bool:
        """Every event taken by a bridge is stored, under its type, and the audit agrees."""
        taken = all(not (r["waiting"] or r["dropped"] or r["refused"]) for r in self.reports)
        return (
            taken
            and self.published == self.stored
            and self.audit["published"] == self.audit["stored"] == self.total
            and self.audit["lost"] == 0
        )


def gather(
    db: Path,
    plan: Mapping[str, Any],
    reports: Sequence[dict[str, Any]],
    audit: dict[str, Any],
    seconds: float,
) -> Result:
    """The result, given a publisher's plan, all publishers' reports and the audit.

    Events later than the audit (the bus reports its health) are not counted.
    """
    published: Counter[str] = Counter()
    sources: dict[str, str] = {}
    for report in reports:
        published.update(report["published"])
        sources.update(dict.fromkeys(report["published"], report["source"]))
    counted = queries.run(
        db,
        "SELECT event_type, source, count(*) FROM events"
        f" WHERE seq <= {audit['published']} GROUP BY 1, 2 ORDER BY 3 DESC",
    )
    stored: dict[str, int] = {}
    other: dict[tuple[str, str], int] = {}
    for event_type, source, count in counted.rows:
        if sources.get(event_type) == source:
            stored[event_type] = count
        else:
            other[event_type, source] = count
    asked = [queries.PATTERN_PROFIT, queries.DAILY_RANGE, queries.trade_story(db)]
    return Result(
        candles=plan["candles"],
        first=plan["first"],
        last=plan["last"],
        seconds=seconds,
        published=dict(published),
        stored=stored,
        sources=sources,
        other=other,
        reports=list(reports),
        audit=audit,
        answers=[(q, queries.run(db, q.sql)) for q in asked if q],
    )
