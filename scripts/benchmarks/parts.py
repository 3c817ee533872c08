"""Where the processor time of an event goes: what each step takes alone, over the mix."""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import mix
from limits import BATCH, POOL, canonical_lines

from collector.store import Store
from event_bus import envelope
from event_bus.bridge import Bridge
from event_bus.event_schema import Registry
from event_bus.settings import Settings
from event_bus.subscriber import Batch


class _Unsent(Bridge):
    """A bridge whose events stay where the call has put them."""

    def _start(self) -> str:
        return ""


def parts(rounds: int) -> dict[str, float]:
    """Microseconds of processor time an event, the least of several rounds."""
    events = mix.events(POOL)
    lines = canonical_lines(POOL)
    bodies = [b"\n".join(lines[i : i + BATCH]) + b"\n" for i in range(0, POOL, BATCH)]
    batches = [envelope.decode_lines(body) for body in bodies]
    checks = {event_type.name: event_type.is_valid for event_type in Registry()}
    with tempfile.TemporaryDirectory(prefix="bitten-bench-") as directory:
        home = Path(directory)
        bridge = _Unsent(Settings(home=home, source="publisher"))
        store = Store(home / "bitten_events.db", Registry())

        def call() -> None:
            for event_type, data, fields in events:
                bridge.emit(event_type, data, **fields)
            bridge.outbox.take(POOL, 1 << 30)

        def check() -> None:
            for event_type, data, _ in events:
                checks[event_type](data)

        def read_as_the_bus() -> None:
            for body in bodies:
                envelope.decode_canonical(body)

        def checksum() -> None:
            for body in bodies:
                zlib.crc32(body)

        def decode() -> None:
            for body in bodies:
                envelope.decode_lines(body)

        def write() -> None:
            for batch in batches:
                now = time.time()
                for i, event in enumerate(batch):
                    event.timestamp = now + i * 1e-6
                store.write([Batch(store.last_seq + 1, time.time(), batch)], "bench")

        steps: dict[str, Callable[[], None]] = {
            "bridge: a call": call,
            "bridge: of that, the schema": check,
            "bus: read, and see that it is canonical": read_as_the_bus,
            "bus: the schema again": check,
            "bus: a checksum": checksum,
            "collector: decode": decode,
            "collector: store": write,
        }
        found = {name: min(_us(step) for _ in range(rounds)) for name, step in steps.items()}
        store.close()
        bridge.outbox.lines.clear()
    return found


def _us(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return (time.process_time() - begin) / POOL * 1e6
