"""The broker, through its sockets: nothing here looks inside."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import jsonschema
import msgspec
import psutil
import pytest
import zmq
from conftest import System, free_port, wait_until
from disks import small_disk

import schemas
from event_bus import envelope, protocol
from event_bus.broker import Broker
from event_bus.envelope import Envelope, new_producer
from event_bus.errors import BusRefused, BusUnavailable, TrimmedRange
from event_bus.protocol import Client, FetchReply
from event_bus.settings import Settings


def line(event_id: str, event_type: str = "user_action", **data: Any) -> bytes:
    event = Envelope(
        event_id=event_id,
        event_type=event_type,
        timestamp=1.5,
        data=data or {"action": "a"},
    )
    return envelope.encode_lines([event])


class Running:
    """A broker in a thread of its own, with clocks that a test may move, and a client."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(
            home=home,
            events_url="tcp://127.0.0.1:0",
            ingress_url="tcp://127.0.0.1:0",
            **settings,
        )
        self.ahead_s = 0.0
        self.clock_set_s = 0.0
        self.broker = Broker(
            self.settings,
            clock=lambda: time.time() + self.ahead_s + self.clock_set_s,
            monotonic=lambda: time.monotonic() + self.ahead_s,
        )
        self.thread = threading.Thread(target=self.broker.run)
        self.thread.start()
        self.reached = replace(self.settings, ingress_url=self.broker.ingress_url)
        self.client = Client(self.reached)
        wait_until(lambda: self.client.status()["last_seq"], "its own first event is stored")

    def publish(self, *lines: bytes) -> dict[str, Any]:
        return self.client.publish(b"".join(lines))

    def fetch(self, **request: Any) -> tuple[FetchReply, list[dict[str, Any]]]:
        request_id = self.client.send(protocol.FETCH, json.dumps(request).encode())
        head, *bodies = self.client.receive(request_id, 10)
        reply = msgspec.json.decode(head, type=FetchReply)
        return reply, [json.loads(text) for body in bodies for text in body.splitlines()]

    def later(self, seconds: float) -> None:
        """Let time pass for the broker, and wake it."""
        self.ahead_s += seconds
        self.client.status()

    def set_clock(self, seconds: float) -> None:
        """Put the broker's clock forward or back; no time passes."""
        self.clock_set_s += seconds
        self.client.status()

    def close(self) -> None:
        self.client.close()
        self.broker.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(**settings: Any) -> Running:
        running.append(Running(tmp_path / "home", **settings))
        return running[-1]

    yield start
    for r in running:
        r.close()


Start = Callable[..., Running]


class Watcher:
    """A plain SUB socket that is known to be subscribed."""

    def __init__(self, broker: Broker, *topics: str, **options: int) -> None:
        context: zmq.Context[Any] = zmq.Context.instance()
        self.socket = context.socket(zmq.SUB)
        self.socket.linger = 0
        for name, value in options.items():
            self.socket.set(getattr(zmq, name.upper()), value)
        for topic in topics:
            self.socket.subscribe(topic)
        self.socket.connect(broker.events_url)
        wait_until(lambda: set(topics) <= set(broker.status()["subscriptions"]), "subscribed")

    def receive(self, timeout_s: float = 10) -> tuple[str, dict[str, Any]]:
        assert self.socket.poll(int(timeout_s * 1000)), "nothing arrived"
        topic, body = self.socket.recv_multipart()
        return topic.decode(), json.loads(body)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


