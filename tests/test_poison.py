"""Poison among real events, through every door, against real processes."""

from __future__ import annotations

import json
import re
import signal
from typing import Any

import psutil
import pytest
from conftest import System, wait_until

from event_bus.protocol import Client

TOKEN = "0123456789abcdef0123"
BATCHES = 40
GOOD_PER_BATCH = 45


def line(event_id: str, data: str = '{"action":"a"}', event_type: str = "user_action") -> bytes:
    return (
        f'{{"event_id":"{event_id}","event_type":"{event_type}","timestamp":1.5,"data":{data}}}\n'
    ).encode()


POISON: dict[str, tuple[bytes, str]] = {
    "broken JSON": (line("p")[:-9] + b"\n", "json"),
    "no JSON": (b"\x00\x1b[2J garbage\n", "json"),
    "broken UTF-8": (line("p").replace(b'"a"', b'"\xff\xfe"'), "utf8"),
    "wrong type": (line("p", '{"action":1}'), "type"),
    "a list": (b"[1,2]\n", "type"),
    "missing field": (line("p", "{}"), "required"),
    "NaN": (line("p", '{"action":NaN}'), "finite"),
    "-Infinity": (line("p", '{"action":-Infinity}'), "finite"),
    "2^63": (line("p", '{"action":"a","x":9223372036854775808}'), "int64"),
    "10,000 digits": (line("p", '{"action":"a","x":' + "9" * 10_000 + "}"), "int64"),
    "10,000 digits after the point": (line("p", '{"action":1.' + "9" * 10_000 + "}"), "type"),
    "1e999": (line("p", '{"action":"a","x":1e999}'), "float64"),
    "200,000 levels": (line("p", '{"action":' + "[" * 200_000 + "]" * 200_000 + "}"), "maxDepth"),
    "lone surrogate": (line("p", '{"action":"\\ud800"}'), "utf8"),
    "key twice": (line("p", '{"action":"a","action":"b"}'), "uniqueKeys"),
    "unknown type": (line("p", event_type="no_such_type"), "event_type"),
    "the bus's own type": (line("p", event_type="heartbeat"), "event_type"),
    "unknown field": (line("p").replace(b'"data"', b'"seq":1,"data"'), "envelope"),
    "over 1 MiB": (line("p", '{"action":"' + "x" * (1 << 20) + '"}'), "maxBytes"),
    "empty": (b"\n", "json"),
}
KEPT = [  # odd, but events
    line("nul", '{"action":"a\\u0000b"}'),
    line("limits", '{"action":"a","x":[9223372036854775807,-9223372036854775808,1e308,-0.0]}'),
    line("deep", '{"action":"a","details":' + "[" * 62 + "]" * 62 + "}"),
    line("emoji \\ud83d\\ude00", '{"action":"\\ud83d\\ude00"}'),
    line("empty key", '{"action":"a","":null}'),
]


def value(raw: bytes) -> Any:
    return json.loads(raw)


@pytest.mark.timeout(240)
def test_poison_as_a_tenth_of_raw_batches_is_kept_aside_and_costs_no_good_event(
    system: System,
) -> None:
    bus, collector = system.start_bus(), system.start_collector()
    client = Client(system.settings)
    acks = dict.fromkeys(("accepted", "duplicates", "rejected", "conflicts"), 0)
    poison = list(POISON.values())
    sent: list[tuple[bytes, str]] = []
    resident = 0
    for number in range(BATCHES):
        lines = [line(f"{TOKEN}-{number * GOOD_PER_BATCH + i + 1}") for i in range(GOOD_PER_BATCH)]
        for place in range(5):
            bad = poison[(number * 5 + place) % len(poison)]
            sent.append(bad)
            lines.insert(place * 9, bad[0])
        ack = client.publish(b"".join(lines), timeout_s=30)
        for name in acks:
            acks[name] += ack[name]
        if number == BATCHES // 2:  # each kind was seen five times by then
            resident = psutil.Process(bus.pid).memory_info().rss
    assert client.publish(b"".join(KEPT))["accepted"] == len(KEPT)
    client.close()
    good = BATCHES * GOOD_PER_BATCH
    assert acks == {"accepted": good, "duplicates": 0, "rejected": len(sent), "conflicts": 0}
    system.wait_stored()
    assert (bus.poll(), collector.poll()) == (None, None)
    assert psutil.Process(bus.pid).memory_info().rss < resident + (32 << 20)
    numbers = system.sql("SELECT event_id FROM events WHERE event_id LIKE ? ORDER BY seq", "0123%")
    assert [i for (i,) in numbers] == [f"{TOKEN}-{n}" for n in range(1, good + 1)]
    kept = system.sql("SELECT rule, raw FROM rejected_events ORDER BY seq")
    assert [(rule, raw if isinstance(raw, bytes) else raw.encode()) for rule, raw in kept] == [
        (rule, bad.removesuffix(b"\n")) for bad, rule in sent
    ]
    for odd in KEPT:
        event = value(odd)
        rows = system.sql("SELECT data FROM events WHERE event_id = ?", event["event_id"])
        assert [repr(value(data)) for (data,) in rows] == [repr(event["data"])]


