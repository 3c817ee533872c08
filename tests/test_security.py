"""A bus with keys: who gets in, and what each may publish and read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from conftest import System, free_port, wait_until

from event_bus import keys, protocol
from event_bus.errors import BusRefused, BusUnavailable, KeysError
from event_bus.protocol import Client
from event_bus.rejection import MAX_RAW_BYTES_A_MINUTE
from event_bus.subscriber import Subscriber

LOGIN: dict[str, Any] = {"action": "login"}
TICK: dict[str, Any] = {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2}


Connect = Callable[[System], Client]
Subscribe = Callable[..., zmq.Socket[Any]]


def event(event_id: str, event_type: str = "user_action", data: Any = None) -> bytes:
    fields = {"event_id": event_id, "event_type": event_type, "timestamp": time.time()}
    default = LOGIN if event_type == "user_action" else TICK
    return json.dumps(fields | {"data": data or default}).encode() + b"\n"


@pytest.fixture
def connect() -> Iterator[Callable[[System], Client]]:
    """Makes clients that are closed after the test."""
    with contextlib.ExitStack() as closing:
        yield lambda home: closing.enter_context(contextlib.closing(Client(home.settings)))


@pytest.fixture
def subscribe() -> Iterator[Callable[..., zmq.Socket[Any]]]:
    """Makes SUB sockets, and XSUB ones without a prefix, that are closed after the test."""
    with contextlib.ExitStack() as closing:

        def make(home: System, *prefixes: str) -> zmq.Socket[Any]:
            context = zmq.Context.instance()
            socket = closing.enter_context(context.socket(zmq.SUB if prefixes else zmq.XSUB))
            socket.linger = 0
            keys.use_client_key(socket, home.settings.keys, home.settings.events_url)
            for prefix in prefixes:
                socket.subscribe(prefix)
            socket.connect(home.settings.events_url)
            return socket

        yield make


class Guarded:
    """A running bus with keys, and homes of others who have one."""

    def __init__(self, system: System) -> None:
        self.system = system
        assert system.bitten("keys", "new").returncode == 0
        self.process = system.start_bus()

    def guest(self, name: str, *, publish: str = "", subscribe: str = "") -> System:
        """A home on "another machine", with a key that was made here for it."""
        keys = self.system.settings.keys
        assert self.system.bitten("keys", "new", name).returncode == 0
        self.allow(name, publish=publish, subscribe=subscribe)
        other = System(self.system.home.parent / name)
        other.environ |= {
            k: self.system.environ[k] for k in ("BITTEN_EVENTS_URL", "BITTEN_INGRESS_URL")
        }
        other.settings.keys.mkdir(parents=True)
        (other.settings.keys / "bus.key").write_bytes((keys / "bus.key").read_bytes())
        (keys / f"{name}.key_secret").rename(other.settings.keys / "client.key_secret")
        return other

    def allow(self, name: str, *, publish: str = "", subscribe: str = "") -> None:
        rights = [f"--publish={p}" for p in publish.split()]
        rights += [f"--subscribe={p}" for p in subscribe.split()]
        assert self.system.bitten("keys", "allow", name, *rights).returncode == 0

    def log(self) -> str:
        """Stops the bus and gives all that it has said."""
        self.process.terminate()
        return self.process.communicate()[0]


@pytest.fixture
def guarded(system: System) -> Iterator[Guarded]:
    yield Guarded(system)


def heard(socket: zmq.Socket[Any], until: str) -> list[str]:
    """Topics up to the first `until`, which included."""
    topics: list[str] = []
    deadline = time.monotonic() + 20
    while until not in topics:
        assert time.monotonic() < deadline, topics
        if socket.poll(100):
            topics.append(socket.recv_multipart()[0].decode())
    return topics


def refusal(system: System) -> dict[str, Any]:
    with Subscriber("event_rejected", start=1, timeout_s=5, settings=system.settings) as events:
        return next(iter(events)).data


def test_processes_of_the_home_find_its_key_by_themselves(guarded: Guarded) -> None:
    system = guarded.system
    system.start_collector()
    done = system.script(
        "from event_bus import event_bridge as b\n"
        "b.user_action({'action': 'login'})\n"
        "assert b.flush(10)\n"
        "import asyncio\n"
        "from event_bus.subscriber import Subscriber\n"
        "async def read():\n"
        "    async for event in Subscriber('user_action', start=1, timeout_s=5):\n"
        "        return event.seq\n"
        "assert asyncio.run(read())\n"
    )
    assert done.returncode == 0, done.stderr
    assert system.bitten("status").returncode == 0
    assert system.bitten("emit", "user_action", "action=logout").returncode == 0
    assert system.bitten("tail", "--from-seq", "1", "--count", "2", "user_action").returncode == 0
    system.wait_stored()
    assert system.sql("SELECT count(*) FROM events WHERE event_type = 'user_action'") == [(2,)]


@pytest.mark.parametrize("key", ["none", "unknown", "another bus's"])
def test_peer_without_a_listed_key_gets_and_stores_nothing(
    guarded: Guarded, key: str, connect: Connect, subscribe: Subscribe
) -> None:
    system = guarded.system
    before = system.status()
    assert before is not None
    stranger = System(system.home.parent / "stranger")
    if key != "none":
        stranger.bitten("keys", "new")
    if key == "unknown":
        (stranger.settings.keys / "bus.key").write_bytes(
            (system.settings.keys / "bus.key").read_bytes()
        )
    stranger.environ |= {k: system.environ[k] for k in ("BITTEN_EVENTS_URL", "BITTEN_INGRESS_URL")}
    client = connect(stranger)
    for verb, body in ((b"publish", event("x-1")), (b"fetch", b'{"from_seq":1}'), (b"status", b"")):
        with pytest.raises(BusUnavailable):
            client.receive(client.send(verb, body), 0.5)
    live = subscribe(stranger, "")
    known = subscribe(system, "")
    heard(known, until="bitten.heartbeat")
    heard(known, until="bitten.heartbeat")
    assert not live.poll(0)
    emitted = stranger.bitten("emit", "user_action", "action=login")
    assert (emitted.returncode, "waits in" in emitted.stderr) == (3, True)
    after = system.status()
    assert after is not None
    assert after["accepted"] == before["accepted"]
    assert ("is not in" in guarded.log()) == (key == "unknown")


def test_refused_key_is_logged_once_so_that_its_owner_can_be_let_in(
    guarded: Guarded, connect: Connect
) -> None:
    keys = guarded.system.settings.keys
    guest = guarded.guest("laptop", subscribe="*")
    public = next(iter(k for k in (keys / "laptop.key").read_text().split('"') if len(k) == 40))
    assert guarded.system.bitten("keys", "revoke", "laptop").returncode == 0
    for _ in range(3):
        with pytest.raises(BusUnavailable):
            connect(guest).status(0.5)
    guarded.allow("laptop", subscribe="*")
    assert connect(guest).status(5)["state"] == "ok"
    assert guarded.log().count(f"its key {public} is not in") == 1


def test_event_type_without_the_right_is_a_kept_rejection(
    guarded: Guarded, connect: Connect
) -> None:
    guest = guarded.guest("feed", publish="market_data user_*")
    client = connect(guest)
    bad = event("f-2", "fire_command", {"fire_id": "1"})
    ack = client.publish(event("f-1", "market_data") + bad + event("f-3"))
    assert (ack["accepted"], ack["rejected"]) == (2, 1)
    assert ack["refusals"] == [{"line": 1, "reason": "the key feed may not publish fire_command"}]
    account = refusal(guarded.system)
    assert (account["rule"], account["event_type"]) == ("rights", "fire_command")


def test_key_that_may_publish_nothing_is_forbidden_and_stores_nothing(
    guarded: Guarded, connect: Connect
) -> None:
    client = connect(guarded.guest("reader", subscribe="*"))
    for n in range(3):
        with pytest.raises(BusRefused, match="the key reader may publish nothing") as e:
            client.publish(event(f"r-{n}") * 100)
        assert e.value.code == "forbidden"
    status = connect(guarded.system).status()
    assert (status["rejected"], status["forbidden"]) == (0, {"reader": 3})
    assert status["publish_forbidden"] == {"reader": 3}
    with Subscriber(start=1, timeout_s=1, settings=guarded.system.settings) as events:
        assert {e.event_type for e in events} == {"system_health"}
    assert "requests without the right to them: reader 3" in guarded.system.bitten("status").stdout
    assert guarded.log().count("refused a request of reader: the key reader may publish") == 1


def test_bridge_of_a_key_that_may_publish_nothing_keeps_its_events_and_says_why(
    guarded: Guarded,
) -> None:
    guest = guarded.guest("feed", subscribe="*")
    done = guest.script(
        "from event_bus import event_bridge as b\n"
        "assert b.user_action({'action': 'early'})\n"
        "assert not b.flush(1)\n"
        "print(b.stats()['last_error'], b.stats()['refused_by_bus'])\n"
    )
    assert done.stdout == "the key feed may publish nothing 0\n"
    assert "events wait: the key feed may publish nothing" in done.stderr
    emitted = guest.bitten("emit", "user_action", "action=late")
    assert (emitted.returncode, "feed may publish nothing" in emitted.stderr) == (3, True)
    assert len(list(guest.settings.spool.glob("*.ndjson"))) == 2
    guarded.allow("feed", publish="user_action")
    wait_until(
        lambda: guest.bitten("emit", "user_action", "action=last").returncode == 0, "it may now"
    )
    assert not list(guest.settings.spool.iterdir())
    with Subscriber("user_action", start=1, timeout_s=5, settings=guarded.system.settings) as all_:
        assert {next(iter(all_)).data["action"] for _ in range(3)} >= {"early", "late"}


def test_raw_bytes_of_what_a_key_may_not_publish_are_kept_up_to_a_bound(
    guarded: Guarded, connect: Connect
) -> None:
    client = connect(guarded.guest("feed", publish="market_data"))
    for n in range(20):
        bad = event(f"f-{n}", "fire_command", {"fire_id": "1", "note": "x" * 10_000})
        assert client.publish(bad)["rejected"] == 1
    assert client.publish(event("f-20", "market_data", {"bid": 1}))["rejected"] == 1
    system = guarded.system
    system.start_collector()
    system.wait_stored()
    whole, rows, kept = system.sql(
        "SELECT sum(raw_bytes = length(raw)), count(*), sum(length(raw))"
        " FROM rejected_events WHERE rule = 'rights'"
    )[0]
    assert (whole, rows, kept) == (6, 20, MAX_RAW_BYTES_A_MINUTE)
    assert system.sql("SELECT min(raw_bytes) > 10000 FROM rejected_events WHERE rule = 'rights'")
    other = "SELECT raw_bytes = length(raw) FROM rejected_events WHERE rule != 'rights'"
    assert system.sql(other) == [(1,)]  # what is wrong otherwise is kept whole
    assert "14 refused events kept in part" in system.bitten("audit").stdout


def test_canonical_batch_is_checked_for_rights_too(guarded: Guarded) -> None:
    """The path of a bridge, whose batches are taken in whole."""
    guest = guarded.guest("feed", publish="market_data")
    done = guest.script(
        "from event_bus import event_bridge as b\n"
        "b.market_data({'symbol': 'EURUSD', 'bid': 1.1, 'ask': 1.2})\n"
        "b.user_action({'action': 'login'})\n"
        "b.user_action({})\n"  # refused by the bridge itself, which tells the bus so
        "b.flush(10)\n"
        "print(b.stats()['acked'], b.stats()['refused_by_bus'])\n"
    )
    assert done.stdout == "3 1\n"
    assert refusal(guarded.system)["rule"] == "rights"


def test_key_reads_only_the_types_it_may(guarded: Guarded, connect: Connect) -> None:
    guest = guarded.guest("reader", subscribe="market_* signal_generated")
    own = connect(guarded.system)
    for n in range(4):
        own.publish(
            event(f"e-{n}a") + event(f"e-{n}b", "market_data") + event(f"e-{n}c", "market_data")
        )
    with Subscriber(start=1, timeout_s=1, settings=guest.settings) as subscriber:
        got = [(e.seq, e.event_id) for e in subscriber]
        next_seq = subscriber.next_seq
    with Subscriber("market_data", start=1, timeout_s=1, settings=guarded.system.settings) as all_:
        assert [(e.seq, e.event_id) for e in all_] == got
        assert all_.next_seq == next_seq
    assert len(got) == 8
    raw = connect(guest)
    _, *bodies = raw.receive(raw.send(protocol.FETCH, b'{"from_seq":1}'), 5)
    assert b"login" not in b"".join(bodies)
    assert b"".join(bodies).count(b"null\n") >= 4


def test_what_shows_everything_needs_the_right_to_read_everything(
    guarded: Guarded, connect: Connect
) -> None:
    guest = guarded.guest("reader", subscribe="market_data", publish="*")
    client = connect(guest)
    for verb, body in (
        (b"status", b""),
        (b"forget", b"data_collector"),
        (b"fetch", b'{"from_seq":1,"consumer":"mine"}'),
    ):
        with pytest.raises(BusRefused) as e:
            client.receive(client.send(verb, body), 5)
        assert e.value.code == "forbidden"


def test_live_subscription_is_narrowed_to_what_the_key_may_read(
    guarded: Guarded, connect: Connect, subscribe: Subscribe
) -> None:
    guest = guarded.guest("reader", subscribe="market_data")
    live = subscribe(guest, "")
    everything = subscribe(guarded.system, "bitten.")
    heard(live, until="bitten.heartbeat")
    heard(everything, until="bitten.heartbeat")
    own = connect(guarded.system)
    own.publish(event("e-1") + event("e-2", "market_data"))
    assert set(heard(live, until="bitten.market_data")) <= {
        "bitten.market_data",
        "bitten.heartbeat",
    }
    assert "bitten.user_action" in heard(everything, until="bitten.market_data")


def test_revoked_key_is_refused_at_once_and_its_live_subscription_ends(
    guarded: Guarded, connect: Connect, subscribe: Subscribe
) -> None:
    guest = guarded.guest("reader", subscribe="*", publish="*")
    client = connect(guest)
    live = subscribe(guest, "bitten.")
    heard(live, until="bitten.heartbeat")
    other = subscribe(guarded.system, "bitten.")
    heard(other, until="bitten.heartbeat")
    assert client.publish(event("e-1"))["accepted"] == 1
    assert guarded.system.bitten("keys", "revoke", "reader").returncode == 0

    def is_refused() -> bool:
        try:
            client.status(1.0)
        except BusRefused as e:
            return e.code == "forbidden"
        except BusUnavailable:
            return True
        return False

    wait_until(is_refused, "the revoked key is refused")
    with pytest.raises((BusRefused, BusUnavailable)):
        client.publish(event("e-2"), 1.0)
    while live.poll(0):
        live.recv_multipart()
    while other.poll(0):
        other.recv_multipart()
    own = connect(guarded.system)
    wait_until(lambda: "bitten." in (own.status()["subscriptions"]), "the other one is back")
    own.publish(event("e-3"))
    heard(other, until="bitten.user_action")
    assert not live.poll(0)


def test_revoked_bridge_keeps_its_events(guarded: Guarded) -> None:
    guest = guarded.guest("feed", publish="*")
    assert guarded.system.bitten("keys", "revoke", "feed").returncode == 0
    assert guest.bitten("emit", "user_action", "action=login").returncode == 3
    assert list((guest.home / "spool").glob("*.ndjson"))


def test_bridge_with_a_broken_key_says_so_and_keeps_its_events(guarded: Guarded) -> None:
    guest = guarded.guest("feed", publish="*")
    (guest.settings.keys / "bus.key").write_text("rubbish")
    done = guest.script(
        "from event_bus import event_bridge as b\n"
        "assert b.user_action({'action': 'login'})\n"
        "assert not b.flush(1)\n"
        "print(b.stats()['last_error'])\n"
    )
    assert done.returncode == 0, done.stderr
    assert "cannot use the key" in done.stdout
    assert "bus.key" in done.stdout
    assert list((guest.home / "spool").glob("*.ndjson"))


def test_message_that_is_no_subscription_gives_nobody_anothers_events(
    guarded: Guarded, connect: Connect, subscribe: Subscribe
) -> None:
    """libzmq 4.3.5 then takes the next subscriptions for the wrong connections'."""
    guest = guarded.guest("evil", subscribe="market_data")
    evil = subscribe(guest)
    evil.send(b"\1bitten.market_data")
    heard_by: list[bytes] = []
    own = connect(guarded.system)
    for n in range(10):
        evil.send(b"\2nothing")
        honest = subscribe(guarded.system, "bitten.user_action")
        evil.send(b"\1bitten.market_data%d" % n)

        def arrives(n: int = n, honest: zmq.Socket[Any] = honest) -> bool:
            own.publish(event(f"e-{n}-{time.monotonic()}"))
            return bool(honest.poll(50))

        wait_until(arrives, "the honest subscriber hears its events")
        while evil.poll(0):
            heard_by.append(evil.recv_multipart()[0])
    assert b"bitten.user_action" not in heard_by
    assert "evil sent what is no subscription" in guarded.log()


