"""BITTEN event bus: broker, bridge and subscriber of a one-machine trading system."""

from event_bus.errors import BittenError
from event_bus.version import __version__

__all__ = ["BittenError", "__version__"]