BRIDGE = """
import json, sys
from event_bus import event_bridge
class Bad:
    def __repr__(self): raise RuntimeError("no")
deep = []
for _ in range(200_000): deep = [deep]
itself = {}
itself["itself"] = itself
poison = [None, 7, "text", [1], {}, {"action": 1}, {"action": Bad()}, {"action": deep}, itself,
    {"action": "\\ud800"}, {"action": float("nan")}, {"action": "a", "x": 2 ** 63}, {1: 2, "1": 3},
    {"action": 10 ** 5_000}, {"action": "x" * (1 << 20)},
    {"action": "a", "x": float("inf")}, {"action": "a", ("t",): 1}, {"action": lambda: 0}, Bad()]
good = refused = 0
for n in range(int(sys.argv[1])):
    for _ in range(9):
        good += 1
        assert event_bridge.user_action({"action": "good", "n": good}, source="load")
    assert event_bridge.user_action(poison[n % len(poison)], source="load") is None
    refused += 1
assert event_bridge.emit("no_such_type", {"a": 1}) is None
assert event_bridge.emit(Bad(), {"a": 1}) is None
assert event_bridge.flush(60), event_bridge.stats()
print(json.dumps([good, refused + 2]))
sys.modules.pop("event_bus.event_bridge")
deep = itself = poison = None
"""


@pytest.mark.timeout(240)
def test_poison_as_a_tenth_of_bridge_calls_is_kept_aside_and_costs_no_good_event(
    system: System,
) -> None:
    bus = system.start_bus()
    system.start_collector()
    done = system.script(BRIDGE, "100", timeout=120)
    assert done.returncode == 0, done.stderr[-2_000:]
    good, refused = json.loads(done.stdout)
    system.wait_stored()
    assert bus.poll() is None
    stored = system.sql(
        "SELECT json_extract(data, '$.n') FROM events WHERE source='load' ORDER BY seq"
    )
    assert [n for (n,) in stored if n is not None] == list(range(1, good + 1))
    assert system.sql("SELECT count(*) FROM rejected_events") == [(refused,)]
    assert system.sql("SELECT count(*) FROM rejected_events WHERE reason = '' OR raw = ''") == [
        (0,)
    ]