def test_new_type_that_begins_like_an_allowed_one_does_not_leak(
    guarded: Guarded, connect: Connect, subscribe: Subscribe
) -> None:
    guest = guarded.guest("reader", subscribe="market_data")
    live = subscribe(guest, "bitten.")
    heard(live, until="bitten.heartbeat")
    schemas = guarded.system.home / "schemas"
    schemas.mkdir()
    (schemas / "market_data_secret.json").write_text('{"type": "object"}')
    own = connect(guarded.system)
    wait_until(
        lambda: own.publish(event(f"s-{time.monotonic()}", "market_data_secret", {"a": 1}))[
            "accepted"
        ],
        "the new type is known",
    )
    for n in range(3):
        own.publish(event(f"t-{n}", "market_data_secret", {"a": 1}))
        topics = heard(live, until="bitten.heartbeat")
        assert "bitten.market_data_secret" not in topics


@pytest.mark.parametrize(
    "url", ["tcp://*:{}", "tcp://0.0.0.0:{}", "tcp://[::]:{}", "tcp://eth0:{}", "tcp://somehost:{}"]
)
@pytest.mark.parametrize("setting", ["BITTEN_EVENTS_URL", "BITTEN_INGRESS_URL"])
def test_bus_beyond_loopback_without_keys_refuses_to_start(
    system: System, setting: str, url: str
) -> None:
    port = free_port()
    done = system.bitten("bus", env={setting: url.format(port)})
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "other machines can reach" in done.stderr
    assert "bitten keys new" in done.stderr
    assert "bitten keys allow" in done.stderr


