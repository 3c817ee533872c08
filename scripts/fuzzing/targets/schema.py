"""A schema file of anything: refused in one sentence, or a type that SQLite has a table for."""

from __future__ import annotations

import json
from pathlib import Path

import apsw
import words

from collector import layout
from collector.columns import rows
from collector.relations import Relation, events_view_sql
from event_bus.errors import RejectedEvent, SchemaError
from event_bus.event_schema import Registry

DATAS = [
    {},
    {"a": 1},
    {"a": "a\0b", "b": 0.12345678901234568},
    {"symbol": "s", "bid": 1.5, "ask": None, "x": [1, {"y": "\0"}]},
]


def seeds() -> list[bytes]:
    small = {
        "type": "object",
        "properties": {"a": {"type": ["string", "null"]}, "b": {"type": "number"}},
        "required": ["a"],
        "x-bitten": {
            "table": "t",
            "indexes": ["a"],
            "intern": ["a"],
            "key": "a",
            "decimals": {"b": 2},
            "inline": True,
        },
        "examples": [{"a": "x"}],
    }
    return [*words.schema_files(), json.dumps(small).encode(), b'{"type":"object"}', b"[]"]


class Target:
    def __init__(self, home: Path) -> None:
        self._home = home

    def __call__(self, data: bytes) -> None:
        (self._home / "my_event.json").write_bytes(data)
        registry = Registry(self._home)
        registry.verify()
        for problem in registry.problems:
            str(problem).encode()
        own = registry.types.get("my_event")
        if own is None:
            assert registry.problems
            return
        examples = own.schema.get("examples", [])
        for document in [*DATAS, *examples]:
            own.topic(document).encode()
            try:
                own.check(document)
            except RejectedEvent as e:
                str(e).encode()
                assert not own.is_valid(document)
            else:
                assert own.is_valid(document)
        try:
            relation = Relation.of(own)
        except SchemaError:
            return  # its events are kept as JSON
        self._make(relation, [*DATAS, *examples])

    def _make(self, relation: Relation, datas: list[dict[str, object]]) -> None:
        db = apsw.Connection(":memory:")
        db.execute(layout.TABLES)
        for sql in (*relation.table_sql(), *relation.index_sql(), relation.view_sql(1)):
            db.execute(sql)
        db.execute(events_view_sql([(1, relation)]))
        db.execute("INSERT INTO _name VALUES (1, 'my_event')")
        names = {None: None}
        columns, misfits = rows(relation, datas, _Names(db, names))
        inline = [relation.sql_name(c.name) for c in relation.columns] if relation.inline else []
        if not inline:
            seqs = range(1, len(datas) + 1)
            db.executemany(relation.insert_sql(), zip(seqs, *columns, strict=True))
        for at, document in enumerate(datas):
            exact = json.dumps(document) if at in misfits else None
            event = (at + 1, 1, 0.0, None, None, None, None, exact)
            values = [column[at] for column in columns] if inline else []
            db.execute(layout.insert_event_sql(inline), (*event, *values))
        read = [json.loads(row[0]) for row in db.execute("SELECT data FROM events ORDER BY seq")]
        assert [_spelled(d) for d in read] == [_spelled(d) for d in datas]
        db.execute(f'SELECT * FROM "{relation.table}"').fetchall()
        db.close()


class _Names(dict):  # type: ignore[type-arg]
    def __init__(self, db: apsw.Connection, known: dict[str | None, int | None]) -> None:
        super().__init__(known)
        self._db = db

    def __missing__(self, name: str) -> int:
        self._db.execute("INSERT OR IGNORE INTO _name (name) VALUES (?)", (name,))
        row = self._db.execute("SELECT id FROM _name WHERE name = ?", (name,)).fetchone()
        self[name] = row[0]
        return int(row[0])


def _spelled(document: object) -> str:
    return json.dumps(document, sort_keys=True)
