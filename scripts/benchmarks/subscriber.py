"""A reader process: `python subscriber.py socket|subscriber|stored COUNT`; prints latencies (s) of
the publisher's events as JSON, less than COUNT if no more come.

`socket` reads the live frames of port 5570 with a plain SUB socket, `subscriber` uses
event_bus.subscriber, `stored` reads the database until it sees the row. Latency is the time of
receipt less the event's timestamp. All decode no more than they need: they share the cores.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Iterator

import msgspec
import zmq

from event_bus.settings import Settings
from event_bus.subscriber import Subscriber

SOURCE = "publisher"
QUIET_S = 5.0
"""Without an event, no more come: a SUB socket that was too slow misses some."""

LOOK_S = 0.0005
"""Between two looks at the database: the resolution of `stored`, with the time of a look."""


class Stamp(msgspec.Struct):
    source: str
    timestamp: float


def socket_latencies() -> Iterator[float]:
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.rcvhwm = 0
    socket.connect(Settings.load().events_url)
    socket.subscribe(b"bitten.")
    socket.recv_multipart()  # a heartbeat: we are connected
    print("ready", flush=True)
    decode = msgspec.json.Decoder(Stamp).decode
    last = time.monotonic() + QUIET_S
    while time.monotonic() - last < QUIET_S:
        if not socket.poll(100):
            continue
        stamp = decode(socket.recv_multipart()[1])
        if stamp.source == SOURCE:
            last = time.monotonic()
            yield time.time() - stamp.timestamp


def subscriber_latencies() -> Iterator[float]:
    with Subscriber(timeout_s=2 * QUIET_S) as subscriber:
        subscriber.connect()
        print("ready", flush=True)
        for event in subscriber:
            if event.source == SOURCE:
                yield time.time() - event.timestamp


def stored_latencies() -> Iterator[float]:
    db = sqlite3.connect(f"file:{Settings.load().db}?mode=ro", uri=True)
    (seq,) = db.execute("SELECT max(seq) FROM _event").fetchone()
    names: dict[int, str] = {}
    print("ready", flush=True)
    last = time.monotonic() + QUIET_S
    while time.monotonic() - last < QUIET_S:
        rows = db.execute(
            "SELECT seq, timestamp, source FROM _event WHERE seq > ?", (seq,)
        ).fetchall()
        now = time.time()
        if not rows:
            time.sleep(LOOK_S)
            continue
        seq = rows[-1][0]
        for _, timestamp, source in rows:
            if source not in names:
                names.update(db.execute("SELECT id, name FROM _name WHERE id = ?", (source,)))
            if names[source] == SOURCE:
                last = time.monotonic()
                yield now - timestamp


KINDS = {
    "socket": socket_latencies,
    "subscriber": subscriber_latencies,
    "stored": stored_latencies,
}


def main() -> None:
    kind, count = sys.argv[1], int(sys.argv[2])
    latency_s: list[float] = []
    for seconds in KINDS[kind]():
        latency_s.append(seconds)
        if len(latency_s) == count:
            break
    print(json.dumps(latency_s))


main()
