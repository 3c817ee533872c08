"""A publisher or the consumer of a peer, as a process of its own.

`python -m peers.worker publish|consume MODULE ADDRESS COUNT DB` prints "ready" when it is connected
and warm; a publisher begins when it is sent a line. At the end it prints what it measured as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from event_bus.memory import collect_rarely


def _ready() -> None:
    print("ready", flush=True)


def main() -> None:
    role, module, address, count, db = sys.argv[1:]
    peer = importlib.import_module(f"peers.{module}")
    collect_rarely()  # as the bus and the collector do
    if role == "consume":
        stored_at = peer.consume(address, int(count), Path(db), _ready)
        print(json.dumps({"stored_at": stored_at}))
        return
    started = 0.0

    def go() -> None:
        nonlocal started
        _ready()
        if not sys.stdin.readline():
            raise SystemExit("nobody wants it any more")
        started = time.time()

    peer.publish(address, int(count), go)
    print(json.dumps({"started": started, "published_after_s": time.time() - started}))


main()
