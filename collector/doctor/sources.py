"""Sources that published regularly and have fallen silent."""

from __future__ import annotations

import itertools
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import apsw

from collector.doctor.context import Context, row, rows
from collector.doctor.finding import CannotTell, Finding, moment, ok, span, warning
from collector.doctor.history import DAY_S, History
from event_bus.housekeeping import HEALTH_S
from event_bus.intake import SOURCE

MAX_SOURCES = 200
MIN_SILENCE_S = 300.0
MIN_EVENTS = 20
RECENT_EVENTS = 200
SLOT_S = 300.0
GAPS = 10
"""A silence is one if it is this many times the usual gap between two events…"""

QUIETS = 2
"""… and this many times the longest pause of the source's last day."""

WEEK_S = 7 * DAY_S
AROUND_S = 1_800.0

# SQLite would read the whole index for a DISTINCT; this jumps from one source to the next.
_SOURCES = (
    "WITH RECURSIVE known(id) AS (SELECT min(source) FROM _event UNION ALL"
    " SELECT (SELECT min(source) FROM _event WHERE source > id) FROM known WHERE id IS NOT NULL)"
    " SELECT id FROM known WHERE id IS NOT NULL LIMIT ?"
)


@dataclass(frozen=True, kw_only=True)
class Habit:
    """When a source was heard: `recent` the moments of its last events, oldest first; `active`
    the beginnings of the five-minute slots of the day before the last one in which it was.
    `silent_s` is how long the bus has been up since; `was_quiet_last_week` if nothing came from
    the source at this hour then, either."""

    source: str
    recent: Sequence[float]
    active: Sequence[float]
    silent_s: float
    was_quiet_last_week: bool


def silent(context: Context) -> Iterator[Finding]:
    with context.reading(context.settings.db) as db:
        history = History(db)
        bus = row(db, "SELECT id FROM _name WHERE name = ?", SOURCE)
        if bus is None:
            raise CannotTell("the bus has not reported its health yet")
        found = [
            finding
            for (source,) in rows(db, _SOURCES, MAX_SOURCES)
            if source != bus[0] and (habit := _habit(history, source, bus[0]))
            for finding in judge_habit(habit, context.bitten)
        ]
    yield from found or [ok("no source has fallen silent")]


def _habit(history: History, source: int, bus: int) -> Habit | None:
    """None for a source that is not silent, was never regular, or is gone for a week."""
    db = history.db
    now = history.received_at(history.last_seq)
    seqs = [
        seq
        for (seq,) in rows(
            db,
            "SELECT seq FROM _event WHERE source = ? ORDER BY seq DESC LIMIT ?",
            source,
            RECENT_EVENTS,
        )
    ]
    moments = [history.received_at(seq) for seq in reversed(seqs)]
    last_at = moments[-1]
    recent = [at for at in moments if at > last_at - DAY_S]
    if len(recent) < MIN_EVENTS or not MIN_SILENCE_S < now - last_at < WEEK_S:
        return None
    # The bus's own events, one each half minute, are the clock: while it is away all are silent.
    reports = row(db, "SELECT count(*) FROM _event WHERE source = ? AND seq > ?", bus, seqs[0])[0]
    slots = [last_at - DAY_S + i * SLOT_S for i in range(int(DAY_S / SLOT_S) + 1)]
    edges = [history.seq_at(at) for at in slots]
    active = [
        at
        for at, (low, high) in zip(slots, itertools.pairwise(edges), strict=False)
        if _heard(db, source, low, high)
    ]
    quiet = False
    if history.first_at < now - WEEK_S - AROUND_S:
        low, high = (history.seq_at(now - WEEK_S + d) for d in (-AROUND_S, AROUND_S))
        quiet = not _heard(db, source, low, high)
    return Habit(
        source=history.name(source),
        recent=recent,
        active=active,
        silent_s=reports * HEALTH_S,
        was_quiet_last_week=quiet,
    )


def _heard(db: apsw.Connection, source: int, low: int, high: int) -> bool:
    sql = "SELECT 1 FROM _event WHERE source = ? AND seq >= ? AND seq < ? LIMIT 1"
    return row(db, sql, source, low, high) is not None


def judge_habit(habit: Habit, bitten: str) -> Iterator[Finding]:
    if habit.was_quiet_last_week:
        return
    silent_s = habit.silent_s
    usual_s = statistics.median(_gaps(habit.recent))
    longest_s = max([*_gaps(habit.recent), *_gaps(habit.active)])
    if silent_s > max(MIN_SILENCE_S, GAPS * usual_s, QUIETS * longest_s):
        yield warning(
            f"{habit.source} has been silent for {span(silent_s)}",
            why=f"its events came every {span(usual_s)}, its longest pause of that day was"
            f" {span(longest_s)}; the last one came at {moment(habit.recent[-1])}",
            remedy="see whether its process runs, and what its log says of the bus",
            command=f"{bitten} query --limit 3 --source {shlex.quote(habit.source)}",
        )


def _gaps(moments: Sequence[float]) -> list[float]:
    return [max(0.0, b - a) for a, b in itertools.pairwise(moments)] or [0.0]
