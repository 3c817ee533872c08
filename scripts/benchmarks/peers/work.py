"""What every peer has to do: make the events, and store them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mix

from collector.store import Store
from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.event_schema import Registry
from event_bus.subscriber import Batch

POOL = 20_000


def lines(count: int) -> Iterator[bytes]:
    """Events of the standard mix, each validated and encoded when it is asked for.

    What is needed only once, such as compiling the schemas, is done before this returns.
    """
    pool = mix.events(min(count, POOL))
    registry = Registry()
    checks = {name: registry.get(name).is_valid for name in mix.SHARES}
    return _lines(count, pool, checks, envelope.new_producer())


def _lines(
    count: int, pool: list[mix.Event], checks: dict[str, Callable[[object], bool]], token: str
) -> Iterator[bytes]:
    size = len(pool)
    for i in range(count):
        event_type, data, fields = pool[i % size]
        if not checks[event_type](data):
            raise SystemExit(f"no valid {event_type}: {data}")
        yield envelope.encode(
            Envelope(
                event_id=f"{token}-{i + 1}",
                event_type=event_type,
                timestamp=time.time(),
                source="publisher",
                data=data,
                **fields,
            )
        )


class Sink:
    """The database that a consumer fills, with the collector's own store.

    It never syncs: the collector does four times a second, so this is in the peer's favour.
    """

    def __init__(self, db: Path, count: int) -> None:
        self._store = Store(db, Registry())
        self._next_seq = 1
        self.left = count
        self.stored_at = 0.0
        """Unix seconds of the last commit."""

    def write(self, events: Sequence[bytes]) -> None:
        """Decode the lines of a batch and commit them."""
        decoded = envelope.decode_lines(b"\n".join(events))
        self._store.write([Batch(self._next_seq, time.time(), decoded)], "peer")
        self.stored_at = time.time()
        self._next_seq += len(decoded)
        self.left -= len(decoded)

    def close(self) -> None:
        self._store.close()