@pytest.mark.timeout(240)
def test_poison_on_standard_input_is_told_line_by_line_and_the_rest_is_stored(
    system: System,
) -> None:
    system.start_bus()
    system.start_collector()
    datas: list[bytes] = []
    for number, (bad, _) in enumerate(POISON.values()):
        start = bad.find(b'"data":')
        datas += [b'{"action":"good","n":%d}\n' % (9 * number + i) for i in range(9)]
        datas.append(bad[start + 7 : -2] + b"\n" if start >= 0 else bad)
    done = system.bitten("emit", "user_action", input=b"".join(datas).decode("latin-1"), timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    system.wait_stored()
    good = system.sql(
        "SELECT json_extract(data,'$.n') FROM events WHERE data LIKE '%good%' ORDER BY seq"
    )
    assert [n for (n,) in good] == list(range(9 * len(POISON)))


NASTY = [
    "'; DROP TABLE _event; --",
    '" OR 1=1 --',
    "<script>alert(1)</script>",
    "\x1b[2J\x1b]0;owned\x07\x1b[31mred",
    "two\nlines\r\nand\ttabs",
    "\u202egnp.exe\u2066\u2029",
    "\x9b2J\x7f\x00",
    "%s %(x)s {0} ${HOME} `id` $(id)",
]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.mark.timeout(240)
def test_hostile_text_is_stored_byte_for_byte_and_escaped_in_every_output(system: System) -> None:
    bus = system.popen("-m", "event_bus", "bus")
    wait_until(lambda: system.status(0.2), "the bus answers")
    collector = system.start_collector()
    events = []
    for number, text in enumerate(NASTY):
        fields = ("event_id", "source", "user_id", "correlation_id", "causation_id")
        event = dict.fromkeys(fields, f"{text}{number}")
        data = {"action": text, "user_id": text, "details": {text: text}, text: text}
        events.append({**event, "event_type": "user_action", "timestamp": 1.5, "data": data})
    refused = [
        {**e, "event_id": f"r{e['event_id']}", "event_type": e["source"][:200]} for e in events
    ]
    refused += [
        {**e, "event_id": f"s{e['event_id']}", text: text}
        for e, text in zip(events, NASTY, strict=True)
    ]
    batch = b"".join(json.dumps(e).encode() + b"\n" for e in [*events, *refused])
    client = Client(system.settings)
    report = json.dumps({"source": NASTY[3], "pid": NASTY[4]}).encode()
    ack = client.receive(client.send(b"publish", batch, report), 10.0)
    assert json.loads(ack[0])["accepted"] == len(events)
    for verb in NASTY:
        client.send(verb.encode(), b"x")
    for name in NASTY:
        body = json.dumps({"from_seq": 1, "consumer": name, "problem": name}).encode()
        client.receive(client.send(b"fetch", body), 10.0)
    schemas = system.home / "schemas"
    schemas.mkdir(exist_ok=True)
    own = {"type": "object", "description": NASTY[3], "x-bitten": {NASTY[3]: 1}, "title": NASTY[4]}
    (schemas / "bad.json").write_text(json.dumps(own))
    own.pop("x-bitten")
    own["properties"] = {"a": {"type": "string", "description": NASTY[3] + NASTY[5]}}
    (schemas / "odd.json").write_text(json.dumps(own))
    client.publish(line("z", event_type="bad"))  # the bus looks at its schemas again
    client.close()
    system.wait_stored()

    for event in events:
        row = system.sql(
            "SELECT source, user_id, correlation_id, causation_id, data FROM events"
            " WHERE event_id = ?",
            event["event_id"],
        )
        assert [row[0][:4], value(row[0][4])] == [
            tuple(event[n] for n in ("source", "user_id", "correlation_id", "causation_id")),
            event["data"],
        ]
    raw = [json.loads(r) for (r,) in system.sql("SELECT raw FROM rejected_events ORDER BY seq")]
    assert raw[: len(refused)] == refused

    commands = [
        ("query",),
        ("query", "--type", "event_rejected"),
        ("query", "--source", NASTY[0]),
        ("tail", "--from-seq", "1", "--count", str(len(events) + len(refused))),
        ("status",),
        ("stats",),
        ("audit",),
        ("doctor",),
        ("schemas", "list"),
        ("schemas", "show", "odd"),
        ("schemas", "show", "--markdown"),
        ("schemas", "check"),
        ("emit", NASTY[3], f"{NASTY[4]}={NASTY[3]}"),
    ]
    for command in commands:
        done = system.bitten(*[part.replace("\0", "") for part in command], timeout=60)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        found = CONTROL.search(done.stdout + done.stderr)
        assert not found, (command, found, (done.stdout + done.stderr)[found.start() - 60 :][:120])
    for daemon in (bus, collector):
        daemon.send_signal(signal.SIGTERM)
        output, _ = daemon.communicate(timeout=20)
        found = CONTROL.search(output)
        assert not found, (found, output[found.start() - 60 :][:120])
        assert not re.search(r"^(lines|and)", output, re.M), "a text began a line of the log"


STORM = 200
TIMES = 100


@pytest.mark.timeout(240)
def test_duplicate_storm_over_restarts_is_stored_once_and_changed_content_is_a_conflict(
    system: System,
) -> None:
    ids = [f"{TOKEN}-{n}" for n in range(1, STORM // 2 + 1)] + [f"o/{n}" for n in range(STORM // 2)]
    storm = b"".join(line(i) for i in ids)
    counts = dict.fromkeys(("accepted", "duplicates", "rejected", "conflicts"), 0)
    changed = 0
    for life in range(4):
        bus = system.start_bus()
        if life == 0:
            system.start_collector()
        client = Client(system.settings)
        for _ in range(TIMES // 4):
            for name, count in client.publish(storm, timeout_s=30).items():
                if name in counts:
                    counts[name] += count
        changed += client.publish(line(ids[life], '{"action":"b"}'))["conflicts"]
        changed += client.publish(line(ids[-1 - life], '{"action":"b"}'))["conflicts"]
        client.close()
        if life < 3:
            bus.send_signal((signal.SIGTERM, signal.SIGKILL)[life % 2])
            bus.wait()
    assert counts == {
        "accepted": STORM,
        "duplicates": STORM * (TIMES - 1),
        "rejected": 0,
        "conflicts": 0,
    }
    assert changed == 8
    system.wait_stored()
    stored = system.sql("SELECT event_id FROM events WHERE event_type = 'user_action' ORDER BY seq")
    assert [i for (i,) in stored] == ids
    conflicts = system.sql("SELECT raw FROM rejected_events WHERE rule = 'conflict'")
    assert len(conflicts) == 8
    assert all('"b"' in raw for (raw,) in conflicts)
