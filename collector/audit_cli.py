"""`bitten audit`: the loss ledger on a terminal."""

from __future__ import annotations

import sys

import click

from collector import ledger
from collector.audit import Ledger
from collector.audit import audit as make_audit
from collector.ledger import Account
from event_bus.cli.output import clock, print_json, print_table
from event_bus.settings import Settings

_COUNTS = (
    *("published", "acked", "waiting", "dropped", "refused", "rejected", "conflicts", "stored"),
    "lost",
)


@click.command()
@click.option("--producers", is_flag=True, help="Every process, not only those with a fault.")
@click.option("--full", is_flag=True, help="Count again what earlier audits vouched for.")
@click.option("--accept", is_flag=True, help="Take the losses shown as known: no news any more.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@click.pass_obj
def audit(settings: Settings, producers: bool, full: bool, accept: bool, as_json: bool) -> None:
    """Is anything lost? Compares journal, database and spool.

    Exit code 0: nothing is lost, or nothing but what was accepted. 1: something is, and the last
    line says what.

    \b
    bitten audit
    bitten audit --producers
    bitten audit --json | jq .lost
    */10 * * * * bitten audit > /dev/null || mail -s 'events lost' me@example.org
    """
    found = make_audit(settings, full=full, accept=accept)
    if as_json:
        print_json(found)
    else:
        _print(found, every=producers)
    sys.exit(1 if found.news else 0)


def _print(found: Ledger, *, every: bool) -> None:
    print_table(
        ("source", "processes", *_COUNTS),
        [(a.source or "(unknown)", a.processes or "", *_counts(a)) for a in found.sources],
    )
    shown = [(a, ledger.note(a, clock)) for a in found.producers]
    shown = [(a, note) for a, note in shown if every or note]
    if shown:
        click.echo()
        print_table(
            ("process", "source", "pid", *_COUNTS, "last seen", "note"),
            [
                (
                    *(a.producer, a.source, a.pid or "", *_counts(a)),
                    "" if a.last_seen is None else clock(a.last_seen),
                    note,
                )
                for a, note in shown
            ],
        )
    if found.ranges:
        click.echo()
        print_table(
            ("seq", "events", "what", "found", "why"),
            [
                (
                    r,
                    r.events,
                    r.kind.replace("_", " "),
                    "" if r.at is None else clock(r.at),
                    r.reason,
                )
                for r in found.ranges
            ],
        )
    if found.in_backups:
        click.echo()
    for backup in found.in_backups:
        click.echo(f"backup {backup}")
    click.echo(
        f"\njournal {found.first_seq}-{found.last_seq}, database up to {found.stored_seq}"
        f" (counted from {found.counted_from_seq} on), {found.unstored} on their way there,"
        f" {found.truncated} refused events kept in part"
    )
    if found.bus == "away":
        click.echo("the bus is away; the journal was read as it lies")
    click.echo(found.verdict)


def _counts(a: Account) -> list[int]:
    return [a.in_memory + a.in_spool if name == "waiting" else getattr(a, name) for name in _COUNTS]
