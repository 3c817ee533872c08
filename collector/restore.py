"""Restoring a backup into a home that has neither database nor journal, or only lacks the one."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import apsw

from collector import manifest as m
from collector.backup import copy_file, make_directory, sync
from collector.consumer import CONSUMER
from collector.manifest import Manifest
from collector.verify import database_facts, journal_facts
from event_bus import database, recovery
from event_bus.errors import BackupError
from event_bus.journal_format import WAL_HOLDS_MORE
from event_bus.lock import FileLock
from event_bus.settings import Settings

PREPARED = ".restoring"


def find_backup(settings: Settings, name: str | None) -> Path:
    """A backup by its path or its name in `backup_dir`, by default the newest there."""
    if name is not None:
        given, kept = Path(name).expanduser().absolute(), settings.backup_dir / name
        return kept if kept.is_dir() and not given.is_dir() else given
    known = m.backups(settings.backup_dir)
    if not known:
        raise BackupError(
            f"there is no backup in {settings.backup_dir}",
            hint="name one: bitten restore /path/to/2026-01-31T04-00-00Z",
        )
    return known[-1]


def check_backup(backup: Path, *, only_database: bool) -> None:
    """Raise BackupError unless it is what was written, before anything is made or held."""
    manifest = Manifest.read(backup)
    for name in manifest.files:
        if name == m.DATABASE or not only_database:
            manifest.check(name, backup / name)


def _check_home(backup: Path, settings: Settings, *, only_database: bool) -> Manifest:
    """The backup's manifest. Raises BackupError if something in the home is in the way."""
    manifest = Manifest.read(backup)
    if only_database and manifest.database is None:
        raise BackupError(f"{backup} has no database", hint="use another backup")
    # A WAL that is left over would be taken for the restored file's.
    in_the_way = _with_log(settings.db)
    if not only_database:
        in_the_way += [*_with_log(settings.journal), *recovery.left_over(settings.journal)]
    for there in in_the_way:
        if there.exists():
            raise BackupError(
                f"{there} is there already; nothing was restored",
                hint=f"move it aside (mv {there} {there}.old) or use another BITTEN_HOME",
            )
    if only_database:
        _check_journal(manifest, settings.journal)
    return manifest


def restore_config(backup: Path, settings: Settings) -> list[str]:
    """Put config.yaml and schemas where there are none, and return what was put.

    On its own, because config.yaml may say where the database belongs.
    """
    put = []
    with _held(settings, only_database=False):
        manifest = _check_home(backup, settings, only_database=False)
        for name in manifest.files:
            target = settings.home / name
            if name not in (m.DATABASE, m.JOURNAL) and not target.exists():
                make_directory(target.parent)
                prepared = target.with_name(target.name + PREPARED)
                _copy(backup, name, prepared, manifest)
                prepared.rename(target)
                put.append(name)
    return put


def restore(backup: Path, settings: Settings, *, only_database: bool = False) -> Manifest:
    """Put database and journal in their place, or the database alone.

    Verified before and after. Raises BackupError, or StartError if a bus or a collector runs here;
    then neither file is there. A restored journal goes on from an earlier point than the one it was
    copied from did, so that its seqs become another count: it gets a new `journal_id`.
    """
    with _held(settings, only_database=only_database):
        manifest = _check_home(backup, settings, only_database=only_database)
        journal_id = None if only_database else secrets.token_hex(8)
        targets = {m.DATABASE: settings.db}
        if not only_database:
            targets[m.JOURNAL] = settings.journal
        prepared: dict[Path, Path] = {}
        placed: list[Path] = []
        try:
            for name, target in targets.items():
                if name in manifest.files:
                    prepared[target] = target.with_name(target.name + PREPARED)
                    _prepare(backup, name, prepared[target], manifest, journal_id)
            for target, path in prepared.items():
                path.rename(target)
                placed.append(target)
            for target in placed:
                sync(target.parent)
        except BaseException:
            for target in placed:
                target.unlink()
            raise
        finally:
            for path in prepared.values():
                path.unlink(missing_ok=True)
    return manifest


def _prepare(
    backup: Path, name: str, path: Path, manifest: Manifest, journal_id: str | None
) -> None:
    """A copy beside its place, verified, and in the mode its owner expects."""
    _copy(backup, name, path, manifest)
    with contextlib.closing(database.connect(path)) as db:
        if journal_id is not None:
            table = "_meta" if name == m.DATABASE else "meta"
            db.execute(f"UPDATE {table} SET value = ? WHERE key = 'journal_id'", (journal_id,))
        if name == m.JOURNAL:
            # A backup has no -wal, also one that was made in the midst of a checkpoint.
            db.execute("UPDATE meta SET value = 0 WHERE key = ?", (WAL_HOLDS_MORE,))
            # It was copied after the database, and may be older than a bus keeps events: without
            # this the bus would trim, at its start, what the restored database does not have.
            db.execute(
                "INSERT OR REPLACE INTO consumer VALUES (?,?,?)",
                (CONSUMER, manifest.stored_seq + 1, manifest.made_at),
            )
        db.execute("PRAGMA journal_mode=WAL")
    if name == m.DATABASE:
        database_facts(path, backup / name)
    else:
        journal_facts(path, backup / name, stored_seq=manifest.stored_seq)
    for log in _with_log(path)[1:]:  # reading made them; nothing is in them
        log.unlink(missing_ok=True)
    sync(path)


def _copy(backup: Path, name: str, target: Path, manifest: Manifest) -> None:
    copy_file(backup / name, target)
    try:
        manifest.check(name, target)
    except BackupError:
        target.unlink()
        raise


def _with_log(path: Path) -> list[Path]:
    return [path, Path(f"{path}-wal"), Path(f"{path}-shm")]


def _check_journal(manifest: Manifest, path: Path) -> None:
    """Raise BackupError if the collector could not go on from this backup with that journal."""
    assert manifest.database is not None
    if not path.exists():
        return
    try:
        with contextlib.closing(database.connect(path, database.READ_ONLY)) as db:
            ((journal_id,),) = db.execute("SELECT value FROM meta WHERE key = 'journal_id'")
    except apsw.Error as e:
        raise BackupError(
            f"cannot read {path}: {e}", hint="start the bus once, it repairs its journal"
        ) from e
    if manifest.database.journal_id not in (None, journal_id):
        raise BackupError(
            f"the backup is of journal {manifest.database.journal_id}, the one here is"
            f" {journal_id}; nothing was restored",
            hint="use a backup made since, or restore into another BITTEN_HOME to look at it",
        )


@contextlib.contextmanager
def _held(settings: Settings, *, only_database: bool) -> Iterator[None]:
    """Keep the home's daemons from starting meanwhile, and have foreign errors as BackupError."""
    settings.make_home()
    with contextlib.ExitStack() as closing:
        lock = FileLock(Path(f"{settings.db}.lock"), "a collector")
        closing.callback(lock.close)
        if not only_database:
            bus_lock = FileLock(settings.home / "bus.lock", "an event bus", and_directory=True)
            closing.callback(bus_lock.close)
        try:
            yield
        except (apsw.Error, OSError) as e:
            raise BackupError(
                f"cannot restore into {settings.home}: {e}; neither database nor journal was put"
                " there",
                hint="check the disk and its rights",
            ) from e
