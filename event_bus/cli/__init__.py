"""The command `bitten`."""

from event_bus.cli.main import main

__all__ = ["main"]
