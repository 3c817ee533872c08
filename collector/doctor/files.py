"""Database and journal: can they be read, and do they belong together?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from collector.doctor.context import Context, quoted, row, rows
from collector.doctor.finding import CannotTell, Finding, fault, ok, size
from collector.doctor.processes import lock_owner
from collector.layout import LAST_SEQ, check_version, is_blank
from event_bus.errors import DatabaseError, JournalDamaged, JournalError
from event_bus.journal_file import check_version as check_journal_version
from event_bus.journal_file import has_wal
from event_bus.journal_format import WAL_HOLDS_MORE, is_intact
from event_bus.recovery import SPARE_SEQS
from event_bus.traces import last_known

_JOURNAL_ENDS = (
    "SELECT max(first_seq + count - 1) FROM batch",
    "SELECT max(last_seq) FROM lost_range",
    "SELECT value FROM meta WHERE key = 'trimmed_seq'",
)
_BATCH = "SELECT first_seq, count, received_at, crc32, body FROM batch ORDER BY first_seq"


def database(context: Context) -> Iterator[Finding]:
    path = context.settings.db
    if not path.exists():
        yield from _missing(context)
        return
    if not path.stat().st_size and not Path(f"{path}-wal").exists():
        yield fault(
            f"{path} has 0 bytes",
            why="it was cut, or a file was made for it and never filled",
            remedy="start the collector: it fills it from the journal",
            command=f"{context.bitten} collect",
        )
        return
    try:
        with context.reading(path) as db:
            if is_blank(db):
                yield _blank(context)
                return
            check_version(db, path)
            # Both ends, and what every view needs.
            row(db, "SELECT * FROM _event ORDER BY seq LIMIT 1")
            row(db, "SELECT * FROM events ORDER BY seq DESC LIMIT 1")
            last = row(db, LAST_SEQ)[0]
            known = row(db, "SELECT value FROM _meta WHERE key = 'journal_id'")
    except CannotTell as e:
        yield fault(
            str(e),
            **_unreadable(
                e,
                path,
                "start the collector: it moves the file aside and fills a new one from the journal",
            ),
        )
        return
    except DatabaseError as e:
        yield fault(
            str(e.args[0]),
            why="the collector does not write into it",
            remedy=e.hint or "move it aside",
            command=f"mv {quoted(path)} {quoted(path)}.old",
        )
        return
    yield from _belongs(context, known[0] if known else None, last)


def _blank(context: Context) -> Finding:
    path = context.settings.db
    first_seq = _first_in_journal(context) if context.settings.journal.exists() else None
    if first_seq is None or lock_owner(Path(f"{path}.lock")) is not None:
        return ok("the database is new and empty")
    gone = f"; those before {first_seq} are in backups at best" if first_seq > 1 else ""
    return fault(
        f"{path} holds nothing, not even tables",
        why="its -wal is gone and with it all that was not copied yet, it was cut, or the collector"
        " was killed while it made it",
        remedy="put the -wal back if you have it; else start the collector: it fills the database"
        f" with all that the journal has{gone}",
        command=f"{context.bitten} collect",
    )


def _unreadable(problem: CannotTell, path: Path, mend: str) -> dict[str, str]:
    """Why, remedy and command, by the kind of SQLite's error."""
    look = f"ls -l {quoted(path)}"
    error = problem.__cause__
    if isinstance(error, apsw.NotADBError):
        return {
            "why": "it is another file, or its beginning was destroyed",
            "remedy": f"if the name is wrong, give the right one; if not, {mend}",
            "command": f"head -c 100 {quoted(path)} | od -c | head",
        }
    if isinstance(error, apsw.CorruptError | apsw.SQLError):
        check = f"sqlite3 -readonly {quoted(path)} 'PRAGMA quick_check'"
        return {"why": "it is damaged", "remedy": mend, "command": f"{look}; {check}"}
    no_access = apsw.CantOpenError | apsw.PermissionsError | apsw.ReadOnlyError
    if isinstance(error, no_access) or not path.is_file():
        return {
            "why": "it is no file, or not yours to read",
            "remedy": "check its owner and rights, and those of its directory",
            "command": look,
        }
    return {
        "why": "the disk does not give it, or another program keeps it locked",
        "remedy": "check the disk, and who has the file open",
        "command": f"{look}; fuser -v {quoted(path)}; dmesg | tail -20",
    }


