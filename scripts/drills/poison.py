"""Rows 18, 19 and 20: events that are not events, far too large, or full of other people's code."""

from __future__ import annotations

import base64
import itertools
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import psutil
import zmq
from harness import Trial, drill
from system import System, wait_until


def _line(data: str, event_type: str = "user_action") -> bytes:
    head = f'{{"event_id":"@","event_type":"{event_type}","timestamp":1.0,"source":"poisoner",'
    text = f'{head}"data":{data}}}'
    return text.encode("utf-8", "surrogatepass")


POISON: dict[str, bytes] = {
    "broken JSON": b'{"event_type":"user_action","data":{',
    "no JSON": b"GET / HTTP/1.1",
    "broken UTF-8": _line('{"action":"x"}').replace(b"x", b"\xff\xfe"),
    "wrong type": _line('{"action":7}'),
    "no data": b'{"event_type":"user_action"}',
    "an array": b"[1,2,3]",
    "NaN": _line('{"action":"x","value":NaN}'),
    "Infinity": _line('{"action":"x","value":-Infinity}'),
    "2^64": _line('{"action":"x","value":18446744073709551616}'),
    "10,000 digits": _line('{"action":"x","value":' + "9" * 10_000 + "}"),
    "200,000 levels": _line('{"action":"x","value":' + "[" * 200_000 + "]" * 200_000 + "}"),
    "a lone surrogate": _line('{"action":"x","value":"\ud800"}'),
    "an escaped lone surrogate": _line('{"action":"x","value":"\\ud800"}'),
    "a key twice": _line('{"action":"x","action":"y"}'),
    "unknown type": _line('{"a":1}', "nobody_knows_this"),
    "the bus's own type": _line("{}", "heartbeat"),
    "an empty type": _line("{}", ""),
}
"""Each of these is refused."""

KEPT: dict[str, bytes] = {
    "NUL": _line('{"action":"a\\u0000b"}'),
    "2^63 - 1": _line('{"action":"x","value":9223372036854775807}'),
    "64 levels or fewer": _line('{"action":"x","value":' + "[" * 40 + "]" * 40 + "}"),
    "all of Unicode's edges": _line('{"action":"\\uffff\\ud83d\\ude00\\u202e"}'),
}
"""Strange, and events all the same."""


class Raw:
    """A client that sends what it likes."""

    def __init__(self, system: System) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(system.settings.ingress_url)
        self._requests = 0

    def publish(self, batch: bytes) -> dict[str, Any] | None:
        """The ack; None if there is no answer within 10 s."""
        self._requests += 1
        self._socket.send_multipart([b"publish", b"%d" % self._requests, batch])
        if not self._socket.poll(10_000):
            return None
        frames = self._socket.recv_multipart()
        answer: dict[str, Any] = json.loads(frames[2])
        return answer

    def send(self, frames: list[bytes]) -> None:
        self._socket.send_multipart(frames)

    def close(self) -> None:
        self._context.destroy(linger=0)


@drill(
    row=18,
    name="poison",
    fault="a tenth of the load is broken: JSON, UTF-8, types, numbers, depth, keys",
    long="60 rounds of every kind",
    plant="the bus forgets to keep what it refuses",
    breaks="are not kept raw",
)
def poison(trial: Trial) -> None:
    system = trial.system
    up = trial.start(fault="refused-is-gone" if trial.planted else "")
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    raw = Raw(system)
    good = _line('{"action":"fine"}')
    sent: dict[str, list[bytes]] = {name: [] for name in POISON}
    ids = map("poison-%d".__mod__, itertools.count())
    rounds = trial.count(3, 60)
    refused = kept = 0
    memory = 0
    for number in range(rounds):
        for name, line in (*POISON.items(), *KEPT.items()):
            lines = [text.replace(b"@", next(ids).encode()) for text in (good, line, good)]
            receipt = raw.publish(b"\n".join(lines) + b"\n")
            if name in POISON:
                sent[name].append(lines[1])
            expected = (2, 1) if name in POISON else (3, 0)
            found = receipt and (receipt["accepted"], receipt["rejected"])
            trial.expect(found == expected, f"{name}: accepted, rejected {found}, not {expected}")
            refused += expected[1]
            kept += expected[0]
        bus = up.child("bus")
        if number == 1 and bus is not None:  # after the first round it is warm
            memory = bus.memory_info().rss
    raw.close()
    bus = up.child("bus")
    grown = (bus.memory_info().rss - memory) / 1e6 if bus and memory else 0.0
    trial.settle()
    trial.check()
    rows = system.sql("SELECT data FROM events WHERE event_type = 'event_rejected'")
    accounts = [json.loads(data) for (data,) in rows]
    raws = {base64.b64decode(a["raw"]) for a in accounts if a["reason"]}
    for name, lines in sent.items():
        missing = [line for line in lines if line not in raws]
        trial.expect(not missing, f"{name}: {len(missing)} of {len(lines)} are not kept raw")
    (stored,) = system.sql("SELECT count(*) FROM events WHERE source = 'poisoner'")[0]
    trial.expect(stored == kept, f"{stored} of {kept} good events beside the poison are stored")
    trial.note("refused and kept raw", refused)
    trial.note("bus grew MB", round(grown, 1))


