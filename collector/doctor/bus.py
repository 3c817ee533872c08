"""The bus: does it answer, is it this home's, who has its ports, and what does it say itself?"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import zmq
from zmq.utils.monitor import recv_monitor_message

from collector.consumer import CONSUMER
from collector.doctor import files, missing
from collector.doctor.context import Context, quoted, row
from collector.doctor.finding import CannotTell, Finding, fault, moment, ok, span, warning
from collector.doctor.missing import JOURNAL, Remains
from collector.doctor.processes import Process, listeners, lock_owner
from collector.doctor.security import let, own_rights
from collector.keeper import NOTHING_LOST
from event_bus import keys, ports
from event_bus.allow_list import FILE
from event_bus.errors import (
    BittenError,
    JournalDamaged,
    JournalError,
    KeysError,
    SettingsError,
    StartError,
)
from event_bus.journal_file import check_rights, check_version
from event_bus.settings import Settings
from event_bus.version import __version__

PUT_RIGHT = {"journal_put_back"}
"""Codes of what is over and has cost no event; so is a problem of the collector that says so."""

TOLD_ELSEWHERE = {"consumer_stalled", "journal_held", "schema_problem"}
"""Codes of what the checks `lag` and `schemas` see for themselves."""


Reach = Literal["nobody", "connected", "handshake"]
"""How far a connection gets: to nobody, to somebody who listens, to a bus that lets us in."""

REACH_S = 0.5

COMMANDS = {
    "storage_full": "df -h {home}",
    "journal_damaged": "{bitten} audit",
    "journal_recovered": "{bitten} audit; dmesg | tail -50",
    "consumer_problem": "{bitten} audit; df -h {db}; pm2 logs data_collector --lines 50 --nostream",
    "clock_back": "timedatectl",
    "keys_problem": "{bitten} keys list",
}
"""What does or shows more about the remedy of a problem, by its code."""


@dataclass(frozen=True, kw_only=True)
class Absence:
    """What is known of a bus that does not answer: who holds the home's lock, who the port, and
    what `remains` in a home without a journal."""

    home: Path
    remains: Remains | None
    is_client: bool
    url: str
    key_problem: str
    refusal: BittenError | None
    lacks_wal: bool
    reach: Reach
    owner: Process | None
    listener: Process | None
    bitten: str


def answers(context: Context) -> Iterator[Finding]:
    settings, status = context.settings, context.status
    if context.refused:
        yield _untold(context)
        return
    if status is None:
        yield judge_absence(
            Absence(
                home=settings.home,
                remains=None if settings.journal.exists() else missing.look(context),
                is_client=context.is_client,
                url=settings.ingress_url,
                key_problem=context.key_problem,
                lacks_wal=files.lacks_wal(context),
                refusal=None if context.is_client else refusal(context),
                reach=reach(settings),
                owner=lock_owner(settings.home / "bus.lock"),
                listener=listeners([settings.ingress_url]).get(settings.ingress_url),
                bitten=context.bitten,
            )
        )
        return
    home = Path(status["home"])
    if not context.is_own_bus and not context.is_client:
        yield fault(
            f"the bus at {settings.ingress_url} is another home's",
            why=f"it keeps its files in {home}; this is about {settings.home}",
            remedy="use that home, or ports of this home's own bus",
            command=f"bitten --home {quoted(home)} status",
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


def _untold(context: Context) -> Finding:
    """Of a bus that answers, and does not let this home's key ask how it is."""
    rights = own_rights(context)
    if rights is None:  # it may be meant so, for a second machine
        return ok(f"the bus answers; {context.refused}")
    return fault(
        f"this home's key, {rights.name}, may not ask the bus how it is: {context.refused}",
        why="the collector, durable consumers and `bitten status` need that; much of what is wrong"
        " cannot be seen without",
        remedy="let it read all, or make a home and a key of its own for what may not",
        command=let(context, replace(rights, subscribe=("*",))),
    )


def refusal(context: Context) -> BittenError | None:
    """What a start would end with, by the bus's own checks."""
    settings = context.settings
    if settings.home.exists() and settings.home.stat().st_uid != os.geteuid():
        return None  # what its owner may do is not to be seen from here
    try:
        if settings.home.exists():
            settings.check_home()
        ports.allow_list(settings)
        check_rights(settings.journal)
        with contextlib.suppress(CannotTell), context.reading(settings.journal) as db:
            if row(db, "SELECT count(*) FROM sqlite_master")[0]:
                check_version(db, settings.journal)
    except JournalDamaged:  # the start makes a new one of it
        return None
    except BittenError as e:
        return e
    return None


def reach(settings: Settings) -> Reach:
    """How far a new connection with this home's key gets. Raises nothing."""
    found: Reach = "nobody"
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        try:
            keys.use_client_key(socket, settings.keys, settings.ingress_url)
            events = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            monitor = socket.get_monitor_socket(events)
            socket.connect(settings.ingress_url)
        except (KeysError, zmq.ZMQError):
            return found
        end = time.monotonic() + REACH_S
        while found != "handshake" and monitor.poll(max(0, int((end - time.monotonic()) * 1000))):
            event = recv_monitor_message(monitor)["event"]
            found = "connected" if event == zmq.EVENT_CONNECTED else "handshake"
        socket.disable_monitor()
        monitor.close(linger=0)
    return found


