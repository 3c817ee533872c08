"""A subscriber process: `python subscriber.py pub|fetch COUNT`; prints latencies as JSON.

`pub` reads the live frames of port 5570 with a plain SUB socket, `fetch` uses
event_bus.subscriber. Latency is the time of receipt less the event's timestamp.
"""

from __future__ import annotations

import json
import sys
import time

import zmq

from event_bus.intake import SOURCE
from event_bus.settings import Settings
from event_bus.subscriber import Subscriber


def main() -> None:
    kind, count = sys.argv[1], int(sys.argv[2])
    latency_s: list[float] = []
    if kind == "pub":
        socket = zmq.Context.instance().socket(zmq.SUB)
        socket.connect(Settings.load().events_url)
        socket.subscribe(b"bitten.")
        socket.recv_multipart()  # a heartbeat: we are connected
        print("ready", flush=True)
        while len(latency_s) < count:
            event = json.loads(socket.recv_multipart()[1])
            if event["source"] != SOURCE:
                latency_s.append(time.time() - event["timestamp"])
    else:
        subscriber = Subscriber()
        subscriber.connect()
        print("ready", flush=True)
        for event in subscriber:
            if event.source != SOURCE:
                latency_s.append(time.time() - event.timestamp)
            if len(latency_s) >= count:
                break
    print(json.dumps(sorted(latency_s)))


main()
