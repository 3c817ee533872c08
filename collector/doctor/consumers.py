"""The collector and other durable consumers: are they there, and how far behind?"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from collector.consumer import CONSUMER
from collector.doctor.context import Context, row
from collector.doctor.finding import CannotTell, Finding, fault, moment, ok, span, warning
from collector.doctor.processes import lock_owner
from event_bus.health import STALLED_AFTER_S
from event_bus.words import events

BEHIND_S = 60.0
FAR_BEHIND_S = 3_600.0
START_S = 15.0


def collector(context: Context) -> Iterator[Finding]:
    settings = context.settings
    if not settings.journal.exists():
        raise CannotTell("there is nothing to collect yet")
    owner = lock_owner(Path(f"{settings.db}.lock"))
    if owner is None:
        yield fault(
            "the collector is not running",
            why="nobody stores events in the database; they wait in the journal, which grows",
            remedy="start it; with pm2: `pm2 restart data_collector`",
            command=f"{context.bitten} collect",
        )
        return
    if owner.stopped:
        yield fault(
            f"the collector is stopped: {owner}",
            why="a signal or a debugger holds it; events wait in the journal",
            remedy="let it go on",
            command=f"kill -CONT {owner.pid}",
        )
        return
    known = context.bus()["consumers"].get(CONSUMER)
    if known is None and context.now - owner.started_at > START_S:
        yield fault(
            f"the collector, {owner}, has never asked this bus for events",
            why="it asks at another address, or cannot begin; its log says which",
            remedy="start it with the settings of this home",
            command=f"kill {owner.pid}; {context.bitten} collect",
        )
    else:
        yield ok(f"the collector runs: {owner}")


@dataclass(frozen=True, kw_only=True)
class Lag:
    """How far a durable consumer is behind: in events, and by when the next one was received."""

    consumer: str
    events: int
    behind_s: float
    last_seen: float
    silent_s: float


def lag(context: Context) -> Iterator[Finding]:
    consumers = context.bus()["consumers"]
    if not consumers:
        raise CannotTell("no durable consumer has ever asked")
    with context.reading(context.settings.journal) as db:
        for name, consumer in consumers.items():
            received = row(
                db,
                "SELECT received_at FROM batch WHERE first_seq <= ?"
                " ORDER BY first_seq DESC LIMIT 1",
                consumer["next_seq"],
            )
            behind = Lag(
                consumer=name,
                events=consumer["lag"],
                behind_s=context.now - received[0] if received else 0.0,
                last_seen=consumer["last_seen"],
                silent_s=context.now - consumer["last_seen"],
            )
            yield judge_lag(behind, context)


def judge_lag(lag: Lag, context: Context) -> Finding:
    name = lag.consumer
    if not lag.events or (lag.silent_s < STALLED_AFTER_S and lag.behind_s < BEHIND_S):
        return ok(f"consumer {name} is up to date")
    far = f"consumer {name} is {events(lag.events)} behind, {span(lag.behind_s)}"
    if lag.silent_s < STALLED_AFTER_S:
        return (fault if lag.behind_s > FAR_BEHIND_S else warning)(
            far,
            why="it asks, but stores more slowly than events come, or has begun only now",
            remedy="look again in a minute: if it grows, see what the process waits for",
            command=f"{context.bitten} status",
        )
    if name == CONSUMER:
        return fault(
            f"{far}, and has not asked since {moment(lag.last_seen)}",
            why="the journal is kept for it, and grows",
            remedy="start the collector; with pm2: `pm2 restart data_collector`",
            command=f"{context.bitten} collect",
        )
    return warning(
        f"{far}, and has not asked since {moment(lag.last_seen)}",
        why="the journal is kept for it, and grows",
        remedy="start that consumer, or let go of it if it will not come back",
        command=f"{context.bitten} forget {shlex.quote(name)}",
    )
