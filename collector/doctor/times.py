"""Clock steps, and timestamps of events that cannot be right."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator

from collector.doctor.context import Context, row, rows
from collector.doctor.finding import Finding, fault, moment, ok, span, warning
from collector.doctor.history import DAY_S, History
from event_bus.words import events

AHEAD_S = 5.0
STEP_S = 2.0
RECENT_BATCHES = 5_000
RECENT_EVENTS = 10_000
SKEW_S = 60.0
MILLISECONDS_FROM = 1e11
"""In seconds that is the year 5138; in milliseconds, 1973."""

FIRST_S = 946_684_800.0
"""The year 2000: nothing that trades today happened before."""


def steps(context: Context) -> Iterator[Finding]:
    """Has the clock of this machine gone back?"""
    with context.reading(context.settings.db) as db:
        history = History(db)
        last_at = history.received_at(history.last_seq)
        back = row(
            db,
            "SELECT received_at, before - received_at FROM (SELECT received_at, lag(received_at)"
            " OVER (ORDER BY first_seq) AS before FROM (SELECT first_seq, received_at FROM _batch"
            " ORDER BY first_seq DESC LIMIT ?)) WHERE received_at < before - ?"
            " ORDER BY before - received_at DESC LIMIT 1",
            RECENT_BATCHES,
            STEP_S,
        )
    yield judge_steps(last_at, context.now, back)


def judge_steps(last_at: float, now: float, back: tuple[float, float] | None) -> Finding:
    """`back` is when the clock stepped back, as it said afterwards, and by how many seconds."""
    if last_at > now + AHEAD_S:
        return fault(
            f"the clock went back: the last event was received {span(last_at - now)} from now",
            why=f"it was {moment(last_at)} then and is {moment(now)} now; queries by received_at"
            " go wrong until it is past that",
            remedy="set the clock right and keep it so",
            command="timedatectl set-ntp true; timedatectl",
        )
    if back is not None:
        return warning(
            f"the clock went back by {span(back[1])}, to {moment(back[0])}",
            why="received_at of neighbouring events shows it; their order by seq is right",
            remedy="let a time service slew the clock; order by seq where it matters",
            command="timedatectl set-ntp true; timedatectl",
        )
    return ok("the clock has not gone back lately")


def timestamps(context: Context) -> Iterator[Finding]:
    """Events of the last day, by source: milliseconds, the future, the distant past."""
    with context.reading(context.settings.db) as db:
        history = History(db)
        since = history.seq_at(context.now - DAY_S)
        latest = max(since, history.last_seq - RECENT_EVENTS)
        columns = "SELECT source, seq, timestamp FROM _event"
        found: dict[int | None, dict[int, float]] = {}
        for sql, values in (
            (f"{columns} WHERE seq >= ?", (latest,)),
            # What is rare among the latest, by the index: its two ends, and not too much of them.
            (
                f"SELECT * FROM ({columns} WHERE timestamp > ? ORDER BY timestamp DESC LIMIT ?)"
                " WHERE seq >= ?",
                (context.now + SKEW_S, RECENT_EVENTS, since),
            ),
            (
                f"SELECT * FROM ({columns} WHERE timestamp < ? ORDER BY timestamp LIMIT ?)"
                " WHERE seq >= ?",
                (FIRST_S, RECENT_EVENTS, since),
            ),
        ):
            for source, seq, timestamp in rows(db, sql, *values):
                found.setdefault(source, {})[seq] = timestamp
        stamps = [
            (history.name(source), {s: (t, history.received_at(s)) for s, t in by_seq.items()})
            for source, by_seq in found.items()
        ]
    wrong = [
        finding
        for source, times in stamps
        for finding in judge_source(source, list(times.values()), context.bitten)
    ]
    yield from wrong or [ok("the timestamps of the last day's events can be right")]


def judge_source(
    source: str, times: list[tuple[float, float]], bitten: str = "bitten"
) -> Iterator[Finding]:
    """`times` are (timestamp, when received) of events of one source."""
    named = "" if source == "no source" else f" --source {shlex.quote(source)}"
    show = f"{bitten} query --limit 5{named}"
    thousandfold = [t for t, _ in times if abs(t) >= MILLISECONDS_FROM]
    if thousandfold:
        yield fault(
            f"{source} sends timestamps in milliseconds: {events(len(thousandfold))} of late",
            why=f"{thousandfold[-1]:.0f} seconds are far in the future; queries by time miss them",
            remedy="divide by 1000 where it calls the bridge, or leave the timestamp out",
            command=show,
        )
    early = [t for t, _ in times if t < FIRST_S]
    if early:
        yield warning(
            f"{source} sends timestamps before the year 2000: {events(len(early))} of late",
            why=f"such as {early[-1]:g}; often a clock that is not set, or a 0 for unknown",
            remedy="leave the timestamp out where it calls the bridge, or set that clock",
            command=show,
        )
    usual = [(t, at) for t, at in times if FIRST_S <= t < MILLISECONDS_FROM]
    ahead = [t - at for t, at in usual if t - at > SKEW_S]
    if ahead:
        yield warning(
            f"{source} sends timestamps {span(statistics.median(ahead))} in the future:"
            f" {len(ahead)} of {len(usual)} events looked at",
            why="they say that they happened after they were received; its clock is ahead, or it"
            " sends local time as if it were UTC",
            remedy="set that machine's clock, or use time.time() where it calls the bridge",
            command=show,
        )
