"""The bridge's delivery thread against a real broker that is away, killed, stopped or odd."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from conftest import System, wait_until

from event_bus.bridge import Bridge
from event_bus.settings import Settings
from event_bus.subscriber import Event, Subscriber

TICK = {"symbol": "EURUSD", "bid": 1.08451, "ask": 1.08453}

MakeBridge = Callable[..., Bridge]


@pytest.fixture
def make_bridge(system: System) -> Iterator[MakeBridge]:
    """Bridges of this process into the system's home; closed at the end."""
    made: list[Bridge] = []

    def make(**values: Any) -> Bridge:
        given = system.settings
        bridge = Bridge(
            Settings(home=given.home, ingress_url=given.ingress_url, source="test", **values)
        )
        made.append(bridge)
        return bridge

    yield make
    for bridge in made:
        bridge.close()
        bridge.outbox.spool.release()


def count_up(bridge: Bridge, numbers: range) -> None:
    for n in numbers:
        assert bridge.emit("user_action", {"action": "n", "n": n}) or bridge.dropped


def acked_more_than(bridge: Bridge, events: int) -> bool:
    return bool(bridge.stats()["acked"] > events)


def journalled(system: System) -> list[Event]:
    """Every event in the journal, in order; their seqs have no hole."""
    status = system.status()
    assert status is not None
    events: list[Event] = []
    if status["last_seq"]:
        with Subscriber(start=1, settings=system.settings, timeout_s=5) as subscriber:
            for event in subscriber:
                events.append(event)
                if event.seq >= status["last_seq"]:
                    break
    assert [e.seq for e in events] == list(range(1, status["last_seq"] + 1))
    return events


def numbers(events: list[Event]) -> list[int]:
    return [e.data["n"] for e in events if e.event_type == "user_action"]


def assert_balanced(bridge: Bridge) -> dict[str, Any]:
    stats = bridge.stats()
    assert stats["emitted"] == stats["acked"] + stats["waiting"] + stats["dropped"]
    return stats


