"""`bitten collect`, `query`, `stats` and `audit`."""

from __future__ import annotations

import logging

import click

from collector.data_collector import DataCollector
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