def test_events_left_on_another_machine_are_delivered_by_the_next_process_there(
    guarded: Guarded,
) -> None:
    laptop = guarded.guest("laptop", publish="user_action")
    away = {"BITTEN_INGRESS_URL": f"tcp://127.0.0.1:{free_port()}"}
    assert laptop.bitten("emit", "user_action", "action=early", env=away).returncode == 3
    assert laptop.bitten("emit", "user_action", "action=late").returncode == 0
    assert not list(laptop.settings.spool.iterdir())
    guarded.system.start_collector()
    guarded.system.wait_stored()
    rows = guarded.system.sql("SELECT action FROM user_action ORDER BY seq")
    assert rows == [("late",), ("early",)]


def test_bus_with_a_key_needs_an_allow_list(system: System) -> None:
    system.bitten("keys", "new")
    allowed = system.settings.keys / "allowed.yaml"
    allowed.unlink()
    done = system.bitten("bus")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert str(allowed) in done.stderr
    allowed.write_text("client:\n  publish: x\n")
    done = system.bitten("bus")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "allowed.yaml, line 2" in done.stderr
    assert done.stderr.endswith("; mend that line\n")


def test_what_the_bus_says_of_a_missing_allow_list_lets_the_homes_own_processes_in(
    system: System,
) -> None:
    system.bitten("keys", "new")
    (system.settings.keys / "allowed.yaml").unlink()
    refused = system.bitten("bus").stderr
    assert "that line" not in refused
    (advised,) = re.findall(r"`bitten (keys new)`", refused)
    assert system.bitten(*advised.split()).returncode == 0
    system.start_bus()
    assert system.bitten("emit", "user_action", "action=x").returncode == 0


