"""From a schema file to the table, the view and the indexes that analysts use."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import JOURNAL, REGISTRY, by_apsw, by_program, event, tick, write

from collector import layout
from collector.columns import rows
from collector.learning import Learning
from collector.relations import MAX_COLUMNS, MAX_INLINE_COLUMNS, Relation
from collector.store import Store
from event_bus.errors import SchemaError
from event_bus.event_schema import EventType, Registry
from event_bus.subscriber import Batch

TEXT = {"type": "string"}
NUMBER = {"type": "number"}


def event_type(name: str, properties: dict[str, Any], **storage: Any) -> EventType:
    schema = {"type": "object", "properties": properties, "x-bitten": storage}
    return EventType(name, schema, Path(f"{name}.json"))


def opened(path: Path, *types: EventType) -> Store:
    """A store that knows the built-in types and these."""
    registry = Registry()
    registry.types.update({t.name: t for t in types})
    return Store(path, registry)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


def columns(path: Path, relation: str) -> list[str]:
    return [line.split("|")[1] for line in by_program(path, f'PRAGMA table_info("{relation}")')]


def plan(path: Path, query: str) -> str:
    return "\n".join(by_program(path, f"EXPLAIN QUERY PLAN {query}"))


def test_every_stored_type_has_its_relation(path: Path) -> None:
    opened(path).close()
    views = set(by_program(path, "SELECT name FROM sqlite_master WHERE type = 'view'"))
    seed = {"events", "signal_events", "trade_events", "health_events", "rejected_events"}
    others = {"fire_command", "balance_update", "user_action", "market_data", "pattern_detected"}
    assert views == seed | others | {"bridge_loss", "journal_loss"}


def test_relations_have_seq_times_fields_and_who(path: Path) -> None:
    opened(path).close()
    assert columns(path, "events") == [
        *("seq", "event_id", "event_type", "timestamp", "source", "user_id"),
        *("correlation_id", "causation_id", "received_at", "data"),
    ]
    own = ["signal_id", "symbol", "direction", "confidence", "pattern_type"]
    assert columns(path, "signal_events") == [
        *("seq", "created_at", "received_at"),
        *own,
        *("source", "user_id", "correlation_id"),
    ]
    assert {"seq", "received_at", "source", "reason", "raw"} <= set(
        columns(path, "rejected_events")
    )


def test_row_of_a_relation_carries_the_events_time_and_origin(path: Path) -> None:
    store = opened(path)
    data = {"fire_id": "F1", "symbol": "EURUSD", "direction": "BUY", "lot_size": 0.5}
    write(
        store,
        event(
            "fire_command",
            data,
            timestamp=1763695000.5,
            source="engine",
            user_id="u1",
            correlation_id="c1",
        ),
        received_at=1763695001.25,
    )
    store.close()
    assert by_program(path, "SELECT * FROM fire_command") == [
        "1|1763695000.5|1763695001.25|F1||u1|EURUSD|BUY|0.5|engine|c1"
    ]


@pytest.mark.parametrize("intern", [(), ("user_id",)])
def test_user_of_a_row_is_that_of_the_data_or_else_of_the_envelope(
    path: Path, intern: tuple[str, ...]
) -> None:
    kind = event_type("own", {"user_id": TEXT}, intern=intern)
    store = opened(path, kind)
    write(
        store,
        event("own", {"user_id": "in data"}, user_id="in envelope"),
        event("own", {}, user_id="in envelope"),
        event("own", {}),
    )
    store.close()
    assert by_program(path, "SELECT user_id FROM own ORDER BY seq") == [
        "in data",
        "in envelope",
        "",
    ]


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        ("event_type = 'x'", "_event_type"),
        ("timestamp > 1763695677", "_event_timestamp"),
        ("timestamp > strftime('%s', 'now', '-24 hours')", "_event_timestamp"),
        ("source = 'x'", "_event_source"),
        ("user_id = 'x'", "_event_user_id"),
        ("correlation_id = 'x'", "_event_correlation_id"),
        ("seq > 5", "INTEGER PRIMARY KEY"),
    ],
)
def test_filter_on_events_uses_its_index(path: Path, condition: str, index: str) -> None:
    opened(path).close()
    steps = plan(path, f"SELECT * FROM events WHERE {condition}")
    assert f"SEARCH e USING INDEX {index} " in steps or f"SEARCH e USING {index} " in steps, steps


@pytest.mark.parametrize(
    ("relation", "column"),
    [
        ("signal_events", "symbol"),
        ("signal_events", "signal_id"),
        ("trade_events", "symbol"),
        ("market_data", "symbol"),
        ("pattern_detected", "symbol"),
        ("fire_command", "symbol"),
        ("fire_command", "fire_id"),
        ("health_events", "component"),
        ("user_action", "action"),
        ("rejected_events", "event_type"),
    ],
)
def test_filter_on_a_relation_uses_its_index(path: Path, relation: str, column: str) -> None:
    opened(path).close()
    steps = plan(path, f"SELECT * FROM {relation} WHERE {column} = 'x'")
    index = "_event.market_data" if relation == "market_data" else f"_rows_{relation}"
    assert f"USING INDEX {index}.{column} " in steps, steps


def test_relation_is_found_by_time(path: Path) -> None:
    opened(path).close()
    steps = plan(path, "SELECT * FROM market_data WHERE created_at > 1763695677")
    assert "SEARCH e USING INDEX _event_timestamp " in steps, steps


def test_time_compares_with_text_of_strftime(path: Path) -> None:
    store = opened(path)
    write(store, event("market_data", tick().data, timestamp=1000.0), received_at=2000.0)
    store.close()
    for relation, column in [
        ("events", "timestamp"),
        ("events", "received_at"),
        ("market_data", "created_at"),
        ("market_data", "received_at"),
    ]:
        counts = by_program(
            path,
            f"SELECT count(*) FROM {relation} WHERE {column} > strftime('%s', 500, 'unixepoch');"
            f"SELECT count(*) FROM {relation} WHERE {column} > strftime('%s', 5000, 'unixepoch')",
        )
        assert counts == ["1", "0"], (relation, column)


def test_own_type_is_stored_exactly_in_columns_of_every_kind(path: Path) -> None:
    properties: dict[str, Any] = {
        "text": TEXT,
        "number": NUMBER,
        "whole": {"type": "integer"},
        "flag": {"type": "boolean"},
        "either": {"type": ["string", "number"]},
        "nullable": {"type": ["string", "null"]},
        "flag_or_text": {"type": ["boolean", "string"]},
        "anything": {},
        "list": {"type": "array"},
        "order": TEXT,
        "select": NUMBER,
        "n": TEXT,
        "source": TEXT,
        "timestamp": NUMBER,
    }
    sent: list[dict[str, Any]] = [
        {},
        {"text": "85", "number": 85, "whole": 85, "flag": True, "either": "85", "list": []},
        {"number": 85.0, "whole": 85.0, "flag": False, "either": 85, "list": [{"a": None}]},
        {"either": 0.1 + 0.2, "nullable": None, "flag_or_text": True, "anything": {"a": 1}},
        {"order": "by", "select": 1, "n": "x", "source": "s", "timestamp": 5},
    ]
    store = opened(path, event_type("own", properties, indexes=("order",), intern=("order", "n")))
    write(store, *[event("own", data) for data in sent])
    store.close()
    lines = by_program(path, "SELECT data FROM events ORDER BY seq")
    assert list(map(json.loads, lines)) == sent
    assert [json.dumps(json.loads(line), sort_keys=True) for line in lines] == [
        json.dumps(data, sort_keys=True) for data in sent
    ]
    sql = "SELECT flag, either, list FROM own WHERE seq IN (2, 3) ORDER BY seq"
    assert by_program(path, sql) == ["1|85|[]", '0|85|[{"a":null}]']


def test_new_property_becomes_a_column(path: Path) -> None:
    store = opened(path, event_type("own", {"a": TEXT}))
    write(store, event("own", {"a": "1", "b": "early"}))
    store.close()
    store = opened(path, event_type("own", {"a": TEXT, "b": TEXT}, indexes=("b",)))
    write(store, event("own", {"a": "2", "b": "late"}), event("own", {"a": "3"}))
    store.close()
    assert by_program(path, "SELECT a, b FROM own ORDER BY seq") == ["1|", "2|late", "3|"]
    assert by_program(path, "SELECT data FROM events ORDER BY seq") == [
        '{"a":"1","b":"early"}',
        '{"a":"2","b":"late"}',
        '{"a":"3"}',
    ]
    assert "_rows_own.b" in plan(path, "SELECT * FROM own WHERE b = 'x'")


@pytest.mark.parametrize("before", ["text", "name", "number", "integer", "boolean", "json"])
def test_property_of_a_changed_kind_is_kept_as_it_was_and_said(
    path: Path, before: str, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: dict[str, tuple[dict[str, Any], Any]] = {
        "text": (TEXT, "nul\0"),
        "name": (TEXT, "x"),
        "number": (NUMBER, 0.5),
        "integer": ({"type": "integer"}, 5),
        "boolean": ({"type": "boolean"}, True),
        "json": ({"type": "object"}, {"a": 1}),
    }
    intern = ("a",) if before == "name" else ()
    opened(path, event_type("own", {"a": kinds[before][0]}, intern=intern)).close()
    for kind, (schema, value) in kinds.items():
        if kind in (before, "name"):
            continue
        caplog.clear()
        store = opened(path, event_type("own", {"a": schema}))
        if not {before, kind} <= {"text", "name"}:
            assert f"own.json: column a is stored as {before}, not as {kind}" in caplog.text
        first = write(store, event("own", {"a": value}), event("own", {}))
        store.close()
        sql = f"SELECT data FROM events WHERE seq >= {first} ORDER BY seq"
        assert [json.loads(x) for x in by_apsw(path, sql)] == [{"a": value}, {}]
        assert by_program(path, f"SELECT a IS NULL FROM own WHERE seq > {first}") == ["1"]


def test_changed_table_name_is_kept_as_it_was_and_said(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(path, event_type("own", {"a": TEXT}, table="first")).close()
    store = opened(path, event_type("own", {"a": TEXT}, table="second"))
    write(store, event("own", {"a": "x"}))
    store.close()
    assert "table first would become second; kept as it is" in caplog.text
    assert by_program(path, "SELECT a FROM first") == ["x"]


@pytest.mark.parametrize("table", ["events", "EVENTS", "_event", "sqlite_x", 'a"b', "", "1a"])
def test_reserved_or_impossible_table_is_refused(table: str) -> None:
    kind = event_type("own", {"a": TEXT})
    kind.table = table
    with pytest.raises(SchemaError, match=r"own.json: x-bitten.table: "):
        Relation.of(kind)


@pytest.mark.parametrize("name", ["event", "name", "meta", "batch", "count", "gap", "relation"])
def test_type_may_be_called_like_an_inner_table(path: Path, name: str) -> None:
    store = opened(path, event_type(name, {"type": TEXT}, indexes=("type",)))
    write(store, event(name, {"type": "x"}), tick())
    store.close()
    assert by_program(path, f"SELECT type FROM {name} WHERE type = 'x'") == ["x"]


def test_indexes_of_types_whose_names_run_together_are_both_there(path: Path) -> None:
    types = (
        event_type("a_b", {"c": TEXT}, indexes=("c",)),
        event_type("a", {"b_c": TEXT}, indexes=("b_c",)),
    )
    opened(path, *types).close()
    assert "SEARCH" in plan(path, "SELECT * FROM a WHERE b_c = 'x'")
    assert "SEARCH" in plan(path, "SELECT * FROM a_b WHERE c = 'x'")


def test_index_without_a_column_is_refused() -> None:
    without: list[dict[str, Any]] = [{}, {"a": {}}, {"a": {"type": ["boolean", "string"]}}]
    for properties in without:
        with pytest.raises(SchemaError, match=r"x-bitten.indexes: 'a' has no column"):
            Relation.of(event_type("own", properties, indexes=("a",)))


def test_properties_that_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(SchemaError, match="'Price' and 'price' would be one column"):
        Relation.of(event_type("own", {"Price": NUMBER, "price": NUMBER}))


@pytest.mark.parametrize(
    "refused",
    [
        event_type("own", {"a": TEXT}, table="market_data"),
        event_type("own", {"a": TEXT}, table="Signal_Events"),
        event_type("own", {"a": TEXT}, table="events"),
        event_type("own", {"a": TEXT}, indexes=("b",)),
    ],
)
def test_refused_type_is_named_and_its_events_are_kept_as_json(
    path: Path, refused: EventType, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(path, refused)
    write(store, event("own", {"a": "x"}), tick())
    store.close()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "no table for own, its events are kept as JSON: own.json: x-bitten." in record.message
    assert by_program(path, "SELECT data FROM events WHERE event_type = 'own'") == ['{"a":"x"}']
    assert by_program(path, "SELECT count(*) FROM market_data") == ["1"]


def test_type_with_very_many_properties_is_stored(path: Path) -> None:
    names = [f"p{i}" for i in range(1_500)]
    store = opened(path, event_type("own", dict.fromkeys(names, TEXT)))
    sent = [dict.fromkeys(names, "x"), {"p0": "first", "p1499": "last"}, {"p7": "x"}]
    write(store, *[event("own", data) for data in sent])
    store.close()
    lines = by_program(path, "SELECT data FROM events ORDER BY seq")
    assert list(map(json.loads, lines)) == sent
    assert len(columns(path, "_rows_own")) == MAX_COLUMNS + 1


def test_views_of_an_older_program_are_renewed(path: Path) -> None:
    store = opened(path)
    write(store, tick())
    store.close()
    by_program(path, "DROP VIEW market_data; CREATE VIEW market_data AS SELECT 'old' AS symbol")
    opened(path).close()
    assert by_program(path, "SELECT symbol FROM market_data") == ["EURUSD"]


def test_opening_again_changes_nothing(path: Path) -> None:
    opened(path).close()
    before = by_program(path, "PRAGMA schema_version")
    opened(path).close()
    assert by_program(path, "PRAGMA schema_version") == before


def test_built_in_types_ask_for_possible_relations() -> None:
    for kind in REGISTRY:
        if not kind.storage.live_only:
            assert Relation.of(kind).table


numbers = (
    st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**63), 2**63 - 1)
    | st.decimals(-(10**12), 10**12, places=5).map(float)
    | st.sampled_from([0.0, -0.0, 1e10, 1e15, 9.9e14, 1e300, -1e300, 2**53 + 1, 0.1 + 0.2])
)


@settings(database=None, deadline=None)
@given(values=st.lists(numbers, min_size=1, max_size=5), digits=st.integers(1, 8))
def test_whatever_number_goes_into_a_decimal_column_comes_out(
    values: list[float], digits: int
) -> None:
    relation = Relation.of(event_type("own", {"price": NUMBER}, decimals={"price": digits}))
    (column,), misfits = rows(relation, [{"price": v} for v in values], {None: None})
    db = apsw.Connection(":memory:")
    db.execute(layout.TABLES)
    for sql in (*relation.table_sql(), relation.view_sql(1)):
        db.execute(sql)
    db.executemany(relation.insert_sql(), list(enumerate(column)))
    shown = [price for (price,) in db.execute("SELECT price FROM own ORDER BY seq")]
    assert shown == pytest.approx(values, rel=1e-15)
    exact = [i for i in range(len(values)) if i not in misfits]
    assert [repr(shown[i]) for i in exact] == [repr(values[i]) for i in exact]


def test_price_is_a_short_integer_and_an_integer_that_was_sent_stays_one() -> None:
    relation = Relation.of(event_type("own", {"price": NUMBER}, decimals={"price": 5}))
    sent = [{"price": v} for v in (1.08451, 85, 85.0, 0.1234567)]
    (stored,), misfits = rows(relation, sent, {None: None})
    assert list(map(repr, stored)) == ["108451", "85.0", "8500000", "0.1234567"]
    assert misfits == []


def test_database_of_before_keeps_its_numbers_when_a_schema_wants_decimals(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_numbers = event_type("own", {"price": NUMBER})
    store = opened(path, with_numbers)
    write(store, event("own", {"price": 1.5}))
    store.close()
    store = opened(path, event_type("own", {"price": NUMBER}, decimals={"price": 5}))
    store.write([Batch(2, 1.0, [event("own", {"price": 2.5})])], JOURNAL)
    store.close()
    assert by_program(path, "SELECT price FROM own") == ["1.5", "2.5"]
    assert caplog.messages == []


@pytest.mark.parametrize("inline", [[False, True], [True, False]])
def test_where_a_type_was_stored_first_it_stays(path: Path, inline: list[bool]) -> None:
    for seq, is_inline in enumerate(inline, 1):
        own = event_type("own", {"price": NUMBER, "note": TEXT}, inline=is_inline, indexes=["note"])
        store = opened(path, own)
        store.write([Batch(seq, 1.0, [event("own", {"price": 1.5, "note": "x"})])], JOURNAL)
        store.close()
    assert by_program(path, "SELECT seq, price FROM own WHERE note = 'x'") == ["1|1.5", "2|1.5"]
    assert by_program(path, "SELECT DISTINCT data FROM events") == ['{"price":1.5,"note":"x"}']
    beside = by_program(path, "SELECT count(*) FROM sqlite_master WHERE name = '_rows_own'")
    assert beside == ["0" if inline[0] else "1"]


def test_two_inline_types_grow_columns_in_the_table_of_all_events(path: Path) -> None:
    for properties in ({"price": NUMBER}, {"price": NUMBER, "note": TEXT}):
        types = [event_type(name, properties, inline=True) for name in ("one", "two")]
        store = opened(path, *types)
        first_seq = store.last_seq + 1
        data = {name: 2.5 if name == "price" else "x" for name in properties}
        store.write([Batch(first_seq, 1.0, [event(t.name, data) for t in types])], JOURNAL)
        store.close()
    for name in ("one", "two"):
        assert by_program(path, f"SELECT price, note FROM {name}") == ["2.5|", "2.5|x"]
    assert by_program(path, "SELECT data FROM events")[-1] == '{"price":2.5,"note":"x"}'


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        ("event_type = 'a' AND user_id = 'u' ORDER BY seq DESC", "_event_user_id (user_id=?)"),
        ("source = 'a' AND correlation_id = 'x'", "_event_correlation_id (correlation_id=?)"),
        (
            "event_type = 'a' AND timestamp > 5 AND timestamp < 9 ORDER BY seq DESC",
            "_event_type (type=?)",
        ),
        ("event_type = 'a' ORDER BY seq DESC", "_event_type (type=?)"),
    ],
)
def test_query_looks_in_the_index_that_leaves_least(path: Path, condition: str, index: str) -> None:
    opened(path).close()
    steps = plan(path, f"SELECT * FROM events WHERE {condition}")
    assert f"USING INDEX {index}" in steps, steps
    assert "TEMP B-TREE" not in steps, steps


def test_inline_columns_past_the_bound_are_stored_beside(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many = {f"c{i}": NUMBER for i in range(MAX_INLINE_COLUMNS)}
    store = opened(path, event_type("own", many, inline=True))
    write(store, event("own", {"c0": 1.5}))
    store.close()
    assert by_program(path, "SELECT c0 FROM own") == ["1.5"]
    assert by_program(path, "SELECT count(*) FROM _rows_own") == ["1"]
    (told,) = caplog.messages
    assert "x-bitten.inline: more than 40 columns" in told


def test_decimals_get_no_index_that_would_find_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(path, event_type("own", {"price": NUMBER}, decimals={"price": 2})).close()
    opened(path, event_type("own", {"price": NUMBER}, indexes=["price"])).close()
    assert by_program(path, "SELECT name FROM sqlite_master WHERE name = '_rows_own.price'") == []
    assert "price is stored as decimals, and gets no index" in caplog.messages[0]


VERSION_2 = """
DROP VIEW events;
ALTER TABLE _event ADD COLUMN producer INTEGER;
ALTER TABLE _event ADD COLUMN n;
UPDATE _event SET (producer, n) = (
    SELECT producer, CASE typeof(n) WHEN 'integer' THEN n + seq - first_seq ELSE n END
    FROM _batch WHERE first_seq <= seq ORDER BY first_seq DESC LIMIT 1);
