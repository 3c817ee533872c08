"""What strangers may cost the bus: sizes, subscriptions, connections, silence."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import zmq
from conftest import System, wait_until

from event_bus import ports, protocol
from event_bus.errors import BusRefused
from event_bus.live import MAX_SUBSCRIPTIONS
from event_bus.protocol import Client

FRAME_BYTES = 100 << 20
ENDLESS_BYTES = 2 << 30
GROWTH_BYTES = 5 << 20
SILENT = 300


Opens = Callable[[int], zmq.Socket[Any]]


@pytest.fixture
def opens() -> Iterator[Opens]:
    """Makes sockets that are closed after the test."""
    with contextlib.ExitStack() as closing:

        def make(kind: int) -> zmq.Socket[Any]:
            made: zmq.Socket[Any] = closing.enter_context(zmq.Context.instance().socket(kind))
            made.linger = 0
            return made

        yield make


@pytest.fixture
def old_client(bus: System) -> Iterator[Client]:
    with contextlib.closing(Client(bus.settings)) as client:
        yield client


def port(url: str) -> int:
    found = urlsplit(url).port
    assert found is not None
    return found


def publish(client: Client) -> bool:
    event = {"event_id": f"e-{time.monotonic_ns()}", "event_type": "user_action"}
    fields = {"timestamp": time.time(), "data": {"action": "login"}}
    return bool(client.publish(json.dumps(event | fields).encode() + b"\n", 20)["accepted"])


def memory(bus: System) -> int:
    return int(psutil.Process(bus.processes[0].pid).memory_info().rss)


def connected_by_hand(url: str, kind: bytes) -> socket.socket:
    """A connection of a client without keys, its greeting and READY exchanged."""
    peer = socket.create_connection(("127.0.0.1", port(url)), 20)
    ready = b"\x05READY" + b"\x0bSocket-Type" + len(kind).to_bytes(4) + kind
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
    peer.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
    answer = b""
    while b"READY" not in answer:
        answer += peer.recv(1)
    return peer


@pytest.mark.parametrize("url", ["BITTEN_INGRESS_URL", "BITTEN_EVENTS_URL"])
def test_huge_frame_is_cut_before_it_is_read(bus: System, old_client: Client, url: str) -> None:
    before = memory(bus)
    chunk = bytes(1 << 20)
    sent = 0
    kind = b"DEALER" if url == "BITTEN_INGRESS_URL" else b"SUB"
    with connected_by_hand(bus.environ[url], kind) as peer:
        peer.sendall(b"\x02" + FRAME_BYTES.to_bytes(8))  # a message of 100 MB in one frame
        with contextlib.suppress(ConnectionError):
            while sent < FRAME_BYTES:
                peer.sendall(chunk)
                sent += len(chunk)
    assert sent < FRAME_BYTES
    assert publish(old_client)
    assert memory(bus) - before < GROWTH_BYTES


def test_message_of_endless_frames_ends_and_honest_clients_notice_nothing(
    bus: System, old_client: Client
) -> None:
    before = memory(bus)
    frames = (b"\x03" + (1_000).to_bytes(8) + bytes(1_000)) * 10_000
    sent = 0
    with contextlib.closing(Client(bus.settings)) as quiet:
        waiting = quiet.send(protocol.FETCH, b'{"wait_ms":30000}')
        with connected_by_hand(bus.environ["BITTEN_INGRESS_URL"], b"DEALER") as peer:
            with contextlib.suppress(ConnectionError):
                while sent < ENDLESS_BYTES:
                    peer.sendall(frames)
                    sent += len(frames)
                    assert old_client.status(20)
            assert sent < ENDLESS_BYTES
        assert publish(old_client)
        assert quiet.receive(waiting, 20)
    wait_until(lambda: memory(bus) - before < 4 * GROWTH_BYTES, "the memory is given back")
    bus.processes[0].terminate()
    assert bus.processes[0].communicate()[0].count("ended the connection from") == 1


def test_flood_of_subscriptions_ends_and_honest_subscribers_come_back(
    bus: System, old_client: Client, opens: Opens
) -> None:
    honest = opens(zmq.SUB)
    honest.subscribe("bitten.user_action")
    honest.connect(bus.settings.events_url)
    flood = opens(zmq.XSUB)
    flood.sndhwm = 0
    flood.connect(bus.settings.events_url)
    before = memory(bus)
    for n in range(5 * MAX_SUBSCRIPTIONS):
        flood.send(b"\1bitten.flood.%d" % n)
    assert publish(old_client)
    flood.close(0)

    def hears() -> bool:
        assert publish(old_client)
        return bool(honest.poll(100))

    wait_until(hears, "live events arrive again", timeout_s=35)
    assert len(old_client.status()["subscriptions"]) <= MAX_SUBSCRIPTIONS
    assert memory(bus) - before < 20 * GROWTH_BYTES


def test_silent_connections_are_cut_and_nobody_minds_them(bus: System, old_client: Client) -> None:
    process = psutil.Process(bus.processes[0].pid)
    before = process.num_fds()
    with contextlib.ExitStack() as open_ones:
        for n in range(SILENT):
            url = bus.settings.events_url if n % 2 else bus.settings.ingress_url
            peer = socket.create_connection(("127.0.0.1", port(url)), 5)
            open_ones.enter_context(peer)
        assert publish(old_client)
        wait_until(lambda: process.num_fds() <= before + 5, "they are cut", timeout_s=35)
    assert publish(old_client)


def test_bus_without_descriptors_left_goes_on_and_recovers(bus: System, old_client: Client) -> None:
    assert publish(old_client)  # or it might be the one that is not let in
    process = psutil.Process(bus.processes[0].pid)
    limits = process.rlimit(resource.RLIMIT_NOFILE)
    process.rlimit(resource.RLIMIT_NOFILE, (process.num_fds() + 5, limits[1]))
    with contextlib.ExitStack() as open_ones:
        for _ in range(40):
            peer = socket.create_connection(("127.0.0.1", port(bus.settings.ingress_url)), 5)
            open_ones.enter_context(peer)
        end = time.monotonic() + 3.0  # heartbeats and housekeeping come by in this time
        while time.monotonic() < end:
            assert publish(old_client)
        assert process.is_running()
    with contextlib.closing(Client(bus.settings)) as new:
        wait_until(lambda: new.status(5)["state"] == "ok", "a new client", timeout_s=35)
    assert bus.processes[0].poll() is None


def test_long_request_id_is_refused_and_nothing_of_it_is_kept(
    bus: System, old_client: Client, opens: Opens
) -> None:
    before = memory(bus)
    dealer = opens(zmq.DEALER)
    dealer.connect(bus.settings.ingress_url)
    for n in range(30):
        request_id = b"%08d" % n + b"x" * (4 << 20)
        dealer.send_multipart([b"fetch", request_id, b'{"wait_ms":30000}'])
    for n in range(30):
        assert dealer.poll(20_000)
        verb, answered_id, body = dealer.recv_multipart()
        assert (verb, answered_id) == (b"error", b"%08d" % n + b"x" * 56)
        assert json.loads(body)["code"] == "bad_request"
    assert publish(old_client)
    # Of 120 MB that were sent; the allocator keeps some of what was freed.
    assert memory(bus) - before < 8 * GROWTH_BYTES
    dealer.send_multipart([b"status", b"y" * 64])
    assert dealer.poll(20_000)
    assert dealer.recv_multipart()[:2] == [b"status", b"y" * 64]


def test_one_connection_can_have_only_so_many_fetches_waiting(
    bus: System, old_client: Client
) -> None:
    fetch = b'{"wait_ms":30000}'
    with contextlib.closing(Client(bus.settings)) as greedy:
        for _ in range(ports.MAX_UNREAD_REPLIES):
            greedy.send(protocol.FETCH, fetch)
        with pytest.raises(BusRefused, match="64 fetches of this connection") as refused:
            greedy.receive(greedy.send(protocol.FETCH, fetch), 20)
        assert refused.value.code == "busy"
        waiting = old_client.send(protocol.FETCH, fetch)
        wait_until(lambda: greedy.status(20), "others' fetches wait meanwhile")
        with contextlib.closing(Client(bus.settings)) as publisher:
            assert publish(publisher)
        assert old_client.receive(waiting, 20)
        waiting = greedy.send(protocol.FETCH, fetch)  # room again
        assert publish(old_client)
        assert greedy.receive(waiting, 20)


def test_random_bytes_do_no_harm(bus: System, old_client: Client) -> None:
    for n in range(60):
        url = bus.settings.events_url if n % 2 else bus.settings.ingress_url
        peer = socket.create_connection(("127.0.0.1", port(url)), 5)
        with peer, contextlib.suppress(ConnectionError):
            peer.sendall(os.urandom(20_000))
    assert publish(old_client)
    assert old_client.status()["state"] == "ok"


def test_nobody_takes_over_the_answers_of_a_client_by_choosing_its_name(
    bus: System, opens: Opens
) -> None:
    victim, thief = sockets = opens(zmq.DEALER), opens(zmq.DEALER)
    for dealer in sockets:
        dealer.routing_id = b"victim"
        dealer.connect(bus.settings.ingress_url)
        if dealer is victim:
            dealer.send_multipart([b"status", b"1"])
            assert dealer.poll(20_000)
            assert dealer.recv_multipart()[1] == b"1"
    thief.send_multipart([b"status", b"thief"])
    victim.send_multipart([b"status", b"2"])
    assert victim.poll(20_000)
    assert victim.recv_multipart()[1] == b"2"
    assert not thief.poll(200)
