"""Event types: never seen, refused, lost, and schema files that cannot be used."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from collector.doctor.context import Context, quoted, rows
from collector.doctor.finding import CannotTell, Finding, fault, ok, size, span, warning
from collector.doctor.history import DAY_S, History
from event_bus.event_schema import OWN_TYPES, Registry
from event_bus.last_loss import REASON, notes

NEW_S = DAY_S
"""A schema file younger than this may wait for its first event."""

BOUNDS = ("spool full", "memory full")
"""Reasons of a loss that more room for events takes away."""

MAX_REFUSALS = 10_000


def never_seen(context: Context) -> Iterator[Finding]:
    with context.reading(context.settings.db) as db:
        History(db)
        seen = {n for (n,) in rows(db, "SELECT name FROM _count JOIN _name ON id = type")}
    own = context.settings.schemas
    built_in = []
    for event_type in Registry(own):
        if event_type.name in seen or event_type.storage.live_only:
            continue
        if event_type.path.parent != own:
            built_in.append(event_type.name)
            continue
        age_s = context.now - event_type.path.stat().st_mtime
        if age_s > NEW_S:
            yield warning(
                f"no event of your type {event_type.name} was ever stored",
                why=f"its schema is there for {span(age_s)}; the call that emits it may be missing,"
                " or its events are refused",
                remedy="emit one by hand and see what happens, or remove the schema",
                command=f"{context.bitten} schemas show {event_type.name};"
                f" {context.bitten} query --type event_rejected --limit 3",
            )
    unused = sorted(set(built_in) - set(OWN_TYPES))  # those tell of faults
    yield ok(f"built-in types never seen: {', '.join(unused) or 'none'}")


def schema_files(context: Context) -> Iterator[Finding]:
    """Own schema files that are left out."""
    registry = Registry(context.settings.schemas)
    registry.verify()
    for problem in registry.problems:
        yield fault(
            f"an event type is left out: {problem.args[0]}",
            why="its events are refused: the bus does not know the type",
            remedy=problem.hint or "mend the file; the bus takes it in when it starts again",
            command=f"{context.bitten} schemas check",
        )
    if not registry.problems:
        yield ok(f"{len(registry.types)} event types are usable")


def refused(context: Context) -> Iterator[Finding]:
    """What was refused in the last day, and most often why."""
    with context.reading(context.settings.db) as db:
        history = History(db)
        found = rows(
            db,
            "SELECT event_type, source, count(*), rule, reason FROM (SELECT * FROM rejected_events"
            " WHERE seq >= ? ORDER BY seq DESC LIMIT ?) GROUP BY event_type, source, rule"
            " ORDER BY count(*) DESC",
            history.seq_at(context.now - DAY_S),
            MAX_REFUSALS,
        )
    kinds: dict[tuple[str, str], list[tuple[int, str, bool]]] = {}
    for event_type, source, count, rule, reason in found:
        key = (event_type or "events of an unreadable type", source or "an unnamed source")
        kinds.setdefault(key, []).append((count, reason, rule == "rights"))
    show = f"sqlite3 -readonly {quoted(context.settings.db)} " + shlex.quote(
        "SELECT reason, raw FROM rejected_events ORDER BY seq DESC LIMIT 5"
    )
    for (event_type, source), reasons in kinds.items():
        _, reason, lacks_right = max(reasons)
        yield warning(
            f"{sum(n for n, *_ in reasons)} {event_type} of {source} were refused in the last day",
            why=f"most often: {reason}",
            remedy="give that key the right (`bitten keys allow NAME --publish …`, with all that it"
            " is to have), or mend the call; what was sent is kept in rejected_events"
            if lacks_right
            else "mend the call; what was sent is kept in rejected_events",
            command=f"{context.bitten} keys list" if lacks_right else show,
        )
    if not kinds:
        yield ok("nothing was refused in the last day")


def dropped(context: Context) -> Iterator[Finding]:
    """Losses that bridges announced in the last day, or that the bus has not heard of yet."""
    found = [(note.source, note.dropped, REASON) for note in notes(context.settings.spool)]
    try:
        with context.reading(context.settings.db) as db:
            history = History(db)
            found += rows(
                db,
                "SELECT source, sum(dropped), reason FROM bridge_loss WHERE seq >= ?"
                " GROUP BY source, reason ORDER BY seq",
                history.seq_at(context.now - DAY_S),
            )
    except CannotTell:
        if not found:
            raise
    for source, events, reason in found:
        allow = f" (BITTEN_SPOOL_MAX_BYTES, now {size(context.settings.spool_max_bytes)})"
        yield fault(
            f"{source or 'an unnamed source'} dropped {events} events in the last day",
            why=f"{reason}; they are gone",
            remedy="keep the bus up, and "
            + (f"allow more on disk{allow}" if reason in BOUNDS else "space on the home's disk"),
            command=f"{context.bitten} audit"
            + ("" if reason in BOUNDS else f"; df -h {quoted(context.settings.home)}"),
        )
    if not found:
        yield ok("no bridge has dropped events in the last day")