CREATE TABLE before AS SELECT first_seq, received_at FROM _batch WHERE received_at IS NOT
    (SELECT b.received_at FROM _batch b WHERE b.first_seq < _batch.first_seq
     ORDER BY b.first_seq DESC LIMIT 1);
DROP TABLE _batch;
CREATE TABLE _batch (first_seq INTEGER PRIMARY KEY, received_at REAL NOT NULL);
INSERT INTO _batch SELECT * FROM before;
DROP TABLE before;
PRAGMA user_version={};
"""


@pytest.mark.parametrize("version", [1, 2])
def test_older_database_is_brought_up_to_date(path: Path, version: int) -> None:
    store = opened(path)
    a, b = "a" * 20, "b" * 20
    ids = [f"{a}-1", f"{a}-2", f"{b}-7", f"{a}-3", "order/7", "order/8", f"{b}-{'9' * 19}"]
    write(store, *(event("user_action", {}, i) for i in ids), received_at=1.0)
    write(store, *(event("user_action", {}, f"{a}-{n}") for n in (4, 5, 7)), received_at=2.0)
    store.record_gap(11, 19, JOURNAL, "lost")
    store.write([Batch(20, 3.0, [event("user_action", {}, f"{a}-8")])], JOURNAL)
    store.close()
    stored, batches = by_apsw(path, "SELECT * FROM events"), by_apsw(path, "SELECT * FROM _batch")
    assert [row[1] for row in stored] == [*ids, *(f"{a}-{n}" for n in (4, 5, 7, 8))]
    by_program(path, VERSION_2.format(version))
    assert len(by_apsw(path, "SELECT * FROM _batch")) == 3
    store = opened(path)
    assert by_apsw(path, "SELECT * FROM events") == stored
    assert by_apsw(path, "SELECT * FROM _batch") == batches
    assert by_program(path, "PRAGMA user_version") == ["3"]
    write(store, event("user_action", {}, f"{a}-9"))
    assert by_apsw(path, "SELECT event_id FROM events")[-1] == f"{a}-9"
    store.close()


def test_ids_behind_a_missing_event_are_brought_over_too(path: Path) -> None:
    store = opened(path)
    for n in (1, 4):
        ids = [f"{'a' * 20}-{n + i}" for i in range(3)]
        write(store, *(event("user_action", {}, i) for i in ids), received_at=float(n))
    store.close()
    by_program(path, VERSION_2.format(2) + "DELETE FROM _event WHERE seq = 4")
    opened(path).close()
    ids = by_program(path, "SELECT event_id, received_at FROM events")
    assert ids == [f"{'a' * 20}-{n}|{1.0 if n < 4 else 4.0}" for n in (1, 2, 3, 5, 6)]


def test_event_whose_producer_is_not_known_any_more_has_no_id(path: Path) -> None:
    store = opened(path)
    write(store, event("user_action", {}, f"{'a' * 20}-1"))
    store.close()
    by_program(path, f"DELETE FROM _name WHERE name = '{'a' * 20}'")
    assert by_apsw(path, "SELECT event_id FROM events") == [None]


def test_index_over_many_rows_is_not_sorted_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(path)
    assert store._db.execute("PRAGMA temp_store").fetchall() == [(2,)]
    seen: list[Any] = []
    monkeypatch.setattr(
        Learning,
        "_learn_type",
        lambda *_: seen.append(store._db.execute("PRAGMA temp_store").fetchall()),
    )
    store.learn(REGISTRY)
    assert set(map(tuple, seen)) == {((1,),)}
    store.close()
