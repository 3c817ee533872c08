"""A subscriber as docs/protocol.md describes it: live frames, and a fetch for every gap.

`python peer.py FROM_SEQ UNTIL_SEQ RATE PREFIX` prints one JSON object when it has the event
UNTIL_SEQ: the events as [seq, event_id], how many gaps it saw, the frames it lost in them, how
long filling one took at most, and its latencies. RATE is how many frames a second it reads; 0 is
as fast as they come. On SIGUSR1 it stops to be slow. With `--no-fetch` it leaves gaps as they are;
`--topic` adds a subscription by which the bus's status shows it.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from typing import Any

import zmq

from event_bus.protocol import FETCH, Client
from event_bus.settings import Settings
from event_bus.subscriber import Cursor

SMALL_BUFFER_BYTES = 4_096
PATIENCE_MS = 30_000


class Peer:
    def __init__(
        self, from_seq: int, rate: float, *, slow_buffers: bool, fetches: bool, topics: list[str]
    ) -> None:
        settings = Settings.load()
        self._fetches = fetches
        self.rate = rate
        self._sub = zmq.Context.instance().socket(zmq.SUB)
        if slow_buffers:  # so that what a slow reader leaves lies with the bus
            self._sub.rcvhwm = 10
            self._sub.rcvbuf = SMALL_BUFFER_BYTES
        self._sub.connect(settings.events_url)
        self._sub.subscribe(b"bitten.")
        for topic in topics:
            self._sub.subscribe(topic.encode())
        self._client = Client(settings)
        self.next_seq = from_seq
        self.seen: list[tuple[int, str]] = []
        self.latency_s: list[float] = []
        self.gaps = 0
        self.missed = 0
        self.filled_s = 0.0

    def read_until(self, seq: int) -> None:
        first = True
        while self.next_seq <= seq:
            if not self._sub.poll(PATIENCE_MS):
                raise SystemExit(f"no frame for {PATIENCE_MS} ms at seq {self.next_seq}")
            event: dict[str, Any] = json.loads(self._sub.recv_multipart()[1])
            heartbeat = event["event_type"] == "heartbeat"
            last = event["data"]["last_seq"] if heartbeat else event["seq"] - 1
            if self.next_seq <= last:
                if first:  # the replay, and not a gap
                    self._fill(last)
                else:
                    begin = time.monotonic()
                    self.gaps += 1
                    self.missed += last + 1 - self.next_seq
                    self._fill(last)
                    self.filled_s = max(self.filled_s, time.monotonic() - begin)
            first = False
            if event.get("seq") == self.next_seq:
                self._take(event["seq"], event["event_id"])
                self.latency_s.append(time.time() - event["received_at"])
            if self.rate:
                time.sleep(1 / self.rate)

    def _fill(self, last: int) -> None:
        if not self._fetches:
            self.next_seq = last + 1
            return
        cursor = Cursor(next_seq=self.next_seq, wait_ms=1_000)
        while self.next_seq <= last:
            frames = self._client.receive(self._client.send(FETCH, cursor.request()), 30.0)
            for batch in cursor.take(frames):
                for seq, event in enumerate(batch.events, batch.first_seq):
                    self._take(seq, event.event_id)

    def _take(self, seq: int, event_id: str) -> None:
        self.seen.append((seq, event_id))
        self.next_seq = seq + 1


def main() -> None:
    from_seq, until_seq, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    options = sys.argv[4:]
    peer = Peer(
        from_seq,
        rate,
        slow_buffers=rate > 0,
        fetches="--no-fetch" not in options,
        topics=[topic for option, topic in itertools.pairwise(options) if option == "--topic"],
    )
    signal.signal(signal.SIGUSR1, lambda *_: setattr(peer, "rate", 0.0))
    print("ready", flush=True)
    peer.read_until(until_seq)
    print(
        json.dumps(
            {
                "seen": peer.seen,
                "gaps": peer.gaps,
                "missed": peer.missed,
                "filled_s": peer.filled_s,
                "latency_s": sorted(peer.latency_s),
            }
        )
    )


if __name__ == "__main__":
    main()
