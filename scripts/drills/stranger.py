"""A plain ZeroMQ client on another machine: `python stranger.py INGRESS EVENTS ID [KEYS BUS_KEY]`.

KEYS is `unknown` or the file of a secret key; without it there is no encryption. Prints whether
its event was acknowledged and how many live frames it saw, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import zmq
import zmq.auth

PATIENCE_MS = 4_000


def main() -> None:
    ingress, events, event_id, *keys = sys.argv[1:]
    sub, dealer = _socket(zmq.SUB, keys), _socket(zmq.DEALER, keys)
    sub.subscribe(b"")
    sub.connect(events)
    dealer.connect(ingress)
    event = {"event_id": event_id, "event_type": "user_action", "timestamp": time.time()}
    event |= {"source": "stranger", "data": {"action": "knock"}}
    dealer.send_multipart([b"publish", b"1", json.dumps(event).encode() + b"\n"])
    answered = bool(dealer.poll(PATIENCE_MS)) and dealer.recv_multipart()[0] == b"ack"
    frames = 0
    while frames < 10 and sub.poll(PATIENCE_MS):
        sub.recv_multipart()
        frames += 1
    print(json.dumps({"acked": answered, "frames": frames}))


def _socket(kind: int, keys: list[str]) -> zmq.Socket[Any]:
    made: zmq.Socket[Any] = zmq.Context.instance().socket(kind)
    made.linger = 0
    if keys:
        which, bus_key = keys
        if which == "unknown":
            public, secret = zmq.curve_keypair()
        else:
            public, given = zmq.auth.load_certificate(Path(which))
            assert given is not None
            secret = given
        made.curve_serverkey = bus_key.encode()
        made.curve_publickey, made.curve_secretkey = public, secret
    return made


if __name__ == "__main__":
    main()
