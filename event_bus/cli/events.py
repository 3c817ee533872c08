"""`bitten emit`, `tail` and `status`: what a user does with the bus by hand."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from event_bus.bridge import Bridge
from event_bus.cli.output import When, clock, print_json, printable
from event_bus.errors import BusUnavailable, RejectedEvent, StartError
from event_bus.event_schema import EventType
from event_bus.keys import is_loopback
from event_bus.protocol import Client
from event_bus.settings import Settings
from event_bus.subscriber import Event, Subscriber
from event_bus.words import events

FLUSH_S = 5.0
MAX_WAITING = 20_000
"""Events read from standard input ahead of the bus."""

MAX_SHOWN = 72
"""Characters of one value in a line of `tail`; --json shows all."""


@click.command()
@click.argument("event_type", metavar="TYPE")
@click.argument("data", nargs=-1)
@click.option("--user-id", help="The user concerned.")
@click.option("--correlation-id", help="What this event belongs to.")
@click.option("--causation-id", help="Id of the event that led to this one.")
@click.option("--source", help="Who says so.  [default: bitten]")
@click.option("--timestamp", type=float, help="When it happened, Unix seconds.  [default: now]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def emit(
    settings: Settings,
    /,
    event_type: str,
    data: tuple[str, ...],
    as_json: bool,
    **fields: Any,
) -> None:
    """Publish an event, or many from standard input, one JSON object a line.

    \b
    bitten emit user_action action=login user_id=7
    bitten emit market_data '{"symbol": "EURUSD", "bid": 1.0845, "ask": 1.0847}'
    bitten emit market_data < ticks.ndjson

    Exit code 0: all accepted. 1: some refused; rejected_events has them. 3: the bus is away; the
    events wait in $BITTEN_HOME/spool and are delivered when it starts.

    What other processes left in the spool when they ended is delivered too.
    """
    bridge = _Emitter(settings)
    ids = []
    for line, document in _documents(bridge, event_type, data):
        before = len(bridge.refusals)
        if isinstance(document, RejectedEvent):
            bridge.refuse(document, event_type, document.value, {})
        else:
            ids.append(bridge.emit(event_type, document, **fields))
        for refusal in bridge.refusals[before:]:
            refusal["line"] = line
            if not as_json:
                where = f"line {line}: " if line else ""
                click.echo(f"bitten: {where}{printable(refusal['reason'])}", err=True)
        if bridge.stats()["waiting"] > MAX_WAITING:
            bridge.flush(FLUSH_S)
    delivered = bridge.flush(FLUSH_S)
    connected = bridge.connected
    if delivered and not bridge.no_orphans.wait(FLUSH_S):
        click.echo(f"bitten: what other processes left in {settings.spool} still waits", err=True)
    bridge.close()
    stats = bridge.stats()
    accepted = [i for i in ids if i is not None]
    refused_by_bus, bus_reason = stats["refused_by_bus"], bridge.reasons.get("refused by the bus")
    if bus_reason and not as_json:
        click.echo(f"bitten: {printable(bus_reason)}", err=True)
    if as_json:
        print_json(
            {
                "event_ids": accepted,
                "refused": bridge.refusals,
                "refused_by_bus": refused_by_bus,
                "bus_reason": bus_reason,
                "delivered": delivered,
            }
        )
    elif not data:
        refused = len(bridge.refusals) + refused_by_bus
        click.echo(f"{max(0, len(accepted) - refused_by_bus)} events, {refused} refused")
    elif not refused_by_bus and not stats["dropped"]:
        for event_id in accepted:
            click.echo(event_id)
    problem = bridge.reasons.get("delivery") or bridge.reasons.get("connect")
    bus = f"the event bus at {settings.ingress_url}"
    bus += " does not take events" if connected else " does not answer"
    if stats["dropped"]:
        lost = min(stats["dropped"], len(accepted))
        why = bridge.reasons.get("problem") or stats["last_error"] or "there is no room for them"
        raise StartError(
            f"{events(lost, 'are')} lost: {bus}{f' ({problem})' if problem else ''}, and {why}",
            hint=f"make room in {settings.home}, make it writable, or set BITTEN_HOME",
        )
    if not delivered:
        hint = "they are delivered when it starts: `bitten up` or `pm2 start pm2_config.json`"
        if problem:
            hint = "they are delivered when it does; `bitten doctor` says what to do"
        raise BusUnavailable(
            f"{bus}{f': {problem}' if problem else ''};"
            f" {events(len(accepted), 'wait')} in {settings.spool}",
            hint=hint,
        )
    sys.exit(1 if bridge.refusals or refused_by_bus else 0)


class _Emitter(Bridge):
    """A bridge that tells its one caller why an event was refused, instead of logging it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        logging.getLogger("event_bus.bridge").setLevel(logging.ERROR)
        self.source = settings.source or "bitten"
        self.enabled = True
        self.refusals: list[dict[str, Any]] = []
        self.reasons: dict[Any, str] = {}
        """The last warning of each kind, without what every one of them begins with."""

    def warn(self, kind: Any, message: str) -> None:
        self.reasons[kind] = message.partition(": ")[2]
        super().warn(kind, message)

    def refuse(self, error: Exception, event_type: Any, data: Any, fields: dict[str, Any]) -> None:
        self.refusals.append({"reason": str(error)})
        super().refuse(error, event_type, data, fields)


