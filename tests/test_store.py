"""What goes into bitten_events.db comes out of it, value by value, in every SQLite."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collector import inspection, learning, wal
from collector.store import Store
from event_bus.envelope import Envelope, decode_lines, encode_lines
from event_bus.errors import (
    DatabaseCorrupt,
    DatabaseError,
    DatabaseReplaced,
    DatabaseUnavailable,
)
from event_bus.event_schema import EventType, Registry
from event_bus.subscriber import Batch

SQLITE = "/usr/bin/sqlite3"
JOURNAL = "journal-1"
REGISTRY = Registry()
TYPES = sorted(t.name for t in REGISTRY if not t.storage.live_only)


def event(event_type: str, data: dict[str, Any], event_id: str = "", **fields: Any) -> Envelope:
    event_id = event_id or f"0123456789abcdef0123-{next(_numbers)}"
    fields = {"timestamp": 1763695677.25, "source": "test", **fields}
    fields = {name: value for name, value in fields.items() if value is not None}
    return Envelope(event_id=event_id, event_type=event_type, data=data, **fields)


_numbers = iter(range(1, 1 << 62))


def tick(**more: Any) -> Envelope:
    return event("market_data", {"symbol": "EURUSD", "bid": 1.5, "ask": 1.75, **more})


def write(store: Store, *events: Envelope, received_at: float = 1763695678.5) -> int:
    """Store events as the bus hands them out; the first one's seq."""
    first = store.last_seq + 1
    arrived = decode_lines(encode_lines(events))
    assert store.write([Batch(first, received_at, arrived)], JOURNAL) == len(events)
    return first