def test_list_that_is_begun_without_the_homes_own_key_says_so(system: System) -> None:
    system.bitten("keys", "new")
    system.bitten("keys", "new", "laptop")
    (system.settings.keys / "allowed.yaml").unlink()
    allowed = system.bitten("keys", "allow", "laptop", "--publish", "user_action")
    assert "`bitten keys new` lets them in" in allowed.stderr
    assert system.bitten("keys", "new").returncode == 0
    assert system.bitten("keys", "allow", "laptop", "--subscribe", "*").stderr == ""
    listed = system.bitten("keys", "list", "--json").stdout
    assert '"name":"client"' in listed
    assert '"name":"laptop"' in listed


def test_allow_list_that_breaks_while_the_bus_runs_changes_nothing(
    guarded: Guarded, connect: Connect, subscribe: Subscribe
) -> None:
    system = guarded.system
    (system.settings.keys / "allowed.yaml").write_text("client: [")
    with Subscriber("user_action", start=1, settings=system.settings, timeout_s=5) as subscriber:
        connect(system).publish(event("e-1"))
        assert next(iter(subscriber)).event_id == "e-1"
    time_to_look = subscribe(system, "bitten.heartbeat")
    for _ in range(3):
        heard(time_to_look, until="bitten.heartbeat")
    assert "allowed.yaml, line 1" in guarded.log()


