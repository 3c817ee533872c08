"""`bitten collect`, `query` and `stats`."""

from __future__ import annotations

import logging
from typing import Any

import click

from collector.data_collector import DataCollector
from event_bus.cli.output import When, clock, print_csv, print_json, print_table
from event_bus.pm2 import notify_ready
from event_bus.settings import Settings

log = logging.getLogger("bitten.collect")


@click.command()
@click.pass_obj
def collect(settings: Settings) -> None:
    """Store the bus's events in the database, until Ctrl-C or SIGTERM.

    It goes on where it stopped; while the bus is away it waits.
    """
    collector = DataCollector(settings=settings)

    def ready() -> None:
        log.info("storing into %s", settings.db)
        notify_ready()

    collector.run(on_ready=ready)
    log.info("stopped; %d events stored since the start", collector.stored)


@click.command()
@click.option("--type", "event_type", help="Of this event type only.", metavar="TYPE")
@click.option("--since", "start_time", type=When(), help="Not before: 15m, 1h, 7d, 2026-01-31, …")
@click.option("--until", "end_time", type=When(), help="Before: the same forms.")
@click.option("--source", help="From this source only.")
@click.option("--user-id", help="Of this user only.")
@click.option("--correlation-id", help="Under this correlation id only.")
@click.option("--symbol", help="On this symbol only.")
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(1, 10_000_000), help="At most."
)
@click.option("--json", "form", flag_value="json", help="One JSON object a line.")
@click.option("--csv", "form", flag_value="csv", help="CSV with a header.")
@click.pass_obj
def query(settings: Settings, /, form: str | None, **filters: Any) -> None:
    """Show stored events, newest first.

    \b
    bitten query --type signal_generated --since 1h
    bitten query --symbol EURUSD --limit 5 --json
    bitten query --correlation-id trade-17 --csv > trade.csv

    For anything more there is SQL: sqlite3 ~/.bitten/bitten_events.db "SELECT …".
    """
    events = DataCollector(settings=settings).query_events(**filters)
    columns = [
        *("seq", "event_id", "event_type", "timestamp", "received_at", "source"),
        *("user_id", "correlation_id", "causation_id", "data"),
    ]
    shown = ("seq", "timestamp", "event_type", "source", "user_id", "data")
    if form == "json":
        for event in events:
            print_json(event)
    elif form == "csv":
        print_csv(events, columns)
    elif events:
        print_table(
            ("seq", "time", "type", "source", "user", "data"),
            [[clock(e[c]) if c == "timestamp" else e[c] for c in shown] for e in events],
        )
    else:
        click.echo("no events match", err=True)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def stats(settings: Settings, as_json: bool) -> None:
    """Count what is stored, by type, over the database's life."""
    found = DataCollector(settings=settings).get_stats()
    if as_json:
        print_json(found)
        return
    print_table(("type", "events"), list(found["by_type"].items()))
    click.echo(
        f"\n{found['events_stored']} events stored, {found['events_rejected']} of them rejections,"
        f" in {(found['database_bytes'] + found['wal_bytes']) / 1e6:.1f} MB: {found['database']}"
    )
