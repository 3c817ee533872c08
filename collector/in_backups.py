"""Which backups have events that are lost here, and how to come by them."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import msgspec

from collector import manifest as m
from collector.journal_view import JournalView
from collector.ledger import LEFT_OUT, Range
from collector.manifest import Manifest
from collector.seqs import Seqs, count, merged, text, without
from event_bus.errors import BackupError
from event_bus.settings import Settings

MAX_STRETCHES = 5
"""Named one by one; of more, a command shows all from the first to the last."""


class InBackup(msgspec.Struct, kw_only=True, frozen=True):
    """Lost events that a backup has. `command` shows them there; or brings them back, if it
    `restores`: that is for a collector that was stopped."""

    backup: str
    seqs: Seqs
    events: int
    restores: bool
    command: str

    def __str__(self) -> str:
        how = "to bring them back, stop the collector and" if self.restores else "look there:"
        seqs = text(self.seqs, MAX_STRETCHES)
        return f"{self.backup} has {self.events} of these (seq {seqs}); {how} {self.command}"


def find(
    settings: Settings, journal: JournalView, stored_seq: int, ranges: list[Range]
) -> list[InBackup]:
    """Backups that have some of the lost events, the newest first, each with what no newer has.

    To restore is advised only if that gives up nothing that the database has: it is in the journal,
    from where the collector adds it, or in the backup.
    """
    ranges = [r for r in ranges if r.events and r.last_seq is not None]
    missing = [
        # What the journal lost may be stored.
        (r, max(r.first_seq, stored_seq + 1) if r.kind == "journal" else r.first_seq)
        for r in ranges
    ]
    lost = merged((first, r.last_seq or 0) for r, first in missing if r.kind != LEFT_OUT)
    nowhere = merged((first, r.last_seq or 0) for r, first in missing if r.kind != "differs")
    here = without([(1, stored_seq)], nowhere)
    ours = journal.journal_id
    in_journal = without([(journal.first_seq, journal.last_seq)], journal.lost())
    found: list[InBackup] = []
    for backup, manifest in _read(settings.backup_dir) if lost else ():
        database, copy = manifest.database, manifest.journal
        if database is not None and database.journal_id == ours:
            seqs = _shared(lost, database.held)
            given_up = without(without(here, database.held), in_journal)
            restores = not given_up and database.last_seq <= journal.last_seq
            if seqs:
                found.append(_in_database(backup, seqs, settings, restores=restores))
                lost = without(lost, seqs)
        if copy is not None and copy.journal_id == ours:
            seqs = _shared(lost, copy.held)
            if seqs:
                found.append(_in_journal(backup, seqs))
                lost = without(lost, seqs)
    return found


def _read(folder: Path) -> Iterator[tuple[Path, Manifest]]:
    with contextlib.suppress(BackupError):  # what cannot be read is no advice
        for backup in reversed(m.backups(folder)):
            with contextlib.suppress(BackupError):
                yield backup, Manifest.read(backup)


def _shared(one: Seqs, other: Seqs) -> Seqs:
    return without(one, without(one, other))


def _in_database(backup: Path, seqs: Seqs, settings: Settings, *, restores: bool) -> InBackup:
    if restores:
        aside = shlex.quote(str(settings.home / f"before-{backup.name}"))
        command = (
            f"mkdir {aside} && mv {shlex.quote(str(settings.db))}* {aside}"
            f" && bitten --home {shlex.quote(str(settings.home))} restore --only database"
            f" {shlex.quote(str(backup))}"
        )
    else:
        where = " OR ".join(f"seq BETWEEN {a} AND {b}" for a, b in _few(seqs))
        command = _sqlite(backup / m.DATABASE, f"SELECT * FROM events WHERE {where}")
    return InBackup(
        backup=str(backup), seqs=seqs, events=count(seqs), restores=restores, command=command
    )


def _in_journal(backup: Path, seqs: Seqs) -> InBackup:
    where = " OR ".join(f"first_seq <= {b} AND first_seq + count > {a}" for a, b in _few(seqs))
    sql = f"SELECT first_seq, CAST(body AS TEXT) FROM batch WHERE {where}"
    return InBackup(
        backup=str(backup),
        seqs=seqs,
        events=count(seqs),
        restores=False,
        command=_sqlite(backup / m.JOURNAL, sql),
    )


def _sqlite(path: Path, sql: str) -> str:
    return f"sqlite3 {shlex.quote(str(path))} {shlex.quote(sql)}"


def _few(seqs: Seqs) -> Seqs:
    return seqs if len(seqs) <= MAX_STRETCHES else [(seqs[0][0], seqs[-1][1])]
