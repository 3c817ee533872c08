"""The fixtures that tests share; what they hand out is in system.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from system import TIMEOUT_S, System, free_port, wait_until

__all__ = ["TIMEOUT_S", "System", "free_port", "wait_until"]

# How long an example takes says what else the machine does.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A home with nothing running in it."""
    made = System(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture
def bus(system: System) -> System:
    """A home with a running bus."""
    system.start_bus()
    return system


@pytest.fixture
def running(bus: System) -> System:
    """A home with bus and collector, and an event in its database."""
    bus.start_collector()
    assert bus.bitten("emit", "user_action", "action=x").returncode == 0
    bus.wait_stored()
    return bus
