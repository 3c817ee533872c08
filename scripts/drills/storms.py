"""Row 25: too many connections, subscriptions and bytes of nonsense."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
import zmq
from harness import Trial, drill
from system import wait_until

SILENT = 300
DEALERS = 500
SUBSCRIPTIONS = 20_000
RANDOM_CONNECTIONS = 50
SPARE_DESCRIPTORS = 24
HOLD_S = 3.0
RECOVERED_S = 35.0
GROWTH_BYTES = 128 << 20


@drill(
    row=25,
    name="storms",
    fault="300 silent connections, 500 clients at once, 20,000 subscriptions, random bytes, few"
    " file descriptors",
    long="10 rounds",
    plant="the bus cannot do without a free file descriptor",
    breaks="the bus ended",
)
def storms(trial: Trial) -> None:
    up = trial.start(fault="descriptors-needed" if trial.planted else "")
    load = trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    load.wait_started()
    bus = up.child("bus")
    assert bus is not None
    before = bus.memory_info().rss
    recovered_s = []
    storms = (_silent, _dealers, _subscriptions, _random_bytes, _few_descriptors)
    for _ in range(trial.count(1, 10)):
        for storm in storms:
            begun_at = time.time()
            with storm(trial, bus):
                # Those who were there before go on as if nothing was.
                trial.expect_within(
                    RECOVERED_S,
                    lambda at=begun_at: trial.next_stored(at),
                    f"old clients' events are stored during {storm.__name__[1:]}",
                )
                time.sleep(HOLD_S if trial.planted else trial.seconds(0.2, HOLD_S))
            ended_at = time.time()
            recovered_s.append(
                trial.expect_within(
                    RECOVERED_S,
                    lambda at=ended_at: trial.system.status(1.0) and trial.next_stored(at),
                    f"the bus answers after {storm.__name__[1:]}",
                )
            )
    now = up.child("bus")
    trial.expect(now and now.pid == bus.pid, "the bus ended and was started again")
    if now and now.pid == bus.pid:
        grown = bus.memory_info().rss - before
        trial.note("bus grew by MB", grown >> 20)
        trial.expect(grown < GROWTH_BYTES, f"the bus grew by {grown >> 20} MB")
    trial.note("answers again after s, max", f"{max(recovered_s):.1f}")


def _ports(trial: Trial) -> list[int]:
    settings = trial.system.settings
    return [urlsplit(url).port or 0 for url in (settings.ingress_url, settings.events_url)]


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5.0)


@contextlib.contextmanager
def _silent(trial: Trial, bus: psutil.Process) -> Iterator[None]:
    with contextlib.ExitStack() as open_ones:
        for i in range(SILENT):
            # The bus may refuse some: that is its right.
            with contextlib.suppress(OSError):
                open_ones.enter_context(_connect(_ports(trial)[i % 2]))
        yield


@contextlib.contextmanager
def _dealers(trial: Trial, bus: psutil.Process) -> Iterator[None]:
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * DEALERS)
    for _ in range(DEALERS):
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.connect(trial.system.settings.ingress_url)
        dealer.send_multipart([b"status", b"1"])
    try:
        yield
    finally:
        context.destroy(linger=0)


@contextlib.contextmanager
def _subscriptions(trial: Trial, bus: psutil.Process) -> Iterator[None]:
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    sub.linger = 0
    sub.connect(trial.system.settings.events_url)
    for i in range(SUBSCRIPTIONS):
        sub.subscribe(f"bitten.flood-{i}".encode())
    try:
        yield
    finally:
        context.destroy(linger=0)


@contextlib.contextmanager
def _random_bytes(trial: Trial, bus: psutil.Process) -> Iterator[None]:
    # libzmq's greeting first in half of them: then the nonsense gets further.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
    with contextlib.ExitStack() as open_ones:
        for i in range(RANDOM_CONNECTIONS):
            with contextlib.suppress(OSError):
                peer = open_ones.enter_context(_connect(_ports(trial)[i % 2]))
                noise = trial.rng.randbytes(trial.rng.randint(1, 100_000))
                peer.sendall((greeting if i % 4 < 2 else b"") + noise)
        yield


@contextlib.contextmanager
def _few_descriptors(trial: Trial, bus: psutil.Process) -> Iterator[None]:
    """The bus may open a few more, and far more come than that."""
    before = bus.rlimit(resource.RLIMIT_NOFILE)
    bus.rlimit(resource.RLIMIT_NOFILE, (bus.num_fds() + SPARE_DESCRIPTORS, before[1]))
    try:
        with contextlib.ExitStack() as open_ones:
            for i in range(4 * SPARE_DESCRIPTORS):
                with contextlib.suppress(OSError):
                    open_ones.enter_context(_connect(_ports(trial)[i % 2]))
            yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            bus.rlimit(resource.RLIMIT_NOFILE, before)
