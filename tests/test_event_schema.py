"""Event types: the seed's, the owner's, broken ones, and two validators that must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import schemas
from event_bus.errors import RejectedEvent, SchemaError
from event_bus.event_schema import EventType, Registry, check_schema, read_schema

BUILT_IN = Registry()
REQUIRED = {
    "signal_generated": {"signal_id", "symbol", "direction", "confidence", "pattern_type"},
    "fire_command": {"fire_id", "symbol", "direction", "lot_size"},
    "trade_executed": {"ticket", "symbol", "volume", "open_price"},
    "balance_update": {"balance"},
    "system_health": {"component", "status"},
    "user_action": {"action"},
    "market_data": {"symbol", "bid", "ask"},
    "pattern_detected": {"pattern_type", "symbol", "confidence"},
}


def own_type(directory: Path, name: str = "news", storage: Any = None, **schema: Any) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"type": "object", "x-bitten": storage or {}, **schema}))
    return path


@pytest.mark.parametrize("name", sorted(BUILT_IN.types))
def test_built_in_schema_is_sound_and_its_examples_are_valid(name: str) -> None:
    event_type = BUILT_IN.types[name]
    check_schema(event_type)
    assert event_type.schema["examples"]
    assert event_type.topic(event_type.schema["examples"][0]) == f"bitten.{name}"


def test_every_schema_file_is_a_built_in_type_with_the_seeds_required_fields() -> None:
    assert set(BUILT_IN.types) == {p.stem for p in schemas.DIRECTORY.glob("*.json")}
    own = {"heartbeat", "event_rejected", "bridge_loss", "journal_loss"}
    assert set(BUILT_IN.types) == {*REQUIRED, *own}
    assert BUILT_IN.problems == []
    required = {name: set(BUILT_IN.types[name].schema["required"]) for name in REQUIRED}
    assert required == REQUIRED


SIGNAL = BUILT_IN.types["signal_generated"].schema["examples"][0]
TICK = {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2}


@pytest.mark.parametrize(
    ("name", "data", "rule", "path", "value"),
    [
        ("signal_generated", SIGNAL | {"confidence": 101}, "maximum", "data.confidence", "101"),
        ("signal_generated", SIGNAL | {"confidence": -1}, "minimum", "data.confidence", "-1"),
        ("signal_generated", SIGNAL | {"direction": "UP"}, "enum", "data.direction", '"UP"'),
        ("market_data", TICK | {"bid": "1.1"}, "type", "data.bid", '"1.1"'),
        ("market_data", TICK | {"bid": True}, "type", "data.bid", "true"),
        ("market_data", TICK | {"ask": 0}, "exclusiveMinimum", "data.ask", "0"),
        ("market_data", {"bid": 1}, "required", "data", '{"bid":1}'),
        ("user_action", {"action": None}, "type", "data.action", "null"),
    ],
)
def test_refusal_names_rule_path_and_value(
    name: str, data: dict[str, Any], rule: str, path: str, value: str
) -> None:
    assert not BUILT_IN.get(name).is_valid(data)
    with pytest.raises(RejectedEvent, match=path) as caught:
        BUILT_IN.get(name).check(data)
    assert (caught.value.rule, caught.value.path, caught.value.value) == (rule, path, value)


def test_refusal_of_a_huge_value_is_short() -> None:
    with pytest.raises(RejectedEvent) as caught:
        BUILT_IN.get("market_data").check(TICK | {"bid": "x" * 1_000_000})
    assert len(str(caught.value)) < 500
    assert len(caught.value.value) == 80


def test_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(RejectedEvent) as caught:
        BUILT_IN.get("no_such_type")
    assert (caught.value.rule, caught.value.value) == ("event_type", "no_such_type")


def fields_near(event_type: EventType) -> st.SearchStrategy[dict[str, Any]]:
    """Data around the edges of a schema: right, nearly right and wrong values for each field."""
    scalars = (
        st.none()
        | st.booleans()
        | st.sampled_from([0, -1, 1, 100, 101, 0.5, 1.0, -0.0, 1e300, 2**63 - 1, "", "x", "é" * 40])
        | st.integers(-5, 105)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=40)
    )
    wild = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=3), scalars)
    example = event_type.schema["examples"][0]
    given_values = {
        name: st.just(example[name]) | wild | st.sampled_from(schema.get("enum", [""]))
        if name in example
        else wild
        for name, schema in event_type.properties.items()
    }
    return st.fixed_dictionaries({}, optional=given_values | {"extra": wild}).map(
        lambda changed: example | changed
    ) | st.fixed_dictionaries({}, optional=given_values)


@given(st.data())
def test_both_validators_agree_on_every_built_in_type(data: st.DataObject) -> None:
    event_type = data.draw(st.sampled_from(list(BUILT_IN)))
    value = data.draw(fields_near(event_type))
    slow = jsonschema.Draft202012Validator(event_type.schema).is_valid(value)
    assert event_type.is_valid(value) == slow
    if not slow:
        with pytest.raises(RejectedEvent):
            event_type.check(value)


def test_own_type_with_a_key_has_a_topic_for_each_key(tmp_path: Path) -> None:
    own_type(tmp_path, properties={"symbol": {}}, storage={"key": "symbol"})
    registry = Registry(tmp_path)
    registry.verify()
    assert registry.problems == []
    topic = registry.get("news").topic
    assert topic({"symbol": "EURUSD"}) == "bitten.news.EURUSD"
    assert topic({"symbol": 7}) == "bitten.news.7"


@pytest.mark.parametrize("key", [None, True, 1.5, "", "x" * 256, ["a"], {"a": 1}])
def test_key_that_is_no_short_string_or_integer_stays_out_of_the_topic(
    tmp_path: Path, key: Any
) -> None:
    own_type(tmp_path, properties={"symbol": {}}, storage={"key": "symbol"})
    topic = Registry(tmp_path).get("news").topic
    assert topic({"symbol": key}) == topic({}) == "bitten.news"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("news", "{", "cannot read"),
        ("news", "[]", '"type": "object"'),
        ("news", '{"type": "array"}', '"type": "object"'),
        ("news", '{"type": "object", "properties": []}', "properties is an object"),
        ("News", '{"type": "object"}', "cannot be an event type"),
        ("market_data", '{"type": "object"}', "is built in"),
        ("news", '{"type": "object", "x-bitten": {"tabel": "x"}}', "tabel"),
        ("news", '{"type": "object", "x-bitten": {"key": "k"}}', "x-bitten.key: 'k'"),
        ("news", '{"type": "object", "x-bitten": {"indexes": ["k"]}}', "x-bitten.indexes: 'k'"),
        (
            "news",
            '{"type": "object", "x-bitten": {"decimals": {"k": 2}}}',
            "x-bitten.decimals: 'k'",
        ),
        ("news", '{"type": "object", "x-bitten": {"decimals": {"k": 9}}}', "decimals"),
        (
            "news",
            '{"type": "object", "properties": {"k": {"type": "number"}},'
            ' "x-bitten": {"decimals": {"k": 2}, "indexes": ["k"]}}',
            "x-bitten.decimals: 'k' is in indexes as well",
        ),
        ("news", '{"type": "object", "x-bitten": {"table": "a b"}}', "'a b'"),
        ("news", '{"type": "object", "x-bitten": {"table": "events"}}', "'events'"),
        ("news", '{"type": "object", "x-bitten": {"table": "trade_events"}}', "trade_executed"),
        ("news", '{"type": "object", "properties": {"seq": {}}}', "'seq'"),
        ("news", '{"type": "object", "properties": {"a b": {}}}', "'a b'"),
        ("news", '{"type": "object", "properties": {"A": {}, "a": {}}}', "'A'"),
        ("news", '{"type": "object", "properties": {"a": {"type": "text"}}}', "'text'"),
        (
            "news",
            '{"type": "object", "properties": {"a": {"pattern": "("}}}',
            "properties.a.pattern",
        ),
        ("news", '{"type": "object", "$ref": "#/$defs/gone"}', "/$defs/gone"),
        ("news", '{"type": "object", "$ref": "http://127.0.0.1:9/a"}', "http://127.0.0.1:9/a"),
        ("news", '{"type": "object", "required": ["a"], "examples": [{}]}', r"examples[0]"),
    ],
)
def test_broken_own_schema_is_named_and_left_out_while_the_others_work(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    own_type(tmp_path, "good_one")
    path = tmp_path / f"{name}.json"
    path.write_text(text)
    registry = Registry(tmp_path)
    registry.verify()
    assert set(registry.types) == {*BUILT_IN.types, "good_one"}
    (problem,) = registry.problems
    assert str(path) in str(problem)
    assert complaint in str(problem)
    assert "\n" not in str(problem)


def test_two_own_types_cannot_share_a_table(tmp_path: Path) -> None:
    own_type(tmp_path, "first")
    own_type(tmp_path, "second", storage={"table": "FIRST"})
    registry = Registry(tmp_path)
    registry.verify()
    assert [str(p).count("second.json") for p in registry.problems] == [1]
    assert "first" in registry.types


def test_property_given_as_true_or_false_is_allowed(tmp_path: Path) -> None:
    path = own_type(tmp_path, properties={"a": True, "b": False})
    event_type = read_schema(path)
    check_schema(event_type)
    assert event_type.is_valid({"a": 1})
    assert not event_type.is_valid({"b": 1})


def test_file_that_was_seen_half_written_is_taken_once_it_is_whole(tmp_path: Path) -> None:
    path = own_type(tmp_path)
    whole = path.read_text()
    path.write_text("")
    registry = Registry(tmp_path)
    assert len(registry.problems) == 1
    path.write_text(whole)  # in place: the directory itself does not change
    assert registry.refresh()
    assert registry.problems == []
    assert registry.get("news")
    assert not registry.refresh()


def test_own_directory_may_appear_later(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "schemas")
    assert not registry.refresh()
    own_type(tmp_path / "schemas")
    assert registry.refresh()


def test_schema_error_is_raised_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"gone\.json"):
        read_schema(tmp_path / "gone.json")
