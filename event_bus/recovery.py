"""Opens the journal, and makes a new one of what is left of a damaged one.

Nothing is deleted: what stands in the way is renamed. The new file is built beside the old one as
`journal.recovering`, is called `journal.recovered` once it is whole and synced, and only then put
in place; a start that finds it so goes on there, so a crash in between costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import msgspec

from event_bus import database
from event_bus.carve import MAX_GROUP_EVENTS, MAX_SEQ, Carved, Pages, carve, read_batch
from event_bus.errors import JournalDamaged, JournalError, JournalFailed
from event_bus.id_index import index_stored, places
from event_bus.journal import Journal
from event_bus.journal_file import SUFFIXES
from event_bus.journal_format import LEFT_OUT, LostRange
from event_bus.traces import last_known

log = logging.getLogger(__name__)

SPARE_SEQS = 4 * MAX_GROUP_EVENTS
"""Not given out where the end of the journal is gone: more than a collector can have fetched and
not stored yet, so that no seq becomes two events."""

_EVENT_ID = re.compile(rb'^\{"event_id":("(?:[^"\\]|\\.)*")', re.MULTILINE)
_JOURNAL_ID = re.compile(r"[0-9a-f]{16}")


def open_journal(
    path: Path,
    db: Path,
    clock: Callable[[], float] = time.time,
    *,
    backup_dir: Path | None = None,
) -> Journal:
    """The journal at `path`, recovered if it is damaged, empty or gone.

    `db` is the events database: what it holds was in the journal once, so seqs go on after that.
    So do they after what the last bus, an audit or a backup in `backup_dir` tells of this journal.
    Raises JournalError.
    """
    journal = _open(path, db, clock, backup_dir)
    journal.note_end()
    return journal


def _open(path: Path, db: Path, clock: Callable[[], float], backup_dir: Path | None) -> Journal:
    try:
        _finish(path, _aside(path, "replaced", clock))
        reason = _marked(path) or _missing(path, db)
        if reason is None:
            fresh = not path.exists() or path.stat().st_size == 0
            try:
                known, file = _told(path, backup_dir) if fresh else (0, "")
                if known:
                    return _begin_after(path, known, file, clock)
                journal = Journal(path, create=fresh or _last_stored(db)[0] == 0)
                _go_on_after_what_was_read(journal, db, backup_dir, clock)
                return journal
            except JournalDamaged as e:
                reason = str(e.args[0])  # without the hint: this is the next start
        log.error("recovering the journal: %s", reason)
        try:
            aside = _rebuild(path, db, backup_dir, reason, clock)
        except JournalError:
            _remove(path.with_suffix(".recovering"))  # it would only fill the disk
            raise
        journal = Journal(path)
        journal.recovered = f"{reason}; what it was is {aside.name}"
        return journal
    except OSError as e:
        raise JournalError(
            f"cannot open {e.filename or path}: {e.strerror}", hint="check the disk and its rights"
        ) from e


def _begin_after(path: Path, known: int, file: str, clock: Callable[[], float]) -> Journal:
    """A journal that goes on after the events that `file` tells of, and counts them as lost."""
    reason = f"neither journal nor database is there, and {file} tells of events up to {known}"
    log.error("%s: `bitten restore` brings back a backup", reason)
    new = path.with_suffix(".recovering")
    _remove(new)
    with contextlib.closing(Journal(new, origin_seq=known + 1)) as journal, journal.filling():
        journal.record_loss(
            LostRange(1, known, clock(), reason, ""),
            LostRange(known + 1, None, clock(), reason, ""),
        )
    _seal(new, path)
    _finish(path, _aside(path, "corrupt", clock))
    return Journal(path)


def _told(path: Path, backup_dir: Path | None, journal_id: str | None = None) -> tuple[int, str]:
    return last_known(path.parent, backup_dir, journal_id) if backup_dir else (0, "")


def mark_damaged(path: Path, reason: str) -> None:
    """Have the next start recover the journal, and not trust it again."""
    try:
        _marker(path).write_text(reason, encoding="utf-8")
    except OSError as e:
        log.error("cannot write %s: %s", _marker(path), e.strerror)


def left_over(path: Path) -> list[Path]:
    """Where a recovery leaves what the next start goes by, beside the journal at `path`."""
    return [path.with_suffix(".recovered"), path.with_suffix(".recovering"), _marker(path)]


def put_back(journal: Journal, clock: Callable[[], float]) -> None:
    """A file of it was removed or replaced while it is open: put all it holds in its place again.

    Raises JournalError.
    """
    new = journal.path.with_suffix(".recovering")
    try:
        _remove(new)
        try:
            journal.copy_to(new)
        except JournalError:
            _remove(new)  # half a copy would only fill the disk
            raise
        _seal(new, journal.path)
        journal.reopen(lambda: _finish(journal.path, _aside(journal.path, "replaced", clock)))
        journal.note_end()
    except OSError as e:
        raise JournalFailed(f"cannot put {journal.path} back: {e.strerror}") from e


def _missing(path: Path, db: Path) -> str | None:
    """Why the journal is not what it should be, if it is not there or has no bytes."""
    if path.exists() and path.stat().st_size:
        return None
    what = f"{path} is {'empty' if path.exists() else 'not there'}"
    wal = Path(f"{path}-wal")
    if wal.exists() and wal.stat().st_size:
        return f"{what}, but {wal.name} is"
    last, _ = _last_stored(db, is_needed=True)
    return f"{what}, but {db} holds events up to seq {last}" if last else None


def _last_stored(db: Path, *, is_needed: bool = False) -> tuple[int, str | None]:
    """The last seq of which the events database has account, as the collector counts it, and the
    journal it came from; 0 if it cannot be had.

    Where it `is_needed`, raises JournalError if it cannot be had for now: without it, seqs that
    were given out would be given out again.
    """
    found: list[Any] = []
    try:
        with contextlib.closing(
            database.connect(db, database.READ_ONLY, busy_timeout_ms=500)
        ) as connection:
            for sql in (
                "SELECT max(seq) FROM _event",
                "SELECT max(last_seq) FROM _gap",
                "SELECT value FROM _meta WHERE key = 'journal_id'",
            ):
                try:
                    row = connection.execute(sql).fetchone()
                except (apsw.SQLError, apsw.CorruptError):  # the others may still be readable
                    row = None
                found.append(row[0] if row else None)
    except apsw.Error as e:
        is_there = db.is_file() and not isinstance(e, apsw.NotADBError | apsw.CorruptError)
        if is_needed and is_there:
            kind = JournalFailed if isinstance(e, apsw.BusyError) else JournalError
            raise kind(  # a lock passes: a supervisor is to try again
                f"cannot read {db}, which tells how far the lost journal went: {e}",
                hint=database.reading_hint(e),
            ) from e
        return 0, None
    event, gap, journal_id = found
    return max(event or 0, gap or 0), None if journal_id is None else str(journal_id)


def _go_on_after_what_was_read(
    journal: Journal, db: Path, backup_dir: Path | None, clock: Callable[[], float]
) -> None:
    """A sound journal may end too early: its -wal is gone, or it is an older copy."""
    last_stored, stored_id = _last_stored(db)
    read = [next_seq - 1 for next_seq, _ in journal.consumers().values()]
    read.append(_told(journal.path, backup_dir, journal.journal_id)[0])
    if stored_id in (None, journal.journal_id):  # else another bus's; the collector says so
        read.append(last_stored)
    end = max([journal.last_seq, *read])
    if end <= journal.last_seq and not journal.lacks_wal:
        return
    reason = f"it ends at {journal.last_seq}"
    if end > journal.last_seq:
        reason += f", but once had events up to {end}"
    if journal.lacks_wal:
        reason += ", and the -wal that it was open with is gone"
    if stored_id == journal.journal_id:
        index_stored(journal, db, journal.last_seq, clock)
    losses = [
        LostRange(first, last, clock(), why, journal.path.name)
        for first, last, why in _lost_tail(journal.last_seq, end, reason)
    ]
    for loss in losses:
        log.error("%s: %s", journal.path, loss)
    # At once: with the first of them alone, the next start would find nothing amiss.
    journal.record_loss(*losses)
    journal.checkpoint()  # a -wal may go again


def _lost_tail(last_seq: int, end: int, reason: str) -> list[tuple[int, int, str]]:
    """(first seq, last seq, reason) of what is lost after `last_seq`, of a journal that is known
    to have had `end`."""
    spare = f"{LEFT_OUT}; {reason}"
    tail = [(last_seq + 1, end, reason), (end + 1, end + SPARE_SEQS, spare)]
    return [lost for lost in tail if lost[0] <= lost[1]]


def _rebuild(
    path: Path, db: Path, backup_dir: Path | None, reason: str, clock: Callable[[], float]
) -> Path:
    new = path.with_suffix(".recovering")
    _remove(new)
    last_stored, stored_id = _last_stored(db, is_needed=True)
    aside = _aside(path, "corrupt", clock)
    with Pages(path) as pages:
        carved = carve(pages)
        identity = _identity(carved, stored_id)
        told, _ = _told(path, backup_dir, identity)
        proven, end = _ends(carved, max(last_stored, told))
        origin_seq, trimmed_seq = _beginning(carved, last_stored, end)
        with (
            contextlib.closing(Journal(new, origin_seq=origin_seq)) as journal,
            journal.filling(),
        ):
            journal.adopt(
                journal_id=identity,
                epoch=_number(carved, "epoch"),
                trimmed_seq=trimmed_seq,
                losses=list(carved.losses.values()),
            )

            def lose(first: int, last: int | None, why: str = reason) -> None:
                for new in journal.record_loss(LostRange(first, last, clock(), why, aside.name)):
                    log.error("%s", new)

            _copy(carved, pages, journal, lose)
            if _identity(carved, stored_id) in (None, stored_id):
                ends = (first + place[2] - 1 for first, place in carved.batches.items())
                index_stored(journal, db, max(ends, default=0), clock)
            if journal.last_seq < proven:  # what was lost at its end, or damaged there
                lose(journal.last_seq + 1, proven)
            if not carved.batches and not carved.end():
                lose(end + 1, None)
            if end > max(proven, journal.last_seq):
                for lost in _lost_tail(journal.last_seq, end, reason):
                    lose(*lost)
            journal.save_consumers(
                {n: c for n, c in carved.consumers.items() if 0 < c[0] <= journal.last_seq + 1}
            )
    _seal(new, path)
    _finish(path, aside)
    log.warning("recovered %d batches; the damaged file is %s", len(carved.batches), aside)
    return aside


def _ends(carved: Carved, last_known: int) -> tuple[int, int]:
    """Up to where the journal proves itself what it had, and up to where it is known to have had
    something: by an index, by whoever read it, or else (the database, an audit, a backup)."""
    lost = [loss.last_seq or 0 for loss in carved.losses.values()]
    proven = max([_number(carved, "trimmed_seq"), carved.end(is_exact=True), *lost])
    read = [seq - 1 for seq, _ in carved.consumers.values() if seq < MAX_SEQ]
    return proven, max([proven, carved.end(), last_known, *read])


def _beginning(carved: Carved, last_stored: int, end: int) -> tuple[int, int]:
    """(origin_seq, trimmed_seq) of the new journal."""
    origin_seq = max(1, _number(carved, "origin_seq"))
    first = min(carved.batches, default=0)
    trimmed = _number(carved, "trimmed_seq")
    if first and ("trimmed_seq" not in carved.meta or trimmed >= carved.end()):
        # Pages of trimmed batches may not be used again yet, and those are no loss: begin after
        # the last hole in what every reader who matters has.
        trimmed = first - 1
        safe = min([last_stored + 1, *(seq for seq, _ in carved.consumers.values())])
        end = first
        for first_seq, place in sorted(carved.batches.items()):
            if end < first_seq <= safe:
                trimmed = first_seq - 1
            end = first_seq + place[2]
    elif not first and not trimmed:  # nothing is known of it: a new count
        return end + SPARE_SEQS + 1, end + SPARE_SEQS
    return origin_seq, trimmed


def _copy(
    carved: Carved, pages: Pages, journal: Journal, lose: Callable[[int, int | None], None]
) -> None:
    """Every intact batch with its seq, and where its ids lie."""
    for known in carved.producers.values():
        producer = journal.producer(known.token)
        producer.last_n, producer.forgotten_n = known.last_n, known.forgotten_n
        producer.last_seen, producer.report = known.last_seen, known.report
    journal.save_producers()
    for first_seq in sorted(carved.batches):
        if first_seq <= journal.last_seq:  # trimmed, and its page not used again
            continue
        if first_seq > journal.last_seq + 1:
            lose(journal.last_seq + 1, first_seq - 1)
        batch = read_batch(pages, first_seq, carved.batches[first_seq])
        ids = (msgspec.json.decode(quoted, type=str) for quoted in _EVENT_ID.findall(batch.body))
        runs, opaque_ids = places(enumerate(ids), journal)
        journal.append(
            [batch.body], batch.count, batch.received_at, runs=runs, opaque_ids=opaque_ids
        )


def _identity(carved: Carved, stored_id: str | None) -> str | None:
    """The journal's own id, else the one under which the database has its events."""
    own = carved.meta.get("journal_id")
    if isinstance(own, str) and _JOURNAL_ID.fullmatch(own):
        return own
    return stored_id if carved.batches else None


