"""Row 28: a bus that other machines can reach, and one of them in a network namespace."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq.auth
from harness import NotRun, Trial, drill
from system import free_port, wait_until

STRANGER = str(Path(__file__).parent / "stranger.py")
REFUSED_EXIT = 4


@drill(
    row=28,
    name="network",
    fault="a bus bound beyond loopback; clients without a key, with an unknown and a revoked one",
    long="3 rounds",
    needs=("root", "ip"),
    plant="the unknown key is on the allow-list",
    breaks="a peer with a key that is not listed",
)
def network(trial: Trial) -> None:
    with _other_machine() as (space, address):
        for port in ("BITTEN_EVENTS_URL", "BITTEN_INGRESS_URL"):
            trial.system.environ[port] = f"tcp://{address}:{free_port()}"
        refused = trial.system.bitten("bus")
        trial.expect(
            refused.returncode == REFUSED_EXIT and "keys new" in refused.stderr,
            f"a bus without keys: exit code {refused.returncode}, {refused.stderr[-200:]!r}",
        )
        if refused.returncode != REFUSED_EXIT:
            return
        _keys(trial, "new")
        trial.start()
        trial.publish()
        wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
        for i in range(trial.count(1, 3)):
            _round(trial, space, str(i))
        trial.settle()
        trial.check()
    stored = {
        i for (i,) in trial.system.sql("SELECT event_id FROM events WHERE source = 'stranger'")
    }
    trial.expect(
        all(i.startswith("listed") for i in stored), f"strangers' events are stored: {stored}"
    )


def _round(trial: Trial, space: str, number: str) -> None:
    directory = trial.system.home / "keys"
    _keys(trial, "new", f"laptop-{number}")
    secret = str(directory / f"laptop-{number}.key_secret")
    bus_key = zmq.auth.load_certificate(directory / "bus.key")[0].decode()
    if trial.planted:
        _keys(trial, "allow", f"laptop-{number}", "--publish", "*", "--subscribe", "*")
    for who, keys in {
        "without a key": (),
        "with a key of its own": ("unknown", bus_key),
        "with a key that is not listed": (secret, bus_key),
    }.items():
        got = _knock(trial, space, f"{who} {number}", *keys)
        trial.expect(got == {"acked": False, "frames": 0}, f"a peer {who} got {got}")
    _keys(trial, "allow", f"laptop-{number}", "--publish", "*", "--subscribe", "*")
    got = _knock(trial, space, f"listed {number}", secret, bus_key)
    trial.expect(got["acked"] and got["frames"], f"a peer with a listed key got {got}")
    _keys(trial, "revoke", f"laptop-{number}")
    got = _knock(trial, space, f"revoked {number}", secret, bus_key)
    trial.expect(got == {"acked": False, "frames": 0}, f"a peer with a revoked key got {got}")


def _keys(trial: Trial, *argv: str) -> None:
    done = trial.system.bitten("keys", *argv)
    assert done.returncode == 0, done.stderr


def _knock(trial: Trial, space: str, event_id: str, *keys: str) -> dict[str, Any]:
    settings = trial.system.settings
    process = trial.system.popen(
        *(STRANGER, settings.ingress_url, settings.events_url, event_id, *keys),
        preexec_fn=_entering(space),
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    found: dict[str, Any] = json.loads(output)
    return found


def _entering(space: str) -> Any:
    """For `preexec_fn`: the child's network is that namespace's."""

    libc = ctypes.CDLL(None, use_errno=True)
    clone_newnet = 0x40000000

    def enter() -> None:
        fd = os.open(f"/run/netns/{space}", os.O_RDONLY)
        if libc.setns(fd, clone_newnet):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(fd)

    return enter


@contextlib.contextmanager
def _other_machine() -> Iterator[tuple[str, str]]:
    """A network namespace, a cable to it, and our address on the cable."""
    number = os.getpid() % 65_536
    space, ours, theirs = (f"{p}{number}" for p in ("drill", "dro", "drt"))
    net = f"10.{200 + number // 16_384}.{number // 64 % 256}"
    first = number % 64 * 4
    try:
        _ip("netns", "add", space)
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", space)
        _ip("address", "add", f"{net}.{first + 1}/30", "dev", ours)
        _ip("link", "set", ours, "up")
        _ip("-n", space, "address", "add", f"{net}.{first + 2}/30", "dev", theirs)
        _ip("-n", space, "link", "set", theirs, "up")
        yield space, f"{net}.{first + 1}"
    finally:
        subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", ours], check=False, capture_output=True)


def _ip(*argv: str) -> None:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotRun(f"ip {' '.join(argv)}: {done.stderr.strip()}")
