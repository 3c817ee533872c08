"""The bridge in the caller's thread: what it takes, what it refuses, what it counts."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime
import decimal
import enum
import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import System, free_port, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from event_bus import envelope
from event_bus.bridge import Bridge
from event_bus.correlation import correlation
from event_bus.settings import Settings

TICK = {"symbol": "EURUSD", "bid": 1.08451, "ask": 1.08453}


class QueueOnly(Bridge):
    """A bridge without its delivery thread: what is queued stays to be looked at."""

    def _start(self) -> str:
        return ""

    def events(self) -> list[envelope.Envelope]:
        return [envelope.read(line) for line in self.outbox.lines]

    def last(self) -> envelope.Envelope:
        return self.events()[-1]


def make(home: Path, **values: Any) -> QueueOnly:
    url = f"tcp://127.0.0.1:{free_port()}"
    return QueueOnly(Settings(home=home, ingress_url=url, source="test", **values))


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[QueueOnly]:
    made = make(tmp_path)
    yield made
    made.outbox.lines.clear()


class Side(enum.Enum):
    BUY = "BUY"


@dataclasses.dataclass
class Point:
    price: float


class Hostile:
    """An object that raises whatever is done with it."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equality")

    __hash__ = None  # type: ignore[assignment]


def circle() -> dict[str, Any]:
    result: dict[str, Any] = dict(TICK)
    result["self"] = result
    return result


def nested(levels: int) -> dict[str, Any]:
    value: Any = 0
    for _ in range(levels):
        value = {"x": value}
    return {**TICK, "x": value}


def test_objects_with_an_evident_plain_form_take_it(bridge: QueueOnly) -> None:
    data = {
        "symbol": "EURUSD",
        "bid": np.float64(1.25),
        "ask": decimal.Decimal("1.50"),
        "volume": np.int64(7),
        "at": datetime.datetime(2025, 1, 2, 3, 4, 5),
        "side": Side.BUY,
        "point": Point(2.5),
        "f32": np.float32(0.5),
        "big": decimal.Decimal(2**60),
    }
    assert bridge.emit("market_data", data)
    assert bridge.last().data == {
        "symbol": "EURUSD",
        "bid": 1.25,
        "ask": 1.5,
        "volume": 7,
        "at": "2025-01-02T03:04:05",
        "side": "BUY",
        "point": {"price": 2.5},
        "f32": 0.5,
        "big": 2**60,
    }


def test_none_in_an_optional_field_means_absent_and_elsewhere_stays(bridge: QueueOnly) -> None:
    assert bridge.emit("market_data", {**TICK, "volume": None, "note": None})
    assert bridge.last().data == {**TICK, "note": None}
    assert bridge.emit("market_data", {**TICK, "bid": None}) is None


