"""The command `bitten`, as a user and as a script sees it."""

from __future__ import annotations

import csv
import io
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path

import msgspec
import pytest
import zmq
from conftest import System, wait_until

from event_bus import protocol
from event_bus.protocol import Client, FetchRequest

TICK = '{"symbol": "EURUSD", "bid": 1.0845, "ask": 1.0847}'
COMMANDS = sorted(entry_points(group="bitten.commands").names)


class Responder:
    """Answers every request with an error, as a bus does that cannot write."""

    error = b""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.bind(self._url)
            while not self._ends.is_set():
                if socket.poll(50):
                    who, _, request_id, *_ = socket.recv_multipart()
                    socket.send_multipart([who, protocol.ERROR, request_id, self.error])

    def __enter__(self) -> Responder:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        self._thread.join()


@pytest.fixture
def filled(bus: System) -> System:
    """Bus and collector with three ticks, a login and a refused event."""
    bus.start_collector()
    for bid in (1.1, 1.2, 1.3):
        tick = json.dumps({"symbol": "EURUSD", "bid": bid, "ask": 2})
        assert bus.bitten("emit", "market_data", tick).returncode == 0
    bus.bitten("emit", "user_action", "action=login", "user_id=7", "--correlation-id", "c1")
    bus.bitten("emit", "user_action", "user_id=8")
    bus.wait_stored()
    return bus


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(system: System, command: str) -> None:
    done = system.bitten(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: bitten {command}")
    assert command in system.bitten("--help").stdout


def test_emit_prints_the_id_of_the_event(bus: System) -> None:
    done = bus.bitten("emit", "market_data", TICK)
    assert (done.returncode, done.stderr) == (0, "")
    tail = bus.bitten("tail", "market_data", "--from-seq", "1", "--count", "1", "--json")
    event = json.loads(tail.stdout)
    assert event["event_id"] == done.stdout.strip()
    assert event["data"] == json.loads(TICK)


def test_emit_takes_pairs_as_the_schema_types_them(bus: System) -> None:
    bus.bitten("emit", "user_action", "action=7", "user_id=7", 'details={"a": [1]}', "note=plain")
    tail = bus.bitten("tail", "user_action", "--from-seq", "1", "--count", "1", "--json")
    event = json.loads(tail.stdout)
    assert event["data"] == {"action": "7", "user_id": 7, "details": {"a": [1]}, "note": "plain"}
    assert event["user_id"] == "7"


def test_emit_names_the_lines_of_standard_input_that_are_refused(bus: System) -> None:
    lines = f'{TICK}\n\n{{bad\n{{"symbol": "EURUSD", "bid": -1, "ask": 2}}\n{TICK}\n'
    done = bus.bitten("emit", "market_data", input=lines)
    assert done.returncode == 1
    assert done.stdout == "2 events, 2 refused\n"
    assert "line 3: not JSON" in done.stderr
    assert "line 4: data.bid of market_data: -1 is less than" in done.stderr


def test_emit_says_what_the_bus_refused_and_prints_no_id(system: System) -> None:
    system.bitten("keys", "new")
    system.bitten("keys", "allow", "client", "--publish", "market_data", "--subscribe", "*")
    system.start_bus()
    done = system.bitten("emit", "user_action", "action=x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "bitten: the key client may not publish user_action\n"
    done = system.bitten("emit", "user_action", input='{"action": "x"}\n')
    assert (done.returncode, done.stdout) == (1, "0 events, 1 refused\n")
    done = system.bitten("emit", "user_action", "action=x", "--json")
    assert json.loads(done.stdout)["bus_reason"] == "the key client may not publish user_action"


def test_emit_tells_a_bus_that_refuses_from_one_that_is_away(system: System) -> None:
    class Full(Responder):
        error = b'{"code": "storage_full", "message": "no space left for the journal"}'

    with Full(system.settings.ingress_url):
        done = system.bitten("emit", "user_action", "action=x")
    assert done.returncode == 3
    assert "does not take events: no space left for the journal; 1 event waits in" in done.stderr
    assert "does not answer" not in done.stderr


@pytest.mark.parametrize("arguments", [("query",), ("query", "--csv"), ("stats", "--json")])
def test_output_that_cannot_be_written_is_told_in_one_line(
    filled: System, arguments: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "event_bus", *arguments]
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - as the shell does
        done = subprocess.run(
            command, env=filled.environ, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 4
    assert done.stderr == b"bitten: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("command", ["audit", "stats", "query", "status", "doctor"])
def test_closed_output_is_told_in_one_line(filled: System, command: str) -> None:
    line = f'"{sys.executable}" -m event_bus {command} >&-'
    done = subprocess.run(
        ["sh", "-c", line], env=filled.environ, stderr=subprocess.PIPE, check=False
    )
    assert done.returncode == 4
    assert done.stderr == b"bitten: cannot write the output: Bad file descriptor\n"


def test_emit_reports_as_json(bus: System) -> None:
    done = bus.bitten("emit", "market_data", "symbol=X", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert result["event_ids"] == []
    assert '"bid" is a required property' in result["refused"][0]["reason"]


def test_emitted_while_the_bus_is_away_is_stored_once_it_runs(system: System) -> None:
    done = system.bitten("emit", "market_data", TICK)
    assert done.returncode == 3
    assert "1 event waits in" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    system.start_bus()
    system.start_collector()
    wait_until(lambda: not list(system.settings.spool.iterdir()), "the bus takes in the spool")
    system.wait_stored()
    assert system.sql("SELECT event_id FROM events WHERE event_type = 'market_data'") == [
        (done.stdout.strip(),)
    ]


def test_emit_into_a_home_that_cannot_be_written_says_that_the_event_is_lost(
    system: System,
) -> None:
    system.home.mkdir()
    system.settings.spool.write_text("a file where the directory should be")
    done = system.bitten("emit", "market_data", TICK)
    assert done.returncode == 4
    assert "1 event is lost" in done.stderr
    assert str(system.settings.spool) in done.stderr


def test_tail_follows_live_events_of_a_pattern(bus: System) -> None:
    tail = bus.popen("-m", "event_bus", "tail", "user_*", "--count", "2", "--json")
    emitted = []

    def seen() -> bool:
        bus.bitten("emit", "market_data", TICK)
        emitted.append(bus.bitten("emit", "user_action", "action=x").stdout.strip())
        return tail.poll() is not None

    wait_until(seen, "tail has seen two events")
    events = [json.loads(line) for line in tail.communicate()[0].splitlines()]
    assert [e["event_type"] for e in events] == ["user_action"] * 2
    assert [e["event_id"] for e in events] == emitted[emitted.index(events[0]["event_id"]) :][:2]


def test_tail_leaves_out_what_it_is_told_to_ignore(filled: System) -> None:
    arguments = ("--from-seq", "1", "--ignore", "market_*", "--ignore", "system_health")
    done = filled.bitten("tail", *arguments, "--count", "2", "--json")
    types = [json.loads(line)["event_type"] for line in done.stdout.splitlines()]
    assert types == ["user_action", "event_rejected"]


def test_control_characters_of_an_event_do_not_reach_the_terminal(filled: System) -> None:
    evil = "\x1b[2J\r\nfake\u202e"
    filled.bitten("emit", "user_action", json.dumps({"action": evil}))
    filled.wait_stored()
    tail = filled.bitten("tail", "user_action", "--from-seq", "1", "--count", "2").stdout
    query = filled.bitten("query", "--type", "user_action").stdout
    assert "\\x1b[2J" in tail
    assert "\\u001b[2J" in query
    for text in (tail, query):
        assert not set(text) & set("\x1b\r\u202e")
    assert len(tail.splitlines()) == 2


def test_query_filters_and_prints_as_asked(filled: System) -> None:
    as_json = filled.bitten("query", "--symbol", "EURUSD", "--limit", "2", "--json").stdout
    assert [json.loads(line)["data"]["bid"] for line in as_json.splitlines()] == [1.3, 1.2]
    rows = list(csv.DictReader(io.StringIO(filled.bitten("query", "--csv").stdout)))
    assert [r["event_type"] for r in rows[:2]] == ["event_rejected", "user_action"]
    found = filled.bitten("query", "--correlation-id", "c1", "--since", "1h", "--json").stdout
    assert json.loads(found)["user_id"] == "7"
    table = filled.bitten("query", "--user-id", "7").stdout
    assert table.splitlines()[0].split() == ["seq", "time", "type", "source", "user", "data"]
    nothing = filled.bitten("query", "--until", "1999-12-31")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "no events match\n")


def test_query_explains_what_a_moment_looks_like(system: System) -> None:
    done = system.bitten("query", "--since", "yesterday")
    assert done.returncode == 2
    assert "use 90s, 15m, 1h" in done.stderr


def test_stats_count_by_type(filled: System) -> None:
    stats = json.loads(filled.bitten("stats", "--json").stdout)
    assert stats["by_type"]["market_data"] == 3
    assert stats["events_stored"] == filled.stored()
    assert f"{filled.stored()} events stored" in filled.bitten("stats").stdout


def test_a_consumer_that_will_not_come_back_is_forgotten(bus: System) -> None:
    client = Client(bus.settings)
    request = FetchRequest(from_seq=1, consumer="gone")
    client.receive(client.send(protocol.FETCH, msgspec.json.encode(request)), 5.0)
    client.close()
    waiting = wait_until(lambda: (bus.status() or {})["last_seq"], "the bus has said how it is")
    done = bus.bitten("forget", "gone")
    text = f"gone is forgotten; it had not stored {waiting} event{'s' * (waiting != 1)}\n"
    assert (done.returncode, done.stdout) == (0, text)
    assert "gone" not in (bus.status() or {})["consumers"]
    again = bus.bitten("forget", "gone")
    assert again.returncode == 1
    assert "the bus knows no consumer 'gone'" in again.stderr


def test_status_shows_the_collector_caught_up(filled: System) -> None:
    def lag() -> bool:
        status = json.loads(filled.bitten("status", "--json").stdout)
        return status["consumers"]["data_collector"]["lag"] == 0

    wait_until(lag, "no lag")
    assert "consumer data_collector" in filled.bitten("status").stdout


def test_audit_vouches_for_a_whole_system(filled: System) -> None:
    done = filled.bitten("audit")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "0 lost"
    ledger = json.loads(filled.bitten("audit", "--json").stdout)
    assert ledger["published"] == ledger["stored"] == filled.stored()
    assert (ledger["refused"], ledger["rejected"]) == (1, 0)
    producers = ledger["producers"]
    assert [p["published"] for p in producers] == [p["stored"] for p in producers]
    assert sum(p["stored"] for p in producers) == ledger["stored"]
    assert all(time.time() - p["last_seen"] < 60 for p in producers)


def test_audit_names_what_is_missing(filled: System) -> None:
    for process in filled.processes:
        process.send_signal(signal.SIGTERM)
        process.wait()
    with sqlite3.connect(filled.db) as db:
        db.execute("DELETE FROM _event WHERE seq IN (2, 3)")
    done = filled.bitten("audit")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == [
        "the bus is away; the journal was read as it lies",
        "2 lost: 2 missing in the database (seq 2-3)",
    ]


@pytest.mark.parametrize("command", [("query",), ("stats",), ("audit",), ("status",), ("tail",)])
def test_without_bus_and_database_one_line_says_what_to_do(
    system: System, command: tuple[str, ...]
) -> None:
    done = system.bitten(*command)
    assert done.returncode in (3, 4)
    assert len(done.stderr.splitlines()) == 1
    assert "bitten up" in done.stderr


def test_unknown_settings_are_named(system: System) -> None:
    system.home.mkdir()
    (system.home / "config.yaml").write_text("jornal_max_bytes: 5\n")
    done = system.bitten("stats")
    assert done.returncode == 2
    assert "unknown setting jornal_max_bytes" in done.stderr


def test_own_event_type_is_checked_listed_shown_and_stored(bus: System) -> None:
    bus.start_collector()
    own = bus.settings.schemas
    own.mkdir()
    schema = {
        "type": "object",
        "description": "News came in.",
        "properties": {"headline": {"type": "string"}, "impact": {"type": "integer"}},
        "required": ["headline"],
        "x-bitten": {"indexes": ["impact"], "key": "impact"},
    }
    path = own / "news_item.json"
    path.write_text(json.dumps(schema))
    assert bus.bitten("schemas", "check").stdout == f"{path}: good\n"
    assert "news_item" in bus.bitten("schemas", "list").stdout
    assert json.loads(bus.bitten("schemas", "show", "news_item").stdout) == schema
    page = bus.bitten("schemas", "show", "news_item", "--markdown").stdout
    assert "`bitten.news_item.<impact>`" in page
    assert bus.bitten("emit", "news_item", "headline=CPI", "impact=3").returncode == 0
    bus.wait_stored()
    assert bus.sql("SELECT headline, impact FROM news_item") == [("CPI", 3)]


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ("{", "cannot read"),
        ('{"type": "array"}', '"type": "object"'),
        ('{"type": "object", "properties": {"a": {"type": "strnig"}}}', "properties.a.type"),
        ('{"type": "object", "x-bitten": {"tabel": "x"}}', "tabel"),
        ('{"type": "object", "x-bitten": {"indexes": ["a"]}}', "none of its properties"),
        ('{"type": "object", "properties": {"seq": {"type": "string"}}}', "cannot be a column"),
    ],
)
def test_broken_schema_is_refused_with_place_and_reason(
    system: System, tmp_path: Path, schema: str, complaint: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(schema)
    done = system.bitten("schemas", "check", str(path))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert complaint in done.stderr


def test_schema_change_that_breaks_stored_events_is_refused(bus: System, tmp_path: Path) -> None:
    bus.start_collector()
    own = bus.settings.schemas
    own.mkdir()
    schema = {"type": "object", "properties": {"level": {"type": "integer"}}}
    (own / "mine.json").write_text(json.dumps(schema))
    bus.bitten("emit", "mine", "level=9")
    bus.wait_stored()
    changed = tmp_path / "mine.json"
    for level, complaint in (
        ({"type": "string"}, "column level is stored as integer, not as text"),
        ({"type": "integer", "maximum": 5}, "breaks it: data.level of mine: 9 is greater"),
    ):
        changed.write_text(json.dumps(schema | {"properties": {"level": level}}))
        done = bus.bitten("schemas", "check", str(changed))
        assert done.returncode == 2
        assert complaint in done.stderr


HOSTILE = "\x1b[31m \x9b31m \x7f \u202e \u2066 \u200e \u200f \u061c \ufeff \u2028 a\nb 📈 ü"


def test_hostile_characters_are_escapes_in_json_and_on_a_terminal(bus: System) -> None:
    bus.start_collector()
    event = {"event_id": "h", "event_type": "user_action", "timestamp": 1.0, "source": HOSTILE}
    client = Client(bus.settings)
    ack = client.publish(json.dumps({**event, "data": {"action": HOSTILE}}).encode() + b"\n")
    client.close()
    assert ack["accepted"] == 1
    bus.wait_stored()
    query = ("query", "--type", "user_action")
    printed = {
        "query --json": bus.bitten(*query, "--json").stdout,
        "tail --json": bus.bitten(
            "tail", "--from-seq", "1", "--count", "1", "--json", *query[2:]
        ).stdout,
        "table": bus.bitten(*query).stdout,
        "csv on a terminal": bus.on_terminal(*query, "--csv"),
    }
    for name, text in printed.items():
        bad = {c for c in text if c not in "\r\n" and not c.isprintable()}
        assert text, name
        assert not bad, name
    for name in ("query --json", "tail --json"):
        found = json.loads(printed[name])
        assert (found["source"], found["data"]["action"]) == (HOSTILE, HOSTILE)
    piped = bus.bitten(*query, "--csv").stdout
    assert HOSTILE in piped  # another program gets what is stored