def test_live_event_is_topic_and_envelope_with_seq_and_received_at(start: Start) -> None:
    bus = start()
    with Watcher(bus.broker, "bitten.user_action", "bitten.balance") as watcher:
        sent_at = time.time()
        ack = bus.publish(
            line("1", "market_data", symbol="E", bid=1, ask=2),
            line("2"),
            line("3", "balance_update", balance=5),
        )
        assert ack["accepted"] == 3
        received = [watcher.receive(), watcher.receive()]
    assert [topic for topic, _ in received] == ["bitten.user_action", "bitten.balance_update"]
    last_seq = bus.client.status()["last_seq"]
    assert [event["seq"] for _, event in received] == [last_seq - 1, last_seq]
    first = received[0][1]
    assert sent_at - 1 < first.pop("received_at") < time.time() + 1
    assert first.pop("seq") and first == json.loads(line("2"))


def test_nobody_hears_of_an_event_before_it_is_in_the_journal(start: Start) -> None:
    bus = start()
    with Watcher(bus.broker, "bitten.user_action") as watcher:
        blocker = apsw.Connection(str(bus.settings.journal))
        blocker.execute("BEGIN IMMEDIATE")  # the broker's commit waits for this
        request_id = bus.client.send(protocol.PUBLISH, line("1"))
        assert not watcher.socket.poll(300)
        assert not bus.client.socket.poll(0)
        blocker.execute("ROLLBACK")
        assert json.loads(bus.client.receive(request_id, 10)[0])["accepted"] == 1
        stored = list(blocker.execute("SELECT body FROM batch"))
        assert line("1") in [body for (body,) in stored]
        assert watcher.receive()[1]["event_id"] == "1"
        blocker.close()


def test_heartbeat_comes_each_second_and_fits_its_schema(start: Start) -> None:
    bus = start()
    schema = json.loads((schemas.DIRECTORY / "heartbeat.json").read_text())
    with Watcher(bus.broker, "bitten.heartbeat") as watcher:
        bus.fetch(from_seq=1, consumer="reader")
        beats = []
        for _ in range(3):
            bus.later(1.0)
            topic, event = watcher.receive()
            assert topic == "bitten.heartbeat"
            assert "seq" not in event
            beats.append(event["data"])
    for data in beats:
        jsonschema.Draft202012Validator(schema).validate(data)
        assert set(data) == set(schema["properties"])
    assert beats[-1]["consumers"] == {"reader": beats[-1]["last_seq"]}
    assert beats[-1]["uptime"] > beats[0]["uptime"] + 1.5


def test_health_of_the_bus_itself_is_stored_every_30_seconds(start: Start) -> None:
    bus = start()
    with Watcher(bus.broker, "bitten.heartbeat") as watcher:
        bus.later(29.0)
        while watcher.receive()[1]["data"]["uptime"] < 29:
            pass
    bus.publish(line("a later turn of the loop"))
    assert bus.client.status()["last_seq"] == 2
    bus.later(2.0)
    wait_until(lambda: bus.client.status()["last_seq"] == 3, "the second account is stored")
    _, events = bus.fetch(from_seq=1)
    health = [e["data"] for e in events if e["event_type"] == "system_health"]
    assert [h["component"] for h in health] == ["event_bus"] * 2
    assert [h["status"] for h in health] == ["ok"] * 2


def test_own_type_added_while_the_broker_runs_works_at_first_use_with_its_key(
    start: Start,
) -> None:
    bus = start()
    assert bus.publish(line("0", "news", symbol="E"))["rejected"] == 1
    bus.settings.schemas.mkdir()
    schema = {"type": "object", "required": ["symbol"], "properties": {"symbol": {}}}
    schema["x-bitten"] = {"key": "symbol"}
    (bus.settings.schemas / "broken.json").write_text("{")
    (bus.settings.schemas / "news.json").write_text(json.dumps(schema))
    with Watcher(bus.broker, "bitten.news.EUR") as watcher:
        ack = bus.publish(
            line("1", "news", symbol="GBPUSD"),
            line("2", "news", symbol="EURUSD"),
            line("3", "news", other=1),
            line("4", "broken", a=1),
        )
        assert (ack["accepted"], ack["rejected"]) == (2, 2)
        topic, event = watcher.receive()
    assert (topic, event["event_id"]) == ("bitten.news.EURUSD", "2")
    (problem,) = bus.client.status()["schema_problems"]
    assert "broken.json" in problem


