"""Durable consumers: who reads the journal to the end whatever happens, and how far each is."""

from __future__ import annotations

from typing import Any

import msgspec

from event_bus.health import STALLED_AFTER_S
from event_bus.journal import Journal

MAX_CONSUMERS = 1_000


class Consumer(msgspec.Struct):
    """Everything before `next_seq` is stored there. `problem` is what it says keeps it from
    storing more, empty if nothing does. `silent_s` is how long it has not asked."""

    next_seq: int
    last_seen: float
    problem: str = ""
    silent_s: float = 0.0


class Consumers(dict[str, Consumer]):
    """Consumers by name; how far they are is kept in the journal by `save`."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(
            {name: Consumer(seq, seen) for name, (seq, seen) in journal.consumers().items()}
        )
        self._journal = journal
        self._saved = self._positions()

    def save(self) -> None:
        """Write what has changed. Raises JournalError."""
        positions = self._positions()
        if positions != self._saved:
            self._journal.save_consumers(positions)
            self._saved = positions

    def forget(self, name: str) -> None:
        """Take a consumer off the list, on disk too."""
        self.pop(name, None)
        self.save()

    def pass_time(self, seconds: float) -> None:
        """So much time of the bus's own has passed. Not read from a clock: one that jumps, or
        stood still with the whole machine, says nothing about a consumer."""
        for consumer in self.values():
            consumer.silent_s += seconds
            if consumer.silent_s >= STALLED_AFTER_S:
                consumer.problem = ""  # nobody says so any more; that it is silent is told instead

    def is_full_for(self, name: str) -> bool:
        return len(self) >= MAX_CONSUMERS and name not in self

    def slowest(self) -> tuple[int, str] | None:
        """The lowest seq that a consumer still needs, and its name."""
        return min(((c.next_seq, name) for name, c in self.items()), default=None)

    def lag(self, consumer: Consumer) -> int:
        """Events in the journal that it has not stored."""
        return max(0, self._journal.last_seq + 1 - consumer.next_seq)

    def status(self) -> dict[str, Any]:
        return {
            name: {
                "next_seq": c.next_seq,
                "lag": self.lag(c),
                "last_seen": c.last_seen,
                "problem": c.problem,
            }
            for name, c in self.items()
        }

    def _positions(self) -> dict[str, tuple[int, float]]:
        return {name: (c.next_seq, c.last_seen) for name, c in self.items()}
