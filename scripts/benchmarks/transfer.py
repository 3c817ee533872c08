"""Two processes and pyzmq alone: `python transfer.py SECONDS LINES`; prints events/s.

Starts the sender, which packs that many lines of the mix into each frame, and receives from it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import zmq
from limits import canonical_lines

POOL = 4_000


def receive(seconds: float, lines_a_frame: int) -> float:
    socket = zmq.Context.instance().socket(zmq.PULL)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sender = subprocess.Popen([sys.executable, __file__, str(port), str(lines_a_frame), "send"])
    socket.recv()  # connected; caches are warm from here on
    events, begin = 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        for _ in range(1 if lines_a_frame > 1 else 1_000):
            socket.recv()
            events += lines_a_frame
    rate = events / (time.monotonic() - begin)
    sender.kill()
    sender.wait()
    return rate


def send(port: int, lines_a_frame: int) -> None:
    lines = [line + b"\n" for line in canonical_lines(POOL)]
    frames = [b"".join(lines[i : i + lines_a_frame]) for i in range(0, len(lines), lines_a_frame)]
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.connect(f"tcp://127.0.0.1:{port}")
    for frame in itertools.cycle(frames):
        socket.send(frame)


def main() -> None:
    first, lines_a_frame, *role = sys.argv[1:]
    if role:
        send(int(first), int(lines_a_frame))
    else:
        print(receive(float(first), int(lines_a_frame)))


main()