def judge_absence(facts: Absence) -> Finding:
    away = "events wait with their processes, then on disk, as far as their bounds allow"
    if facts.owner is not None and facts.owner.stopped:
        return fault(
            f"the bus is stopped: {facts.owner}",
            why=f"a signal or a debugger holds it; {away}",
            remedy="let it go on",
            command=f"kill -CONT {facts.owner.pid}",
        )
    keys_command = f"ls -l {quoted(facts.home / 'keys')}; {facts.bitten} keys list"
    if facts.refusal is not None and facts.owner is None:
        error = facts.refusal
        command = keys_command
        if isinstance(error, SettingsError):
            command = f"ls -ld {quoted(facts.home)}"
        elif isinstance(error, JournalError):
            command = f"ls -l {quoted(facts.home / JOURNAL)}*"
        elif isinstance(error, StartError) or not (facts.home / "keys" / FILE).exists():
            command = f"{facts.bitten} keys new"
        remedy = error.hint or "see its log"
        if isinstance(error, StartError) and facts.key_problem:
            remedy += "; if the bus is on another machine, put client.key_secret and bus.key here"
        return fault(
            f"the bus cannot start: {error.args[0]}",
            why=f"`bitten up` and `bitten bus` end with that; {away}",
            remedy=remedy,
            command=command,
        )
    if facts.key_problem:
        return fault(
            f"the bus cannot be asked: {facts.key_problem}",
            why=f"no process of this home can talk to it; {away}",
            remedy="put the right file there; `bitten keys --help` says which belong there",
            command=keys_command,
        )
    if facts.reach == "connected" and (facts.owner is not None or facts.is_client):
        return fault(
            f"the bus at {facts.url} does not let this home's key in",
            why="it has other keys than those here, does not allow this one, or was started"
            f" before `bitten keys new`; it may also hang; {away}",
            remedy="compare the keys of both; if they are newer than the bus, restart the bus"
            " (`pm2 restart event_bus`)",
            command=keys_command,
        )
    if facts.is_client:
        host, _, port = facts.url.removeprefix("tcp://").rpartition(":")
        hangs = facts.reach == "handshake"
        return fault(
            f"the bus of another machine, at {facts.url}, does not answer",
            why=("it hangs" if hangs else "nobody listens there, or a firewall is between")
            + f"; {away}",
            remedy="see on that machine what `bitten doctor` says",
            command=f"nc -vz {shlex.quote(host)} {port}",
        )
    if facts.owner is not None and facts.reach == "handshake":
        return fault(
            f"the bus, {facts.owner}, does not answer at {facts.url}",
            why=f"it hangs: it takes connections and answers nothing; {away}",
            remedy="end it, so that pm2 or `bitten up` restarts it; its own watchdog does so too",
            command=f"kill {facts.owner.pid}",
        )
    if facts.owner is not None:
        return fault(
            f"the bus, {facts.owner}, does not answer at {facts.url}",
            why=f"it is just starting, or listens at another address; {away}",
            remedy="see where it listens, and give it or these settings the other's address",
            command=f"ss -ltnp | grep pid={facts.owner.pid},",
        )
    if facts.listener is not None:
        return fault(
            f"the bus cannot start: its port is taken by {facts.listener}",
            why=f"it listens at {facts.url} and is no event bus of this home",
            remedy="stop it, or give the bus another port with BITTEN_INGRESS_URL",
            command=f"ss -ltnp | grep ':{facts.url.rpartition(':')[2]} '",
        )
    if facts.remains is not None:
        return missing.judge(facts.remains)
    if facts.lacks_wal:
        return fault(
            "the bus is not running, and its journal lacks its -wal",
            why=f"a start finds that what was committed last is gone; {away}",
            remedy="see the check `journal` first; then start bus and collector",
            command=f"ls -l {quoted(facts.home / JOURNAL)}*",
        )
    return fault(
        "the bus is not running",
        why=f"nobody listens at {facts.url} and nobody holds {facts.home / 'bus.lock'}; {away}",
        remedy="start bus and collector; with pm2: `pm2 start pm2_config.json`",
        command=f"{facts.bitten} up",
    )


def events_port(context: Context) -> Iterator[Finding]:
    """The events port: that of ingress is judged with the answer."""
    settings, status = context.settings, context.status
    if status is not None:
        if context.is_client:  # the bus may name the address as its own machine sees it
            yield ok(f"events are published at {settings.events_url}")
        else:
            yield from judge_addresses(status, settings.events_url)
        return
    if context.is_client:
        raise CannotTell("this home's bus is on another machine")
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
        put_right = problem["code"] in PUT_RIGHT or (
            problem["message"].startswith(f"consumer {CONSUMER}: ")
            and NOTHING_LOST in problem["message"]
        )
        yield (warning if put_right else fault)(
            f"the bus says {problem['code']}: {problem['message']}",
            why=f"since {moment(problem['since'])}",
            remedy=problem["remedy"],
            command=COMMANDS.get(problem["code"], "{bitten} audit").format(
                bitten=context.bitten,
                home=quoted(context.settings.home),
                db=quoted(context.settings.db.parent),
            ),
        )
    if not found:
        yield ok("the bus reports nothing else")
