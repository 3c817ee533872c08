"""`python -m event_bus` is `bitten`."""

from event_bus.cli import main

main()
