"""Spool files of dead processes, delivered by a bridge of their home when no bus lives there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from conftest import System, wait_until
from system import free_port

from event_bus import envelope
from event_bus.bridge import Bridge
from event_bus.envelope import Envelope
from event_bus.orphans import Orphans
from event_bus.settings import Settings
from event_bus.spool import open_locked

OVERFLOWING = 3_000
"""Events of a file: more than one batch of it."""


@pytest.fixture
def remote(bus: System, tmp_path: Path) -> Iterator[System]:
    """A home on "another machine": no bus of its own, the addresses of another home's."""
    made = System(tmp_path / "remote")
    made.environ |= {k: bus.environ[k] for k in ("BITTEN_EVENTS_URL", "BITTEN_INGRESS_URL")}
    made.settings.make_home()
    yield made
    made.close()


@pytest.fixture
def make_bridge() -> Iterator[Callable[[System], Bridge]]:
    made: list[Bridge] = []

    def make(system: System) -> Bridge:
        given = system.settings
        made.append(Bridge(Settings(home=given.home, ingress_url=given.ingress_url, source="t")))
        return made[-1]

    yield make
    for bridge in made:
        bridge.close()
        bridge.outbox.spool.release()


def leave(system: System, events: int, tail: bytes = b"") -> Path:
    """A file as a process leaves it that dies while the bus is away; its source is the token."""
    token = envelope.new_producer()
    system.settings.make_home()
    path = system.settings.spool / f"{token}.ndjson"
    lines = [
        envelope.encode(
            Envelope(
                event_id=f"{token}-{n}",
                event_type="user_action",
                timestamp=1.0,
                source=token,
                data={"action": "n", "n": n},
            )
        )
        for n in range(1, events + 1)
    ]
    path.write_bytes(b"\n".join(lines) + b"\n" + tail)
    return path


def arrived(bus: System, path: Path) -> list[int]:
    """Numbers of a file's events in the database, by seq."""
    bus.wait_stored()
    rows = bus.sql("SELECT data ->> 'n' FROM events WHERE source = ? ORDER BY seq", path.stem)
    return [int(n) for (n,) in rows]


def test_next_bridge_delivers_in_order_what_dead_processes_left(
    bus: System, remote: System, make_bridge: Callable[[System], Bridge]
) -> None:
    left = [leave(remote, OVERFLOWING), leave(remote, 5)]
    bridge = make_bridge(remote)
    assert bridge.emit("user_action", {"action": "own"})
    wait_until(lambda: not any(p.exists() for p in left), "both files are delivered")
    bus.start_collector()
    assert arrived(bus, left[0]) == list(range(1, OVERFLOWING + 1))
    assert arrived(bus, left[1]) == list(range(1, 6))
    stats = bridge.stats()
    assert (stats["emitted"], stats["acked"], stats["waiting"]) == (1, 1, 0)


def test_bridge_that_has_nothing_to_do_finds_what_is_left_later(
    bus: System, remote: System, make_bridge: Callable[[System], Bridge]
) -> None:
    bridge = make_bridge(remote)
    assert bridge.emit("user_action", {"action": "own"})
    assert bridge.flush(10)
    assert bridge.no_orphans.wait(10)
    left = leave(remote, 5)
    wait_until(lambda: not left.exists(), "the file is delivered")


def test_emit_on_another_machine_delivers_what_waits_there(bus: System, remote: System) -> None:
    away = {"BITTEN_INGRESS_URL": f"tcp://127.0.0.1:{free_port()}"}
    assert remote.bitten("emit", "user_action", "action=early", env=away).returncode == 3
    assert list(remote.settings.spool.iterdir())
    assert remote.bitten("emit", "user_action", "action=late").returncode == 0
    assert not list(remote.settings.spool.iterdir())
    bus.start_collector()
    bus.wait_stored()
    rows = bus.sql("SELECT action FROM user_action ORDER BY seq")
    assert rows == [("late",), ("early",)]


def test_cut_last_line_is_kept_as_refused(
    bus: System, remote: System, make_bridge: Callable[[System], Bridge]
) -> None:
    left = leave(remote, 3, tail=b'{"event_id":"cut sho')
    bridge = make_bridge(remote)
    assert bridge.emit("user_action", {"action": "own"})
    wait_until(lambda: not left.exists(), "the file is delivered")
    bus.start_collector()
    assert arrived(bus, left) == [1, 2, 3]
    assert bus.sql("SELECT count(*) FROM rejected_events") == [(1,)]


def test_file_is_let_go_of_when_the_bus_goes_and_delivered_when_it_comes_back(
    bus: System, remote: System, make_bridge: Callable[[System], Bridge]
) -> None:
    bridge = make_bridge(remote)
    assert bridge.emit("user_action", {"action": "own"})
    assert bridge.flush(10)
    for process in bus.processes:
        process.kill()
        process.wait()
    left = leave(remote, OVERFLOWING)
    wait_until(lambda: not bridge.connected, "the bridge sees that the bus is gone")
    os.close(open_locked(left))
    assert bridge.emit("user_action", {"action": "own"})
    bus.start_bus()
    wait_until(lambda: not left.exists(), "the file is delivered")
    bus.start_collector()
    assert arrived(bus, left) == list(range(1, OVERFLOWING + 1))


def test_forked_child_does_not_keep_the_file_of_its_parent(
    bus: System, remote: System, make_bridge: Callable[[System], Bridge]
) -> None:
    left = leave(remote, 3)
    bridge = make_bridge(remote)
    bridge.orphans = Orphans(remote.settings.spool, bridge.no_orphans)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(remote.settings.ingress_url)
        bridge.orphans.proceed(socket)
        assert bridge.orphans.on_the_way
        ready, started = os.pipe()
        done, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(tell)
            os.write(started, b"1")
            os.read(done, 1)
            os._exit(0)
        try:
            os.read(ready, 1)
            bridge.orphans.let_go()
            os.close(open_locked(left))
        finally:
            for fd in (ready, started, done, tell):
                os.close(fd)
            os.waitpid(pid, 0)
