"""The bus: does it answer, is it this home's, who has its ports, and what does it say itself?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from collector.doctor.context import Context, quoted
from collector.doctor.finding import Finding, fault, moment, ok, span, warning
from collector.doctor.processes import Process, listeners, lock_owner
from event_bus.version import __version__

TOLD_ELSEWHERE = {"consumer_stalled", "journal_held", "schema_problem"}
"""Codes of what the checks `lag` and `schemas` see for themselves."""


@dataclass(frozen=True, kw_only=True)
class Absence:
    """What is known of a bus that does not answer: who holds the home's lock, who the port."""

    home: Path
    is_begun: bool
    url: str
    owner: Process | None
    listener: Process | None
    bitten: str


def answers(context: Context) -> Iterator[Finding]:
    settings, status = context.settings, context.status
    if status is None:
        yield judge_absence(
            Absence(
                home=settings.home,
                is_begun=settings.journal.exists(),
                url=settings.ingress_url,
                owner=lock_owner(settings.home / "bus.lock"),
                listener=listeners([settings.ingress_url]).get(settings.ingress_url),
                bitten=context.bitten,
            )
        )
        return
    home = Path(status["home"])
    if home.resolve() != settings.home.resolve():
        yield fault(
            f"the bus at {settings.ingress_url} is another home's",
            why=f"it keeps its files in {home}; this is about {settings.home}",
            remedy="use that home, or ports of this home's own bus",
            command=f"export BITTEN_HOME={quoted(home)}",
        )
    elif status["version"] != __version__:
        yield warning(
            f"the bus runs version {status['version']}, installed is {__version__}",
            why=f"process {status['pid']} was started before the upgrade",
            remedy="start it again",
            command="pm2 restart event_bus data_collector",
        )
    else:
        yield ok(
            f"the bus answers: process {status['pid']}, up {span(status['uptime_s'])},"
            f" last seq {status['last_seq']}"
        )


def judge_absence(facts: Absence) -> Finding:
    away = "events wait with their processes, then on disk, as far as their bounds allow"
    if facts.owner is not None and facts.owner.stopped:
        return fault(
            f"the bus is stopped: {facts.owner}",
            why=f"a signal or a debugger holds it; {away}",
            remedy="let it go on",
            command=f"kill -CONT {facts.owner.pid}",
        )
    if facts.owner is not None:
        return fault(
            f"the bus, {facts.owner}, does not answer at {facts.url}",
            why=f"it hangs, is just starting, or listens at another address; {away}",
            remedy="see where it listens; if here, end it, so that pm2 or `bitten up` restarts it",
            command=f"ss -ltnp | grep pid={facts.owner.pid}; kill {facts.owner.pid}",
        )
    if facts.listener is not None:
        return fault(
            f"the bus cannot start: its port is taken by {facts.listener}",
            why=f"it listens at {facts.url} and is no event bus of this home",
            remedy="stop it, or give the bus another port with BITTEN_INGRESS_URL",
            command=f"ss -ltnp | grep ':{facts.url.rpartition(':')[2]} '",
        )
    if not facts.is_begun:
        return fault(
            f"there is nothing in {facts.home} yet",
            why="no bus was ever started with this home",
            remedy="start bus and collector; with pm2: `pm2 start pm2_config.json`",
            command=f"{facts.bitten} up",
        )
    return fault(
        "the bus is not running",
        why=f"nobody listens at {facts.url} and nobody holds {facts.home / 'bus.lock'}; {away}",
        remedy="start bus and collector; with pm2: `pm2 start pm2_config.json`",
        command=f"{facts.bitten} up",
    )


def ports(context: Context) -> Iterator[Finding]:
    """The events port: that of ingress is judged with the answer."""
    settings, status = context.settings, context.status
    if status is not None:
        yield from judge_addresses(status, settings.events_url)
        return
    taken = listeners([settings.events_url]).get(settings.events_url)
    if taken is None:
        yield ok(f"{settings.events_url} is free")
    elif taken != lock_owner(settings.home / "bus.lock"):
        yield fault(
            f"the bus cannot start: its events port is taken by {taken}",
            why=f"it listens at {settings.events_url}",
            remedy="stop it, or give the bus another port with BITTEN_EVENTS_URL",
            command=f"ss -ltnp | grep ':{settings.events_url.rpartition(':')[2]} '",
        )


def judge_addresses(status: Mapping[str, str], events_url: str) -> Iterator[Finding]:
    if status["events_url"] == events_url:
        yield ok(f"events are published at {events_url}")
        return
    yield warning(
        f"events are published at {status['events_url']}, not at {events_url}",
        why="subscribers with these settings hear nothing",
        remedy="give them the bus's address, or start the bus with theirs",
        command=f"export BITTEN_EVENTS_URL={status['events_url']}",
    )


def problems(context: Context) -> Iterator[Finding]:
    """What the bus itself says is wrong."""
    found = [p for p in context.bus()["problems"] if p["code"] not in TOLD_ELSEWHERE]
    for problem in found:
        yield fault(
            f"the bus says {problem['code']}: {problem['message']}",
            why=f"since {moment(problem['since'])}",
            remedy=problem["remedy"],
            command=f"{context.bitten} status",
        )
    if not found:
        yield ok("the bus reports nothing else")
