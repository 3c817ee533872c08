"""The limits of the envelope, and what the fast road through them lets pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict

from event_bus import envelope
from event_bus.envelope import MAX_EVENT_BYTES, Envelope
from event_bus.errors import RejectedEvent

GOOD = b'{"event_id":"a","event_type":"market_data","timestamp":1.5,"data":{}}'


def with_data(json_text: str | bytes) -> bytes:
    text = json_text.encode() if isinstance(json_text, str) else json_text
    return GOOD.replace(b'"data":{}', b'"data":{"x":' + text + b"}")


def with_field(name: str, value: Any) -> bytes:
    return json.dumps({**json.loads(GOOD), name: value}).encode()


def fast(batch: bytes) -> list[Envelope] | None:
    """What the fast road makes of a batch."""
    events = envelope.decode_canonical(batch)
    return events and [Envelope(**asdict(e)) for e in events]


def refusal(line: bytes) -> tuple[str, str, str]:
    """(rule, path, value) of the refusal; the fast road must not let the line pass either."""
    with pytest.raises(RejectedEvent) as caught:
        envelope.read(line)
    assert envelope.decode_canonical(line + b"\n") is None
    str(caught.value).encode()  # printable, whatever was refused
    return caught.value.rule, caught.value.path, caught.value.value


@pytest.mark.parametrize(
    ("line", "rule", "path", "value"),
    [
        (with_field("data", []), "envelope", "data", "[]"),
        (with_field("timestamp", "now"), "envelope", "timestamp", '"now"'),
        (with_field("timestamp", True), "envelope", "timestamp", "true"),
        (with_field("source", None), "envelope", "source", "null"),
        (with_field("source", ""), "envelope", "source", '""'),
        (with_field("event_id", "i" * 256), "envelope", "event_id", '"' + "i" * 79),
        (with_field("colour", 1), "envelope", "colour", "1"),
        (with_field("seq", 1), "envelope", "seq", "1"),
        (GOOD.replace(b',"data":{}', b""), "envelope", "data", ""),
        (GOOD.replace(b'"event_id":"a",', b""), "envelope", "event_id", ""),
        (b"[]", "type", "", "[]"),
        (b"", "json", "", ""),
        (b"not json", "json", "", "not json"),
        (GOOD[:-1], "json", "", ""),
        (GOOD + GOOD, "json", "", GOOD[:20].decode()),
        (with_data(b'"\xff"'), "utf8", "", "b'\\xff'"),
        (with_data("NaN"), "finite", "", "NaN"),
        (with_data("Infinity"), "finite", "", "Infinity"),
        (with_data("-Infinity"), "finite", "", "-Infinity"),
        (with_data("1e999"), "float64", "", "1e999"),
        (with_data(str(2**63)), "int64", "data.x", hex(2**63)),
        (with_data(str(-(2**63) - 1)), "int64", "data.x", hex(-(2**63) - 1)),
        (with_data(str(2**64)), "int64", "data.x", hex(2**64)),
        (with_data("9" * 10_000), "int64", "", "9" * 24),
        (with_data('"\\ud800"'), "utf8", "data.x", "'\\ud800'"),
        (with_data('{"\\udfff":1}'), "utf8", "data.x", "'\\udfff'"),
        (with_data('{"k":1,"k":1}'), "uniqueKeys", "k", ""),
        (with_data('{"\\ud800":1,"\\ud800":2}'), "uniqueKeys", "\\ud800", ""),
        (GOOD.replace(b'"data"', b'"event_id":"a","data"'), "uniqueKeys", "event_id", ""),
    ],
)
def test_event_beyond_a_limit_is_refused_with_rule_path_and_value(
    line: bytes, rule: str, path: str, value: str
) -> None:
    assert refusal(line) == (rule, path, value)


@pytest.mark.parametrize(
    "json_text",
    [
        str(2**63 - 1),
        str(-(2**63)),
        '"\\u0000"',
        '"a\\u0000b"',
        '"\\ud83d\\ude00"',
        "1e308",
        "-0.0",
        '{"":null}',
        '"1111111111111111111111111"',
    ],
)
def test_value_at_a_limit_is_kept_exactly(json_text: str) -> None:
    event = envelope.read(with_data(json_text))
    assert repr(event.data["x"]) == repr(json.loads(json_text))
    line = envelope.encode(event)
    assert fast(line + b"\n") == [event]
    assert envelope.read(line) == event


def nested(levels: int) -> bytes:
    """An event of so many levels, itself and data among them."""
    return with_data("[" * (levels - 2) + "]" * (levels - 2))


def test_64_levels_are_accepted_and_65_refused() -> None:
    event = envelope.read(nested(64))
    assert fast(nested(64) + b"\n") == [event]
    assert refusal(nested(65))[0] == "maxDepth"


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_200_000_levels_are_refused(opening: str) -> None:
    assert refusal(with_data(opening * 200_000))[0] == "maxDepth"


def padded(size: int) -> bytes:
    return with_data('"' + "x" * (size - len(with_data('""'))) + '"')


def test_event_of_1_mib_is_accepted_and_one_byte_more_is_refused() -> None:
    assert envelope.decode_canonical(padded(MAX_EVENT_BYTES) + b"\n")
    assert envelope.read(padded(MAX_EVENT_BYTES))
    assert refusal(padded(MAX_EVENT_BYTES + 1)) == ("maxBytes", "", str(MAX_EVENT_BYTES + 1))


def test_event_that_outgrows_the_limit_when_numbers_are_written_out_is_refused() -> None:
    line = with_data("[" + ",".join(["1e15"] * 100_000) + "]")
    assert len(line) < MAX_EVENT_BYTES
    assert refusal(line)[0] == "maxBytes"


def test_batch_with_many_nested_objects_or_long_numbers_takes_the_fast_road() -> None:
    event = Envelope(
        event_id="a",
        event_type="t",
        timestamp=1.0,
        data={"time_ns": 1_763_699_458_123_456_789, "details": {"a": [1, {"b": 2}]}},
    )
    assert fast(envelope.encode_lines([event] * 100)) == [event] * 100


@pytest.mark.parametrize(
    "batch",
    [
        GOOD,
        b"\n",
        GOOD + b"\n\n",
        GOOD + b"\r\n",
        b" " + GOOD + b"\n",
        b"\xef\xbb\xbf" + GOOD + b"\n",
    ],
)
def test_batch_in_another_spelling_is_no_canonical_batch(batch: bytes) -> None:
    assert envelope.decode_canonical(batch) is None


def test_producer_tokens_sort_by_time_and_differ() -> None:
    tokens = [envelope.new_producer() for _ in range(100)]
    assert len(set(tokens)) == 100
    assert [t[:12] for t in tokens] == sorted(t[:12] for t in tokens)


texts = st.text() | st.sampled_from(["\ud800", "\x00", "k"])
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([2**63, -(2**63) - 1, 10**30, 1e15, 1e16, 1.5e-7, 0.0001234567890123456])
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
events = st.fixed_dictionaries(
    {
        "event_id": texts | values,
        "event_type": st.just("market_data") | values,
        "timestamp": numbers | values,
        "data": st.dictionaries(texts, values, max_size=4) | values,
    },
    optional={"source": texts, "user_id": values, "extra": values},
)
spellings = st.sampled_from([(",", ":"), (", ", ": ")])


@given(st.lists(st.tuples(events | values, st.booleans(), spellings), min_size=1, max_size=3))
def test_fast_road_accepts_only_what_read_accepts_and_reads_the_same(
    batch: list[tuple[Any, bool, tuple[str, str]]],
) -> None:
    lines = [
        json.dumps(document, ensure_ascii=ascii_only, separators=separators).encode(
            "utf-8", "surrogatepass"
        )
        for document, ascii_only, separators in batch
    ]
    read = []
    for line in lines:
        try:
            event = envelope.read(line)
        except RejectedEvent as e:
            str(e).encode()
            continue
        canonical = envelope.encode(event)
        assert envelope.read(canonical) == event
        assert envelope.encode(envelope.read(canonical)) == canonical
        # What is canonical is recognised as such, unless it must be looked at closely.
        assert fast(canonical + b"\n") == [event]
        read.append(event)
    accepted = fast(b"".join(line + b"\n" for line in lines))
    assert accepted is None or accepted == read


@given(st.binary(max_size=200) | st.text().map(lambda t: with_data(t.encode("utf-8", "replace"))))
def test_bytes_of_any_kind_are_read_or_refused_and_nothing_else(line: bytes) -> None:
    accepted = fast(line + b"\n")
    try:
        event = envelope.read(line)
    except RejectedEvent as e:
        str(e).encode()
        assert accepted is None
    else:
        assert accepted in (None, [event])
