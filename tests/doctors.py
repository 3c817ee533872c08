"""What the doctor finds in a home, for the tests of its checks."""

from __future__ import annotations

import time

from conftest import System

from collector.doctor import examination
from collector.doctor.examination import CHECKS, run
from collector.doctor.finding import Finding

MACHINE = {"clock", "memory", "sqlite", "python", "pm2", "disk", "file-system"}
"""Checks of the machine that the tests happen to run on."""


def findings(system: System, check: str = "", *, later_s: float = 0.0) -> list[Finding]:
    """Faults and warnings, of one check if it is given, as seen that much later."""
    context = examination.prepare(system.settings, clock=lambda: time.time() + later_s)
    checks = {check: CHECKS[check]} if check else CHECKS
    return [f for f in run(checks, context) if f.level in ("fault", "warning")]


def only(system: System, check: str, *, later_s: float = 0.0) -> Finding:
    """The one thing that a check finds, with all its parts."""
    (finding,) = findings(system, check, later_s=later_s)
    assert finding.why
    assert finding.remedy
    assert finding.command
    return finding
