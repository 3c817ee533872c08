"""From an event type's schema to its table, its view, and the rows of its events. Pure.

Each property with a column is stored there alone, and `events.data` is put together from the
columns when somebody reads it. The exact JSON is kept beside the columns only for an event that
they cannot give back exactly: a field the schema does not list, a null, a number with more than 15
significant digits, a NUL.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from event_bus.event_schema import EventType

_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_OWN_COLUMNS = {"seq", "created_at", "received_at"}

# Kind of a column to its declared type. Numbers are declared without one: SQLite then keeps
# 85 an integer and 85.0 a float, as they were sent.
_DECLARED = {
    "text": "TEXT",
    "name": "INTEGER",
    "bytes": "BLOB",
    "number": "",
    "integer": "INTEGER",
    "scalar": "",
    "boolean": "INTEGER",
    "json": "TEXT",
}


class Column(msgspec.Struct, frozen=True):
    """`kind` is one of the keys above; `name` columns hold an id of the table `_name`."""

    name: str
    kind: str


class Relation(msgspec.Struct, frozen=True):
    """How one event type is stored: `table` is the view analysts read, `_table` holds the rows."""

    event_type: str
    table: str
    columns: tuple[Column, ...]
    indexes: tuple[str, ...]

    @classmethod
    def of(cls, event_type: EventType) -> Relation:
        columns = []
        for name, schema in event_type.properties.items():
            kind = _kind(schema, name in event_type.storage.intern)
            if kind and _COLUMN.fullmatch(name) and name.lower() not in _OWN_COLUMNS:
                columns.append(Column(name, kind))
        return cls(event_type.name, event_type.table, tuple(columns), event_type.storage.indexes)

    def merged(self, stored: Relation) -> Relation:
        """This relation as far as what is stored allows: known columns stay as they are."""
        known = {c.name for c in stored.columns}
        added = tuple(c for c in self.columns if c.name not in known)
        return Relation(self.event_type, stored.table, stored.columns + added, self.indexes)

    def conflicts(self, stored: Relation) -> list[str]:
        """What of a stored relation this one would change, in words."""
        found = []
        if stored.table != self.table:
            found.append(f"table {stored.table} would become {self.table}")
        kinds = {c.name: c.kind for c in stored.columns}
        for c in self.columns:
            if kinds.get(c.name, c.kind) != c.kind:
                found.append(f"column {c.name} is stored as {kinds[c.name]}, not as {c.kind}")
        return found

    def table_sql(self) -> str:
        columns = "".join(f', "{c.name}" {_DECLARED[c.kind]}' for c in self.columns)
        return f'CREATE TABLE "_{self.table}" (seq INTEGER PRIMARY KEY{columns})'

    def column_sql(self, column: Column) -> str:
        return f'ALTER TABLE "_{self.table}" ADD COLUMN "{column.name}" {_DECLARED[column.kind]}'

    def index_sql(self) -> list[str]:
        return [
            f'CREATE INDEX IF NOT EXISTS "_{self.table}_{name}" ON "_{self.table}" ("{name}")'
            f' WHERE "{name}" IS NOT NULL'
            for name in self.indexes
        ]

    def insert_sql(self) -> str:
        return f'INSERT INTO "_{self.table}" VALUES (?{",?" * len(self.columns)})'

    def view_sql(self) -> str:
        """The relation that analysts read: seq, times, fields, then what the envelope adds."""
        columns = ["r.seq AS seq", "e.timestamp AS created_at", f"{RECEIVED_AT} AS received_at"]
        joins = ["LEFT JOIN _event e ON e.seq = r.seq"]
        for c in self.columns:
            if c.kind == "name" and c.name in self.indexes:  # a condition on it finds its index
                columns.append(f'"n_{c.name}".name AS "{c.name}"')
                joins.append(f'LEFT JOIN _name "n_{c.name}" ON "n_{c.name}".id = r."{c.name}"')
            elif c.kind == "name":  # costs nothing where it is not asked for
                value = f'r."{c.name}"'
                columns.append(f'{_name_of(value)} AS "{c.name}"')
            elif c.name == "user_id":
                columns.append('coalesce(r."user_id", e.user_id) AS "user_id"')
            else:
                columns.append(f'r."{c.name}" AS "{c.name}"')
        own = {c.name.lower() for c in self.columns}
        for name, sql in {
            "source": _name_of("e.source"),
            "user_id": "e.user_id",
            "correlation_id": "e.correlation_id",
        }.items():
            if name not in own:
                columns.append(f"{sql} AS {name}")
        return (
            f'CREATE VIEW "{self.table}" AS SELECT {", ".join(columns)} '
            f'FROM "_{self.table}" r {" ".join(joins)}'
        )

    def json_sql(self) -> str:
        """An expression for the data of the row of `_event e`, as JSON."""
        parts = []
        for c in self.columns:
            key, value = f"',\"{c.name}\":'", f'r."{c.name}"'
            if c.kind == "name":
                parts.append(
                    f"coalesce((SELECT {key} || json_quote(name) FROM _name WHERE id = {value}), '')"
                )
            elif c.kind == "boolean":
                parts.append(
                    f"coalesce({key} || CASE {value} WHEN 1 THEN 'true' WHEN 0 THEN 'false' END, '')"
                )
            elif c.kind == "json":
                parts.append(f"coalesce({key} || {value}, '')")
            elif c.kind != "bytes":
                parts.append(
                    f"CASE WHEN {value} IS NULL THEN '' ELSE {key} || json_quote({value}) END"
                )
        if not parts:
            return "'{}'"
        return (
            f"(SELECT '{{' || substr({' || '.join(parts)}, 2) || '}}' "
            f'FROM "_{self.table}" r WHERE r.seq = e.seq)'
        )


RECEIVED_AT = (
    "(SELECT b.received_at FROM _batch b WHERE b.first_seq <= e.seq ORDER BY b.first_seq DESC LIMIT 1)"
)


def events_view_sql(relations: Iterable[tuple[int, Relation]]) -> str:
    """The view `events`, given each stored type's id in `_name` and its relation."""
    cases = "".join(f" WHEN {type_id} THEN {r.json_sql()}" for type_id, r in relations)
    data = f"coalesce(e.data, CASE e.type{cases} END)" if cases else "e.data"
    return f"""CREATE VIEW events AS SELECT
    e.seq AS seq,
    CASE WHEN e.producer IS NULL THEN e.n ELSE {_name_of("e.producer")} || '-' || e.n END AS event_id,
    t.name AS event_type, e.timestamp AS timestamp, s.name AS source, e.user_id AS user_id,
    e.correlation_id AS correlation_id, e.causation_id AS causation_id,
    {RECEIVED_AT} AS received_at,
    {data} AS data
    FROM _event e LEFT JOIN _name t ON t.id = e.type LEFT JOIN _name s ON s.id = e.source"""


