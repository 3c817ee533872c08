"""Subscribers see every event once, in order, from where they asked."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import System

from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.errors import BusRefused, BusUnavailable, TrimmedRange
from event_bus.protocol import Client
from event_bus.subscriber import Cursor, Event, Subscriber

TOKEN = envelope.new_producer()


def batch(*numbers: int, event_type: str = "user_action", **data: Any) -> bytes:
    data = data or {"action": "a"}
    return envelope.encode_lines(
        [
            Envelope(event_id=f"{TOKEN}-{n}", event_type=event_type, timestamp=n, data=data)
            for n in numbers
        ]
    )


class Publisher:
    """Publishes numbered events until it is stopped, sending again what was not acknowledged."""

    def __init__(self, bus: System) -> None:
        self.bus = bus
        self.sent = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        client = Client(self.bus.settings)
        while not self._stopping.is_set():
            body = batch(*range(self.sent + 1, self.sent + 51))
            while True:
                try:
                    client.publish(body, timeout_s=0.5)
                    break
                except BusUnavailable:
                    continue
            self.sent += 50
        client.close()

    def stop(self) -> int:
        self._stopping.set()
        self._thread.join()
        return self.sent


@pytest.fixture
def client(bus: System) -> Iterator[Client]:
    made = Client(bus.settings)
    yield made
    made.close()


def collect_sync(subscriber: Subscriber, count: int | None = None) -> list[Event]:
    with subscriber:
        return list(itertools.islice(subscriber, count))


def collect_async(subscriber: Subscriber, count: int | None = None) -> list[Event]:
    async def collect() -> list[Event]:
        found: list[Event] = []
        stream = subscriber.__aiter__()
        while len(found) != count:
            event = await anext(stream, None)
            if event is None:
                break
            found.append(event)
        await stream.aclose()  # type: ignore[attr-defined]
        return found

    return asyncio.run(collect())


Collect = Callable[..., list[Event]]
both = pytest.mark.parametrize("collect", [collect_sync, collect_async], ids=["sync", "asyncio"])


@both
def test_patterns_choose_types_and_ignore_leaves_out(
    bus: System, client: Client, collect: Collect
) -> None:
    client.publish(batch(1, event_type="market_data", symbol="E", bid=1, ask=2))
    client.publish(batch(2) + batch(3, event_type="balance_update", balance=1))

    def types(*patterns: str, **options: Any) -> list[str]:
        arguments: Any = {"start": 1, "timeout_s": 0.01, "settings": bus.settings} | options
        return [e.event_type for e in collect(Subscriber(*patterns, **arguments))]

    assert types("market_*", "bitten.balance_update") == ["market_data", "balance_update"]
    assert types("user_actio?") == ["user_action"]
    assert types(ignore=["system_*"]) == ["market_data", "user_action", "balance_update"]
    assert types("*a*", ignore=["*_action", "system_health"]) == ["market_data", "balance_update"]
    assert types("nothing") == []


@both
def test_event_has_every_field_and_none_for_what_was_left_out(
    bus: System, client: Client, collect: Collect
) -> None:
    given: Any = {
        "event_id": "mine",
        "event_type": "user_action",
        "timestamp": 1.25,
        "user_id": "u",
        "data": {"action": "x", "n": [1, None]},
    }
    client.publish(envelope.encode_lines([Envelope(**given)]))
    (event,) = collect(Subscriber("user_action", start=1, settings=bus.settings), 1)
    fields = {name: getattr(event, name) for name in given}
    assert fields == given
    assert (event.source, event.correlation_id, event.causation_id) == (None, None, None)
    assert event.seq == 2
    assert abs(event.received_at - time.time()) < 60


@both
def test_start_is_a_seq_or_a_time(bus: System, client: Client, collect: Collect) -> None:
    for n in (1, 2, 3):
        client.publish(batch(n))
    settings = bus.settings
    events = collect(Subscriber(start=0.0, settings=settings), 4)
    assert [e.seq for e in events] == [1, 2, 3, 4]
    assert collect(Subscriber(start=3, settings=settings), 2) == events[2:]
    assert collect(Subscriber(start=events[2].received_at, settings=settings), 2) == events[2:]


def test_start_of_another_kind_is_refused(system: System) -> None:
    with pytest.raises(ValueError, match="expected 'now', a seq"):
        Subscriber(start="yesterday", settings=system.settings)


def test_from_now_begins_where_connect_was_called(bus: System, client: Client) -> None:
    client.publish(batch(1))
    with Subscriber("user_action", settings=bus.settings, timeout_s=5) as subscriber:
        subscriber.connect()
        client.publish(batch(2, 3))
        events = list(itertools.islice(subscriber, 2))
    assert [e.event_id for e in events] == [f"{TOKEN}-2", f"{TOKEN}-3"]


@both
def test_joining_under_load_from_the_past_misses_and_repeats_nothing(
    bus: System, collect: Collect
) -> None:
    publisher = Publisher(bus)
    try:
        events = collect(Subscriber("user_action", start=1, settings=bus.settings), 5_000)
    finally:
        publisher.stop()
    assert [e.event_id for e in events] == [f"{TOKEN}-{n}" for n in range(1, 5_001)]


@both
def test_stream_goes_on_over_a_restart_of_the_bus(bus: System, collect: Collect) -> None:
    publisher = Publisher(bus)
    found: list[Event] = []
    subscriber = Subscriber("user_action", start=1, settings=bus.settings)
    reader = threading.Thread(target=lambda: found.extend(collect(subscriber, 6_000)))
    reader.start()
    try:
        while publisher.sent < 1_000:
            time.sleep(0.01)
        bus.processes[0].send_signal(signal.SIGKILL)
        bus.processes[0].wait()
        bus.start_bus()
        reader.join(30)
        assert not reader.is_alive()
    finally:
        publisher.stop()
    assert [e.event_id for e in found] == [f"{TOKEN}-{n}" for n in range(1, 6_001)]
    assert all(a.seq < b.seq for a, b in itertools.pairwise(found))


@both
def test_iteration_ends_after_the_timeout(bus: System, collect: Collect) -> None:
    began = time.monotonic()
    assert collect(Subscriber("nothing", start=1, timeout_s=0.3, settings=bus.settings)) == []
    assert 0.3 <= time.monotonic() - began < 2.0


@both
def test_timeout_holds_while_the_bus_is_away(system: System, collect: Collect) -> None:
    began = time.monotonic()
    assert collect(Subscriber(timeout_s=0.3, settings=system.settings)) == []
    assert 0.3 <= time.monotonic() - began < 2.5


@both
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_another_subscriber_goes_on_where_one_was_left(
    bus: System, client: Client, collect: Collect, taken: int
) -> None:
    client.publish(batch(*range(1, 6)))
    first = Subscriber("user_action", start=1, settings=bus.settings, timeout_s=2)
    seen = collect(first, taken)
    client.publish(batch(*range(6, 9)))
    second = Subscriber("user_action", start=first.next_seq or 1, settings=bus.settings)
    seen += collect(second, 8 - taken)
    assert [e.event_id for e in seen] == [f"{TOKEN}-{n}" for n in range(1, 9)]
    assert second.next_seq == seen[-1].seq + 1


def test_second_loop_over_one_subscriber_goes_on_where_the_first_stopped(
    bus: System, client: Client
) -> None:
    client.publish(batch(*range(1, 6)))
    seen = []
    with Subscriber("user_action", start=1, settings=bus.settings, timeout_s=0.05) as subscriber:
        for event in subscriber:
            seen.append(event.event_id)
            if len(seen) == 2:
                break
        seen += [event.event_id for event in subscriber]
    assert seen == [f"{TOKEN}-{n}" for n in range(1, 6)]

    async def both_loops() -> list[str]:
        found = []
        subscriber = Subscriber("user_action", start=1, settings=bus.settings, timeout_s=0.05)
        stream = subscriber.__aiter__()
        found.append((await anext(stream)).event_id)
        await stream.aclose()  # type: ignore[attr-defined]
        return found + [event.event_id async for event in subscriber]

    assert asyncio.run(both_loops()) == seen


def test_next_seq_passes_events_that_were_not_asked_for(bus: System, client: Client) -> None:
    client.publish(batch(1, 2, 3))
    with Subscriber("nothing", start=1, settings=bus.settings, timeout_s=0.01) as subscriber:
        assert list(subscriber) == []
        assert subscriber.next_seq == 5


@both
def test_start_before_the_journal_raises_with_the_range(system: System, collect: Collect) -> None:
    system.environ["BITTEN_JOURNAL_MAX_BYTES"] = "1"
    system.start_bus()
    client = Client(system.settings)
    for n in range(1, 4):
        client.publish(batch(n))
    system.processes[0].send_signal(signal.SIGTERM)
    system.processes[0].communicate()
    system.start_bus()  # trims when it starts, and then every five seconds
    first_seq = client.status()["first_seq"]
    client.close()
    assert first_seq > 1
    with pytest.raises(TrimmedRange) as caught:
        collect(Subscriber(start=1, settings=system.settings))
    assert caught.value.first_seq >= first_seq


@both
def test_start_beyond_the_end_is_refused(bus: System, collect: Collect) -> None:
    with pytest.raises(BusRefused, match="the journal ends at") as caught:
        collect(Subscriber(start=1_000, settings=bus.settings))
    assert caught.value.code == "ahead"


LINE = b'{"event_id":"a","event_type":"user_action","timestamp":1.5,"data":{"action":"a"}}\n'


def answer(batches: str, *bodies: bytes) -> list[bytes]:
    head = f'{{"from_seq":1,"batches":{batches},"first_seq":1,"last_seq":9,"journal_id":"j",'
    return [f'{head}"epoch":1}}'.encode(), *bodies]


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        (answer("[[2,1,1.5]]", LINE), "event 1 is missing before 2"),
        (answer("[[1,1,1.5],[3,1,1.5]]", LINE, LINE), "event 2 is missing before 3"),
        (answer("[[1,2,1.5]]", LINE), "1 events where 2 were announced"),
        (answer("[[1,1,1.5]]"), "shorter"),
        (answer("[[1,1,1.5]]", b"garbage"), "malformed"),
        ([b"garbage"], "malformed"),
        ([], "out of range"),
    ],
)
def test_answer_that_is_none_is_refused_and_the_cursor_stays(
    frames: list[bytes], problem: str
) -> None:
    cursor = Cursor(next_seq=1)
    with pytest.raises(BusRefused, match=problem):
        cursor.take(frames)
    assert cursor.next_seq == 1
    assert [b.first_seq for b in cursor.take(answer("[[1,1,1.5],[2,1,1.5]]", LINE, LINE))] == [1, 2]