def by_program(path: Path, sql: str) -> list[str]:
    """Lines that the plain `sqlite3` program prints."""
    done = subprocess.run(
        [SQLITE, str(path), sql], capture_output=True, check=True, timeout=20, encoding="utf-8"
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def by_apsw(path: Path, sql: str) -> list[Any]:
    """Rows as apsw gives them; a row of one column as its value.

    Never Python's own sqlite3 here: two SQLite libraries in one process undo each other's locks.
    """
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows = list(db.execute(sql))
        return [row[0] if len(row) == 1 else row for row in rows]
    finally:
        db.close()


def spelled(data: Any) -> str:
    """Data as text that differs when a value or its type does: 85 or 85.0, 0.0 or -0.0."""
    return json.dumps(data, sort_keys=True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "events.db", REGISTRY)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for all examples of a property."""
    made = Store(tmp_path_factory.mktemp("shared") / "events.db", REGISTRY)
    yield made
    made.close()


NASTY = [
    'it\'s "quoted"',
    "line\nbreak\ttab\r",
    "nul\0inside",
    "\0",
    "🐂 ünïcode \u2028 \u200f",
    "'; DROP TABLE events; --",
    "\x1b[31mred\x1b[0m \x7f \x01",
    "\\u0000 \\",
    "null",
    "85",
    "",
]
texts = st.sampled_from(NASTY) | st.text(max_size=20)
FLOATS = [0.1 + 0.2, 1e300, 5e-324, -0.0, 0.0, 1e-8, 123456789.12345678, 85.0, 1e15, 1e16, 1e22]
FLOATS += [
    1.7976931348623157e308,
    2.0**53,
    2.0**53 + 2,
    9007199254740993.0,
    1 / 3,
    1.08453,
    2.0**63,
]
floats = st.sampled_from(FLOATS) | st.floats(allow_nan=False, allow_infinity=False)
integers = st.sampled_from([0, 85, 2**63 - 1, -(2**63), 2**53 + 1]) | st.integers(
    -(2**63), 2**63 - 1
)
anything = st.recursive(
    st.none() | st.booleans() | integers | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, anything, max_size=3)

_BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "string": texts,
    "number": floats | integers,
    "integer": integers | st.integers(0, 100).map(float),
    "object": objects,
    "array": st.lists(anything, max_size=3),
    "boolean": st.booleans(),
    "null": st.none(),
}


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fitting = st.one_of(*[_BY_TYPE[kind] for kind in kinds])
    if "number" in kinds and len(kinds) == 1:
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1e9))
        high = schema.get("maximum", 1e9)
        fitting = st.floats(low, high) | st.integers(int(low), int(high)) | fitting
    return fitting.filter(
        lambda v: not isinstance(v, str) or schema.get("minLength", 0) <= len(v)
    ).map(lambda v: min(abs(v), 2**63 - 1) if type(v) is int and "minimum" in schema else v)


def datas(event_type: EventType) -> st.SearchStrategy[dict[str, Any]]:
    required = event_type.schema["required"]
    own = st.fixed_dictionaries(
        {name: values(event_type.properties[name]) for name in required},
        optional={n: values(s) for n, s in event_type.properties.items() if n not in required},
    )
    extras: st.SearchStrategy[dict[str, Any]] = st.just({}) | st.dictionaries(
        texts, anything, max_size=2
    )
    return st.builds(lambda a, b: {**b, **a}, own, extras).filter(event_type.is_valid)


any_data = st.sampled_from(TYPES).flatmap(
    lambda name: st.tuples(st.just(name), datas(REGISTRY.types[name]))
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(any_data, min_size=1, max_size=12))
def test_data_comes_back_exactly_as_it_was_sent(
    shared: Store, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    first = write(shared, *[event(name, data) for name, data in sent])
    sql = f"SELECT data FROM events WHERE seq >= {first} ORDER BY seq"
    expected = [spelled(data) for _, data in sent]
    assert [spelled(json.loads(line)) for line in by_program(shared.path, sql)] == expected
    assert [spelled(json.loads(line)) for line in by_apsw(shared.path, sql)] == expected


@pytest.mark.parametrize("number", [*FLOATS, 85, 2**63 - 1])
def test_numbers_come_back_with_value_and_type(store: Store, number: float) -> None:
    write(store, event("balance_update", {"balance": number}), event("x_unknown", {"n": number}))
    sql = "SELECT data FROM events ORDER BY seq"
    expected = [spelled({"balance": number}), spelled({"n": number})]
    assert [spelled(json.loads(line)) for line in by_program(store.path, sql)] == expected
    assert [spelled(json.loads(line)) for line in by_apsw(store.path, sql)] == expected


ids = st.one_of(
    st.uuids().map(str),
    st.from_regex(r"[0-9a-f]{20}-[0-9]{1,21}", fullmatch=True),
    st.text(min_size=20, max_size=20).flatmap(
        lambda head: st.text("0123456789-_ +٣²", max_size=20).map(lambda tail: f"{head}-{tail}")
    ),
    st.text(min_size=1, max_size=255),
)
names = st.none() | st.sampled_from([n for n in NASTY if n]) | st.text(min_size=1, max_size=255)
envelopes = st.builds(
    lambda event_id, name, data, **fields: event(
        name, data, event_id, **{k: v for k, v in fields.items() if v is not None}
    ),
    ids,
    st.just("user_action"),
    st.just({"action": "x"}),
    timestamp=st.floats(-1e12, 1e12) | st.sampled_from([0.0, 1763695677.1234567, 253402300800.0]),
    source=names,
    user_id=names,
    correlation_id=names,
    causation_id=names,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(envelopes, min_size=1, max_size=8), st.floats(1.0, 1e11))
@example([event("user_action", {"action": "x"}, f"{'a' * 20}-007")], 1.5)
@example([event("user_action", {"action": "x"}, f"{'a' * 20}-٣")], 1.5)
@example([event("user_action", {"action": "x"}, f"{'a' * 20}-{2**63}")], 1.5)
@example([event("user_action", {"action": "x"}, f"{'a' * 20}--5")], 1.5)
@example([event("user_action", {"action": "x"}, f"{'a' * 20}--{2**64}")], 1.5)
def test_envelope_comes_back_exactly_as_it_was_sent(
    shared: Store, sent: list[Envelope], received_at: float
) -> None:
    first = write(shared, *sent, received_at=received_at)
    columns = ("event_id", "source", "user_id", "correlation_id", "causation_id")
    expected = [tuple(getattr(e, c, None) or None for c in columns) for e in sent]
    hexed = ", ' ', ".join(f"coalesce(hex({c}), '')" for c in columns).replace(", ' ', ", "||' '||")
    lines = by_program(shared.path, f"SELECT {hexed} FROM events WHERE seq >= {first} ORDER BY seq")
    assert [
        tuple(bytes.fromhex(part).decode() or None for part in line.split(" ")) for line in lines
    ] == expected
    rows = by_apsw(
        shared.path,
        f"SELECT seq, event_type, timestamp, received_at, {', '.join(columns)}"
        f" FROM events WHERE seq >= {first} ORDER BY seq",
    )
    assert rows == [
        (seq, e.event_type, e.timestamp, received_at, *row)
        for seq, (e, row) in enumerate(zip(sent, expected, strict=True), first)
    ]


def test_rejected_bytes_come_back_exactly(store: Store) -> None:
    raws = [b'{"bid":-1}', b"\xff\xfe not UTF-8", b"nul \0 inside", b"", "ünï".encode()]
    for raw in raws:
        data = {
            "reason": "no good",
            "rule": "json",
            "raw": base64.b64encode(raw).decode(),
            "raw_bytes": len(raw),
            "source": "feed",
        }
        write(store, event("event_rejected", data, source="event_bus"))
    sql = "SELECT hex(CAST(raw AS BLOB)) FROM rejected_events ORDER BY seq"
    assert [bytes.fromhex(line) for line in by_program(store.path, sql)] == raws
    assert by_program(store.path, "SELECT seq, received_at, source, reason FROM rejected_events")[
        :1
    ] == ["1|1763695678.5|feed|no good"]


def test_event_of_unknown_type_is_stored_with_its_json(store: Store) -> None:
    write(store, event("from_the_future", {"a": [1, None]}))
    assert by_program(store.path, "SELECT event_type, data FROM events") == [
        'from_the_future|{"a":[1,null]}'
    ]


def test_field_is_null_for_events_that_do_not_have_it_beside_odd_ones(store: Store) -> None:
    health = {"component": "c", "status": "s"}
    write(
        store,
        event("user_action", {"action": "nul\0inside"}),
        event("user_action", {"action": "a"}),
        event("bridge_loss", {"producer": "nul\0", "dropped": 1, "reason": "nul\0"}),
        event("bridge_loss", {"producer": "p", "dropped": 1, "reason": "r"}),
        event("trade_executed", {"ticket": 1, "symbol": "E", "volume": 1, "open_price": 1}),
        event(
            "trade_executed",
            {"ticket": 1, "symbol": "E", "volume": 1, "open_price": 1, "fire_id": "nul\0"},
        ),
        event("system_health", health),
    )
    sql = "SELECT count(*) FROM trade_events WHERE fire_id IS NULL AND direction IS NULL"
    assert by_program(store.path, sql) == ["1"]


def test_batch_that_comes_again_is_stored_once_and_counted_as_received(store: Store) -> None:
    batch = Batch(1, 1.0, [tick(), tick()])
    assert store.write([batch], JOURNAL) == 2
    assert store.write([batch, Batch(3, 2.0, [tick()])], JOURNAL) == 1
    overlapping = Batch(2, 3.0, [*batch.events[1:], tick(), tick()])
    assert store.write([overlapping], JOURNAL) == 1
    assert by_program(store.path, "SELECT group_concat(seq) FROM events") == ["1,2,3,4"]
    assert by_program(store.path, "SELECT value FROM _meta WHERE key = 'events_received'") == ["8"]
    assert by_program(store.path, "SELECT sum(stored) FROM _count") == ["4"]


def test_batch_behind_a_hole_is_refused(store: Store) -> None:
    write(store, tick())
    with pytest.raises(DatabaseError, match="events 2 to 4 did not arrive"):
        store.write([Batch(5, 1.0, [tick()])], JOURNAL)
    assert store.last_seq == 1


def test_recorded_gap_moves_the_cursor_and_survives(store: Store) -> None:
    store.record_gap(1, 41, JOURNAL, "trimmed")
    assert store.last_seq == 41
    assert write(store, tick()) == 42
    other = Store(store.path, REGISTRY)
    assert other.last_seq == 42
    other.close()


def test_another_journal_is_refused(store: Store) -> None:
    write(store, tick())
    with pytest.raises(DatabaseError, match=r"filled from journal journal-1.* restore"):
        store.write([Batch(2, 1.0, [tick()])], "journal-2")
    with pytest.raises(DatabaseError, match="filled from journal journal-1"):
        store.record_gap(2, 9, "journal-2", "trimmed")
    assert store.last_seq == 1


def test_failed_write_leaves_nothing_behind_and_succeeds_later(store: Store) -> None:
    write(store, tick())
    other = apsw.Connection(str(store.path))
    other.execute("BEGIN IMMEDIATE")
    new_names = event("market_data", {"symbol": "NEW", "bid": 1, "ask": 1}, source="new source")
    with pytest.raises(DatabaseUnavailable, match="end the other program's transaction"):
        store.write([Batch(2, 1.0, [new_names])], JOURNAL)
    other.close()
    with pytest.raises(DatabaseError):  # fails once the names are made
        store.write([Batch(2, 1.0, [new_names]), Batch(9, 1.0, [tick()])], JOURNAL)
    write(store, tick(symbol="OTHER"), new_names)
    assert by_program(store.path, "SELECT symbol FROM market_data ORDER BY seq") == [
        "EURUSD",
        "OTHER",
        "NEW",
    ]
    assert by_program(store.path, "SELECT source FROM events WHERE seq = 3") == ["new source"]


def test_what_is_stored_counts_as_synced_only_after_a_sync_that_succeeded(store: Store) -> None:
    write(store, tick(), tick())
    assert (store.last_seq, store.synced_seq) == (2, 0)
    lock = apsw.Connection(str(store.path))
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable):
        store.sync()
    assert store.synced_seq == 0
    lock.close()
    store.sync()
    assert store.synced_seq == 2
    write(store, tick())
    assert store.synced_seq == 2
    store.close()
    reopened = Store(store.path, REGISTRY)
    assert reopened.synced_seq == reopened.last_seq == 3
    reopened.close()


def test_names_beyond_the_cache_are_still_right(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "MAX_CACHED_NAMES", 5)
    symbols = [f"S{i % 9}" for i in range(50)]
    for part in (symbols[:25], symbols[25:]):
        write(store, *[event("market_data", tick(symbol=s).data, source=None) for s in part])
    assert by_program(store.path, "SELECT symbol FROM market_data ORDER BY seq") == symbols
    assert by_program(store.path, "SELECT count(*) FROM events WHERE source IS NULL") == ["50"]


def test_files_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = Store(tmp_path / "events.db", REGISTRY)
        write(store, tick())
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
        store.close()
    finally:
        os.umask(old)
    assert modes == {"events.db": 0o600, "events.db-wal": 0o600, "events.db-shm": 0o600}


def test_making_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    by_program(path, "PRAGMA journal_mode=WAL")
    assert path.stat().st_size > 0
    store = Store(path, REGISTRY)
    write(store, tick())
    store.close()


def test_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    by_program(path, "CREATE TABLE orders (id)")
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=r"of another program; move it aside \(mv "):
        Store(path, REGISTRY)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [0, 4, 99])
def test_database_of_another_version_is_left_alone(tmp_path: Path, version: int) -> None:
    path = tmp_path / "events.db"
    Store(path, REGISTRY).close()
    by_program(path, f"PRAGMA user_version={version}")
    with pytest.raises(
        DatabaseError, match=f"has version {version}, this program knows 3; install"
    ):
        Store(path, REGISTRY)


def test_corrupt_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(DatabaseCorrupt, match="not a database; the collector moves it aside"):
        Store(path, REGISTRY)


def test_removed_or_replaced_file_is_noticed(store: Store) -> None:
    write(store, tick())
    store.path.unlink()
    with pytest.raises(DatabaseReplaced, match="removed or replaced"):
        store.write([Batch(2, 1.0, [tick()])], JOURNAL)
    store.path.touch()
    with pytest.raises(DatabaseReplaced, match="removed or replaced"):
        store.check_file()


def test_nothing_stored_needs_a_newer_sqlite_than_3_31(store: Store) -> None:
    sql = "\n".join(by_apsw(store.path, "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"))
    for newer in ("STRICT", "GENERATED", "RETURNING", "iif(", "->", "MATERIALIZED", "format("):
        assert newer.lower() not in sql.lower()
    called = set(re.findall(r"(\w+)\(", sql)) - {"sqlite_stat1", "sqlite_stat4"}  # tables
    assert called <= {"CAST", "coalesce", "json_quote", "likelihood", "substr", "typeof"}


def test_mix_of_mostly_ticks_takes_at_most_110_bytes_an_event(tmp_path: Path) -> None:
    store = Store(tmp_path / "events.db", REGISTRY)
    for part in range(10):
        events = []
        for i in range(part * 2000, part * 2000 + 2000):
            time = 1763695677.123456 + i / 1000
            if i % 5:
                price = round(1 + i % 997 / 1000, 5)
                data = {"symbol": f"SYM{i % 12}", "bid": price, "ask": price, "volume": i % 100}
                events.append(event("market_data", data, timestamp=time))
            elif i % 2:
                fire = {"fire_id": f"F{i}", "symbol": "EURUSD", "direction": "BUY", "lot_size": 0.1}
                more = {"user_id": f"user_{i % 50}", "correlation_id": f"corr-{i:08d}"}
                events.append(event("fire_command", fire, timestamp=time, **more))
            else:
                pattern = {"pattern_type": "FVG", "symbol": f"SYM{i % 12}", "confidence": 72.5}
                events.append(event("pattern_detected", pattern, timestamp=time))
        write(store, *events)
    store.close()
    assert store.path.stat().st_size / 20_000 <= 110


@pytest.mark.parametrize("bad", ["no base64!", "ü", "YQ"])
def test_rejection_whose_raw_is_no_base64_is_kept_as_it_is(store: Store, bad: str) -> None:
    data = {"reason": "r", "rule": "r", "raw": bad, "raw_bytes": 1}
    write(store, event("event_rejected", data))
    assert by_program(store.path, "SELECT raw FROM rejected_events") == [bad]
    (stored,) = by_program(store.path, "SELECT data FROM events")
    assert json.loads(stored) == data


def test_looking_for_damage_gives_way_to_a_log_that_grows_and_is_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "STEPS", 1)
    monkeypatch.setattr(inspection, "MAX_WAL_BYTES", 1)
    store = Store(tmp_path / "events.db", REGISTRY)
    write(store, *(tick() for _ in range(200)))
    before = wal.wal_bytes(store.path)
    looks = iter([before, *[before] * 5, before + 1])
    ends: list[str] = []

    class Look(inspection.Inspection):
        def _run(self) -> None:
            for _ in range(2):
                try:
                    self._look()
                    ends.append("done")
                except apsw.InterruptError:
                    ends.append("gave way")

    monkeypatch.setattr(inspection.wal, "wal_bytes", lambda path: next(looks, before + 1))
    look = Look(store.path)
    look._thread.join()
    look.close()
    assert ends == ["gave way", "done"]
    store.close()
