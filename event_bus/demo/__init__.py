"""`bitten demo`: real candles through a real bus, in a home of its own."""

from event_bus.demo.run import Demo, Result

__all__ = ["Demo", "Result"]
