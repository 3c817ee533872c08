"""Key files, the allow-list, and the commands that make them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import zmq
from conftest import System

from event_bus import allow_list, keys
from event_bus.allow_list import AllowList, Rights
from event_bus.errors import KeysError

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
OTHER_KEY = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"


def modes(directory: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


@pytest.mark.parametrize("umask", [0, 0o777])
def test_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        keys.make_pair(tmp_path / "home" / "keys", "laptop")
        allow_list.write(tmp_path / "home" / "keys" / "allowed.yaml", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "home" / "keys").stat().st_mode) == 0o700
    assert modes(tmp_path / "home" / "keys") == {0o600}


def test_key_files_are_those_that_pyzmq_reads(tmp_path: Path) -> None:
    from zmq import auth

    public = keys.make_pair(tmp_path, "laptop")
    assert auth.load_certificate(tmp_path / "laptop.key")[0].decode() == public
    read_public, secret = auth.load_certificate(tmp_path / "laptop.key_secret")
    assert secret is not None
    assert read_public.decode() == public == zmq.curve_public(secret).decode()


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    public = keys.make_pair(tmp_path, "laptop")
    with pytest.raises(KeysError, match="exists already"):
        keys.make_pair(tmp_path, "laptop")
    assert keys.read_public(tmp_path, "laptop") == public


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\nb", ".hidden", "x" * 64, "\x1b[31m"])
def test_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeysError, match="cannot be the name of a key"):
        keys.make_pair(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "No public key"),
        (b'curve\n    public-key = "%b"\n' % KEY.encode(), "no secret-key"),
        (b'public-key = "short"\nsecret-key = "short"\n', "40 characters"),
        (b"\xff\xfe\x00\npublic-key = \xff\nsecret-key = x", "codec can't decode"),
    ],
)
def test_broken_key_file_is_one_clear_line(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    keys.make_pair(tmp_path, keys.BUS)
    if content is not None:
        (tmp_path / "client.key_secret").write_bytes(content)
    socket = zmq.Context.instance().socket(zmq.DEALER)
    with pytest.raises(KeysError, match=reason) as e:
        keys.use_client_key(socket, tmp_path, LOOPBACK)
    assert "client.key_secret" in str(e.value)
    assert "\n" not in str(e.value)
    socket.close()


def test_home_without_keys_is_left_alone(tmp_path: Path) -> None:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    keys.use_client_key(socket, tmp_path / "nowhere", LOOPBACK)
    assert socket.mechanism == zmq.NULL
    socket.close()


@pytest.mark.parametrize("host", ["10.8.0.1", "0.0.0.0", "[2001:db8::1]", "bus.example"])
def test_home_without_keys_says_nothing_beyond_this_machine(tmp_path: Path, host: str) -> None:
    with (
        contextlib.closing(zmq.Context.instance().socket(zmq.DEALER)) as socket,
        pytest.raises(KeysError, match="beyond this machine"),
    ):
        keys.use_client_key(socket, tmp_path, f"tcp://{host}:5571")


def test_keys_directory_that_others_could_read_is_closed_before_a_secret_is_in_it(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "keys"
    directory.mkdir()
    directory.chmod(0o755)
    seen: list[int] = []

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.chmod" and str(arguments[0]).endswith("_secret"):
            seen.append(Path(str(arguments[0])).stat().st_mode & 0o777)

    before = os.umask(0)
    try:
        sys.addaudithook(look)
        keys.make_pair(directory, keys.BUS)
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert seen == [0o600]
    assert os.umask(before) == before


LOOPBACK = "tcp://127.0.0.1:5571"

GOOD = f"""
feed:
  public_key: "{KEY}"
  publish: [market_data]
laptop:
  public_key: '{OTHER_KEY}'
  subscribe: ["*"]
