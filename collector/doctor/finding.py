"""What a check says: one finding for each thing it looked at."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

Level = Literal["fault", "warning", "skipped", "ok"]
"""A fault loses events or answers, or will soon; a warning can wait until tomorrow. `skipped` is
a check that had nothing to look at."""

LEVELS: tuple[Level, ...] = ("fault", "warning", "skipped", "ok")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`what` is wrong, `why` is how we know or what it leads to, `remedy` is what to do, and
    `command` does it or shows more; `check` is the name in docs/doctor.md."""

    level: Level
    what: str
    why: str = ""
    remedy: str = ""
    command: str = ""
    check: str = ""


class CannotTell(Exception):
    """What the check looks at is not there or cannot be read; another check says so."""


def ok(what: str) -> Finding:
    return Finding(level="ok", what=what)


def warning(what: str, *, why: str, remedy: str, command: str) -> Finding:
    return Finding(level="warning", what=what, why=why, remedy=remedy, command=command)


def fault(what: str, *, why: str, remedy: str, command: str) -> Finding:
    return Finding(level="fault", what=what, why=why, remedy=remedy, command=command)


def size(amount: float) -> str:
    """Bytes for people: 1.5 GB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while amount >= 1_000 and len(units) > 1:
        amount /= 1_000
        units.pop(0)
    return f"{amount:.0f} bytes" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def span(seconds: float) -> str:
    """A length of time for people, in one unit: 3 days."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def moment(timestamp: float) -> str:
    """Unix seconds as local time, to the second; as they are if no calendar has them."""
    try:
        return datetime.datetime.fromtimestamp(timestamp).isoformat(sep=" ", timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return str(timestamp)
