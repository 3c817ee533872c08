"""`bitten bus` and `bitten up`."""

from __future__ import annotations

import logging
import signal

import click

from event_bus.broker import Broker
from event_bus.pm2 import notify_ready
from event_bus.settings import Settings

log = logging.getLogger("bitten.bus")


@click.command()
@click.pass_obj
def bus(settings: Settings) -> None:
    """Run the event bus: take events in, keep them, publish them.

    Stops on Ctrl-C or SIGTERM, once what has arrived is on disk and acknowledged. With pm2:
    pm2 start pm2_config.json.
    """
    broker = Broker(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: broker.stop())
    log.info(
        "events out on %s, in on %s, journal %s from seq %d",
        broker.events_url,
        broker.ingress_url,
        settings.journal,
        broker.journal.last_seq + 1,
    )
    notify_ready()
    broker.run()
    log.info("stopped after seq %d", broker.journal.last_seq)