def test_type_that_only_the_bus_publishes_is_refused(start: Start) -> None:
    bus = start()
    ack = bus.publish(line("1", "heartbeat", epoch=1, journal_id="x", last_seq=1))
    assert ack["rejected"] == 1
    assert "published by the bus alone" in ack["refusals"][0]["reason"]


def test_fetch_returns_what_was_sent_and_waits_for_more(start: Start) -> None:
    bus = start()
    bus.publish(line("1"), line("2"))
    reply, events = bus.fetch(from_seq=1)
    assert [e["event_id"] for e in events][-2:] == ["1", "2"]
    assert sum(head.count for head in reply.batches) == len(events) == reply.last_seq
    other = Client(bus.reached)
    waiting = other.send(protocol.FETCH, b'{"wait_ms":20000}')
    also_waiting = other.send(protocol.FETCH, b'{"wait_ms":20000}')
    wait_until(lambda: other.status(), "the requests before it have arrived")
    bus.publish(line("3"))
    for request_id in (waiting, also_waiting):
        assert line("3") in b"".join(other.receive(request_id, 10)[1:])
    other.close()
    assert bus.fetch(from_seq=reply.last_seq + 2, wait_ms=1)[1] == []


@pytest.mark.parametrize(
    ("request_body", "code"),
    [
        ({"from_seq": 10**30}, "ahead"),
        ({"from_seq": 1000}, "ahead"),
        ({"from_seq": 0}, "trimmed"),
        ({"from_seq": -1}, "bad_request"),
        ({"from_seq": "1"}, "bad_request"),
        ({"consumer": "x" * 65}, "bad_request"),
        ([], "bad_request"),
    ],
)
def test_fetch_that_cannot_be_answered_is_refused_with_a_code(
    start: Start, request_body: Any, code: str
) -> None:
    bus = start()
    request_id = bus.client.send(protocol.FETCH, json.dumps(request_body).encode())
    with pytest.raises(BusRefused) as caught:
        bus.client.receive(request_id, 10)
    assert caught.value.code == code


def test_fetch_below_the_journal_is_told_what_is_left(start: Start) -> None:
    bus = start(journal_max_age_s=60)
    for n in range(3):
        bus.publish(line(str(n)))
    last_seq = bus.client.status()["last_seq"]
    bus.later(61.0)
    wait_until(lambda: bus.client.status()["first_seq"] > last_seq, "trimmed by age")
    with pytest.raises(TrimmedRange, match=r"events before \d+ are no longer") as caught:
        bus.fetch(from_seq=1)
    assert caught.value.first_seq == last_seq + 1
    assert bus.fetch(from_time=0.0)[0].from_seq == last_seq + 1


def has_events_after(bus: Running, seq: int) -> bool:
    return bool(bus.client.status()["last_seq"] > seq)


