"""Redis Streams with redis-py and hiredis: one entry an event, a consumer group, AOF.

What was tuned. XADDs are packed by hiredis and sent `PIPELINE` at a time on a connection of
redis-py's, up to `WINDOW` of such pipelines ahead of the answers: a quarter faster than its
`Pipeline`. The acknowledgement of a batch and the next XREADGROUP go in one message before the
batch is stored, so that Redis answers meanwhile. TCP was a tenth faster than a UNIX socket, whose
buffers are smaller. Snapshots and the rewriting of the AOF are off.

Without a group the reader asks with XREAD after the last id it has stored. That id would be kept
in its database, as the collector's cursor is: Redis then keeps no account of what is pending.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from running import free_port

from peers import server, work
from peers.peer import Peer

if TYPE_CHECKING:
    from redis.connection import Connection

STREAM, GROUP, CONSUMER = b"events", b"collector", b"collector"
PIPELINE = 1_000
WINDOW = 4
BATCH = b"4000"
NO_END = b"0"
GROUPED = "#group"
"""Ends the address of a server that is read through a consumer group."""


def publish(address: str, count: int, go: Callable[[], None]) -> None:
    from hiredis import pack_command

    lines = work.lines(count)
    connection = _connect(address)
    go()
    waiting: deque[int] = deque()
    while commands := [
        pack_command((b"XADD", STREAM, b"*", b"e", line)) for line in islice(lines, PIPELINE)
    ]:
        connection.send_packed_command([b"".join(commands)])
        waiting.append(len(commands))
        if len(waiting) >= WINDOW:
            _read(connection, waiting.popleft())
    _read(connection, sum(waiting))
    connection.disconnect()


def _read(connection: Connection, answers: int) -> None:
    """Raises ResponseError if one of them is."""
    for _ in range(answers):
        connection.read_response()


def consume(address: str, count: int, db: Path, ready: Callable[[], None]) -> float:
    from hiredis import pack_command

    sink = work.Sink(db, count)
    grouped = address.endswith(GROUPED)
    connection = _connect(address)
    if grouped:
        connection.send_command("XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM")
        connection.read_response()
    ready()

    def request(last_id: bytes) -> bytes:
        options = (b"COUNT", BATCH, b"BLOCK", NO_END, b"STREAMS", STREAM)
        if grouped:
            return pack_command((b"XREADGROUP", b"GROUP", GROUP, CONSUMER, *options, b">"))
        return pack_command((b"XREAD", *options, last_id))

    acks: list[bytes] = []
    answers = 0
    connection.send_packed_command([request(b"0")])
    left = count
    while left:
        _read(connection, answers)
        ((_, entries),) = connection.read_response()
        left -= len(entries)
        if left:
            connection.send_packed_command([*acks, request(entries[-1][0])])
            answers = len(acks)
            acks.clear()
        sink.write([event for _, (_, event) in entries])
        if grouped:
            ids = (entry_id for entry_id, _ in entries)
            acks.append(pack_command((b"XACK", STREAM, GROUP, *ids)))
    connection.send_packed_command(acks)
    _read(connection, len(acks))
    connection.disconnect()
    sink.close()
    return sink.stored_at


def _connect(address: str) -> Connection:
    from redis import Connection

    connection = Connection(
        host="127.0.0.1", port=int(address.removesuffix(GROUPED)), protocol=2, socket_timeout=None
    )
    connection.connect()
    return connection


@contextlib.contextmanager
def _serve(directory: Path, fsync: str, how: str) -> Iterator[str]:
    port = free_port()
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(directory),
        "save": "",
        "appendonly": "yes",
        "appendfsync": fsync,
        "auto-aof-rewrite-percentage": "0",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    with server.running(["redis-server", *arguments], directory / "server.log", port):
        yield f"{port}{how}"


PEERS = tuple(
    Peer(
        name=f"Redis Streams, AOF {fsync}{'' if how else ', no group'}",
        module="redis_streams",
        serve=partial(_serve, fsync=fsync, how=how),
        missing=partial(server.missing, "redis-server", "redis", "hiredis"),
    )
    for fsync, how in (("everysec", GROUPED), ("everysec", ""), ("always", GROUPED))
)