def _documents(bridge: Bridge, event_type: str, data: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """(line number, document or what is wrong with it) of each event; line 0 is the command."""
    if not data:
        for number, line in enumerate(sys.stdin.buffer, 1):
            if line.strip():
                yield number, _parse(line)
    elif len(data) == 1 and data[0].lstrip().startswith("{"):
        yield 0, _parse(data[0].encode("utf-8", "surrogateescape"))
    else:
        known = bridge.registry.types.get(event_type)
        yield 0, dict(_pair(text, known) for text in data)


def _parse(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as e:
        shown = text.decode("utf-8", "backslashreplace").rstrip("\n")
        return RejectedEvent(f"not JSON: {e}", rule="json", value=shown)


def _pair(text: str, event_type: EventType | None) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{text!r}: expected key=value or one JSON object in quotes")
    schema = event_type.properties.get(key, {}) if event_type else {}
    if schema.get("type") == "string":
        return key, value
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


@click.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]…")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave these types out.")
@click.option("--since", type=When(), help="Begin in the past: 15m, 1h, 2026-01-31, …")
@click.option("--from-seq", type=click.IntRange(min=1), help="Begin at this seq.")
@click.option("--count", type=click.IntRange(min=1), help="Stop after this many events.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def tail(
    settings: Settings,
    patterns: tuple[str, ...],
    ignore: tuple[str, ...],
    since: float | None,
    from_seq: int | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Show events as they happen; Ctrl-C ends.

    Patterns are event types with * and ?. None is left out, however fast they come.

    \b
    bitten tail
    bitten tail 'signal_*' fire_command
    bitten tail --ignore market_data --since 15m
    bitten tail --json trade_executed | jq .data.ticket
    """
    start = from_seq if from_seq is not None else since if since is not None else "now"
    with Subscriber(*patterns, ignore=ignore, start=start, settings=settings) as subscriber:
        subscriber.connect()
        if not as_json and sys.stderr.isatty():
            click.echo("waiting for events; Ctrl-C ends", err=True)
        try:
            for event in itertools.islice(subscriber, count):
                if as_json:
                    print_json(event)
                else:
                    click.echo(_line(event))
                sys.stdout.flush()
        except KeyboardInterrupt:
            return


def _line(event: Event) -> str:
    data = " ".join(f"{printable(k)}={_short(v)}" for k, v in event.data.items())
    who = printable(event.source) + (f" user={printable(event.user_id)}" if event.user_id else "")
    moment = clock(event.timestamp, date=False)
    return f"{event.seq:>8} {moment} {event.event_type:<17} {who:<14} {data}"


def _short(value: Any) -> str:
    text = printable(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


@click.command()
@click.argument("consumer")
@click.pass_obj
def forget(settings: Settings, consumer: str) -> None:
    """Let go of a durable consumer that will not come back: the journal is not kept for it.

    `bitten status` lists them. What CONSUMER has not stored by then, it may
    never get; how many events that are is said.

    \b
    bitten forget my_dashboard
    """
    client = Client(settings)
    lag = client.forget(consumer)
    client.close()
    if lag is None:
        raise click.ClickException(f"the bus knows no consumer {printable(consumer)!r}")
    missed = f"; it had not stored {events(lag)}" if lag else ""
    click.echo(f"{printable(consumer)} is forgotten{missed}")


def _compare_homes(settings: Settings, answer: dict[str, Any]) -> None:
    """On this machine a bus is this home's, or the wrong one."""
    home = Path(answer["home"])
    if is_loopback(settings.ingress_url) and home.resolve() != settings.home.resolve():
        answer["state"] = "another_home"
        problem = {
            "code": "another_home",
            "message": f"the bus that answers is another home's: it keeps its files in {home},"
            f" this is about {settings.home}",
            "remedy": "use its home (--home, BITTEN_HOME), or the ports of this home's own bus",
            "since": time.time(),
        }
        answer["problems"].insert(0, problem)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
@click.pass_obj
def status(settings: Settings, as_json: bool) -> None:
    """Ask the bus how it is.

    \b
    bitten status
    bitten status --json | jq .problems

    Exit code 0: all is well. 1: something is wrong; it says what, and what to do. 3: no answer.
    """
    client = Client(settings)
    answer = client.status()
    client.close()
    _compare_homes(settings, answer)
    if as_json:
        print_json(answer)
        sys.exit(1 if answer["problems"] else 0)
    held = answer["last_seq"] - answer["first_seq"] + 1
    rows = [
        ("state", answer["state"]),
        ("version", answer["version"]),
        ("process", f"{answer['pid']}, up {answer['uptime_s']:.0f} s, epoch {answer['epoch']}"),
        ("memory", f"{answer['memory_bytes'] / 1e6:.1f} MB"),
        ("home", answer["home"]),
        ("events out", answer["events_url"]),
        ("events in", answer["ingress_url"]),
        ("last seq", answer["last_seq"]),
        ("journal", f"{held} events, {answer['journal_bytes'] / 1e6:.1f} MB"),
        (
            "since start",
            f"{answer['accepted']} accepted, {answer['rejected']} rejected,"
            f" {answer['duplicates']} duplicates, {answer['conflicts']} conflicts",
        ),
    ]
    if answer.get("forbidden"):
        counts = (f"{name} {count}" for name, count in answer["forbidden"].items())
        rows.append(("refused keys", f"requests without the right to them: {', '.join(counts)}"))
    for name, consumer in answer["consumers"].items():
        seen = clock(consumer["last_seen"])
        rows.append(
            (f"consumer {printable(name)}", f"lag {consumer['lag']} events, last seen {seen}")
        )
    if not answer["consumers"]:
        rows.append(("consumers", "none yet: is the collector running?"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {printable(value)}")
    for problem in answer["problems"]:
        text = f"{problem['message']}; {problem['remedy']} (since {clock(problem['since'])})"
        click.secho(f"{'problem':<{width}}  {printable(text)}", fg="red")
    sys.exit(1 if answer["problems"] else 0)
