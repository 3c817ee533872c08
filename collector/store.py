"""The writer's side of bitten_events.db: one process, one connection, one transaction a batch.

Tables begin with an underscore; analysts read the views `events` and one for each event type.
`_event` has a row for every event, and its highest seq is the collector's cursor. Texts that
repeat (types, sources, users, symbols, producers) are stored once, in `_name`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector.relations import Relation, events_view_sql, rows
from event_bus.errors import DatabaseError
from event_bus.event_schema import Registry
from event_bus.subscriber import Batch

log = logging.getLogger(__name__)

APPLICATION_ID = 0x42495445  # "BITE"
VERSION = 1
BUSY_TIMEOUT_MS = 5_000
MAX_CACHED_NAMES = 200_000

_SCHEMA = """
CREATE TABLE _meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE _name (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE _relation (type INTEGER PRIMARY KEY, definition TEXT NOT NULL);
CREATE TABLE _count (type INTEGER PRIMARY KEY, stored INTEGER NOT NULL);
CREATE TABLE _batch (first_seq INTEGER PRIMARY KEY, received_at REAL NOT NULL);
CREATE TABLE _event (
    seq INTEGER PRIMARY KEY, type INTEGER NOT NULL, timestamp REAL NOT NULL, source INTEGER,
    user_id TEXT, correlation_id TEXT, causation_id TEXT, producer INTEGER, n, data TEXT);
CREATE INDEX _event_type ON _event (type);
CREATE INDEX _event_timestamp ON _event (timestamp);
CREATE INDEX _event_source ON _event (source);
CREATE INDEX _event_user_id ON _event (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX _event_correlation_id ON _event (correlation_id) WHERE correlation_id IS NOT NULL;
"""


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
        self[""] = None

    def __missing__(self, name: str) -> int:
        if name is msgspec.UNSET:
            self[name] = None  # type: ignore[unreachable]
            return None
        row = self._db.execute("SELECT id FROM _name WHERE name = ?", (name,)).fetchone()
        if row is None:
            row = self._db.execute("INSERT INTO _name (name) VALUES (?) RETURNING id", (name,)).fetchone()
        if len(self) > MAX_CACHED_NAMES:
            self.forget()
        self[name] = row[0]
        return int(row[0])


class Store:
    """Opens or creates the database for writing. Raises DatabaseError, also from `write`."""

    def __init__(self, path: Path, registry: Registry) -> None:
        self.path = path
        new = not path.exists() or path.stat().st_size == 0
        try:
            old_umask = os.umask(0o077)
            try:
                self._db = apsw.Connection(str(path))
            finally:
                os.umask(old_umask)
            self._db.set_busy_timeout(BUSY_TIMEOUT_MS)
            if new:
                self._create()
            self._check_version()
            # A commit lost with the power is fetched again: the journal has it.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA cache_size=-16000")
            self._db.execute("PRAGMA journal_size_limit=67108864")
            self._names = Names(self._db)
            self._relations: dict[str, Relation] = {}
            self.learn(registry)
            self.last_seq: int = self._value("SELECT coalesce(max(seq), 0) FROM _event")
        except apsw.Error as e:
            raise DatabaseError(f"cannot open {path}: {e}", hint=_hint(e)) from e

    def _create(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        with self._transaction():
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version={VERSION}")

    def _check_version(self) -> None:
        check_version(self._db, self.path)

    def learn(self, registry: Registry) -> None:
        """Make tables and views for event types, and columns for properties, that are new."""
        with self._transaction():
            stored = self._stored_relations()
            for event_type in registry:
                if event_type.storage.live_only:
                    continue
                wanted = Relation.of(event_type)
                type_id = self._names[event_type.name]
                old = stored.get(type_id)
                if old is None:
                    self._db.execute(wanted.table_sql())
                else:
                    for conflict in wanted.conflicts(old):
                        log.warning("%s: %s; kept as it is", event_type.path, conflict)
                    wanted = wanted.merged(old)
                    for column in wanted.columns[len(old.columns) :]:
                        self._db.execute(wanted.column_sql(column))
                for sql in wanted.index_sql():
                    self._db.execute(sql)
                stored[type_id] = wanted
                if wanted != old:
                    self._db.execute(
                        "INSERT OR REPLACE INTO _relation VALUES (?,?)",
                        (type_id, msgspec.json.encode(wanted).decode()),
                    )
                    self._db.execute(f'DROP VIEW IF EXISTS "{wanted.table}"')
                    self._db.execute(wanted.view_sql())
            self._db.execute("DROP VIEW IF EXISTS events")
            self._db.execute(events_view_sql(sorted(stored.items())))
        self._relations = {r.event_type: r for r in stored.values()}

    def _stored_relations(self) -> dict[int, Relation]:
        return {
            type_id: msgspec.json.decode(definition, type=Relation)
            for type_id, definition in self._db.execute("SELECT type, definition FROM _relation")
        }

    def write(self, batches: list[Batch], journal_id: str) -> int:
        """Store consecutive batches in one transaction; returns how many events they held.

        Everything or nothing is stored. Raises DatabaseError; with a busy database that is worth
        trying again.
        """
        try:
            with self._transaction():
                self._check_journal(journal_id)
                return sum(self._write_batch(batch) for batch in batches)
        except apsw.Error as e:
            self._names.forget()
            raise DatabaseError(f"cannot write {self.path}: {e}", hint=_hint(e)) from e
        finally:
            self.last_seq = self._value("SELECT coalesce(max(seq), 0) FROM _event")

    def _write_batch(self, batch: Batch) -> int:
        names = self._names
        events = batch.events
        by_type: dict[str, list[int]] = defaultdict(list)
        for i, e in enumerate(events):
            by_type[e.event_type].append(i)
        exact: dict[int, str] = {}
        first_seq = batch.first_seq
        for event_type, places in by_type.items():
            relation = self._relations.get(event_type)
            datas = [events[i].data for i in places]
            misfits: Any = range(len(datas))
            if relation is not None:
                columns, misfits = rows(relation, datas, names)
                self._db.executemany(
                    relation.insert_sql(), zip([first_seq + i for i in places], *columns, strict=True)
                )
            for i in misfits:
                exact[places[i]] = msgspec.json.encode(datas[i]).decode()
            self._db.execute(
                "INSERT INTO _count VALUES (?1,?2) ON CONFLICT (type) DO UPDATE SET stored = stored + ?2",
                (names[event_type], len(places)),
            )
        self._db.executemany(
            "INSERT INTO _event VALUES (?,?,?,?,?,?,?,?,?,?)", self._event_rows(batch, exact)
        )
        self._db.execute("INSERT INTO _batch VALUES (?,?)", (first_seq, batch.received_at))
        return len(events)

    def _event_rows(self, batch: Batch, exact: dict[int, str]) -> Iterator[tuple[Any, ...]]:
        names = self._names
        for i, e in enumerate(batch.events):
            event_id = e.event_id
            tail = event_id[21:]
            if event_id[20:21] == "-" and tail.isdigit() and tail.isascii() and tail[0] != "0":
                producer, n = names[event_id[:20]], int(tail) if len(tail) < 19 else tail
            else:
                producer, n = None, event_id
            yield (
                batch.first_seq + i,
                names[e.event_type],
                e.timestamp,
                names[e.source],
                e.user_id or None,
                e.correlation_id or None,
                e.causation_id or None,
                producer,
                n,
                exact.get(i),
            )

    def _check_journal(self, journal_id: str) -> None:
        known = self.journal_id
        if known is None:
            self._db.execute("INSERT INTO _meta VALUES ('journal_id', ?)", (journal_id,))
        elif known != journal_id:
            raise DatabaseError(
                f"{self.path} was filled from journal {known}, the bus now writes {journal_id}",
                hint="restore that journal.db, or move the database aside to begin a new one",
            )

    @property
    def journal_id(self) -> str | None:
        """Identity of the journal that the events came from; None while there are none."""
        row = self._db.execute("SELECT value FROM _meta WHERE key = 'journal_id'").fetchone()
        return row[0] if row else None

    def close(self) -> None:
        self._db.close()

    def _value(self, sql: str) -> Any:
        return self._db.execute(sql).fetchone()[0]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # Immediate: a deferred one that turns to writing fails at once when somebody else wrote.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if not self._db.get_autocommit():
                self._db.execute("ROLLBACK")
            raise


def check_version(db: apsw.Connection, path: Path) -> None:
    """Raise DatabaseError unless this is an events database of the version known here."""
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise DatabaseError(
            f"{path} is an SQLite database of another program",
            hint=f"move it aside (mv {path} {path}.old) or set BITTEN_DB",
        )
    if version != VERSION:
        raise DatabaseError(
            f"{path} has version {version}, this program knows {VERSION}",
            hint=f"install the bitten-event-bus that wrote it, or move it aside (mv {path} {path}.old);"
            " a new one is filled from the journal",
        )


def _hint(error: apsw.Error) -> str:
    if isinstance(error, apsw.BusyError):
        return "another program holds a write lock; nothing is lost, events wait in the journal"
    if isinstance(error, apsw.FullError):
        return "free some disk space; events wait in the journal"
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return "move it aside; a new one is filled from the journal"
    return "check that the directory exists and is writable"