def test_journal_is_not_trimmed_past_a_durable_consumer_and_says_so(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    bus = start(journal_max_age_s=60)
    bus.publish(line("1"))
    bus.publish(line("2"))
    bus.fetch(from_seq=3, stored_seq=2, consumer="slow")
    for _ in range(3):
        bus.later(61.0)
        before = bus.client.status()["last_seq"]
        wait_until(lambda: bus.client.status()["journal_held_by"], "held")
        bus.later(31.0)
        wait_until(partial(has_events_after, bus, before), "timers have run")
    status = bus.client.status()
    assert status["journal_held_by"] == "slow"
    assert status["first_seq"] == status["consumers"]["slow"]["next_seq"] == 2
    assert caplog.text.count("consumer slow has not stored it") == 1
    forgotten = bus.client.receive(bus.client.send(protocol.FORGET, b"slow"), 10)
    lag = bus.client.status()["last_seq"] - 1
    assert json.loads(forgotten[0]) == {"consumer": "slow", "known": True, "lag": lag}
    bus.later(6.0)
    wait_until(lambda: bus.client.status()["first_seq"] > 3, "trimmed")
    assert bus.client.status()["journal_held_by"] is None


def test_damaged_events_are_refused_by_range_and_the_rest_is_served(start: Start) -> None:
    bus = start()
    for n in range(3):
        bus.publish(line(str(n)))
    other = apsw.Connection(str(bus.settings.journal))
    other.execute("UPDATE batch SET body = zeroblob(length(body)) WHERE first_seq = 3")
    other.close()
    _, events = bus.fetch(from_seq=1)
    assert [e["event_id"] for e in events][1:] == ["0"]
    with pytest.raises(TrimmedRange, match="events 3 to 3 are damaged") as caught:
        bus.fetch(from_seq=3)
    assert (caught.value.code, caught.value.first_seq) == ("damaged", 4)
    assert bus.fetch(from_seq=4)[1][0]["event_id"] == "2"
    assert bus.publish(line("1"))["duplicates"] == 1


def test_req_socket_can_publish_fetch_and_ask_for_status(start: Start) -> None:
    bus = start()
    req: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
    req.linger = 0
    req.connect(bus.broker.ingress_url)
    answers = []
    for frames in (
        [b"publish", b"1", line("1")],
        [b"fetch", b"2", b"{}"],
        [b"status", b"3"],
        [b"x"],
    ):
        req.send_multipart(frames)
        assert req.poll(10_000)
        answers.append(req.recv_multipart())
    req.close()
    assert [a[:2] for a in answers] == [
        [b"ack", b"1"],
        [b"batches", b"2"],
        [b"status", b"3"],
        [b"error", b""],
    ]
    assert json.loads(answers[3][2])["code"] == "bad_request"


def test_garbage_on_both_ports_ends_nothing(start: Start) -> None:
    bus = start()
    rng = random.Random(4)
    context: zmq.Context[Any] = zmq.Context.instance()
    verbs = [b"publish", b"fetch", b"status", b"forget", b"", b"\xff", b"PUBLISH"]
    for _ in range(30):
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 1000
        dealer.connect(bus.broker.ingress_url)
        for _ in range(20):
            frames = [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 6))]
            frames[0] = rng.choice([*verbs, frames[0]])
            dealer.send_multipart(frames)
        dealer.send_multipart([b"status", b"the end"])
        while dealer.poll(10_000) and dealer.recv_multipart()[1] != b"the end":
            pass
        dealer.close()
    xsub = context.socket(zmq.XSUB)
    xsub.linger = 1000
    xsub.connect(bus.broker.events_url)
    for _ in range(100):
        xsub.send_multipart([rng.randbytes(rng.randrange(9)) for _ in range(rng.randrange(1, 4))])
    xsub.close()
    for url in (bus.broker.ingress_url, bus.broker.events_url):
        for size in (1, 10, 64, 5_000):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
                raw.sendall(rng.randbytes(size))
    assert bus.publish(line("after"))["accepted"] == 1
    assert bus.publish(line("after"))["duplicates"] == 1


def test_batch_with_a_bad_line_is_acknowledged_line_by_line(start: Start) -> None:
    bus = start()
    ack = bus.publish(line("1"), b"nonsense\n", line("2"), line("1"), line("1", action="b"))
    refusals = ack.pop("refusals")
    assert ack == {"accepted": 2, "duplicates": 1, "rejected": 1, "conflicts": 1}
    assert [r["line"] for r in refusals] == [1, 4]
    status = bus.client.status()
    assert [status[k] for k in ("accepted", "duplicates", "rejected", "conflicts")] == [2, 1, 1, 1]


