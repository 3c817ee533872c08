"""Live subscribers: `python drain.py SOCKETS`; reads all until its stdin ends, then prints how many
events they had together."""

from __future__ import annotations

import contextlib
import math
import sys
import time

import zmq

from event_bus.settings import Settings

HEARTBEAT = b"bitten.heartbeat"
AT_ONCE = 500
REST_S = 1.0


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
    received = 0
    ends_at = math.inf
    while time.monotonic() < ends_at:  # heartbeats go on
        for found, _ in poller.poll(REST_S * 1_000):
            if isinstance(found, int):
                poller.unregister(found)
                ends_at = time.monotonic() + REST_S
                continue
            with contextlib.suppress(zmq.Again):
                for _ in range(AT_ONCE):
                    topic, _ = found.recv_multipart(zmq.NOBLOCK)
                    if topic != HEARTBEAT:
                        received += 1
                        ends_at = max(ends_at, time.monotonic() + REST_S)
    print(received)


main()
