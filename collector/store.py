"""The writer's side of bitten_events.db: one process, one connection, one transaction a batch.

Tables begin with an underscore; analysts read the views `events` and one for each event type.
`_event` has a row for every event, and its highest seq is the collector's cursor. Texts that
repeat (types, sources, symbols, producers) are stored once, in `_name`. `_gap` has the ranges of
seq that were gone from the journal before they could be stored. `_opening` has a row for each time
that the collector opened the database.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector.columns import rows
from collector.relations import Relation, events_view_sql
from event_bus import database
from event_bus.envelope import Envelope
from event_bus.errors import DatabaseError, DatabaseUnavailable, SchemaError
from event_bus.event_schema import EventType, Registry
from event_bus.subscriber import Batch

log = logging.getLogger(__name__)

APPLICATION_ID = 0x42495445  # "BITE"
VERSION = 1
BUSY_TIMEOUT_MS = 500
"""Short, because nothing else happens meanwhile, a stop included; the caller tries again."""

CACHE_KIB = 8_000
MAX_CACHED_NAMES = 50_000

_SCHEMA = """
CREATE TABLE _meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE _name (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE _relation (type INTEGER PRIMARY KEY, definition TEXT NOT NULL);
CREATE TABLE _count (type INTEGER PRIMARY KEY, stored INTEGER NOT NULL);
CREATE TABLE _batch (first_seq INTEGER PRIMARY KEY, received_at REAL NOT NULL);
CREATE TABLE _gap (
    first_seq INTEGER PRIMARY KEY, last_seq INTEGER NOT NULL, found_at REAL NOT NULL);
CREATE TABLE _event (
    seq INTEGER PRIMARY KEY, type INTEGER NOT NULL, timestamp REAL NOT NULL, source INTEGER,
    user_id TEXT, correlation_id TEXT, causation_id TEXT, producer INTEGER, n, data TEXT);
CREATE INDEX _event_type ON _event (type);
CREATE INDEX _event_timestamp ON _event (timestamp);
CREATE INDEX _event_source ON _event (source);
CREATE INDEX _event_user_id ON _event (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX _event_correlation_id ON _event (correlation_id) WHERE correlation_id IS NOT NULL;
"""

_ADD_COUNT = (
    "INSERT INTO _count VALUES (?,?) ON CONFLICT DO UPDATE SET stored = stored + excluded.stored"
)
_ADD_META = (
    "INSERT INTO _meta VALUES (?,?) ON CONFLICT DO UPDATE SET value = value + excluded.value"
)
LAST_SEQ = (
    "SELECT max(coalesce((SELECT max(seq) FROM _event), 0),"
    " coalesce((SELECT max(last_seq) FROM _gap), 0))"
)
_OPENING = (
    "CREATE TABLE IF NOT EXISTS _opening"
    " (id INTEGER PRIMARY KEY, token TEXT NOT NULL, last_seq INTEGER NOT NULL)"
)
_NOTE_OPENING = f"INSERT INTO _opening (token, last_seq) VALUES (?, ({LAST_SEQ}))"
"""An older copy of the database begins lower again: so an audit knows what it may rely on."""


class Names(dict[str | None, int | None]):
    """Text to its id in `_name`, added when it is new. Works within the store's transaction."""

    def __init__(self, db: apsw.Connection) -> None:
        super().__init__()
        self._db = db
        self.forget()

    def forget(self) -> None:
        """Drop what is cached, because a rollback may have undone it or because it is too much."""
        self.clear()
        self[None] = None

    def __missing__(self, name: str) -> int:
        row = self._db.execute("SELECT id FROM _name WHERE name = ?", (name,)).fetchone()
        if row is None:
            self._db.execute("INSERT INTO _name (name) VALUES (?)", (name,))
            row = (self._db.last_insert_rowid(),)
        if len(self) > MAX_CACHED_NAMES:
            self.forget()
        self[name] = row[0]
        return int(row[0])


class Store:
    """Opens or creates the database for writing.

    Raises DatabaseUnavailable where trying again helps and DatabaseError where it does not, also
    from every method. A method that raises has changed nothing.
    """

    def __init__(self, path: Path, registry: Registry) -> None:
        self.path = path
        try:
            # SQLite gives the files beside it the same rights.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            pass  # opened below
        except OSError as e:
            raise DatabaseError(
                f"cannot create {path}: {e.strerror}",
                hint="make its directory writable, or set BITTEN_DB to a file elsewhere",
            ) from e
        with self._errors("open"):
            self._db = database.connect(path, busy_timeout_ms=BUSY_TIMEOUT_MS)
        self._names = Names(self._db)
        self._relations: dict[str, Relation] = {}
        try:
            with self._errors("open"):
                self._prepare()
            self.learn(registry)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        new = is_blank(self._db)
        if not new:
            check_version(self._db, self.path)
        self._db.execute("PRAGMA journal_mode=WAL")
        # The journal may be cut as soon as this is stored: a power loss must not undo it then.
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        self._db.execute("PRAGMA wal_autocheckpoint=4000")  # 16 MB: a twentieth faster than 4 MB
        self._db.execute("PRAGMA journal_size_limit=67108864")
        if new:
            with self._transaction():
                self._db.execute(_SCHEMA)
                self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version={VERSION}")
        with self._transaction():
            self._db.execute(_OPENING)
            self._db.execute(_NOTE_OPENING, (secrets.token_hex(8),))
        self._inode = self.path.stat().st_ino

    @property
    def last_seq(self) -> int:
        """Everything up to here is stored or recorded as a gap; 0 at the beginning."""
        return int(self._value(LAST_SEQ))

    def learn(self, registry: Registry) -> None:
        """Make tables and views for event types, and columns for properties, that are new.

        A type that cannot have a table is named in the log; its events are kept as JSON.
        """
        with self._transaction():
            stored: dict[int, Relation] = {
                type_id: msgspec.json.decode(definition, type=Relation)
                for type_id, definition in self._db.execute(
                    "SELECT type, definition FROM _relation"
                )
            }
            for event_type in registry:
                if not event_type.storage.live_only:
                    try:
                        self._learn_type(event_type, stored)
                    except SchemaError as e:
                        log.error(
                            "no table for %s, its events are kept as JSON: %s", event_type.name, e
                        )
            self._make_view("events", events_view_sql(sorted(stored.items())))
        self._relations = {r.event_type: r for r in stored.values()}

    def _learn_type(self, event_type: EventType, stored: dict[int, Relation]) -> None:
        wanted = Relation.of(event_type)
        type_id = self._value("SELECT id FROM _name WHERE name = ?", event_type.name)
        old = stored.get(type_id)
        if old is None:
            for other in stored.values():
                if other.table.lower() == wanted.table.lower():
                    raise SchemaError(
                        f"{event_type.path}: x-bitten.table: {wanted.table!r} holds the events"
                        f" of type {other.event_type}",
                        hint="choose another name",
                    )
            type_id = self._names[event_type.name]
            self._db.execute(wanted.table_sql())
        else:
            for conflict in wanted.conflicts(old):
                log.warning("%s: %s; kept as it is", event_type.path, conflict)
            wanted = wanted.merged(old)
            for column in wanted.columns[len(old.columns) :]:
                self._db.execute(wanted.column_sql(column))
        for sql in wanted.index_sql():
            self._db.execute(sql)
        if wanted != old:
            self._db.execute(
                "INSERT OR REPLACE INTO _relation VALUES (?,?)",
                (type_id, msgspec.json.encode(wanted).decode()),
            )
        self._make_view(wanted.table, wanted.view_sql())
        stored[type_id] = wanted

    def _make_view(self, name: str, sql: str) -> None:
        if self._value("SELECT sql FROM sqlite_master WHERE name = ?", name) != sql:
            self._db.execute(f'DROP VIEW IF EXISTS "{name}"')
            self._db.execute(sql)

    def write(self, batches: list[Batch], journal_id: str) -> int:
        """Store batches in one transaction; returns how many events were new.

        What is stored already is counted as received and otherwise left out; a hole in front of a
        batch is refused.
        """
        self.check_file()
        new = 0
        with self._transaction():
            self._bind(journal_id)
            next_seq = self.last_seq + 1
            for batch in batches:
                if batch.first_seq > next_seq:
                    raise DatabaseError(
                        f"events {next_seq} to {batch.first_seq - 1} did not arrive"
                    )
                events = batch.events[next_seq - batch.first_seq :]
                if events:
                    self._write_events(next_seq, batch.received_at, events)
                    new += len(events)
                    next_seq += len(events)
            self._db.execute(_ADD_META, ("events_received", sum(len(b.events) for b in batches)))
        return new

    def _write_events(self, first_seq: int, received_at: float, events: list[Envelope]) -> None:
        names = self._names
        types = [e.event_type for e in events]
        by_type: dict[str, list[int]] = defaultdict(list)
        for i, event_type in enumerate(types):
            by_type[event_type].append(i)
        exact: list[str | None] = [None] * len(events)
        for event_type, places in by_type.items():
            relation = self._relations.get(event_type)
            datas = [events[i].data for i in places]
            misfits: Any = range(len(datas))
            if relation is not None:
                columns, misfits = rows(relation, datas, names)
                self._db.executemany(
                    relation.insert_sql(),
                    zip([first_seq + i for i in places], *columns, strict=True),
                )
            for i in misfits:
                exact[places[i]] = msgspec.json.encode(datas[i]).decode()
            self._db.execute(_ADD_COUNT, (names[event_type], len(places)))
        producers, ns = self._split_ids([e.event_id for e in events])
        # Columns zipped, as in `rows`: a generator of rows took twice as long (`scripts/bench`).
        self._db.executemany(
            "INSERT INTO _event VALUES (?,?,?,?,?,?,?,?,?,?)",
            zip(
                range(first_seq, first_seq + len(events)),
                [names[t] for t in types],
                [e.timestamp for e in events],
                [names[e.source or None] for e in events],
                [e.user_id or None for e in events],
                [e.correlation_id or None for e in events],
                [e.causation_id or None for e in events],
                producers,
                ns,
                exact,
                strict=True,
            ),
        )
        self._db.execute("INSERT INTO _batch VALUES (?,?)", (first_seq, received_at))

    def _split_ids(self, ids: list[str]) -> tuple[list[int | None], list[int | str]]:
        """Ids as (id of the producer's token, n); a foreign id as (None, the id itself)."""
        heads = [i[:21] for i in ids]
        tails = [i[21:] for i in ids]
        producers = {h: self._names[h[:20]] for h in set(heads) if h[20:] == "-"}
        try:
            ns = list(map(int, tails))
        except ValueError:
            ns = []
        alike = len(producers) == len(set(heads)) and list(map(str, ns)) == tails
        if alike and min(ns) > 0 and max(ns) < 1 << 63:
            return [producers[h] for h in heads], ns  # type: ignore[return-value]
        split = [_split_id(i) for i in ids]
        return [self._names[token] for token, _ in split], [n for _, n in split]

    def record_gap(self, first_seq: int, last_seq: int, journal_id: str) -> int:
        """Note that these events can no longer be stored; returns how many they are."""
        with self._transaction():
            self._bind(journal_id)
            self._db.execute("INSERT INTO _gap VALUES (?,?,?)", (first_seq, last_seq, time.time()))
        return last_seq - first_seq + 1

    def _bind(self, journal_id: str) -> None:
        self.check_journal(journal_id)
        self._db.execute("INSERT OR IGNORE INTO _meta VALUES ('journal_id', ?)", (journal_id,))

    def check_journal(self, journal_id: str) -> None:
        """Raise DatabaseError unless the events stored here came from that journal."""
        known = self._value("SELECT value FROM _meta WHERE key = 'journal_id'")
        if known not in (None, journal_id):
            raise DatabaseError(
                f"{self.path} was filled from journal {known}, the bus now writes {journal_id}",
                hint=f"restore that journal.db, or {_aside(self.path)} to begin a new database",
            )

    def check_file(self) -> None:
        """Raise DatabaseError if the file was removed or replaced: its rows would go nowhere."""
        try:
            inode = self.path.stat().st_ino
        except OSError:
            inode = -1
        if inode != self._inode:
            raise DatabaseError(
                f"{self.path} was removed or replaced while the collector had it open",
                hint="start the collector again; a new database is filled from the journal",
            )

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

    @contextlib.contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except apsw.Error as e:
            passing = isinstance(e, apsw.BusyError | apsw.FullError | apsw.IOError)
            kind = DatabaseUnavailable if passing else DatabaseError
            raise kind(f"cannot {verb} {self.path}: {e}", hint=_hint(e, self.path)) from e


def is_blank(db: apsw.Connection) -> bool:
    """True if nothing was ever stored here: a new file, or one whose making was cut short."""
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    application = db.execute("PRAGMA application_id").fetchone()
    return tables == (0,) and application == (0,)


def check_version(db: apsw.Connection, path: Path) -> None:
    """Raise DatabaseError unless this is an events database of the version known here."""
    (application,) = db.execute("PRAGMA application_id").fetchone() or (0,)
    (version,) = db.execute("PRAGMA user_version").fetchone() or (0,)
    if application != APPLICATION_ID:
        raise DatabaseError(
            f"{path} is an SQLite database of another program",
            hint=f"{_aside(path)} or set BITTEN_DB to another file",
        )
    if version != VERSION:
        raise DatabaseError(
            f"{path} has version {version}, this program knows {VERSION}",
            hint=f"install the bitten-event-bus that wrote it, or {_aside(path)};"
            " a new one is filled from the journal",
        )


def _split_id(event_id: str) -> tuple[str | None, int | str]:
    token, tail = event_id[:20], event_id[21:]
    if event_id[20:21] == "-" and tail.isascii() and tail.isdigit() and tail[0] != "0":
        return token, int(tail) if len(tail) < 19 else tail
    return None, event_id


def _aside(path: Path) -> str:
    return f"move it aside (mv {path} {path}.old)"


def _hint(error: apsw.Error, path: Path) -> str:
    if isinstance(error, apsw.BusyError):
        return "end the other program's transaction; nothing is lost, events wait in the journal"
    if isinstance(error, apsw.FullError):
        return "free some disk space; nothing is lost, events wait in the journal"
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return f"{_aside(path)}; a new one is filled from the journal"
    return "check that the file and its directory are writable, and the disk"