def test_user_id_comes_from_the_argument_or_the_data(bridge: QueueOnly) -> None:
    cases: list[tuple[dict[str, Any], Any, Any]] = [
        ({"action": "a", "user_id": 7}, None, "7"),
        ({"action": "a"}, np.int64(8), "8"),
        ({"action": "a", "user_id": "x"}, "y", "y"),
        ({"action": "a"}, 9.0, "9"),
        ({"action": "a", "user_id": ""}, None, msgspec.UNSET),
        ({"action": "a"}, "", msgspec.UNSET),
    ]
    for data, argument, expected in cases:
        assert bridge.emit("user_action", data, user_id=argument)
        assert bridge.last().user_id == expected


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"user_id": math.nan}, "user_id"),
        ({"user_id": "x" * 256}, "user_id"),
        ({"correlation_id": "x" * 256}, "correlation_id"),
        ({"source": ""}, "source"),
        ({"timestamp": math.nan}, "timestamp"),
        ({"timestamp": math.inf}, "timestamp"),
        ({"timestamp": "soon"}, "timestamp"),
        ({"user_id": "\ud800"}, "data"),
    ],
)
def test_bad_envelope_fields_are_refused_by_name(
    bridge: QueueOnly, fields: dict[str, Any], path: str
) -> None:
    assert bridge.emit("market_data", TICK, **fields) is None
    assert bridge.last().event_type == "event_rejected"
    assert bridge.last().data["path"] == path


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({**TICK, "bid": math.nan}, "finite"),
        ({**TICK, "extra": [(1.0, math.inf)]}, "finite"),
        ({**TICK, "extra": Point(math.nan)}, "finite"),
        ({**TICK, "extra": decimal.Decimal("NaN")}, "finite"),
        ({**TICK, "extra": np.float64("nan")}, "finite"),
        ({**TICK, "extra": decimal.Decimal("1E+400")}, "finite"),
        ({**TICK, "extra": decimal.Decimal("1E+999999")}, "finite"),
        ({**TICK, "extra": 2**63}, "int64"),
        ({**TICK, "extra": -(2**70)}, "int64"),
        ({**TICK, "extra": 10**5000}, "int64"),
        ({**TICK, "extra": {1: "a", "1": "b"}}, "uniqueKeys"),
        ({**TICK, "extra": "\ud800"}, "utf8"),
        ({**TICK, "\ud800": 1}, "utf8"),
        ({**TICK, "extra": 1j}, "encoding"),
        ({**TICK, "extra": Hostile()}, "encoding"),
        ({**TICK, "extra": "x" * (1 << 20)}, "maxBytes"),
        ({**TICK, "bid": -1}, "exclusiveMinimum"),
        ({**TICK, "symbol": 5}, "type"),
        ({"symbol": "EURUSD"}, "required"),
        (circle(), "maxDepth"),
        (nested(63), "maxDepth"),
        (nested(5_000), "maxDepth"),
        ([1, 2], "envelope"),
        (None, "envelope"),
        (Hostile(), "encoding"),
    ],
)
def test_bad_data_is_refused_with_the_rule_and_kept_raw(
    bridge: QueueOnly, data: Any, rule: str
) -> None:
    assert bridge.emit("market_data", data) is None
    account = bridge.last()
    assert account.event_type == "event_rejected"
    assert account.data["rule"] == rule
    assert account.data["event_type"] == "market_data"
    assert account.data["raw_bytes"] >= len(base64.b64decode(account.data["raw"])) > 0
    assert bridge.stats()["refused"] == 1
    bridge.registry.get("event_rejected").check(account.data)


def test_limits_themselves_are_accepted(bridge: QueueOnly) -> None:
    for data in (
        {**TICK, "extra": [2**63 - 1, -(2**63)]},
        nested(62),
        {**TICK, "digits": "1" * 40},
        {**TICK, "extra": {1: "a"}},
    ):
        assert bridge.emit("market_data", data), data
        bridge.last()  # the broker's own reader takes it


def test_largest_event_that_the_bridge_takes_is_one_the_broker_takes(bridge: QueueOnly) -> None:
    low, high = 1_000_000, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        if bridge.emit("user_action", {"action": "a", "text": "x" * middle}):
            low = middle
        else:
            high = middle
        assert len(bridge.outbox.lines[-1]) <= envelope.MAX_EVENT_BYTES
        bridge.outbox.lines.clear()
    assert low > (1 << 20) - 500


def test_wrong_arguments_are_refused_and_not_raised(tmp_path: Path) -> None:
    done = System(tmp_path).script(
        "from event_bus import event_bridge as b\n"
        "results = [b.emit(), b.emit('market_data'), b.market_data(), b.market_data(1, 2),\n"
        "    b.market_data({}, event_type='x'), b.market_data({}, colour='red'),\n"
        "    b.market_data({}, self=1), b.emit(event_type='market_data', data=[]),\n"
        "    b.emit([1], {}), b.emit(None, {}), b.emit('nosuch', {}), b.emit('heartbeat', {}),\n"
        "    b.emit('bridge_loss', {}), b.emit('event_rejected', {})]\n"
        "print(results == [None] * 14, b.stats()['refused'], b.stats()['emitted'])\n"
    )
    assert done.stdout.split() == ["True", "14", "14"], done


JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs"]), max_size=3)
    | st.binary()
    | st.complex_numbers()
    | st.decimals()
    | st.datetimes()
    | st.uuids()
    | st.sampled_from([Side.BUY, Point(math.nan), Point, len, np.array([1.0])])
    | st.builds(Hostile)
    | st.builds(np.float32, st.floats(width=32))
    | st.builds(np.int64, st.integers(-(2**63), 2**63 - 1)),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.frozensets(st.integers())
        | st.dictionaries(st.text() | st.integers() | st.none() | st.floats(), inner)
    ),
    max_leaves=8,
)


