"""Backups: are there any, and is the newest one young enough?"""

from __future__ import annotations

from collections.abc import Iterator

from collector.doctor.context import Context
from collector.doctor.finding import CannotTell, Finding, fault, ok, span, warning
from collector.doctor.history import DAY_S, History
from collector.manifest import backups
from event_bus.errors import BackupError

OLD_S = 7 * DAY_S
LATE = 2
"""A backup by the clock is late when this many intervals have passed without one."""


def newest(context: Context) -> Iterator[Finding]:
    settings = context.settings
    with context.reading(settings.db) as db:
        history_s = context.now - History(db).first_at
    try:
        found = backups(settings.backup_dir)
    except BackupError as e:
        yield fault(
            str(e.args[0]),
            why="no backup can be made or found there",
            remedy=e.hint or "check its owner and rights",
            command=f"ls -ld {settings.backup_dir}",
        )
        return
    age_s = context.now - found[-1].stat().st_mtime if found else None
    yield judge_age(age_s, history_s, settings.backup_interval_s, context.bitten)


def judge_age(age_s: float | None, history_s: float, interval_s: int, bitten: str) -> Finding:
    """`age_s` is None without a backup, `interval_s` 0 if none is made by the clock."""
    limit_s = LATE * interval_s if interval_s else OLD_S
    if age_s is None and history_s < max(DAY_S, LATE * interval_s):
        raise CannotTell("there is no backup yet, and not a day of events")
    if age_s is not None and age_s <= limit_s:
        return ok(f"the newest backup is {span(age_s)} old")
    return warning(
        "there is no backup" if age_s is None else f"the newest backup is {span(age_s)} old",
        why="one is due every " + span(interval_s) + "; the collector's log says what failed"
        if interval_s
        else "a damaged disk or a slip of the hand takes what came since",
        remedy="make one now, have the collector make them (BITTEN_BACKUP_INTERVAL_S), and copy"
        " them to another machine",
        command=f"{bitten} backup",
    )