def test_every_part_of_the_product_connects_with_the_homes_key() -> None:
    root = Path(__file__).parent.parent
    for package in ("event_bus", "collector"):
        for path in (root / package).rglob("*.py"):
            assert not re.search(r"Client\([^)]*_url", path.read_text()), path
            if ".connect(" in path.read_text() and "zmq" in path.read_text():
                assert "use_client_key" in path.read_text(), path


def test_ended_subscriptions_of_a_key_cost_nothing(
    guarded: Guarded, connect: Connect, subscribe: Subscribe
) -> None:
    system = guarded.system
    client = connect(system)
    busy = subscribe(system)
    process = psutil.Process(guarded.process.pid)

    def has(mark: str) -> bool:
        return mark in client.status(20)["subscriptions"]

    def come_and_go(rounds: range) -> int:
        for i in rounds:
            # A socket holds 1,000, and may not know yet that the last 500 have been read.
            for n in range(200):
                prefix = b"bitten.%d.%d." % (i, n) + b"x" * 1_000
                busy.send(b"\1" + prefix)
                busy.send(b"\0" + prefix)
            mark = f"bitten.mark.{i}"
            busy.send(b"\1" + mark.encode())
            wait_until(partial(has, mark), "all has arrived")
        return int(process.memory_info().rss)

    before = come_and_go(range(10))
    assert come_and_go(range(10, 130)) - before < 10 << 20
    assert "connect anew" not in guarded.log()


