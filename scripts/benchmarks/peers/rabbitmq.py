"""RabbitMQ with pika: a durable classic queue, persistent messages, confirms, acks of batches.

What was tuned. The publisher is a SelectConnection, whose confirms are counted as they come, up to
`WINDOW` outstanding; a BlockingConnection waits for each. The consumer has `PREFETCH` messages on
their way and acknowledges the last of a batch for all of them. More of either was no faster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from running import free_port

from peers import server, work
from peers.peer import Peer

QUEUE = "events"
WINDOW = 8_000
CHUNK = 200
"""Events published before answers are read again."""

BATCH = 2_000
PREFETCH = 8_000
PATIENCE_S = 0.02
"""A batch that does not fill up is stored after this time."""

PROGRAM = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""What Debian's own rabbitmq-server calls after it has become another user."""


def publish(address: str, count: int, go: Callable[[], None]) -> None:
    import pika

    lines = work.lines(count)
    persistent = pika.BasicProperties(delivery_mode=2)
    confirms = Confirms()
    sent = 0

    def on_channel(channel: Any) -> None:
        channel.confirm_delivery(confirms.take, callback=lambda _: begin(channel))

    def begin(channel: Any) -> None:
        go()
        turn(channel)

    def turn(channel: Any) -> None:
        nonlocal sent
        if sent - confirms.events < WINDOW:
            for line in islice(lines, CHUNK):
                channel.basic_publish("", QUEUE, line, persistent)
                sent += 1
        if confirms.events < count:
            connection.ioloop.add_callback_threadsafe(lambda: turn(channel))
        else:
            connection.close()

    connection = _connect(address, on_channel)
    connection.ioloop.start()


class Confirms:
    """How many events are confirmed without a gap; RabbitMQ may confirm later ones earlier."""

    def __init__(self) -> None:
        self.events = 0
        self._ahead: set[int] = set()

    def take(self, frame: Any) -> None:
        if frame.method.NAME != "Basic.Ack":
            raise SystemExit(f"RabbitMQ refused: {frame.method}")
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            self._ahead.difference_update(range(self.events + 1, tag + 1))
            self.events = max(self.events, tag)
        else:
            self._ahead.add(tag)
        while self.events + 1 in self._ahead:
            self.events += 1
            self._ahead.remove(self.events)


def consume(address: str, count: int, db: Path, ready: Callable[[], None]) -> float:
    sink = work.Sink(db, count)
    got: list[bytes] = []
    last_tag = 0

    def on_channel(channel: Any) -> None:
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.queue_declare(QUEUE, durable=True, callback=lambda _: begin(channel))

    def begin(channel: Any) -> None:
        def on_event(_channel: Any, method: Any, _properties: Any, body: bytes) -> None:
            nonlocal last_tag
            got.append(body)
            last_tag = method.delivery_tag
            if len(got) >= BATCH:
                store(channel)

        channel.basic_consume(QUEUE, on_event, callback=lambda _: ready())
        look(channel)

    def look(channel: Any) -> None:
        if got:
            store(channel)
        if sink.left:
            connection.ioloop.call_later(PATIENCE_S, lambda: look(channel))
        else:
            connection.close()

    def store(channel: Any) -> None:
        sink.write(got)
        got.clear()
        channel.basic_ack(last_tag, multiple=True)

    connection = _connect(address, on_channel)
    connection.ioloop.start()
    sink.close()
    return sink.stored_at


def _connect(address: str, on_channel: Callable[[Any], None]) -> Any:
    """A connection that ends its loop when it is closed. Nothing happens before that runs."""
    import pika

    def on_close(connection: Any, _reason: Any) -> None:
        connection.ioloop.stop()

    def on_no_connection(_connection: Any, error: Any) -> None:
        raise SystemExit(f"RabbitMQ: {error}")

    return pika.SelectConnection(
        pika.ConnectionParameters("127.0.0.1", int(address), heartbeat=0),
        on_open_callback=lambda connection: connection.channel(on_open_callback=on_channel),
        on_open_error_callback=on_no_connection,
        on_close_callback=on_close,
    )


def _missing() -> str:
    if not Path(PROGRAM).exists() or shutil.which("epmd") is None:
        return "rabbitmq-server is not installed"
    return server.missing(PROGRAM, "pika")


@contextlib.contextmanager
def _serve(directory: Path) -> Iterator[str]:
    port, names_port, nodes_port = free_port(), free_port(), free_port()
    (directory / "plugins").write_text("[].\n", encoding="utf-8")
    environ = {
        **os.environ,
        "HOME": str(directory),  # of the cookie
        "ERL_EPMD_PORT": str(names_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"bench{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(nodes_port),
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
        "RABBITMQ_CONFIG_FILE": str(directory / "none"),
    }
    # With none there, Erlang starts a name server that would stay when all else has ended.
    with (
        server.running(["epmd"], directory / "epmd.log", names_port, env=environ),
        server.running([PROGRAM], directory / "server.log", port, env=environ),
    ):
        yield str(port)


PEERS = (Peer(name="RabbitMQ, durable queue", module="rabbitmq", serve=_serve, missing=_missing),)
