"""Properties of the bridge's reading of callers' objects, of the spool, and of storage."""

from __future__ import annotations

import enum
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from collector.relations import Relation
from collector.store import Store
from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.errors import RejectedEvent, SchemaError
from event_bus.event_schema import EventType, Registry, check_schema
from event_bus.plain import as_rejection, as_sent, plain_data, plain_name, plain_timestamp
from event_bus.spool import Spool
from event_bus.subscriber import Batch

FIXED = settings(
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


class Colour(enum.Enum):
    RED = "red"


class Hostile:
    """Raises whatever is asked of it, but for its name in a failing test."""

    def __repr__(self) -> str:
        return "Hostile()"

    def __str__(self) -> str:
        raise OSError("no")

    def __float__(self) -> float:
        raise OverflowError("no")

    @property
    def item(self) -> Any:  # as numpy's scalars have it
        raise RuntimeError("no")


def deep(levels: int) -> Any:
    made: Any = 0
    for _ in range(levels):
        made = [made]
    return made


keys = st.text(max_size=4) | st.sampled_from(["action", "user_id", "details", "\ud800", "a"])
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(categories=["Cs", "Cc"]), max_size=2)
    | st.binary(max_size=8)
    | st.decimals()
    | st.dates()
    | st.datetimes()
    | st.timedeltas()
    | st.uuids()
    | st.complex_numbers()
    | st.sampled_from([Colour.RED, Hostile(), object(), len, deep(70), 10**4_000])
)
objects = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(keys | st.integers() | st.none(), inner, max_size=3)
        | st.frozensets(st.integers() | st.text(max_size=2), max_size=2)
    ),
    max_leaves=6,
)
datas = st.dictionaries(keys, objects, max_size=3).map(lambda d: {"action": "a", **d}) | objects
USER_ACTION = Registry().types["user_action"]


@FIXED
@given(datas)
def test_any_object_of_a_caller_becomes_plain_data_or_a_rejection_that_can_be_sent(
    data: Any,
) -> None:
    try:
        plain = plain_data(USER_ACTION, data)
    except Exception as e:  # noqa: BLE001 - what `Bridge.emit` takes for a refusal
        rejection = as_rejection(e)
        str(rejection).encode()
        assert rejection.rule
        as_sent({"data": data})
    else:
        event = Envelope(event_id="a", event_type="user_action", timestamp=1.0, data=plain)
        line = envelope.encode(event)
        assert envelope.decode_canonical(line + b"\n")
        assert envelope.encode(envelope.read(line)) == line
        assert envelope.read(line).data == plain


@FIXED
@given(objects)
def test_any_object_is_a_name_or_a_time_or_refused(value: Any) -> None:
    try:
        name = plain_name(value, "source")
    except Exception as e:  # noqa: BLE001 - as above
        str(as_rejection(e)).encode()
    else:
        assert 0 < len(name) <= 255
    try:
        assert math.isfinite(plain_timestamp(value))
    except Exception as e:  # noqa: BLE001 - as above
        str(as_rejection(e)).encode()