def _name_of(value: str) -> str:
    return f"(SELECT name FROM _name WHERE id = {value})"


def rows(
    relation: Relation, datas: list[dict[str, Any]], names: Mapping[str | None, int | None]
) -> tuple[list[list[Any]], list[int]]:
    """Values by column for events of one type, and which of the events need their JSON kept.

    `names` maps a text to its id, and None to None. Column by column, because a list
    comprehension over one column costs a tenth of a loop over events.
    """
    columns, exact = _columns(relation, datas, names)
    if exact:
        return columns, []
    misfits = [i for i, data in enumerate(datas) if not _columns(relation, [data], names)[1]]
    return columns, misfits


def _columns(
    relation: Relation, datas: list[dict[str, Any]], names: Mapping[str | None, int | None]
) -> tuple[list[list[Any]], bool]:
    columns = []
    exact = True
    present = 0
    for c in relation.columns:
        name = c.name
        values = [data.get(name) for data in datas]
        present += len(values) - values.count(None)
        stored, fits = _STORE[c.kind](values, names)
        exact = exact and fits
        columns.append(stored)
    return columns, exact and present == sum(map(len, datas))


_Stored = tuple[list[Any], bool]
_Names = Mapping[str | None, int | None]


def _text(values: list[Any], names: _Names) -> _Stored:
    fits = set(map(type, values)) <= {str, type(None)} and not any(
        "\0" in v for v in set(values) if v
    )
    return (values if fits else [v if isinstance(v, str) else _json(v) for v in values]), fits


def _name(values: list[Any], names: _Names) -> _Stored:
    values, fits = _text(values, names)
    return [names[v] for v in values], fits


def _number(values: list[Any], names: _Names) -> _Stored:
    kinds = set(map(type, values))
    if not kinds <= {float, int, type(None)}:
        return [v if isinstance(v, float | int | None) else _json(v) for v in values], False
    return values, float not in kinds or _print_exactly(v for v in values if type(v) is float)


def _integer(values: list[Any], names: _Names) -> _Stored:
    fits = set(map(type, values)) <= {int, type(None)}
    return (values if fits else [v if isinstance(v, float | int | None) else _json(v) for v in values]), fits


def _boolean(values: list[Any], names: _Names) -> _Stored:
    return values, set(map(type, values)) <= {bool, type(None)}


def _scalar(values: list[Any], names: _Names) -> _Stored:
    texts = _text([v for v in values if isinstance(v, str)], names)[1]
    numbers = _number([v for v in values if not isinstance(v, str)], names)[1]
    return [v if isinstance(v, str | float | int | None) else _json(v) for v in values], texts and numbers


def _as_json(values: list[Any], names: _Names) -> _Stored:
    return [None if v is None else _json(v) for v in values], True


def _bytes(values: list[Any], names: _Names) -> _Stored:
    return [None if v is None else _decoded(v) for v in values], values.count(None) == len(values)


_STORE: dict[str, Callable[[list[Any], _Names], _Stored]] = {
    "text": _text,
    "name": _name,
    "bytes": _bytes,
    "number": _number,
    "integer": _integer,
    "scalar": _scalar,
    "boolean": _boolean,
    "json": _as_json,
}


def _print_exactly(floats: Iterable[float]) -> bool:
    """True if SQLite's 15 significant digits give every float back.

    A float that equals a whole number of 1e-8 below 1e15 of them has at most 15 digits; that
    test costs a third of printing, and prices pass it.
    """
    return all(
        (-1e7 < v < 1e7 and round(v * 1e8) / 1e8 == v and v != 0)
        or (float(f"{v:.15g}") == v and (v != 0 or math.copysign(1, v) > 0))
        for v in floats
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _decoded(value: Any) -> str | bytes | None:
    """Bytes of a base64 text: as text where they are UTF-8 without NUL."""
    try:
        raw = base64.b64decode(value, validate=True)
        return raw if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return raw
    except (ValueError, TypeError):
        return value if isinstance(value, str) else json.dumps(value)


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