def test_slow_subscriber_loses_frames_and_sees_the_gap_while_others_lose_none(
    start: Start,
) -> None:
    bus = start()
    pad = "x" * 2_000  # what the sockets hold counts in bytes, the high-water mark in events
    with (
        Watcher(bus.broker, "bitten.user_action", rcvhwm=1, rcvbuf=4_096) as slow,
        Watcher(bus.broker, "bitten.user_action", rcvhwm=0) as fast,
    ):
        seqs = []
        total = 0
        while total < 26_000:
            batch = [line(f"{total + i}", action="a", pad=pad) for i in range(500)]
            assert bus.publish(*batch)["accepted"] == 500
            total += 500
            seqs += [fast.receive()[1]["seq"] for _ in range(500)]
        assert seqs == list(range(seqs[0], seqs[0] + total))
        read = [slow.receive()[1]["seq"]]
        while len(read) == 1 or read[-1] == read[-2] + 1:
            if not slow.socket.poll(500):
                bus.publish(line("last"))  # whoever reads on learns of the gap by the next event
            read.append(slow.receive()[1]["seq"])
    assert read[-1] > read[-2] + 1
    _, events = bus.fetch(from_seq=read[-2] + 1)
    assert events  # and can fill it


def test_stop_acknowledges_what_has_arrived_and_frees_the_journal(start: Start) -> None:
    bus = start()
    blocker = apsw.Connection(str(bus.settings.journal))
    blocker.execute("BEGIN IMMEDIATE")
    request_id = bus.client.send(protocol.PUBLISH, line("1"))
    assert not bus.client.socket.poll(300)  # it waits for the journal
    bus.broker.stop()
    blocker.execute("ROLLBACK")
    blocker.close()
    assert json.loads(bus.client.receive(request_id, 10)[0])["accepted"] == 1
    bus.thread.join(10)
    bus.broker.stop()  # a second signal does nothing
    again = start()
    assert again.client.status()["epoch"] == 2
    assert again.publish(line("1"))["duplicates"] == 1


def test_taken_port_is_named_with_its_owner(system: System) -> None:
    with socket.socket() as taken:
        port = int(system.environ["BITTEN_INGRESS_URL"].rpartition(":")[2])
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = system.bitten("bus")
    assert done.returncode == 4
    (complaint,) = done.stderr.splitlines()
    assert f"port {port} is held by process {os.getpid()}" in complaint
    assert "BITTEN_INGRESS_URL" in complaint


def test_second_bus_on_the_same_home_is_refused_and_names_the_first(bus: System) -> None:
    environ = {"BITTEN_INGRESS_URL": f"tcp://127.0.0.1:{free_port()}"}
    done = bus.bitten("bus", env=environ)
    assert done.returncode == 4
    (complaint,) = done.stderr.splitlines()
    assert f"already running here: process {bus.processes[0].pid} holds" in complaint
    assert bus.status() is not None


def test_sigterm_ends_the_bus_with_exit_code_0(bus: System) -> None:
    client = Client(bus.settings)
    assert client.publish(line("1"))["accepted"] == 1
    client.close()
    bus.processes[0].send_signal(signal.SIGTERM)
    output, _ = bus.processes[0].communicate(timeout=10)
    assert bus.processes[0].returncode == 0, output
    assert "stopped at seq 2" in output


def test_full_disk_is_refused_aloud_and_the_bus_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        system = System(disk / "home")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(2_000_000))
        try:
            process = system.start_bus()
            client = Client(system.settings)
            accepted = 0
            with pytest.raises(BusRefused, match="no space left") as caught:
                for n in range(100):
                    accepted += client.publish(line(str(n), action="x" * 100_000))["accepted"]
            assert caught.value.code == "storage_full"
            status = client.status()
            assert status["state"] == "storage_full"
            assert status["accepted"] == accepted == n
            ballast.unlink()
            assert client.publish(line(str(n), action="x" * 100_000))["accepted"] == 1
            assert client.publish(line("0", action="x" * 100_000))["duplicates"] == 1
            status = client.status()
            assert (status["state"], status["accepted"]) == ("ok", n + 1)
            assert status["last_seq"] in (n + 2, n + 3)  # with one or two system_health
            client.close()
            process.send_signal(signal.SIGTERM)
            assert "refusing events: no space left" in process.communicate(timeout=10)[0]
        finally:
            system.close()


