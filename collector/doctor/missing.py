"""A home without a journal while no bus runs: never begun, misspelled, or its files are gone?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from collector.doctor.context import Context, quoted
from collector.doctor.finding import Finding, fault
from collector.manifest import backups
from event_bus.errors import BackupError, SettingsError
from event_bus.recovery import left_over
from event_bus.settings import Settings
from event_bus.traces import last_known

MAX_SHOWN = 3
JOURNAL = "journal.db"
_START = "start bus and collector; with pm2: `pm2 start pm2_config.json`"


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What there is instead of a journal. `past_seq` is how far `trace` says that it went, 0 if
    nothing tells; `others` are homes elsewhere that do have a journal."""

    home: Path
    journal: Path
    db: Path
    exists: bool
    recoverable: bool
    has_database: bool
    has_backup: bool
    past_seq: int
    trace: str
    others: Sequence[Path]
    bitten: str


def look(context: Context) -> Remains:
    settings = context.settings
    past_seq, trace = last_known(settings.home, settings.backup_dir)
    found: list[Path] = []
    with contextlib.suppress(BackupError):
        found = backups(settings.backup_dir)
    wal = Path(f"{settings.journal}-wal")
    return Remains(
        home=settings.home,
        journal=settings.journal,
        db=settings.db,
        exists=settings.home.is_dir(),
        recoverable=any(path.exists() for path in (wal, *left_over(settings.journal))),
        has_database=settings.db.exists() and settings.db.stat().st_size > 0,
        has_backup=bool(found),
        past_seq=past_seq,
        trace=trace,
        others=_other_homes(settings.home),
        bitten=context.bitten,
    )


def _other_homes(home: Path) -> list[Path]:
    """The default home, and directories beside this one, that have a journal."""
    candidates: list[Path] = []
    with contextlib.suppress(SettingsError):
        candidates.append(Settings.load(environ={}).home)
    with contextlib.suppress(OSError):
        candidates += sorted(path.parent for path in home.parent.glob(f"*/{JOURNAL}"))
    found: list[Path] = []
    for path in candidates:
        with contextlib.suppress(OSError):
            if path != home and path not in found and (path / JOURNAL).is_file():
                found.append(path)
    return found[:MAX_SHOWN]


def judge(remains: Remains) -> Finding:
    bitten = remains.bitten
    if remains.recoverable:
        return fault(
            f"the bus is not running, and {remains.journal} is not there; what it can be made"
            " again from is",
            why="it was removed without its -wal, or a start was cut short",
            remedy="start the bus: it makes the journal of that, and says what is lost",
            command=f"{bitten} up",
        )
    if remains.has_database:
        return fault(
            f"the journal is gone: there is no {remains.journal}, but there is a database",
            why="it was removed or moved while the bus was stopped; the events of the database are"
            " safe, those that the collector had not stored yet are only in the missing file",
            remedy="look for the file, and put it back before anything is started; if it is gone"
            " for good, start the bus: it goes on after the last event of the database, and `bitten"
            " audit` says what is lost. Do not restore a backup",
            command=f"{bitten} up",
        )
    if remains.has_backup or remains.past_seq:
        told = f": {remains.trace} tells of events up to {remains.past_seq}"
        return fault(
            f"journal and database are gone from {remains.home}"
            + (told if remains.past_seq else ": there are only backups"),
            why="they were removed or moved while the bus was stopped",
            remedy="do not start the bus yet; put the files back if you have them, else bring back"
            " the newest backup, and then start bus and collector"
            if remains.has_backup
            else "do not start the bus yet; put the files back if you have them, or bring back a"
            " backup that lies elsewhere (`bitten restore PATH`). Without either, start the bus: it"
            " goes on after these events, and calls them lost",
            command=f"{bitten} restore" if remains.has_backup else f"ls -la {quoted(remains.home)}",
        )
    what = (
        f"there is nothing in {remains.home} yet"
        if remains.exists
        else f"there is nothing in {remains.home} yet: there is no such directory"
    )
    if remains.others:
        return fault(
            what,
            why="no bus was ever started with this home, or its name is misspelled; a journal is in"
            f" {' and in '.join(map(str, remains.others))}",
            remedy="set BITTEN_HOME (or --home) to the one you mean; if it is this one, start bus"
            " and collector with `bitten up`",
            command=f"bitten --home {quoted(remains.others[0])} doctor",
        )
    return fault(
        what,
        why="no bus was ever started with this home, or BITTEN_HOME is misspelled",
        remedy=f"see that this is the home you mean, then {_START}",
        command=f"{bitten} up",
    )