def _number(carved: Carved, key: str) -> int:
    value = carved.meta.get(key)
    return value if isinstance(value, int) and 0 <= value < MAX_SEQ else 0


def _seal(new: Path, path: Path) -> None:
    """The new file is whole: from now on it is the journal, wherever a crash comes."""
    fd = os.open(new, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    new.replace(path.with_suffix(".recovered"))
    _sync_directory(path.parent)


def _finish(path: Path, aside: Path) -> None:
    """Put a sealed journal in its place; what stands there is renamed to `aside`."""
    recovered = path.with_suffix(".recovered")
    if not recovered.exists():
        return
    _marker(path).unlink(missing_ok=True)  # it is not about this one
    for suffix in SUFFIXES:
        old = Path(f"{path}{suffix}")
        if old.exists():
            old.rename(f"{aside}{suffix}")
    _sync_directory(path.parent)
    recovered.rename(path)
    _sync_directory(path.parent)


def _aside(path: Path, label: str, clock: Callable[[], float]) -> Path:
    """A free name of the form journal.db.corrupt-20260131T120000Z."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(clock()))
    name = free = Path(f"{path}.{label}-{moment}")
    n = 1
    while any(Path(f"{free}{suffix}").exists() for suffix in SUFFIXES):
        n += 1
        free = Path(f"{name}-{n}")
    return free


def _marker(path: Path) -> Path:
    return Path(f"{path}.damaged")


def _marked(path: Path) -> str | None:
    try:
        return _marker(path).read_text(encoding="utf-8") or "it was found damaged"
    except FileNotFoundError:
        return None


def _remove(new: Path) -> None:
    """What an earlier attempt left half made."""
    for suffix in SUFFIXES:
        Path(f"{new}{suffix}").unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