@drill(
    row=19,
    name="huge-payload",
    fault="frames of 100 MB on both ports",
    long="20 times",
    plant="the bus takes frames of any size",
    breaks="the bus grew",
)
def huge_payload(trial: Trial) -> None:
    system = trial.system
    up = trial.start(fault="any-size" if trial.planted else "")
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    bus = up.child("bus")
    assert bus is not None
    frame = b'{"event_type":"user_action","data":{"action":"' + bytes(100 << 20)
    time.sleep(trial.seconds(3, 10))  # the load has warmed it up
    before = bus.memory_info().rss
    peak = before
    for _ in range(trial.count(2, 20)):
        for kind, url in (
            (zmq.DEALER, system.settings.ingress_url),
            (zmq.SUB, system.settings.events_url),
        ):
            peak = max(peak, _throw(kind, url, frame, bus))
    grown = (peak - before) / 1e6
    trial.expect(grown < 5.0, f"the bus grew by {grown:.1f} MB")
    trial.expect(up.child("bus") == bus, "the bus ended")
    trial.note("bus grew MB", round(grown, 1))


def _throw(kind: int, url: str, frame: bytes, bus: psutil.Process) -> int:
    """Send one frame, wait for the connection to be cut; the bus's highest memory meanwhile.

    By hand (ZMTP 3.0, RFC 23): libzmq's own SUB keeps a subscription in a tree one level a byte
    deep, and 100 MB of it overflow its stack when it is closed.
    """
    role = b"DEALER" if kind == zmq.DEALER else b"SUB"
    ready = b"\x05READY\x0bSocket-Type" + len(role).to_bytes(4, "big") + role
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    address = urlsplit(url)
    peak = 0
    with socket.create_connection((address.hostname, address.port), timeout=0.05) as peer:
        peer.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
        rest = memoryview(b"\x02" + len(frame).to_bytes(8, "big") + frame)
        end = time.monotonic() + 10.0
        while time.monotonic() < end:
            peak = max(peak, bus.memory_info().rss)
            try:
                rest = rest[peer.send(rest) :] if rest else rest
                if not rest and not peer.recv(65_536):
                    return peak
            except TimeoutError:
                continue
            except ConnectionError:
                return peak
    raise AssertionError(f"a frame of {len(frame)} bytes is taken, or waits, at {url}")


HOSTILE = {
    "SQL": "'; DROP TABLE _event; --",
    "HTML": "<script>alert(1)</script>",
    "ANSI": "\x1b[2J\x1b]0;owned\x07\x1b[31mred",
    "newlines": "one\ntwo\r\nthree",
    "direction": "abc\u202edcba\u2066\u200f\u061c",
    "C1": "\x9b31m",
    "NUL": "a\x00b",
    "format": "%s%n{0}{__class__}",
}


@drill(
    row=20,
    name="hostile-strings",
    fault="SQL, HTML, ANSI, newlines and NUL in every string of an event",
    long="200 rounds",
    plant="commands print as it comes",
    breaks="prints",
)
def hostile_strings(trial: Trial) -> None:
    system = trial.system
    trial.start()
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    raw = Raw(system)
    rounds = trial.count(2, 200)
    ids = itertools.count()
    for _ in range(rounds):
        for text in HOSTILE.values():
            event = {
                **dict.fromkeys(("source", "user_id", "correlation_id", "causation_id"), text),
                "event_id": f"hostile-{next(ids)}",
                "event_type": "user_action",
                "timestamp": 1.0,
                "data": {"action": text, text: text},
            }
            receipt = raw.publish(json.dumps(event).encode() + b"\n")
            trial.expect(receipt and receipt["accepted"] == 1, f"{text!r}: {receipt}")
    raw.close()
    wait_until(trial.all_stored, "the database holds all of the journal")
    if trial.planted:
        system.environ |= trial.fault_environ("unescaped")
    shown = [
        system.bitten(*command, timeout=60)
        for command in (
            ("query", "--type", "user_action", "--limit", "50"),
            ("query", "--type", "user_action", "--limit", "50", "--json"),
            ("tail", "--from-seq", "1", "--count", "20", "user_action"),
            ("tail", "--from-seq", "1", "--count", "20", "--json", "user_action"),
            *(("stats",), ("status",), ("audit",), ("doctor",)),
        )
    ]
    csv = ("query", "--type", "user_action", "--limit", "50", "--csv")
    for command, text in [
        *((" ".join(done.args[3:]), done.stdout + done.stderr) for done in shown),
        (f"{' '.join(csv)} on a terminal", system.on_terminal(*csv)),
    ]:
        bad = sorted({c for c in text if c not in "\n\r\t" and not c.isprintable()})
        trial.expect(not bad, f"{command} prints {bad}")
    trial.settle()
    trial.check()
    for name, text in HOSTILE.items():
        rows = system.sql(
            "SELECT source, user_id, correlation_id, causation_id, data FROM events"
            " WHERE source = ?",
            text,
        )
        trial.expect(len(rows) == rounds, f"{name}: {len(rows)} of {rounds} are stored")
        for *fields, data in rows:
            same = fields == [text] * 4 and json.loads(data) == {"action": text, text: text}
            trial.expect(same, f"{name} is not stored as it came: {fields} {data}")
    (tables,) = system.sql("SELECT count(*) FROM sqlite_master WHERE name = '_event'")[0]
    trial.expect(tables == 1, "a table is gone")
    log = up_log(trial)
    trial.expect("\x1b" not in log, "the log of the daemons has an escape character")


def up_log(trial: Trial) -> str:
    assert trial.up is not None
    return trial.up.log.read_text()
