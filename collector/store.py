"""The writer's side of bitten_events.db: one process, one connection, one transaction a batch.

Tables begin with an underscore; analysts read the views `events` and one for each event type.
`_event` has a row for every event, and its highest seq is the collector's cursor. `_batch` has a
row for every stretch of events that were received together and whose ids are one process's,
counting up from `n`; an id of another form is an `n` without a producer. So an event without its
batch has no id. Texts that repeat (types, sources, symbols, producers) are stored once, in `_name`.
`_gap` has the ranges of seq that were gone from the journal before they could be stored, and why.
`_opening` has a row for each time that the collector opened the database.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector import layout
from collector.columns import rows
from collector.layout import LAST_SEQ, aside
from collector.learning import Learning, Names
from event_bus import database
from event_bus.envelope import Envelope
from event_bus.errors import DatabaseError, DatabaseReplaced, DatabaseUnavailable
from event_bus.event_schema import Registry
from event_bus.subscriber import Batch

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 500
"""Short, because nothing else happens meanwhile, a stop included; the caller tries again."""

CACHE_KIB = 7_000
COPIED_PAGES = 2_000
BLOCKS = 500, 50, 1
"""Rows that are inserted by one statement, as long as there are so many."""

MAX_PARAMETERS = 7_500
"""In one statement: apsw keeps none of more than 16 KiB prepared."""

_ADD_COUNT = (
    "INSERT INTO _count VALUES (?,?) ON CONFLICT DO UPDATE SET stored = stored + excluded.stored"
)
_ADD_META = (
    "INSERT INTO _meta VALUES (?,?) ON CONFLICT DO UPDATE SET value = value + excluded.value"
)


class Store:
    """Opens or creates the database for writing.

    Raises DatabaseUnavailable where trying again helps, DatabaseCorrupt where a new file does, and
    DatabaseError where neither does, also from every method. A method that raises has changed
    nothing.
    """

    def __init__(self, path: Path, registry: Registry) -> None:
        self.path = path
        self._paths = [Path(f"{path}{suffix}") for suffix in layout.SUFFIXES]
        with contextlib.suppress(FileExistsError):
            layout.create(path)
        with self._errors("open"):
            self._db = database.connect(path, busy_timeout_ms=BUSY_TIMEOUT_MS)
        self._names = Names(self._db)
        try:
            with self._errors("open"):
                self._prepare()
            self.learn(registry)
        except BaseException:
            self.abandon()
            raise
        self._files = [_identity(p) for p in self._paths]

    def _prepare(self) -> None:
        new = layout.is_blank(self._db)
        if not new:
            layout.check_version(self._db, self.path)
            layout.check_tables(self._db, self.path)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")  # whatever was here before is on disk then
        self._db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        # 32 MB: a page that many batches change, as those of an index, is copied less often.
        self._db.execute("PRAGMA wal_autocheckpoint=8000")
        self._db.execute("PRAGMA journal_size_limit=67108864")
        with self._transaction():
            if new:
                layout.make_tables(self._db)
            layout.bring_up_to_date(self._db)
            layout.note_opening(self._db)
        self._db.execute("PRAGMA synchronous=NORMAL")
        self.synced_seq = self.last_seq
        """What is stored up to here survives a power loss."""

    @property
    def last_seq(self) -> int:
        """Everything up to here is stored or recorded as a gap; 0 at the beginning."""
        return int(self._value(LAST_SEQ))

    def learn(self, registry: Registry) -> None:
        """Make tables and views for event types, and columns for properties, that are new.

        A type that cannot have a table is named in the log; its events are kept as JSON.
        """
        # An index over many rows is sorted in files. A statement that inserts many rows keeps in
        # memory what it may have to undo.
        self._db.execute("PRAGMA temp_store=FILE")
        try:
            with self._transaction():
                relations = Learning(self._db, self._names).learn(registry)
        finally:
            self._db.execute("PRAGMA temp_store=MEMORY")
        self._relations = {r.event_type: r for r in relations}
        self._inline = [r.sql_name(c.name) for r in relations if r.inline for c in r.columns]
        self._insert_event = layout.insert_event_sql(self._inline)

    def write(self, batches: list[Batch], journal_id: str) -> int:
        """Store batches in one transaction; returns how many events were new.

        What is stored already is counted as received and otherwise left out; a hole in front of a
        batch is refused.
        """
        if not self.is_at_path():
            raise self._replaced()
        with self._transaction():
            self._bind(journal_id)
            first_seq = self.last_seq + 1
            events: list[Envelope] = []
            for batch in batches:
                next_seq = first_seq + len(events)
                if batch.first_seq > next_seq:
                    raise DatabaseError(
                        f"events {next_seq} to {batch.first_seq - 1} did not arrive"
                    )
                new = batch.events[next_seq - batch.first_seq :]
                self._write_ids(next_seq, batch.received_at, [e.event_id for e in new])
                events += new
            if events:
                self._write_events(first_seq, events)
            self._db.execute(_ADD_META, ("events_received", sum(len(b.events) for b in batches)))
        return len(events)

    def _write_events(self, first_seq: int, events: list[Envelope]) -> None:
        names = self._names
        types = [e.event_type for e in events]
        by_type: dict[str, list[int]] = defaultdict(list)
        for i, event_type in enumerate(types):
            by_type[event_type].append(i)
        exact: list[str | None] = [None] * len(events)
        inline: dict[str, list[Any]] = {name: [None] * len(events) for name in self._inline}
        for event_type, places in by_type.items():
            relation = self._relations.get(event_type)
            datas = [events[i].data for i in places]
            misfits: Any = range(len(datas))
            if relation is not None:
                columns, misfits = rows(relation, datas, names)
                if relation.inline:
                    for c, values in zip(relation.columns, columns, strict=True):
                        column = inline[relation.sql_name(c.name)]
                        for i, value in zip(places, values, strict=True):
                            column[i] = value
                else:
                    self._insert(relation.insert_sql(), [first_seq + i for i in places], *columns)
            for i in misfits:
                exact[places[i]] = msgspec.json.encode(datas[i]).decode()
            self._db.execute(_ADD_COUNT, (names[event_type], len(places)))
        self._insert(
            self._insert_event,
            range(first_seq, first_seq + len(events)),
            [names[t] for t in types],
            [e.timestamp for e in events],
            [names[e.source or None] for e in events],
            [e.user_id or None for e in events],
            [e.correlation_id or None for e in events],
            [e.causation_id or None for e in events],
            exact,
            *inline.values(),
        )

    def _insert(self, sql: str, *columns: Sequence[Any]) -> None:
        """Insert rows, given by column. SQLite opens table and indexes once a statement, so that
        many rows in one are faster; `scripts/bench --only parts` times it."""
        width = len(columns)
        values: list[Any] = [None] * (len(columns[0]) * width)
        for i, column in enumerate(columns):
            values[i::width] = column
        row_sql = sql[sql.index("(?") :]
        done = 0
        for rows_at_once in BLOCKS:
            size = rows_at_once * width
            starts = range(done, len(values) - size + 1, size)
            if starts and (size <= MAX_PARAMETERS or rows_at_once == 1):
                block_sql = sql + f",{row_sql}" * (rows_at_once - 1)
                self._db.executemany(block_sql, (values[i : i + size] for i in starts))
                done = starts[-1] + size

    def _write_ids(self, first_seq: int, received_at: float, ids: list[str]) -> None:
        """A row for every stretch of ids that count up."""
        stretches = []
        token: str | None = None
        n: int | str = 0
        next_id = ""
        for seq, event_id in enumerate(ids, first_seq):
            if event_id != next_id:
                token, n = _split_id(event_id)
                stretches.append((seq, received_at, self._names[token], n))
            if isinstance(n, int):
                n += 1
                next_id = f"{token}-{n}"
            else:
                next_id = ""
        self._db.executemany("INSERT INTO _batch VALUES (?,?,?,?)", stretches)

    def sync(self) -> None:
        """Have on disk what is stored. Between two syncs a commit does not wait for the disk, and a
        power loss may undo it: the journal must not be cut behind it yet."""
        last_seq = self.last_seq
        if last_seq == self.synced_seq:
            return
        with self._errors("write"):
            self._db.execute("PRAGMA synchronous=FULL")
        try:
            with self._transaction():  # one fsync of the log covers all commits before it
                self._db.execute(
                    "INSERT OR REPLACE INTO _meta VALUES ('synced_seq', ?)", (last_seq,)
                )
        finally:
            self._db.execute("PRAGMA synchronous=NORMAL")
        self.synced_seq = last_seq

    def record_gap(self, first_seq: int, last_seq: int, journal_id: str, reason: str) -> int:
        """Note that these events can no longer be stored, and why; returns how many they are."""
        with self._transaction():
            self._bind(journal_id)
            self._insert_gap(first_seq, last_seq, reason)
        return last_seq - first_seq + 1

    def _insert_gap(self, first_seq: int, last_seq: int, reason: str) -> None:
        self._db.execute(
            "INSERT INTO _gap (first_seq, last_seq, found_at, reason) VALUES (?,?,?,?)",
            (first_seq, last_seq, time.time(), reason),
        )

    def event_id(self, seq: int) -> str | None:
        """The id of the event stored under that seq; None if there is none."""
        known: str | None = self._value("SELECT event_id FROM events WHERE seq = ?", seq)
        return known

    @property
    def journal_id(self) -> str | None:
        """The journal that the events stored here came from; None before the first one."""
        known: str | None = self._value("SELECT value FROM _meta WHERE key = 'journal_id'")
        return known

    def _bind(self, journal_id: str) -> None:
        self.check_journal(journal_id)
        self._db.execute("INSERT OR IGNORE INTO _meta VALUES ('journal_id', ?)", (journal_id,))

    def check_journal(self, journal_id: str) -> None:
        """Raise DatabaseError unless the events stored here came from that journal."""
        known = self.journal_id
        if known not in (None, journal_id):
            raise DatabaseError(
                f"{self.path} was filled from journal {known}, the bus now writes {journal_id}",
                hint=f"restore that journal.db, or {aside(self.path)} to begin a new database",
            )

    def follow(self, journal_id: str, origin_seq: int) -> None:
        """Go on with a journal that was begun after another was lost.

        `origin_seq` is the first seq it ever had. Raises DatabaseError if that is not above all
        that is stored here: then it is no successor.
        """
        if origin_seq <= self.last_seq:
            self.check_journal(journal_id)
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO _meta VALUES ('journal_id', ?)", (journal_id,))

    def check_file(self) -> None:
        """Raise DatabaseReplaced if a file of it was removed or replaced: rows would go nowhere."""
        now = [_identity(p) for p in self._paths]
        if now != self._files or None in now:  # removed even before it was looked at
            raise self._replaced()

    def _replaced(self) -> DatabaseReplaced:
        return DatabaseReplaced(
            f"{self.path} was removed or replaced while the collector had it open"
        )

    def is_at_path(self) -> bool:
        """True if the file at the path is the one that is open, whatever became of its -wal."""
        return _identity(self.path) == self._files[0]

    def left_behind(self) -> list[Path]:
        """Which of our -wal and -shm are still there."""
        beside = list(zip(self._paths, self._files, strict=True))[1:]
        return [path for path, ours in beside if ours is not None and ours == _identity(path)]

    def copy_to(self, path: Path, on_step: Callable[[], None]) -> None:
        """Write all of it, also of a file that was removed, to a new file, synced to disk.

        `on_step` is called every so often meanwhile.
        """
        path.unlink(missing_ok=True)
        layout.create(path)
        with layout.errors("write", path):
            copy = database.connect(path)
            try:
                with copy.backup("main", self._db, "main") as backup:
                    while not backup.done:
                        backup.step(COPIED_PAGES)
                        on_step()
            finally:
                copy.close()

    def shrink_wal(self) -> bool:
        """Copy the WAL into the database and truncate it; False if a reader is in the way."""
        try:
            with self._errors("write"):
                frames, copied = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
                if copied < frames:  # so that nothing waits for a reader that will not end
                    return False
                self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except DatabaseUnavailable:
            return False
        return True

    def abandon(self) -> None:
        """Close it and leave its files as they are."""
        self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._db.close()

    def close(self) -> None:
        self._db.close()

    def _value(self, sql: str, *values: Any) -> Any:
        with self._errors("read"):
            row = self._db.execute(sql, values).fetchone()
        return row[0] if row else None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors("write"):
            # Immediate: a deferred one that turns to writing fails at once if another wrote.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if not self._db.get_autocommit():
                    self._db.execute("ROLLBACK")
                self._names.forget()
                raise

    def _errors(self, verb: str) -> contextlib.AbstractContextManager[None]:
        return layout.errors(verb, self.path)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _split_id(event_id: str) -> tuple[str | None, int | str]:
    """The producer's token and n, as text from 19 digits on: SQLite has no more; of a foreign id
    None and the id itself."""
    token, tail = event_id[:20], event_id[21:]
    if event_id[20:21] == "-" and tail.isascii() and tail.isdigit() and tail[0] != "0":
        return token, int(tail) if len(tail) < 19 else tail
    return None, event_id
