"""`bitten demo`: real candles through a real bus, in a home of its own."""

from event_bus.demo.result import Result
from event_bus.demo.run import Demo

__all__ = ["Demo", "Result"]