def test_events_emitted_while_the_broker_is_away_arrive_in_order(
    system: System, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge()
    count_up(bridge, range(1_000))
    wait_until(lambda: bridge.stats()["spooled"] == 1_000, "the events are on disk")
    count_up(bridge, range(1_000, 3_000))
    assert not bridge.flush(0.01)
    system.start_bus()
    count_up(bridge, range(3_000, 4_000))
    assert bridge.flush(20)
    assert numbers(journalled(system)) == list(range(4_000))
    stats = assert_balanced(bridge)
    assert (stats["waiting"], stats["spooled"], stats["dropped"]) == (0, 0, 0)
    assert not list(system.settings.spool.iterdir())


def test_broker_killed_under_load_stores_all_once_and_in_order(
    system: System, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge()
    bus = system.start_bus()
    for kill in range(3):
        # Enough for several batches to be on their way when it dies.
        count_up(bridge, range(kill * 10_000, kill * 10_000 + 9_000))
        before = kill * 10_000
        wait_until(partial(acked_more_than, bridge, before), "some are acknowledged")
        bus.kill()
        bus.wait()
        count_up(bridge, range(kill * 10_000 + 9_000, (kill + 1) * 10_000))
        bus = system.start_bus()
    assert bridge.flush(20)
    events = journalled(system)
    assert numbers(events) == list(range(30_000))
    ids = [e.event_id for e in events if e.source == "test"]
    assert ids == [f"{bridge.token}-{n}" for n in range(1, 30_001)]
    assert_balanced(bridge)


def test_events_on_their_way_to_a_dead_broker_are_not_passed_by_later_ones(
    system: System, make_bridge: MakeBridge
) -> None:
    """The old connection's batch is lost; the next broker must still see it first."""
    with FakeBroker(system.settings.ingress_url) as broker:
        bridge = make_bridge()
        count_up(bridge, range(10))
        broker.receive()  # and never answer
    with FakeBroker(system.settings.ingress_url) as broker:
        count_up(bridge, range(10, 20))
        seen: list[int] = []
        while len(seen) < 20:
            route, batch = broker.receive()
            seen += batch
            broker.acknowledge(route)
        assert seen == list(range(20))
        assert bridge.flush(10)


def test_broker_stopped_for_seconds_loses_and_repeats_nothing(
    system: System, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge()
    bus = system.start_bus()
    count_up(bridge, range(100))
    assert bridge.flush(10)
    bus.send_signal(signal.SIGSTOP)
    count_up(bridge, range(100, 200))
    # Past the bridge's patience: it gives the connection up and puts the events on disk.
    wait_until(lambda: bridge.stats()["spooled"] >= 100, "the events are on disk")
    count_up(bridge, range(200, 300))
    bus.send_signal(signal.SIGCONT)
    assert bridge.flush(20)
    assert numbers(journalled(system)) == list(range(300))


def test_crowded_memory_spills_while_a_hanging_broker_is_still_given_time(
    system: System, make_bridge: MakeBridge
) -> None:
    with FakeBroker(system.settings.ingress_url) as broker:
        bridge = make_bridge(outbox_max_events=100)
        for n in range(4):  # as many batches as may be on their way
            count_up(bridge, range(n, n + 1))
            broker.receive()
        count_up(bridge, range(4, 84))
        wait_until(lambda: bridge.stats()["spooled"] == 84, "memory is on disk", 1.9)
        count_up(bridge, range(84, 164))
        assert bridge.stats()["dropped"] == 0


def test_drops_are_counted_exactly_and_announced_after_recovery(
    system: System, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge(outbox_max_events=100, spool_max_bytes=10_000)
    for n in range(1_000):
        bridge.emit("user_action", {"action": "n", "n": n})
        if n % 50 == 0:
            time.sleep(0)
    wait_until(lambda: bridge.last_error == "spool full", "the spool is full")
    while bridge.emit("user_action", {"action": "n", "n": -1}):
        pass
    dropped = assert_balanced(bridge)["dropped"]
    assert dropped > 0
    system.start_bus()
    assert not bridge.flush(20)  # told once
    wait_until(lambda: bridge.loss is None and bridge.stats()["waiting"] == 0, "all is told")
    assert bridge.flush(20)
    stats = assert_balanced(bridge)
    assert stats["dropped"] == dropped
    events = journalled(system)
    losses = [e.data for e in events if e.event_type == "bridge_loss"]
    assert sum(loss["dropped"] for loss in losses) == losses[-1]["dropped_total"] == dropped
    assert losses[0]["producer"] == bridge.token
    assert len([e for e in events if e.source == "test"]) == stats["acked"]
    ids = [int(e.event_id.partition("-")[2]) for e in events if e.source == "test"]
    assert ids == list(range(1, len(ids) + 1))


def test_large_events_in_a_burst_go_to_disk_before_memory_is_full(make_bridge: MakeBridge) -> None:
    bridge = make_bridge(outbox_max_bytes=8 << 20)
    bridge.emit("user_action", {"action": "warm up"})
    wait_until(lambda: bridge.stats()["spooled"] == 1, "away is noticed")
    for _ in range(60):
        bridge.emit("user_action", {"action": "a", "text": "x" * 500_000})
        time.sleep(0.003)  # 160 MB/s: what a disk can take
    assert bridge.stats()["dropped"] == 0


def test_burst_that_the_bus_is_too_slow_for_is_spooled_at_once(
    system: System, make_bridge: MakeBridge
) -> None:
    bus = system.start_bus()
    bridge = make_bridge(outbox_max_events=20_000)
    count_up(bridge, range(1))
    assert bridge.flush(5)
    bus.send_signal(signal.SIGSTOP)
    for n in range(1, 35_000):  # in less time than it takes to see that the bus hangs
        bridge.emit("user_action", {"action": "n", "n": n})
        if n % 1_000 == 0:
            time.sleep(0.002)  # a caller that never waits starves any thread of its process
    assert bridge.stats()["dropped"] == 0
    bus.send_signal(signal.SIGCONT)
    assert bridge.flush(30)
    assert numbers(journalled(system)) == list(range(35_000))


def test_every_event_wakes_a_sleeping_thread(system: System, make_bridge: MakeBridge) -> None:
    system.start_bus()
    bridge = make_bridge()
    for n in range(300):
        bridge.emit("user_action", {"action": "n", "n": n})
        assert bridge.flush(5), n
    assert numbers(journalled(system)) == list(range(300))


def test_restarted_broker_is_found_by_the_next_event_alone(
    system: System, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge()
    bus = system.start_bus()
    count_up(bridge, range(1))
    assert bridge.flush(10)
    bus.kill()
    bus.wait()
    system.start_bus()
    count_up(bridge, range(1, 2))
    assert bridge.flush(5)
    assert numbers(journalled(system)) == [0, 1]


def test_spool_that_somebody_cut_is_counted_as_lost_and_delivery_goes_on(
    system: System, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge()
    count_up(bridge, range(50))
    wait_until(lambda: bridge.stats()["spooled"] == 50, "the events are on disk")
    os.truncate(bridge.outbox.spool.path, 0)
    system.start_bus()
    wait_until(lambda: bridge.stats()["dropped"] == 50, "the loss is counted")
    assert not bridge.flush(10)
    count_up(bridge, range(50, 60))
    assert bridge.flush(10)
    wait_until(lambda: bridge.loss is None, "the loss is told")
    assert bridge.flush(10)
    assert_balanced(bridge)
    events = journalled(system)
    assert numbers(events) == list(range(50, 60))
    assert [e.data["dropped"] for e in events if e.event_type == "bridge_loss"] == [50]


class FakeBroker:
    """A ROUTER that answers what the test says."""

    def __init__(self, url: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(url)

    def receive(self) -> tuple[list[bytes], list[int]]:
        """Route (peer, request id) and the numbers of the next published batch."""
        assert self._socket.poll(10_000), "nothing was published"
        peer, _, request_id, body, _ = self._socket.recv_multipart()
        lines = [msgspec.json.decode(line) for line in body.splitlines()]
        return [peer, request_id], [line["data"].get("n") for line in lines]

    def answer(self, route: list[bytes], verb: bytes, *frames: bytes) -> None:
        self._socket.send_multipart([route[0], verb, route[1], *frames])

    def acknowledge(self, route: list[bytes]) -> None:
        receipt = {"accepted": 0, "duplicates": 0, "rejected": 0, "conflicts": 0, "refusals": []}
        self.answer(route, b"ack", msgspec.json.encode(receipt))

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._context.destroy(linger=0)


@pytest.mark.parametrize(
    "answer",
    [
        [b"error", b'{"code":"storage_full","message":"no space left"}'],
        [b"error", b"not json"],
        [b"error"],
        [b"ack", b"[]"],
        [b"ack", b'{"accepted":1}'],
    ],
)
def test_batch_that_is_not_taken_in_is_sent_again(
    system: System, make_bridge: MakeBridge, answer: list[bytes]
) -> None:
    with FakeBroker(system.settings.ingress_url) as broker:
        bridge = make_bridge()
        count_up(bridge, range(1))
        route, first = broker.receive()
        broker.answer(route, *answer)
        route, again = broker.receive()
        assert first == again == [0]
        assert bridge.stats()["acked"] == 0
        assert bridge.last_error
        broker.acknowledge(route)
        assert bridge.flush(10)
        assert bridge.last_error == ""


def test_process_ends_in_time_when_its_events_are_taken_and_never_acknowledged(
    system: System,
) -> None:
    with FakeBroker(system.settings.ingress_url):
        begin = time.monotonic()
        done = system.script(
            "from event_bus import event_bridge as b\n"
            "for n in range(100): b.user_action({'action': 'n', 'n': n})\n"
        )
        assert time.monotonic() - begin < 2
    assert done.stderr == ""
    (spool,) = system.settings.spool.iterdir()
    assert spool.read_bytes().count(b"\n") == 100


def test_events_refused_by_the_bus_alone_are_counted(
    system: System, make_bridge: MakeBridge, caplog: pytest.LogCaptureFixture
) -> None:
    (system.home / "schemas").mkdir(parents=True)
    schema = system.home / "schemas" / "my_event.json"
    schema.write_text('{"type":"object"}')
    bridge = make_bridge()
    schema.write_text('{"type":"object","required":["a"]}')
    system.start_bus()
    assert bridge.emit("my_event", {})
    assert bridge.flush(10)
    assert bridge.stats()["refused_by_bus"] == 1
    assert "refused by the bus" in caplog.text
    assert [e.event_type for e in journalled(system)].count("event_rejected") == 1


def test_own_type_added_while_the_process_runs_is_known_soon_after_its_first_event(
    bus: System, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge()
    assert bridge.emit("my_event", {"a": 1}) is None
    assert bridge.flush(5)
    (bus.home / "schemas").mkdir()
    (bus.home / "schemas" / "my_event.json").write_text('{"type":"object"}')
    wait_until(lambda: bridge.emit("my_event", {"a": 2}), "the type is known")
    assert bridge.flush(5)
    assert [e.data for e in journalled(bus) if e.event_type == "my_event"] == [{"a": 2}]


IDLE = """
import resource, sys, threading, time
from event_bus import event_bridge as b
b.user_action({'action': 'a'})
def settled(): return b.stats()['acked' if sys.argv[1] == 'up' else 'spooled'] == 1
deadline = time.monotonic() + 10
while not settled() and time.monotonic() < deadline: time.sleep(0.01)
assert settled(), b.stats()
def cpu(): u = resource.getrusage(resource.RUSAGE_SELF); return u.ru_utime + u.ru_stime
def wake_ups():
    texts = [open(f'/proc/self/task/{t}/status').read() for t in threads]
    return sum(int(s.split('\\nvoluntary_ctxt_switches:')[1].split()[0]) for s in texts)
threads = [t.native_id for t in threading.enumerate() if t.name == 'bitten-bridge']
time.sleep(1)
begin, before = cpu(), wake_ups()
time.sleep(2); print((cpu() - begin) / 2, (wake_ups() - before) / 2)
"""


@pytest.mark.parametrize("bus_is", ["up", "away"])
def test_idle_bridge_uses_less_than_a_percent_of_a_core(system: System, bus_is: str) -> None:
    if bus_is == "up":
        system.start_bus()
    done = system.script(IDLE, bus_is)
    load, wake_ups = map(float, done.stdout.split())
    assert load < 0.01, done
    assert wake_ups < 10, done  # each try to connect takes a few switches between threads
    if bus_is == "away":
        assert subprocess.run(["ls", system.settings.spool], capture_output=True).stdout


def test_home_that_cannot_be_written_keeps_events_until_the_broker_comes(
    system: System, make_bridge: MakeBridge, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    bridge = make_bridge()
    object.__setattr__(bridge.settings, "home", tmp_path / "file" / "home")
    count_up(bridge, range(10))
    wait_until(lambda: "cannot create" in bridge.last_error, "the trouble is seen")
    system.start_bus()
    assert bridge.flush(10)
    assert numbers(journalled(system)) == list(range(10))