def test_id_that_continues_the_buss_own_is_refused(bus: System) -> None:
    client = Client(bus.settings)
    reply = client.receive(client.send(protocol.FETCH, b'{"from_seq":1}'), 5.0)
    (own,) = envelope.decode_lines(reply[1])
    token = own.event_id.partition("-")[0]
    for n in (2, 3):
        refused = client.publish(line(f"{token}-{n}"))
        assert refused["rejected"] == 1
        assert "the bus's alone" in refused["refusals"][0]["reason"]
    assert client.status()["last_seq"] == 3  # with the bus's own account of both
    client.close()


def test_what_was_on_its_way_does_not_pass_what_a_full_disk_refused(tmp_path: Path) -> None:
    token = new_producer()
    with small_disk(tmp_path / "disk", 4) as disk:
        system = System(disk / "home")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(2_000_000))
        try:
            system.start_bus()
            client = Client(system.settings)
            n = 0
            with pytest.raises(BusRefused, match="no space left"):
                while n < 100:
                    n += 1
                    client.publish(line(f"{token}-{n}", action="x" * 100_000))
            ballast.unlink()
            with pytest.raises(BusRefused, match=f"from {n} on have to come first") as caught:
                client.publish(line(f"{token}-{n + 1}"))
            assert caught.value.code == "storage_full"
            assert client.publish(line("somebody else's"))["accepted"] == 1
            assert client.publish(line(f"{token}-{n}"))["accepted"] == 1
            assert client.publish(line(f"{token}-{n + 1}"))["accepted"] == 1
            client.close()
        finally:
            system.close()


def test_spool_of_a_dead_process_waits_for_room_without_a_busy_loop(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        system = System(disk / "home")
        system.settings.make_home()
        lines = [line(f"0123456789abcdef0123-{n}", action="x" * 10_000) for n in range(1, 201)]
        (system.settings.spool / "0123456789abcdef0123.ndjson").write_bytes(b"".join(lines))
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(5_000_000))
        try:
            system.start_bus()
            with contextlib.closing(Client(system.settings)) as client:
                wait_until(lambda: client.status()["state"] == "storage_full", "the disk is full")
                first = psutil.Process(system.processes[0].pid).cpu_times()
                began = time.monotonic()
                wait_until(lambda: time.monotonic() - began > 1.0, "a second has passed")
                then = psutil.Process(system.processes[0].pid).cpu_times()
                assert then.user + then.system - first.user - first.system < 0.25
                ballast.unlink()
                done = len(lines) + 1
                wait_until(lambda: client.status()["last_seq"] >= done, "the spool is adopted")
                assert list(system.settings.spool.glob("*.ndjson")) == []
        finally:
            system.close()


def test_damaged_events_are_told_once_as_an_event_and_as_a_problem(start: Start) -> None:
    bus = start()
    for n in range(3):
        bus.publish(line(str(n)))
    other = apsw.Connection(str(bus.settings.journal))
    other.execute("UPDATE batch SET body = zeroblob(length(body)) WHERE first_seq = 3")
    other.close()
    for _ in range(3):
        with pytest.raises(TrimmedRange):
            bus.fetch(from_seq=3)
    bus.later(1.0)
    wait_until(lambda: bus.client.status()["state"] == "journal_damaged", "it is a problem")

    def told() -> list[dict[str, Any]]:
        _, events = bus.fetch(from_seq=4)
        return [e["data"] for e in events if e["event_type"] == "journal_loss"]

    wait_until(told, "it is an event")
    bus.later(1.0)
    assert told() == [
        {
            "first_seq": 3,
            "last_seq": 3,
            "events": 1,
            "reason": "CRC-32 is wrong",
            "file": "journal.db",
        }
    ]
    refused = bus.publish(line("x", "journal_loss", first_seq=1, reason="not the client's to say"))
    assert refused["rejected"] == 1


