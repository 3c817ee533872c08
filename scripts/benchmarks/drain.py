"""Live subscribers: `python drain.py SOCKETS`; reads all until its stdin ends, then prints how many
events they had together."""

from __future__ import annotations

import contextlib
import sys

import zmq

from event_bus.settings import Settings

HEARTBEAT = b"bitten.heartbeat"
AT_ONCE = 500
REST_MS = 1_000


def main() -> None:
    url = Settings.load().events_url
    context = zmq.Context.instance()
    poller = zmq.Poller()
    sockets = [context.socket(zmq.SUB) for _ in range(int(sys.argv[1]))]
    for socket in sockets:
        socket.connect(url)
        socket.subscribe(b"bitten.")
        poller.register(socket, zmq.POLLIN)
    for socket in sockets:
        socket.recv_multipart()  # a heartbeat: connected
    print("ready", flush=True)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    received, is_open = 0, True
    while ready := poller.poll(None if is_open else REST_MS):
        for found, _ in ready:
            if isinstance(found, int):
                poller.unregister(found)
                is_open = False
                continue
            with contextlib.suppress(zmq.Again):
                for _ in range(AT_ONCE):
                    topic, _ = found.recv_multipart(zmq.NOBLOCK)
                    received += topic != HEARTBEAT
    print(received)


main()