"""


def test_allow_list_is_read_as_written(tmp_path: Path) -> None:
    allowed = allow_list.parse(GOOD, "allowed.yaml")
    assert allowed == {
        "feed": Rights("feed", KEY, publish=("market_data",)),
        "laptop": Rights("laptop", OTHER_KEY, subscribe=("*",)),
    }
    allow_list.write(tmp_path / "allowed.yaml", allowed)
    assert allow_list.read(tmp_path / "allowed.yaml") == allowed


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("feed: [\n", "line 2: not YAML"),
        ("\n- feed\n", "line 2: expected a mapping of names to rights"),
        ("\nfeed: x\n", "line 2: expected feed's"),
        ("feed:\n  publish: [x]\n", "line 2: feed has no public_key"),
        ("feed:\n  public_key: abc\n", "line 2: expected a public key of 40 characters"),
        (GOOD + "  subscribe: []\n", "line 8: expected each of"),
        (GOOD.replace("publish:", "pubish:"), "line 4: expected each of"),
        (GOOD.replace("[market_data]", "market_data"), "line 4: expected a list of patterns"),
        (GOOD.replace("[market_data]", "['a b']"), "line 4: expected a list of patterns"),
        (GOOD.replace("[market_data]", "[[]]"), "line 4: expected a pattern"),
        (GOOD.replace("[market_data]", "[a.b]"), "line 4: publish has event types"),
        (GOOD.replace(OTHER_KEY, KEY), "line 6: laptop has the key of feed"),
        (GOOD.replace("laptop", "feed"), "line 5: feed stands here twice"),
        (GOOD.replace("laptop", "../x"), "line 5: '../x' cannot be the name"),
        ("[" * 5_000, "not YAML"),
        ("a: &a [*a]\n", "line 1"),
        ("\x00", "not YAML"),
    ],
)
def test_broken_allow_list_names_file_line_and_what_was_expected(text: str, problem: str) -> None:
    with pytest.raises(KeysError) as e:
        allow_list.parse(text, "/home/keys/allowed.yaml")
    assert str(e.value).startswith("/home/keys/allowed.yaml")
    assert problem in str(e.value)


def test_running_bus_keeps_the_last_good_list_and_names_the_problem(tmp_path: Path) -> None:
    path = tmp_path / "allowed.yaml"
    path.write_text(GOOD)
    allowed = AllowList(path)
    path.write_text("feed: [")
    allowed.refresh()
    assert allowed[KEY] is not None
    assert "line 1" in allowed.problem
    path.unlink()
    allowed.refresh()
    assert allowed[KEY] is not None
    assert "there is no allow-list" in allowed.problem
    path.write_text("")
    allowed.refresh()
    assert (allowed[KEY], allowed.problem) == (None, "")


def test_patterns_are_compared_with_types_and_topics() -> None:
    rights = Rights("x", KEY, publish=("signal_*",), subscribe=("price.EUR*", "fire_command"))
    assert rights.may_publish("signal_generated")
    assert rights.may_publish("bridge_loss")
    assert not rights.may_publish("market_data")
    assert rights.may_read("price.EURUSD")
    assert rights.may_read("fire_command")
    assert rights.may_read("fire_command.7")
    assert rights.may_read("heartbeat")
    assert not rights.may_read("price")
    assert not rights.may_read("price.GBPUSD")
    assert not Rights("x", KEY).may_publish("bridge_loss")


def test_commands_make_allow_list_and_revoke(system: System) -> None:
    made = system.bitten("keys", "new")
    assert (made.returncode, made.stderr) == (0, "")
    assert "restart the bus" in made.stdout
    assert system.bitten("keys", "new", "laptop").returncode == 0
    allowed = system.bitten("keys", "allow", "laptop", "--subscribe", "signal_*")
    assert allowed.stdout == "laptop may publish nothing and read signal_*\n"
    listed = system.bitten("keys", "list", "--json").stdout.splitlines()
    client, laptop = map(json.loads, listed)
    assert (client["name"], client["publish"], client["subscribe"]) == ("client", ["*"], ["*"])
    assert (laptop["name"], laptop["publish"], laptop["subscribe"]) == (
        "laptop",
        [],
        ["signal_*"],
    )
    assert laptop["public_key"] in system.bitten("keys", "list").stdout
    assert system.bitten("keys", "revoke", "laptop").returncode == 0
    assert len(system.bitten("keys", "list", "--json").stdout.splitlines()) == 1
    gone = system.bitten("keys", "revoke", "laptop")
    assert gone.returncode == 4
    assert gone.stderr.startswith("bitten: laptop is not on the allow-list")


def test_making_keys_again_changes_nothing(system: System) -> None:
    system.bitten("keys", "new")
    directory = system.settings.keys
    before = {p: p.read_bytes() for p in directory.iterdir()}
    assert system.bitten("keys", "new").returncode == 0
    assert {p: p.read_bytes() for p in directory.iterdir()} == before


def test_key_made_elsewhere_is_allowed_by_its_public_part(system: System) -> None:
    unknown = system.bitten("keys", "allow", "feed", "--publish", "market_data")
    assert (unknown.returncode, "there is no key feed" in unknown.stderr) == (4, True)
    assert system.bitten("keys", "allow", "feed", KEY, "--publish", "market_data").returncode == 0
    assert system.bitten("keys", "allow", "feed", "--publish", "*").returncode == 0
    listed = json.loads(system.bitten("keys", "list", "--json").stdout)
    assert listed == {"name": "feed", "public_key": KEY, "publish": ["*"], "subscribe": []}


@pytest.mark.parametrize(
    "argv",
    [
        ("allow", "feed", "short", "--publish", "x"),
        ("allow", "feed", KEY, "--publish", "a.b"),
        ("allow", "a/b", KEY),
        ("new", "client"),
        ("new", "../x"),
        ("list",),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(system: System, argv: tuple[str, ...]) -> None:
    done = system.bitten("keys", *argv)
    assert done.returncode == 4
    assert done.stderr.startswith("bitten: ")
    assert done.stderr.count("\n") == 1
    assert not (system.settings.keys / "allowed.yaml").exists()


def test_no_command_ever_prints_a_secret(system: System) -> None:
    outputs = []
    for argv in (
        ("new",),
        ("new",),
        ("new", "laptop"),
        ("allow", "laptop", "--subscribe", "*"),
        ("list",),
        ("list", "--json"),
        ("revoke", "laptop"),
    ):
        done = system.bitten("--debug", "keys", *argv)
        outputs.append(done.stdout + done.stderr)
    bus = system.start_bus()
    bus.terminate()
    outputs.append(bus.communicate()[0])
    for path in system.settings.keys.glob("*.key_secret"):
        secret = path.read_text().rpartition("secret-key = ")[2].strip().strip('"')
        assert len(secret) == 40
        assert not [o for o in outputs if secret in o]
