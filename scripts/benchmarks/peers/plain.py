"""The plain way that most would write it: json, jsonschema, PUB and SUB, an INSERT a commit.

Nothing is acknowledged, so nothing may be lost on the way: both sockets have no high-water mark.
Validators are made once for each type, and the database has WAL; all else is as it comes. The
publisher's socket is an XPUB, a PUB that hears of its subscriber, so that it does not begin before.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mix
from running import free_port

from event_bus import envelope
from event_bus.event_schema import Registry
from peers import work
from peers.peer import Peer

TABLES = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT, event_type TEXT, timestamp REAL,
    source TEXT, user_id TEXT, correlation_id TEXT, data TEXT);
CREATE INDEX idx_event_type ON events (event_type);
CREATE INDEX idx_timestamp ON events (timestamp);
CREATE INDEX idx_source ON events (source);
CREATE INDEX idx_user_id ON events (user_id);
CREATE INDEX idx_correlation_id ON events (correlation_id);
"""
INSERT = """
INSERT INTO events (event_id, event_type, timestamp, source, user_id, correlation_id, data)
VALUES (?,?,?,?,?,?,?)
"""
DONE_MS = 60_000


def publish(address: str, count: int, go: Callable[[], None]) -> None:
    import jsonschema
    import zmq

    registry = Registry()
    validators = {
        name: jsonschema.Draft202012Validator(registry.get(name).schema) for name in mix.SHARES
    }
    pool = mix.events(min(count, work.POOL))
    token = envelope.new_producer()
    with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.sndhwm = 0
        socket.connect(address)
        socket.recv()
        go()
        for i in range(count):
            event_type, data, fields = pool[i % len(pool)]
            validators[event_type].validate(data)
            event = {
                "event_id": f"{token}-{i + 1}",
                "event_type": event_type,
                "timestamp": time.time(),
                "source": "publisher",
                "data": data,
                **fields,
            }
            socket.send_multipart([f"bitten.{event_type}".encode(), json.dumps(event).encode()])
        socket.linger = DONE_MS


def consume(address: str, count: int, db: Path, ready: Callable[[], None]) -> float:
    import zmq

    connection = sqlite3.connect(db)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript(TABLES)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.rcvhwm = 0
        socket.subscribe(b"bitten.")
        socket.bind(address)
        ready()
        for _ in range(count):
            event = json.loads(socket.recv_multipart()[1])
            row = (
                event["event_id"],
                event["event_type"],
                event["timestamp"],
                event["source"],
                event.get("user_id"),
                event.get("correlation_id"),
                json.dumps(event["data"]),
            )
            connection.execute(INSERT, row)
            connection.commit()
        stored_at = time.time()
    connection.close()
    return stored_at


@contextlib.contextmanager
def _serve(directory: Path) -> Iterator[str]:
    """No server: the subscriber binds."""
    yield f"tcp://127.0.0.1:{free_port()}"


PEERS = (Peer(name="the plain way", module="plain", serve=_serve, missing=lambda: "", share=50),)