class SpoolMachine(RuleBasedStateMachine):
    """A spool against a list of lines: what is read, in order, and what a crash leaves."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name, "s.ndjson")
        self.spool = Spool(self.path, 200)
        self.lines: list[bytes] = []  # not delivered
        self.read = 0  # of them
        self.number = 0

    @rule(count=st.integers(1, 5), size=st.integers(0, 40), over_limit=st.booleans())
    def append(self, count: int, size: int, over_limit: bool) -> None:
        lines = []
        for _ in range(count):
            self.number += 1
            lines.append(b"%d" % self.number + b"x" * size + b"\n")
        body = b"".join(lines)
        held = len(b"".join(self.lines)) + len(body)
        done = self.spool.append(body, count, over_limit=over_limit)
        assert done == (over_limit or held <= 200)
        if done:
            self.lines += lines

    @precondition(lambda self: hasattr(self, "spool") and self.spool.unread)
    @rule(max_bytes=st.integers(1, 100))
    def read_some(self, max_bytes: int) -> None:
        chunk = self.spool.read(max_bytes)
        count = chunk.count(b"\n")
        assert chunk == b"".join(self.lines[self.read : self.read + count])
        assert count
        self.read += count

    @precondition(lambda self: getattr(self, "read", 0) > 0)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.read))
        size = len(b"".join(self.lines[:count]))
        self.spool.delivered(size, count)
        del self.lines[:count]
        self.read -= count

    @rule()
    def rewind(self) -> None:
        self.spool.rewind()
        self.read = 0

    @rule()
    def process_dies(self) -> None:
        """The file holds what was not delivered at its end; delivered lines may come before."""
        left = self.path.read_bytes() if self.path.exists() else b""
        assert left.endswith(b"".join(self.lines))
        self.spool.release()
        self.path.unlink(missing_ok=True)
        self.spool = Spool(self.path, 200)
        self.lines, self.read = [], 0

    @invariant()
    def counts_are_those_of_the_list(self) -> None:
        if hasattr(self, "spool"):
            assert self.spool.events == len(self.lines)
            assert bool(self.spool) == bool(self.lines) == self.path.exists()
            assert self.spool.unread == (self.read < len(self.lines))

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.spool.release()
            self.directory.cleanup()


TestSpool = SpoolMachine.TestCase
TestSpool.settings = FIXED

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.just("\0")
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
kinds = st.sampled_from(["string", "number", "integer", "boolean", "object", "array", "null"])
columns = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True) | st.sampled_from(
    ["select", "order", "source", "user_id", "event_id", "data", "rowid", "type", "e", "r"]
)
properties = st.dictionaries(
    columns,
    st.fixed_dictionaries(
        {"type": kinds | st.lists(kinds, min_size=1, max_size=3, unique=True)},
        optional={"contentEncoding": st.just("base64")},
    )
    | st.just({}),
    max_size=5,
)


@settings(FIXED, max_examples=60)
@given(st.data())
def test_whatever_a_schema_accepts_is_read_back_equal_through_the_view(data: st.DataObject) -> None:
    fields = data.draw(properties)
    names = sorted(fields)
    some = st.lists(st.sampled_from(names), max_size=2, unique=True) if names else st.just([])
    schema = {
        "type": "object",
        "properties": fields,
        "x-bitten": {
            "intern": data.draw(some),
            "indexes": data.draw(some),
            "inline": data.draw(st.booleans()),
            "decimals": {name: data.draw(st.integers(1, 8)) for name in data.draw(some)},
        },
    }
    own = EventType("own_event", schema, Path("own_event.json"))
    try:
        check_schema(own)
        Relation.of(own)
    except SchemaError:
        return
    documents = st.dictionaries(
        (st.sampled_from(names) if names else texts) | texts, json_values, max_size=4
    )
    accepted = []
    for document in data.draw(st.lists(documents, min_size=1, max_size=6)):
        try:
            own.check(document)
        except RejectedEvent:
            continue
        accepted.append(document)
    if not accepted:
        return
    registry = Registry()
    registry.types["own_event"] = own
    events = [
        Envelope(event_id=f"o{i}", event_type="own_event", timestamp=1.0, data=document)
        for i, document in enumerate(accepted)
    ]
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory, "events.db"), registry)
        store.write([Batch(1, 1.0, envelope.decode_lines(envelope.encode_lines(events)))], "j")
        rows = store._db.execute("SELECT data FROM events ORDER BY seq").fetchall()
        assert store._db.execute("SELECT count(*) FROM own_event").fetchone() == (len(accepted),)
        store.close()
    expected = [json.loads(envelope.encode(e))["data"] for e in events]
    assert [_spelled(json.loads(row[0])) for row in rows] == [_spelled(d) for d in expected]


def _spelled(document: Any) -> str:
    return json.dumps(document, sort_keys=True)
