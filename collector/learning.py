"""What the database knows of event types: their relations, and the names that they share.

Everything here works within the store's transaction.
"""

from __future__ import annotations

import logging
from typing import Any

import apsw
import msgspec

from collector.relations import MAX_INLINE_COLUMNS, Relation, events_view_sql
from event_bus.errors import SchemaError
from event_bus.event_schema import EventType, Registry

log = logging.getLogger(__name__)

MAX_CACHED_NAMES = 50_000


class Names(dict[str | None, int | None]):
    """Text to its id in `_name`, added when it is new."""

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


class Learning:
    """Makes what the types of a registry need."""

    def __init__(self, db: apsw.Connection, names: Names) -> None:
        self._db = db
        self._names = names

    def learn(self, registry: Registry) -> list[Relation]:
        """Every relation that is stored then."""
        stored: dict[int, Relation] = {
            type_id: msgspec.json.decode(definition, type=Relation)
            for type_id, definition in self._db.execute("SELECT type, definition FROM _relation")
        }
        # The inline ones first: 1 as the id of the commonest type takes no space in a row.
        for event_type in sorted(registry, key=lambda t: not t.storage.inline):
            if not event_type.storage.live_only:
                try:
                    self._learn_type(event_type, stored)
                except SchemaError as e:
                    log.error(
                        "no table for %s, its events are kept as JSON: %s", event_type.name, e
                    )
        self._make_view("events", events_view_sql(sorted(stored.items())))
        return list(stored.values())

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
            inline = sum(len(r.columns) for r in stored.values() if r.inline)
            if wanted.inline and inline + len(wanted.columns) > MAX_INLINE_COLUMNS:
                log.warning(
                    "%s: x-bitten.inline: more than %d columns of inline types; stored beside them",
                    event_type.path,
                    MAX_INLINE_COLUMNS,
                )
                wanted = msgspec.structs.replace(wanted, inline=False)
            type_id = self._names[event_type.name]
            for sql in wanted.table_sql():
                self._db.execute(sql)
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
        self._make_view(wanted.table, wanted.view_sql(type_id))
        stored[type_id] = wanted

    def _make_view(self, name: str, sql: str) -> None:
        if self._value("SELECT sql FROM sqlite_master WHERE name = ?", name) != sql:
            self._db.execute(f'DROP VIEW IF EXISTS "{name}"')
            self._db.execute(sql)

    def _value(self, sql: str, *values: Any) -> Any:
        row = self._db.execute(sql, values).fetchone()
        return row[0] if row else None
