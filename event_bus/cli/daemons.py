"""`bitten bus` and `bitten up`."""

from __future__ import annotations

import logging
import signal

import click

from event_bus.broker import Broker
from event_bus.memory import collect_rarely
from event_bus.pm2 import notify_ready
from event_bus.ports import raise_descriptor_limit
from event_bus.settings import Settings

log = logging.getLogger("bitten.bus")


@click.command()
@click.pass_obj
def bus(settings: Settings) -> None:
    """Run the event bus: take events in, keep them, publish them.

    Stops on Ctrl-C or SIGTERM, once what has arrived is on disk and acknowledged.

    \b
    bitten bus                                   foreground
    pm2 start pm2_config.json                    with the collector, kept alive
    bitten --home /srv/bitten bus                files elsewhere
    """
    raise_descriptor_limit()
    broker = Broker(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: broker.stop())
    log.info(
        "events out on %s, in on %s; journal %s at seq %d",
        broker.events_url,
        broker.ingress_url,
        settings.journal,
        broker.journal.last_seq,
    )
    notify_ready()
    collect_rarely()
    broker.run()
    log.info("stopped at seq %d", broker.journal.last_seq)


@click.command()
@click.pass_obj
def up(settings: Settings) -> None:
    """Run bus and collector in this terminal and restart them if they die. Ctrl-C stops both.

    \b
    bitten up
    BITTEN_HOME=/tmp/try BITTEN_EVENTS_URL=tcp://127.0.0.1:6570 \\
        BITTEN_INGRESS_URL=tcp://127.0.0.1:6571 bitten up       a second one, to play with
    """
    import asyncio  # 3 MB that the bus itself has no use for

    from event_bus.supervisor import Supervisor

    settings.make_home()
    click.echo(f"bitten: home {settings.home}, database {settings.db}; Ctrl-C stops", err=True)
    asyncio.run(Supervisor(settings).run())
