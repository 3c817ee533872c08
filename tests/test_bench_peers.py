"""The benchmark's peers against their real servers, and what is said of those that are missing."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

import psutil
import pytest
import report
from peers import PEERS, server, work
from peers.peer import Peer, check

MARK = "BITTEN_TEST_OF_PEERS"
ALWAYS_IN_CI = ("Redis", "NATS")

each_peer = pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """In the environment of every process that the test starts; temporary files are in tmp_path."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return mark


def processes_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def need(peer: Peer) -> None:
    reason = peer.missing()
    if reason:
        if os.environ.get("CI") and peer.name.startswith(ALWAYS_IN_CI) and "installed" in reason:
            pytest.fail(reason)
        pytest.skip(reason)


@each_peer
@pytest.mark.parametrize("publishers", [1, 4])
def test_peer_stores_every_event_once_and_leaves_nothing(
    peer: Peer, publishers: int, marked: str, tmp_path: Path
) -> None:
    need(peer)
    measured = peer.run(2_001, publishers)
    assert measured["stored"] == 2_001
    assert measured["rate"] > 0
    assert processes_with(marked) == []
    assert list(tmp_path.iterdir()) == []


@each_peer
def test_peer_whose_process_fails_says_so_and_leaves_nothing(
    peer: Peer, marked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(peer)
    monkeypatch.setenv("PYTHONHASHSEED", "no number")
    with pytest.raises(SystemExit, match="a process did not start"):
        peer.run(10, 1)
    assert processes_with(marked) == []
    assert list(tmp_path.iterdir()) == []


def test_event_that_is_not_stored_fails_the_round(tmp_path: Path) -> None:
    db = tmp_path / "events.db"
    sink = work.Sink(db, 10)
    lines = list(work.lines(10))
    sink.write(lines[:9])
    sink.close()
    with pytest.raises(SystemExit, match=r"a peer: published \[10\], stored .*9"):
        check(db, [10], "a peer")


def test_event_that_is_stored_twice_fails_the_round(tmp_path: Path) -> None:
    db = tmp_path / "events.db"
    sink = work.Sink(db, 10)
    lines = list(work.lines(10))
    sink.write([*lines[:9], lines[0]])
    sink.close()
    with pytest.raises(SystemExit, match="a peer"):
        check(db, [10], "a peer")


def test_missing_server_or_client_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.missing("sh") == ""
    assert "scripts/install bench" in server.missing("sh", "no_such_module")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert server.missing("redis-server", "redis") == "redis-server is not installed"


def test_server_that_does_not_start_fails_with_what_it_said(tmp_path: Path) -> None:
    argv = ["sh", "-c", "echo no disk is left >&2; exit 3"]
    with (
        pytest.raises(SystemExit, match="no disk is left"),
        server.running(argv, tmp_path / "log", 1),
    ):
        pass


def test_what_could_not_be_measured_is_shown_with_its_reason() -> None:
    results = {
        "publishers": {"1": [90.0, 60.0]},
        "peers": {"A": [30.0, 30.0]},
        "missing": {"B": "b-server is not installed"},
    }
    rows = dict(report.ROWS["peers"](results))
    assert rows["  A"].endswith(" 2.50")
    assert rows["  B"] == "not measured: b-server is not installed"