def test_nothing_goes_to_another_machine_in_clear(system: System) -> None:
    with contextlib.closing(zmq.Context.instance().socket(zmq.ROUTER)) as stranger:
        port = stranger.bind_to_random_port("tcp://0.0.0.0")
        system.environ["BITTEN_INGRESS_URL"] = f"tcp://0.0.0.0:{port}"
        done = system.script(
            "from event_bus import event_bridge as b; b.user_action({'action': 'login'})"
        )
        assert (done.returncode, done.stdout) == (0, "")
        assert "beyond this machine" in done.stderr
        assert [path.stat().st_size > 0 for path in system.settings.spool.glob("*.ndjson")] == [
            True
        ]
        with pytest.raises(KeysError, match="beyond this machine"):
            Client(system.settings)
        status = system.bitten("status")
        assert (status.returncode, status.stderr.count("\n")) == (4, 1)
        assert not stranger.poll(0)


def test_allow_without_rights_takes_none_away(system: System) -> None:
    system.bitten("keys", "new")
    system.bitten("keys", "new", "laptop")
    system.bitten("keys", "allow", "laptop", "--subscribe", "signal_*")
    done = system.bitten("keys", "allow", "laptop")
    assert done.returncode == 2
    assert "now it may publish nothing and read signal_*" in done.stderr
    assert "signal_*" in system.bitten("keys", "list").stdout


def test_home_without_keys_has_a_bus_for_everybody_on_the_machine(bus: System) -> None:
    with contextlib.closing(Client(bus.settings)) as client:
        assert client.status()["state"] == "ok"


@pytest.mark.parametrize("umask", [0, 0o777])
def test_files_of_a_used_home_are_their_owners_alone_whatever_the_umask(
    system: System, umask: int
) -> None:
    before = os.umask(umask)
    try:
        assert system.bitten("emit", "user_action", "action=login").returncode == 3
        spooled = system.script(
            "from event_bus import event_bridge as b; b.user_action({'action': 'login'})"
        )
        assert spooled.returncode == 0
        assert_private(system)
        assert system.bitten("keys", "new").returncode == 0
        system.start_bus()
        system.start_collector()
        assert system.wait_stored() >= 2
        assert system.bitten("backup").returncode == 0
    finally:
        os.umask(before)
    assert_private(system)


def assert_private(system: System) -> None:
    seen = [system.home, *system.home.rglob("*")]
    assert len(seen) > 2
    for path in seen:
        with contextlib.suppress(FileNotFoundError):  # a spool file that was delivered just now
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))


def test_log_and_errors_show_control_characters_instead_of_sending_them(system: System) -> None:
    schemas = system.home / "schemas"
    schemas.mkdir(parents=True)
    (schemas / "x\x1b[2J\nforged.json").write_text("{}")
    bus = system.start_bus()
    bus.terminate()
    log = bus.communicate()[0]
    assert "\\x1b[2J\\nforged" in log
    assert "\x1b" not in log
    assert not [line for line in log.splitlines() if line.startswith("forged")]
    done = system.bitten("keys", "revoke", "x\x1b[2J\ny")
    assert (done.returncode, "\x1b" in done.stderr, done.stderr.count("\n")) == (4, False, 1)
