"""docs/protocol.md: its code runs, and a client written from it alone works.

The client below knows pyzmq, json and that page. It must not import anything of this project.
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from conftest import System

PAGE = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_code_of_the_page_runs(bus: System) -> None:
    done = bus.script("\n".join(fenced("python")))
    assert done.returncode == 0, done.stderr


def test_json_of_the_page_is_what_the_bus_says(bus: System) -> None:
    event, ack, request, batches = map(json.loads, fenced("json"))
    client = Client(bus)
    answer = client.ask(b"publish", json.dumps(event).encode() + b"\nx\n")
    assert set(json.loads(answer[0])) == set(ack)
    assert set(json.loads(answer[0])["refusals"][0]) == set(ack["refusals"][0])
    answer = client.ask(b"fetch", json.dumps(request | {"from_seq": 1}).encode())
    assert set(json.loads(answer[0])) == set(batches)
    client.close()


def test_status_fields_are_those_of_the_page(bus: System) -> None:
    section = PAGE.read_text().partition("## Status")[2]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert set(bus.status() or {}) == documented


class Client:
    """A DEALER for requests and a SUB for live events."""

    def __init__(self, bus: System) -> None:
        self.ingress = bus.environ["BITTEN_INGRESS_URL"]
        self.context = zmq.Context()
        self.producer = f"{int(time.time() * 1000):012x}{secrets.token_hex(4)}"
        self.n = 0
        self.request = 0
        self.connect()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.linger = 0
        self.sub.connect(bus.environ["BITTEN_EVENTS_URL"])

    def connect(self) -> None:
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(self.ingress)

    def close(self) -> None:
        self.context.destroy(linger=0)

    def ask(self, verb: bytes, *frames: bytes, timeout_s: float = 2.0) -> list[bytes]:
        self.request += 1
        request_id = b"%d" % self.request
        self.socket.send_multipart([verb, request_id, *frames])
        while self.socket.poll(int(timeout_s * 1000)):
            answer, answered, *body = self.socket.recv_multipart()
            if answered == request_id:
                if answer == b"error":
                    raise RuntimeError(body[0].decode())
                return body
        self.socket.close()
        self.connect()
        raise TimeoutError

    def event(self, event_type: str, **data: Any) -> dict[str, Any]:
        self.n += 1
        return {
            "event_id": f"{self.producer}-{self.n}",
            "event_type": event_type,
            "timestamp": time.time(),
            "source": "foreign",
            "data": data,
        }

    def publish(self, *events: dict[str, Any]) -> dict[str, Any]:
        body = "".join(json.dumps(e) + "\n" for e in events).encode()
        while True:
            try:
                ack: dict[str, Any] = json.loads(self.ask(b"publish", body, timeout_s=0.5)[0])
                return ack
            except TimeoutError:
                continue

    def fetch(self, **request: Any) -> tuple[list[tuple[int, dict[str, Any]]], int]:
        wait_s = request.get("wait_ms", 0) / 1000
        head, *bodies = self.ask(b"fetch", json.dumps(request).encode(), timeout_s=wait_s + 2)
        answer = json.loads(head)
        next_seq: int = answer["from_seq"]
        events = []
        for (first, count, _), body in zip(answer["batches"], bodies, strict=True):
            lines = body.split(b"\n")[:count]
            events += [(first + i, json.loads(text)) for i, text in enumerate(lines)]
            next_seq = first + count
        return [(seq, e) for seq, e in events if seq >= answer["from_seq"]], next_seq

    def subscribe(self, topic: str, next_seq: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Events from `next_seq` on: live ones, and the missed ones fetched between them."""
        self.sub.subscribe(topic)
        while True:
            assert self.sub.poll(10_000), "the bus is silent"
            _, body = self.sub.recv_multipart()
            event = json.loads(body)
            seq = event.get("seq")
            before = event["data"]["last_seq"] if seq is None else seq - 1
            while next_seq <= before:
                try:
                    missed, next_seq = self.fetch(from_seq=next_seq)
                except TimeoutError:
                    continue
                yield from missed
            if seq == next_seq:
                next_seq += 1
                yield seq, event


@pytest.fixture
def client(bus: System) -> Iterator[Client]:
    made = Client(bus)
    yield made
    made.close()


def test_publish_is_acknowledged_and_repeats_are_recognised(client: Client) -> None:
    first, second = (client.event("user_action", action=a) for a in ("a", "b"))
    assert client.publish(first, second)["accepted"] == 2
    again = client.publish(second, first, second | {"data": {"action": "c"}})
    assert (again["duplicates"], again["conflicts"]) == (2, 1)
    bad = client.publish(client.event("market_data", symbol="E", bid=-1, ask=1))
    assert bad["rejected"] == 1
    assert "data.bid" in bad["refusals"][0]["reason"]
    events, _ = client.fetch(from_seq=1)
    kept = [e for _, e in events if e["source"] == "foreign"]
    assert kept == [first, second]


def test_batch_sent_while_the_bus_restarts_is_stored_once(bus: System, client: Client) -> None:
    assert client.publish(*(client.event("user_action", action=str(i)) for i in range(50)))
    bus.processes[0].send_signal(signal.SIGKILL)
    bus.processes[0].wait()
    batch = [client.event("user_action", action=str(i)) for i in range(50)]
    with pytest.raises(TimeoutError):
        client.ask(
            b"publish", b"".join(json.dumps(e).encode() + b"\n" for e in batch), timeout_s=0.1
        )
    bus.start_bus()
    assert client.publish(*batch)["accepted"] == 50
    assert client.publish(*batch)["duplicates"] == 50
    ids = [e["event_id"] for _, e in client.fetch(from_seq=1)[0] if e["source"] == "foreign"]
    assert ids == [f"{client.producer}-{n}" for n in range(1, 101)]


def test_subscriber_fills_the_gap_of_a_restart(bus: System, client: Client) -> None:
    listener = Client(bus)
    stream = listener.subscribe("bitten.", 1)
    client.publish(*(client.event("user_action", action="a") for _ in range(10)))
    seen = [next(stream) for _ in range(5)]
    bus.processes[0].send_signal(signal.SIGKILL)
    bus.processes[0].wait()
    bus.start_bus()
    client.publish(*(client.event("user_action", action="b") for _ in range(10)))
    expected = [f"{client.producer}-{n}" for n in range(1, 21)]
    ids: list[str] = []
    while ids != expected:
        seen.append(next(stream))
        ids = [e["event_id"] for _, e in seen if e["source"] == "foreign"]
        assert ids == expected[: len(ids)]
    assert [seq for seq, _ in seen] == list(range(1, len(seen) + 1))
    listener.close()


def test_fetch_waits_and_a_durable_consumer_goes_on_where_it_was(client: Client) -> None:
    _, next_seq = client.fetch(from_seq=1, consumer="foreign")
    client.publish(client.event("user_action", action="a"))
    events, next_seq = client.fetch(from_seq=next_seq, wait_ms=5_000, consumer="foreign")
    assert [e["data"]["action"] for _, e in events][-1] == "a"
    assert client.fetch(from_seq=next_seq, wait_ms=10, consumer="foreign")[0] == []
    status = json.loads(client.ask(b"status")[0])
    assert status["consumers"]["foreign"]["next_seq"] == next_seq
    with pytest.raises(RuntimeError, match="ahead"):
        client.fetch(from_seq=10_000)


def test_client_knows_nothing_of_this_project() -> None:
    body = Path(__file__).read_text()
    imports = re.findall(r"^(?:from|import) (\w+)", body, re.M)
    assert not {"event_bus", "collector", "schemas"} & set(imports)