def test_journal_found_broken_while_running_is_recovered_by_the_next_start(
    system: System,
) -> None:
    process = system.start_bus()
    client = Client(system.settings)
    for n in range(300):
        assert client.publish(line(f"id-{n}", action="x" * 5_000))["accepted"] == 1
    journal = system.settings.journal
    other = apsw.Connection(str(journal))
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    root = other.execute("SELECT rootpage FROM sqlite_master WHERE name = 'batch'").get
    other.close()
    with journal.open("r+b") as file:
        file.seek((root - 1) * 8_192)
        file.write(b"\xff" * 8_192)
    with contextlib.suppress(BusRefused, BusUnavailable):
        client.receive(client.send(protocol.FETCH, b'{"from_seq":1}'), 5)
        client.publish(line("one more"))
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 5, output
    assert "journal.db is damaged" in output or "cannot read" in output
    system.start_bus()
    status = system.status()
    assert status is not None
    assert status["state"] == "journal_recovered"
    assert status["epoch"] == 2
    found = []
    while len(found) < 300:
        request = {"from_seq": status["first_seq"] + len(found) + 1}
        reply = client.receive(client.send(protocol.FETCH, json.dumps(request).encode()), 5)
        skip = request["from_seq"] - json.loads(reply[0])["batches"][0][0]
        found += [e.event_id for body in reply[1:] for e in envelope.decode_lines(body)][skip:]
    assert found[:300] == [f"id-{n}" for n in range(300)]
    assert client.publish(line("id-7", action="x" * 5_000))["duplicates"] == 1
    client.close()


def test_journal_removed_under_the_bus_is_put_back_and_nothing_acked_is_lost(bus: System) -> None:
    client = Client(bus.settings)
    for n in range(100):
        assert client.publish(line(f"id-{n}"))["accepted"] == 1
    for path in bus.home.glob("journal.db*"):
        path.unlink()
    assert client.publish(line("id-100"))["accepted"] == 1
    wait_until(bus.settings.journal.exists, "it is back", 8.0)
    assert client.publish(line("id-101"))["accepted"] == 1
    bus.processes[0].kill()
    bus.processes[0].wait()
    bus.start_bus()
    assert [client.publish(line(f"id-{n}"))["duplicates"] for n in range(102)] == [1] * 102
    client.close()


def test_bus_that_was_stopped_takes_what_came_meanwhile_and_misses_nobody(bus: System) -> None:
    client = Client(bus.settings)
    reader = Client(bus.settings)
    reader.receive(reader.send(protocol.FETCH, b'{"from_seq":1,"consumer":"reader"}'), 5)
    bus.processes[0].send_signal(signal.SIGSTOP)
    sent = [client.send(protocol.PUBLISH, line(f"id-{n}")) for n in range(50)]
    assert not client.socket.poll(1_000)
    bus.processes[0].send_signal(signal.SIGCONT)
    for request_id in sent:
        assert json.loads(client.receive(request_id, 10)[0])["accepted"] == 1
    status = client.status()
    assert (status["state"], status["epoch"]) == ("ok", 1)
    client.close()
    reader.close()


def test_bus_on_unix_sockets_takes_events(system: System) -> None:
    for name in ("EVENTS", "INGRESS"):
        system.environ[f"BITTEN_{name}_URL"] = f"ipc://{system.home}/{name}"
    system.home.mkdir(mode=0o700)
    system.start_bus()
    with contextlib.closing(Client(system.settings)) as client:
        assert client.publish(line("e-1"), 10.0)["accepted"] == 1
