"""From an event type's schema to its table and its view. Pure.

An event has a row in `_event`, and one in its type's own table with a column for each property; of
an `inline` type these columns are in `_event` too. A property is stored there alone, and
`events.data` is put together from the columns when somebody reads it. The exact JSON is kept beside
the columns only for an event that they cannot give back exactly: a field the schema does not list,
a null, a number with more than 15 significant digits, a NUL.

A `decimal` column holds 1.08451 as the integer 108451 where `digits` is 5: three bytes, not eight.
An integer that was sent is a float there, and so is a number with more digits; the latter is not
whole, which tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from event_bus.errors import SchemaError
from event_bus.event_schema import EventType

_SQL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_OWN_COLUMNS = {"seq", "created_at", "received_at"}

MAX_COLUMNS = 200
"""Properties past these are kept in the JSON alone: SQLite bounds the depth of an expression."""

MAX_INLINE_COLUMNS = 40
"""Of all inline types together: each of them costs every event a byte."""

MAX_INDEXES = 30
"""Indexes of a type: SQLite joins at most 64 tables."""

# Kind of a column to its declared type. Numbers are declared without one: SQLite then keeps
# 85 an integer and 85.0 a float, as they were sent.
_DECLARED = {
    "text": "TEXT",
    "name": "INTEGER",
    "bytes": "BLOB",
    "number": "",
    "decimal": "",
    "integer": "INTEGER",
    "scalar": "",
    "boolean": "INTEGER",
    "json": "TEXT",
}


class Column(msgspec.Struct, frozen=True):
    """`kind` is one of the keys above; `name` columns hold an id of the table `_name`, and
    `decimal` columns numbers with `digits` after the point."""

    name: str
    kind: str
    digits: int = 0


class Relation(msgspec.Struct, frozen=True):
    """How one event type is stored: `table` is the view that analysts read."""

    event_type: str
    table: str
    columns: tuple[Column, ...]
    indexes: tuple[str, ...]
    inline: bool = False

    @classmethod
    def of(cls, event_type: EventType) -> Relation:
        """The relation that a schema asks for. Raises SchemaError if there can be none."""
        columns: dict[str, Column] = {}
        for name, schema in event_type.properties.items():
            kind = _kind(schema, name in event_type.storage.intern)
            digits = event_type.storage.decimals.get(name, 0) if kind == "number" else 0
            if digits and name not in event_type.storage.indexes:
                kind = "decimal"
            if kind and _SQL_NAME.fullmatch(name) and name.lower() not in _OWN_COLUMNS:
                twin = columns.setdefault(name.lower(), Column(name, kind, digits))
                if twin.name != name:
                    raise SchemaError(
                        f"{event_type.path}: {twin.name!r} and {name!r} would be one column",
                        hint="SQL knows no upper and lower case: rename one of them",
                    )
        relation = cls(
            event_type.name,
            event_type.table,
            tuple(columns.values())[:MAX_COLUMNS],
            event_type.storage.indexes,
            event_type.storage.inline,
        )
        problem = relation._problem()
        if problem:
            raise SchemaError(f"{event_type.path}: x-bitten.{problem}")
        return relation

    def _problem(self) -> str | None:
        table = self.table
        if not _SQL_NAME.fullmatch(table) or table.lower().startswith(("_", "sqlite_")):
            return f"table: {table!r} cannot be the name of a table; begin with a letter"
        if table.lower() == "events":
            return f"table: {table!r} is the table of all events; choose another name"
        if len(self.indexes) > MAX_INDEXES:
            return f"indexes: {len(self.indexes)} are too many; at most {MAX_INDEXES}"
        columns = [c.name for c in self.columns]
        for name in self.indexes:
            if name not in columns:
                return f'indexes: {name!r} has no column; its property needs a "type"'
        return None

    def merged(self, stored: Relation) -> Relation:
        """This relation as far as what is stored allows: known columns stay as they are."""
        known = {c.name.lower() for c in stored.columns}
        added = tuple(c for c in self.columns if c.name.lower() not in known)
        columns = (stored.columns + added)[: max(MAX_COLUMNS, len(stored.columns))]
        indexed = {c.name for c in columns if c.kind != "decimal"}
        indexes = tuple(name for name in self.indexes if name in indexed)
        return Relation(self.event_type, stored.table, columns, indexes, stored.inline)

    def conflicts(self, stored: Relation) -> list[str]:
        """What of a stored relation this one would change, in words."""
        found = []
        if stored.table != self.table:
            found.append(f"table {stored.table} would become {self.table}")
        kinds = {c.name: c.kind for c in stored.columns}
        for c in self.columns:
            known = kinds.get(c.name, c.kind)
            if known != c.kind and {known, c.kind} != {"number", "decimal"}:
                found.append(f"column {c.name} is stored as {known}, not as {c.kind}")
            elif known == "decimal" and c.name in self.indexes:
                found.append(f"column {c.name} is stored as decimals, and gets no index")
        return found

    @property
    def rows_table(self) -> str:
        """The table behind the view. No other table of the database begins like this."""
        return "_event" if self.inline else f"_rows_{self.table}"

    def sql_name(self, name: str) -> str:
        """What the column of a property is called in that table."""
        return f"{self.table}.{name}" if self.inline else name

    def table_sql(self) -> list[str]:
        """What makes the columns of a new relation."""
        if self.inline:
            return [self.column_sql(c) for c in self.columns]
        columns = "".join(f', "{c.name}" {_DECLARED[c.kind]}' for c in self.columns)
        return [f'CREATE TABLE "{self.rows_table}" (seq INTEGER PRIMARY KEY{columns})']

    def column_sql(self, column: Column) -> str:
        name, declared = self.sql_name(column.name), _DECLARED[column.kind]
        return f'ALTER TABLE "{self.rows_table}" ADD COLUMN "{name}" {declared}'

    def index_sql(self) -> list[str]:
        table = self.rows_table
        return [
            f'CREATE INDEX IF NOT EXISTS "{table}.{name}" ON "{table}" ("{name}")'
            f' WHERE "{name}" IS NOT NULL'
            for name in map(self.sql_name, self.indexes)
        ]

    def insert_sql(self) -> str:
        return f'INSERT INTO "{self.rows_table}" VALUES (?{",?" * len(self.columns)})'

    def view_sql(self, type_id: int) -> str:
        """The relation that analysts read: seq, times, fields, then what the envelope adds."""
        columns = ["e.seq AS seq", "e.timestamp AS created_at", f"{RECEIVED_AT} AS received_at"]
        joins = []
        for c in self.columns:
            value = self._value(c)
            if c.kind == "name" and c.name in self.indexes:  # a condition on it finds its index
                joins.append(f'LEFT JOIN _name "n_{c.name}" ON "n_{c.name}".id = {value}')
                value = f'"n_{c.name}".name'
            elif c.kind == "name":  # costs nothing where it is not asked for
                value = _name_of(value)
            if c.name == "user_id":
                value = f"coalesce({value}, e.user_id)"
            columns.append(f'{value} AS "{c.name}"')
        own = {c.name.lower() for c in self.columns}
        for name, sql in {
            "source": _name_of("e.source"),
            "user_id": "e.user_id",
            "correlation_id": "e.correlation_id",
        }.items():
            if name not in own:
                columns.append(f"{sql} AS {name}")
        if self.inline:
            # Most events are of it: other conditions find their indexes first.
            where = f" WHERE likelihood(e.type = {type_id}, 0.9)"
            rows = "_event e"
        else:
            where = ""
            columns[0] = "r.seq AS seq"
            rows = f'"{self.rows_table}" r LEFT JOIN _event e ON e.seq = r.seq'
        return (
            f'CREATE VIEW "{self.table}" AS SELECT {", ".join(columns)} '
            f"FROM {' '.join([rows, *joins])}{where}"
        )

    def _value(self, column: Column) -> str:
        """An expression for what a column holds; of a `name`, its id."""
        value = f'{"e" if self.inline else "r"}."{self.sql_name(column.name)}"'
        if column.kind != "decimal":
            return value
        whole = f"CAST({value} AS INTEGER)"
        return (
            f"CASE typeof({value}) WHEN 'integer' THEN {value} / 1e{column.digits}"
            f" WHEN 'real' THEN CASE {whole} WHEN {value} THEN {whole} ELSE {value} END"
            f" ELSE {value} END"
        )

    def json_sql(self) -> str:
        """An expression for the data of the row of `_event e`, as JSON."""
        parts = []
        for c in self.columns:
            key, value = f"',\"{c.name}\":'", self._value(c)
            if c.kind == "name":
                name = f"SELECT {key} || json_quote(name) FROM _name WHERE id = {value}"
                parts.append(f"coalesce(({name}), '')")
            elif c.kind == "boolean":
                word = f"CASE {value} WHEN 1 THEN 'true' WHEN 0 THEN 'false' END"
                parts.append(f"coalesce({key} || {word}, '')")
            elif c.kind == "json":
                parts.append(f"coalesce({key} || {value}, '')")
            elif c.kind != "bytes":
                parts.append(
                    f"CASE WHEN {value} IS NULL THEN '' ELSE {key} || json_quote({value}) END"
                )
        if not parts:
            return "'{}'"
        json = f"'{{' || substr({' || '.join(parts)}, 2) || '}}'"
        if self.inline:
            return json
        return f'(SELECT {json} FROM "{self.rows_table}" r WHERE r.seq = e.seq)'


_OF_BATCH = "(SELECT {} FROM _batch b WHERE b.first_seq <= e.seq ORDER BY b.first_seq DESC LIMIT 1)"
RECEIVED_AT = _OF_BATCH.format("b.received_at")
_EVENT_ID = _OF_BATCH.format(
    "CASE WHEN b.producer IS NULL THEN ''"
    " ELSE (SELECT name FROM _name WHERE id = b.producer) || '-' END"
    " || CASE typeof(b.n) WHEN 'integer' THEN b.n + e.seq - b.first_seq ELSE b.n END"
)


def events_view_sql(relations: Iterable[tuple[int, Relation]]) -> str:
    """The view `events`, given each stored type's id in `_name` and its relation."""
    cases = "".join(f" WHEN {type_id} THEN {r.json_sql()}" for type_id, r in relations)
    data = f"coalesce(e.data, CASE e.type{cases} END)" if cases else "e.data"
    return f"""CREATE VIEW "events" AS SELECT
    e.seq AS seq, {_EVENT_ID} AS event_id,
    t.name AS event_type, e.timestamp AS timestamp, s.name AS source, e.user_id AS user_id,
    e.correlation_id AS correlation_id, e.causation_id AS causation_id,
    {RECEIVED_AT} AS received_at, {data} AS data
    FROM _event e LEFT JOIN _name t ON t.id = e.type LEFT JOIN _name s ON s.id = e.source"""


def _name_of(value: str) -> str:
    return f"(SELECT name FROM _name WHERE id = {value})"


def _kind(schema: Any, interned: bool) -> str | None:
    if not isinstance(schema, dict) or "type" not in schema:
        return None
    types = schema["type"]
    kinds = {types} if isinstance(types, str) else set(types)
    kinds.discard("null")
    if kinds & {"object", "array"}:
        return "json"
    if kinds == {"string"}:
        if schema.get("contentEncoding") == "base64":
            return "bytes"
        return "name" if interned else "text"
    if kinds == {"integer"}:
        return "integer"
    if kinds == {"boolean"}:
        return "boolean"
    if kinds and kinds <= {"number", "integer"}:
        return "number"
    return "scalar" if kinds and "boolean" not in kinds else None
