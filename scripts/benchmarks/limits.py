"""What the parts can do alone: the store from memory, ZeroMQ between two processes, the disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mix
from running import HERE, answer

from collector.store import Store
from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.event_schema import Registry
from event_bus.subscriber import Batch

BATCH = 4_000
POOL = 20_000
APPENDED_BYTES = 4_096


def canonical_lines(count: int) -> list[bytes]:
    """Events of the mix as the bridge sends them."""
    token = envelope.new_producer()
    return [
        envelope.encode(
            Envelope(
                event_id=f"{token}-{i + 1}",
                event_type=event_type,
                timestamp=time.time(),
                source="publisher",
                data=data,
                **fields,
            )
        )
        for i, (event_type, data, fields) in enumerate(mix.events(count))
    ]


def store_alone(count: int) -> float:
    """Events/s at which the collector's store takes the same events from memory."""
    lines = canonical_lines(min(count, POOL))
    pool = [
        envelope.decode_lines(b"\n".join(lines[i : i + BATCH])) for i in range(0, len(lines), BATCH)
    ]
    with tempfile.TemporaryDirectory(prefix="bitten-bench-") as directory:
        store = Store(Path(directory) / "bitten_events.db", Registry())
        seq, elapsed = 1, 0.0
        while seq <= count:
            events = pool[(seq // BATCH) % len(pool)]
            now = time.time()
            for i, event in enumerate(events):
                event.timestamp = now + i * 1e-6
            begin = time.monotonic()
            store.write([Batch(seq, now, events)], "bench")
            elapsed += time.monotonic() - begin
            seq += len(events)
        store.close()
    return (seq - 1) / elapsed


def limits(seconds: float) -> dict[str, float]:
    """Events/s that pyzmq carries over loopback, and syncs/s of the disk."""
    return {
        "transfer_single": transfer(seconds, lines_a_frame=1),
        "transfer_batched": transfer(seconds, lines_a_frame=2_000),
        "fsync": fsync_rate(seconds),
    }


def transfer(seconds: float, *, lines_a_frame: int) -> float:
    """Events/s from one process to another, PUSH to PULL; nothing is decoded or stored."""
    receiver = subprocess.Popen(
        [sys.executable, str(HERE / "transfer.py"), str(seconds), str(lines_a_frame)],
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(answer(receiver))


def fsync_rate(seconds: float) -> float:
    """Appends of 4 KB with an fdatasync each, per second, where homes are made."""
    with tempfile.NamedTemporaryFile(prefix="bitten-bench-") as file:
        page = bytes(APPENDED_BYTES)
        done, begin = 0, time.monotonic()
        while time.monotonic() - begin < seconds:
            os.write(file.fileno(), page)
            os.fdatasync(file.fileno())
            done += 1
        return done / (time.monotonic() - begin)