def _missing(context: Context) -> Iterator[Finding]:
    path = context.settings.db
    if lock_owner(Path(f"{path}.lock")) is not None:
        yield fault(
            f"{path} is not there, and the collector runs",
            why="the collector puts it back by itself, within seconds, or is about to make it",
            remedy="do not stop the collector; look again in some seconds",
            command=f"sleep 10; {context.bitten} doctor",
        )
    elif Path(f"{path}-wal").exists():
        wal = Path(f"{path}-wal")
        has_journal = context.settings.journal.exists()
        yield fault(
            f"{path} was removed, but its -wal is still there",
            why="the last events are in that file, and the next database throws it away",
            remedy="keep it; then start the collector, which fills a new database from the journal"
            if has_journal
            else "move it aside and keep it: a backup cannot be brought back beside it",
            command=f"{'cp -p' if has_journal else 'mv'} {quoted(wal)} {quoted(wal)}.kept",
        )
    elif not context.settings.journal.exists():
        raise CannotTell("there is no database yet")
    elif (first_seq := _first_in_journal(context)) > 1:
        yield fault(
            f"there is no database at {path}",
            why="the collector never ran with these settings, or the file was removed; the journal"
            f" has only the events from {first_seq} on, those before are in backups at best",
            remedy="put the file back, or bring it back from a backup; then start the collector:"
            " it adds what the journal has",
            command=f"{context.bitten} restore --only database",
        )
    else:
        whole = "" if lacks_wal(context) else "; nothing is lost: the journal has all events"
        yield fault(
            f"there is no database at {path}",
            why=f"the collector never ran with these settings, or the file was removed{whole}",
            remedy="start the collector: it fills a new one from the journal",
            command=f"{context.bitten} collect",
        )


def _first_in_journal(context: Context) -> int:
    """The first seq that the journal still has; 1 if it cannot say."""
    try:
        with context.reading(context.settings.journal) as db:
            found = row(db, "SELECT value FROM meta WHERE key = 'trimmed_seq'")
            origin = row(db, "SELECT value FROM meta WHERE key = 'origin_seq'")
    except CannotTell:  # the journal's own check says so
        return 1
    return max(found[0] + 1 if found else 1, origin[0] if origin else 1)


def _belongs(context: Context, journal_id: str | None, last: int) -> Iterator[Finding]:
    path = context.settings.journal
    try:
        with context.reading(path) as db:
            own_id = row(db, "SELECT value FROM meta WHERE key = 'journal_id'")[0]
            end = row(db, "SELECT first_seq + count - 1 FROM batch ORDER BY first_seq DESC LIMIT 1")
            trimmed = row(db, "SELECT value FROM meta WHERE key = 'trimmed_seq'")[0]
    except CannotTell:  # the journal's own check says so
        yield ok(f"the database is readable, up to seq {last}")
        return
    if lacks_wal(context):  # the journal's own check says so
        yield ok(f"the database is readable, up to seq {last}")
        return
    restore = f"{context.bitten} status; ls -l {quoted(path.parent)}"
    if journal_id not in (None, own_id):
        yield fault(
            f"the database was filled from journal {journal_id}, this is journal {own_id}",
            why="one of the two files is another home's, or was made anew; the same seq means"
            " different events, and the collector refuses to mix them",
            remedy="put the right journal.db back, or move the database aside to begin a new one",
            command=restore,
        )
    elif last > max(end[0] if end else 0, trimmed):
        yield fault(
            f"the database is ahead of the journal: seq {last}, the journal ends at"
            f" {end[0] if end else trimmed}",
            why="an older copy of journal.db was put in its place; new events would get numbers"
            " that others have",
            remedy="stop the bus, and put the newer journal.db back",
            command=restore,
        )
    else:
        yield ok(f"the database is readable, up to seq {last}")