@given(
    event_type=st.sampled_from(["market_data", "user_action"]) | JUNK,
    base=st.sampled_from([{}, TICK, {"action": "a"}]),
    data=JUNK,
    fields=st.dictionaries(
        st.sampled_from(["user_id", "correlation_id", "causation_id", "source", "timestamp"]), JUNK
    ),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_junk_raises_and_whatever_is_queued_the_broker_can_read(
    bridge: QueueOnly, event_type: Any, base: dict[str, Any], data: Any, fields: dict[str, Any]
) -> None:
    bridge.outbox.lines.clear()
    before = bridge.stats()["refused"]
    content = {**base, **data} if isinstance(data, dict) else {**base, "junk": data}
    for candidate in (data, content):
        event_id = bridge.emit(event_type, candidate, **fields)
        event = bridge.last()
        known = bridge.registry.get(event.event_type)
        known.check(event.data)
        if event_id is None:
            assert event.event_type == "event_rejected"
            before += 1
        else:
            assert event.event_id == event_id
            assert event.event_type == event_type
    assert bridge.stats()["refused"] == before


def test_refusals_are_logged_once_a_minute_for_each_kind(
    bridge: QueueOnly, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(50):
        bridge.emit("market_data", {**TICK, "bid": -1})
        bridge.emit("market_data", {"symbol": "EURUSD"})
        bridge.emit(f"unknown_{n}", {})
    assert len(caplog.records) == 3
    assert "data.bid" in caplog.text
    assert bridge.stats()["refused"] == 150


def test_account_of_a_huge_refused_event_fits_in_an_event(bridge: QueueOnly) -> None:
    assert bridge.emit("market_data", {**TICK, "9" * 600_000: math.nan}) is None
    account = bridge.last().data
    assert account["raw_bytes"] > 600_000
    assert len(account["reason"]) <= 1_000
    assert base64.b64decode(account["raw"]).startswith(b'{"event_type": "market_data"')


def test_log_handler_that_emits_events_neither_blocks_nor_recurses(tmp_path: Path) -> None:
    bridge = make(tmp_path, outbox_max_events=1)

    class Forwarder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            bridge.emit("system_health", {"component": "log", "status": record.getMessage()})
            bridge.emit("system_health", {"component": 5})
            raise RuntimeError("a handler that fails")

    handler = Forwarder()
    logging.getLogger("event_bus.bridge").addHandler(handler)
    try:
        assert bridge.emit("market_data", TICK)
        assert bridge.emit("market_data", TICK) is None
        assert bridge.emit("market_data", {}) is None
    finally:
        logging.getLogger("event_bus.bridge").removeHandler(handler)
    assert bridge.stats()["dropped"] >= 2


def test_emit_inside_an_emit_does_not_block(bridge: QueueOnly) -> None:
    with bridge.lock:  # where a signal handler or a finalizer may find its own thread
        assert bridge.emit("market_data", TICK)


def test_wakes_that_nobody_waits_for_do_no_harm(bridge: QueueOnly) -> None:
    for _ in range(10):
        bridge.idle = True
        assert bridge.emit("market_data", TICK)


def test_threads_get_ids_without_holes_in_the_order_of_the_queue(bridge: QueueOnly) -> None:
    def work() -> None:
        for _ in range(200):
            bridge.emit("market_data", TICK)
            bridge.emit("market_data", {})

    threads = [threading.Thread(target=work) for _ in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    ids = [e.event_id for e in bridge.events()]
    assert ids == [f"{bridge.token}-{n}" for n in range(1, 8_001)]
    assert bridge.stats()["refused"] == 4_000


def test_full_memory_drops_with_exact_counts_and_no_hole_in_the_ids(tmp_path: Path) -> None:
    bridge = make(tmp_path, outbox_max_events=10)
    results = [bridge.emit("market_data", TICK) for _ in range(25)]
    assert [r is None for r in results] == [False] * 10 + [True] * 15
    stats = bridge.stats()
    assert (stats["emitted"], stats["waiting"], stats["dropped"]) == (25, 10, 15)
    assert stats["emitted"] == stats["acked"] + stats["waiting"] + stats["dropped"]
    bridge.report_loss()
    account = bridge.last()
    assert account.event_id == f"{bridge.token}-11"
    assert account.data["dropped"] == account.data["dropped_total"] == 15
    bridge.registry.get("bridge_loss").check(account.data)
    bridge.report_loss()
    assert len(bridge.outbox.lines) == 11


def test_bound_on_bytes_drops_too(tmp_path: Path) -> None:
    bridge = make(tmp_path, outbox_max_bytes=10_000)
    for _ in range(20):
        bridge.emit("user_action", {"action": "a", "text": "x" * 1_000})
    assert 5 <= len(bridge.outbox.lines) < 10
    assert bridge.stats()["queued_bytes"] <= 10_000


def test_flush_tells_a_drop_once_and_waits_for_acks(tmp_path: Path) -> None:
    bridge = make(tmp_path, outbox_max_events=2)
    assert bridge.flush(0)
    bridge.emit("market_data", TICK)
    assert not bridge.flush(0.01)
    bridge.settle(acked=1)
    assert bridge.flush(0)
    bridge.emit("market_data", TICK)
    assert bridge.emit("market_data", TICK) is None
    bridge.settle(acked=1)
    assert not bridge.flush(0)
    assert bridge.flush(0)


def test_flush_is_released_by_the_acks_of_what_came_before_it(bridge: QueueOnly) -> None:
    bridge.emit("market_data", TICK)
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(bridge.flush(20)))
    thread.start()
    bridge.settle(acked=1)
    thread.join(20)
    assert done == [True]


def test_disabled_bridge_does_nothing(bridge: QueueOnly) -> None:
    bridge.enabled = False
    assert bridge.emit("market_data", TICK) is None
    assert bridge.emit("no_such_type", object()) is None
    assert bridge.stats()["emitted"] == bridge.stats()["refused"] == 0


def correlation_of(bridge: QueueOnly, **fields: Any) -> Any:
    bridge.emit("market_data", TICK, **fields)
    return bridge.last().correlation_id


def test_correlation_nests_and_an_argument_goes_before_it(bridge: QueueOnly) -> None:
    assert correlation_of(bridge) is msgspec.UNSET
    with correlation("outer"):
        with correlation() as inner:
            assert correlation_of(bridge) == inner != "outer"
            assert correlation_of(bridge, correlation_id="given") == "given"
            assert correlation_of(bridge, correlation_id=0) == "0"
        assert correlation_of(bridge) == "outer"
    assert correlation_of(bridge) is msgspec.UNSET


def test_correlation_stays_in_its_thread_and_its_task(bridge: QueueOnly) -> None:
    async def task(name: str) -> tuple[str, Any]:
        with correlation(name):
            await asyncio.sleep(0)
            return name, correlation_of(bridge)

    async def both() -> list[tuple[str, Any]]:
        return list(await asyncio.gather(task("a"), task("b")))

    seen: list[Any] = []
    with correlation("main"):
        thread = threading.Thread(target=lambda: seen.append(correlation_of(bridge)))
        thread.start()
        thread.join()
        assert asyncio.run(both()) == [("a", "a"), ("b", "b")]
    assert seen == [msgspec.UNSET]


def test_correlation_ended_in_another_task_does_not_raise() -> None:
    async def main() -> None:
        block = correlation("x")
        await asyncio.create_task(asyncio.to_thread(block.__enter__))
        block.__exit__(None, None, None)

    asyncio.run(main())


def test_own_event_types_of_the_home_can_be_emitted(tmp_path: Path) -> None:
    (tmp_path / "schemas").mkdir()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": True}}
    (tmp_path / "schemas" / "my_event.json").write_text(json.dumps(schema))
    (tmp_path / "schemas" / "broken.json").write_text("{")
    bridge = make(tmp_path)
    assert bridge.emit("my_event", {"a": 1})
    assert bridge.emit("my_event", {"a": None, "b": None})
    assert bridge.last().data == {"b": None}
    assert bridge.emit("my_event", {"a": "x"}) is None
    assert bridge.emit("broken", {}) is None


def test_first_event_loads_nothing_slow_in_the_callers_thread(tmp_path: Path) -> None:
    done = System(tmp_path).script(
        "import sys, threading\n"
        "from event_bus import event_bridge as b\n"
        "slow = {'zmq', 'jsonschema', 'jsonschema_rs', 'yaml', 'click', 'apsw', 'psutil'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
        "here = threading.get_ident()\n"
        "class Finder:\n"
        "    seen = []\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if threading.get_ident() == here: self.seen.append(name)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "b.market_data({'symbol': 'X', 'bid': 1, 'ask': 1}); b.market_data({})\n"
        "print(sorted({n.partition('.')[0] for n in Finder.seen} & slow))\n"
    )
    assert done.stdout.split("\n")[:2] == ["[]", "['jsonschema_rs']"], done


def test_second_event_type_does_not_wait_for_the_delivery_threads_imports(
    bridge: QueueOnly,
) -> None:
    importing, done = threading.Event(), threading.Event()

    def imports() -> None:
        with bridge.imports:
            importing.set()
            done.wait(10)

    thread = threading.Thread(target=imports)
    thread.start()
    importing.wait(10)
    emitting = threading.Thread(target=bridge.emit, args=("market_data", TICK))
    emitting.start()
    emitting.join(2)
    waits = emitting.is_alive()
    done.set()
    thread.join()
    emitting.join()
    assert not waits


def test_event_emitted_in_the_middle_of_the_threads_start_starts_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = Bridge(Settings(home=tmp_path, ingress_url=f"tcp://127.0.0.1:{free_port()}"))
    start = threading.Thread.start
    started: list[str] = []

    def interrupted_start(thread: threading.Thread) -> None:
        if thread.name == "bitten-bridge":
            started.append(thread.name)
            if len(started) == 1:
                bridge.emit("market_data", TICK)  # as a signal handler does
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    bridge.emit("market_data", TICK)
    bridge.close()
    assert started == ["bitten-bridge"]


def test_thread_that_could_not_be_started_is_started_by_the_next_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = Bridge(Settings(home=tmp_path, ingress_url=f"tcp://127.0.0.1:{free_port()}"))

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert bridge.emit("market_data", TICK)
    assert bridge.emit("market_data", TICK)
    wait_until(lambda: bridge.stats()["spooled"] == 2, "both are on disk")
    bridge.close()
    bridge.outbox.spool.release()


def test_call_costs_microseconds(bridge: QueueOnly) -> None:
    bridge.emit("market_data", TICK)
    times = []
    for _ in range(2_000):
        begin = time.perf_counter()
        bridge.emit("market_data", TICK)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[1_000] < 50e-6  # 6 µs where it was written; a slow path costs 20


def test_waiting_never_goes_negative_under_concurrent_acks(bridge: QueueOnly) -> None:
    stop = threading.Event()

    def ack() -> None:
        while not stop.is_set():
            if bridge.outbox.lines:
                bridge.settle(acked=len(bridge.outbox.take(10, 1 << 20)))

    thread = threading.Thread(target=ack)
    thread.start()
    try:
        for _ in range(3_000):
            bridge.emit("market_data", TICK)
            stats = bridge.stats()
            assert stats["waiting"] >= 0
            assert stats["emitted"] == stats["acked"] + stats["waiting"] + stats["dropped"]
        wait_until(lambda: bridge.stats()["waiting"] == 0, "all are acknowledged")
    finally:
        stop.set()
        thread.join()


scalars = (
    st.text(max_size=300)
    | st.floats()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.sampled_from(
        [Side.BUY, decimal.Decimal("1.10"), np.float64(1.5), np.int32(7), -0.0, 1e16, 2**63 + 5]
    )
    | st.none()
    | st.lists(st.integers(), max_size=2)
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.dictionaries(st.text(max_size=8) | st.integers(), scalars, max_size=4),
    names=st.fixed_dictionaries(
        {},
        optional={
            name: st.text(max_size=260)
            for name in ("source", "user_id", "correlation_id", "causation_id")
        },
    ),
)
def test_whatever_is_queued_is_a_line_that_the_broker_takes_as_it_is(
    bridge: QueueOnly, data: dict[Any, Any], names: dict[str, str]
) -> None:
    bridge.outbox.lines.clear()
    event_id = bridge.emit("user_action", {"action": "a", **data}, **names)
    for line in bridge.outbox.lines:  # the event, or the account of its refusal
        assert envelope.decode_canonical(line + b"\n")
        assert envelope.encode(envelope.read(line)) == line
    if event_id is not None:
        assert bridge.last().event_id == event_id
        sent = {name: value for name, value in names.items() if value or name == "source"}
        assert {name: getattr(bridge.last(), name) for name in sent} == sent