def journal(context: Context) -> Iterator[Finding]:
    path = context.settings.journal
    if not path.exists():
        if context.status is None:
            raise CannotTell("there is no journal yet")
        if not context.is_own_bus:
            raise CannotTell("the bus that answers keeps its journal elsewhere")
        yield fault(
            f"{path} was removed while the bus has it open",
            why="the bus puts it back by itself, within seconds",
            remedy="do not stop the bus; look again in some seconds",
            command=f"sleep 10; {context.bitten} doctor",
        )
        return
    try:
        with context.reading(path) as db:
            if row(db, "SELECT count(*) FROM sqlite_master")[0]:
                check_journal_version(db, path)
            newest = row(db, f"{_BATCH} DESC LIMIT 1")
            oldest = row(db, f"{_BATCH} LIMIT 1")
    except CannotTell as e:
        yield fault(
            str(e),
            **_unreadable(
                e,
                path,
                "start the bus: it moves the file aside, saves what can be read, and says what is"
                " lost",
            ),
        )
        return
    except JournalDamaged as e:
        yield fault(
            str(e.args[0]),
            why="the disk did not give back what was written",
            remedy=str(e.hint),
            command=f"{context.bitten} up",
        )
        return
    except JournalError as e:
        yield fault(
            str(e.args[0]),
            why="the bus does not start with it",
            remedy=str(e.hint),
            command=f"mv {quoted(path)} {quoted(path)}.old",
        )
        return
    if lacks_wal(context):
        yield _without_wal(context)
        return
    damaged = [b for b in (newest, oldest) if b is not None and not is_intact(*b)]
    if damaged:
        yield fault(
            "the journal's newest or oldest batch is damaged (CRC-32)",
            why="the disk did not give back what was written",
            remedy="check the disk; see what is lost",
            command=f"{context.bitten} audit; dmesg | tail -50",
        )
    else:
        yield ok(f"the journal is readable, {size(path.stat().st_size)}")


def lacks_wal(context: Context) -> bool:
    """Whether the journal of a bus that does not run has lost what it committed last."""
    settings = context.settings
    if context.status is not None or has_wal(settings.journal):
        return False
    try:
        with context.reading(settings.journal) as db:
            meta = dict(rows(db, "SELECT key, value FROM meta"))
            ends = [row(db, sql)[0] or 0 for sql in _JOURNAL_ENDS]
    except CannotTell:
        return False
    told_seq, _ = last_known(settings.home, settings.backup_dir, meta.get("journal_id"))
    is_short = meta.get(WAL_HOLDS_MORE) == 1 or told_seq > max(ends)
    # Last, for a bus may have been started meanwhile.
    return is_short and lock_owner(settings.home / "bus.lock") is None


def _without_wal(context: Context) -> Finding:
    settings = context.settings
    wal = f"{settings.journal}-wal"
    known = []
    meta: dict[str, Any] = {}
    with contextlib.suppress(CannotTell), context.reading(settings.journal) as db:
        meta = dict(rows(db, "SELECT key, value FROM meta"))
        known = [row(db, sql)[0] or 0 for sql in _JOURNAL_ENDS]
        known.append(row(db, "SELECT max(next_seq) - 1 FROM consumer")[0] or 0)
    journal_id = meta.get("journal_id")
    known.append(last_known(settings.home, settings.backup_dir, journal_id)[0])
    with contextlib.suppress(CannotTell), context.reading(settings.db) as db:
        bound = row(db, "SELECT value FROM _meta WHERE key = 'journal_id'")
        if bound is None or bound[0] == journal_id:
            known.append(row(db, LAST_SEQ)[0] or 0)
    back = wal if meta.get(WAL_HOLDS_MORE) == 1 else f"{wal} or the newer journal.db"
    older = "" if meta.get(WAL_HOLDS_MORE) == 1 else ", or it is an older copy"
    return fault(
        f"the journal's -wal is gone, and with it what was committed last{older}",
        why="journal.db, or last_seq.json beside it, says that it is not all there is: the -wal was"
        " removed or emptied while the bus had it open or was killed",
        remedy=f"put {back} back if you have it, before the bus is started. Without it a start goes"
        f" on after seq {max(known)}, the last one known, leaves {SPARE_SEQS} numbers out and names"
        " what is lost; what a database has of it is safe",
        command=f"ls -la {quoted(settings.home)}",
    )
