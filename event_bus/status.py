"""What the broker says of itself: the answer to `status`, the heartbeat, its own health events."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import psutil

from event_bus.consumers import Consumers
from event_bus.envelope import Envelope
from event_bus.health import ConsumerFacts, Facts, Health, LossFacts
from event_bus.intake import SOURCE, Intake
from event_bus.journal_format import LostRange
from event_bus.version import __version__

MAX_PRODUCERS = 1_000


class BrokerStatus:
    """Reads what the others know; what only the broker knows is told to it by attributes.

    `clock` gives Unix seconds, `monotonic` those that uptime is counted in.
    """

    def __init__(
        self,
        intake: Intake,
        consumers: Consumers,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.health = Health()
        self.storage_full_since: float | None = None
        self.storage_full_reason = ""
        self.journal_held_by: str | None = None
        self.keys_problem = ""
        self.put_back_at: float | None = None
        self._intake = intake
        self._journal = intake.journal
        self._consumers = consumers
        self._clock = clock
        self._monotonic = monotonic
        self._started = monotonic()
        self._latest = clock()
        self._process = psutil.Process()
        self._process.cpu_percent()
        self._last_memory_bytes = 0
        self._last_cpu_percent = 0.0

    def look(self) -> bool:
        """See how things are; True if the state is another one than at the last look."""
        now = self._clock()
        self._latest = max(self._latest, now)
        return self.health.look(
            Facts(
                now=now,
                latest=self._latest,
                storage_full_since=self.storage_full_since,
                storage_full_reason=self.storage_full_reason,
                storage=str(self._journal.path),
                recovered=self._journal.recovered,
                put_back_at=self.put_back_at,
                losses=[_loss_facts(loss) for loss in self._journal.losses],
                journal_held_by=self.journal_held_by,
                wal_bytes=self._journal.wal_bytes,
                consumers={
                    name: ConsumerFacts(self._consumers.lag(c), c.silent_s, c.problem)
                    for name, c in self._consumers.items()
                },
                keys_problem=self.keys_problem,
                schema_problems=[str(p) for p in self._intake.registry.problems],
            )
        )

    def answer(self) -> dict[str, Any]:
        """The answer to a status request; docs/protocol.md lists the fields."""
        journal = self._journal
        return {
            "version": __version__,
            "pid": os.getpid(),
            **self._counts(),
            "origin_seq": journal.origin_seq,
            "uptime_s": self._uptime_s(),
            "memory_bytes": self.memory_bytes(),
            "journal_bytes": journal.size_bytes(),
            "journal_held_by": self.journal_held_by,
            "consumers": self._consumers.status(),
            "schema_problems": [str(p) for p in self._intake.registry.problems],
            "producers": [
                {
                    "producer": p.token,
                    "last_n": p.last_n,
                    "last_seen": p.last_seen,
                    "report": p.report,
                }
                for p in sorted(journal.producers.values(), key=lambda p: p.id)[-MAX_PRODUCERS:]
            ],
        }

    def heartbeat(self) -> Envelope:
        data = {
            **self._counts(),
            "uptime": self._uptime_s(),
            "memory_usage": self._memory_mb(),
            "cpu_usage": self._cpu_percent(),
            "consumers": {n: self._consumers.lag(c) for n, c in self._consumers.items()},
        }
        now = self._clock()
        return Envelope(
            event_id=f"{self._journal.journal_id}-{self._journal.epoch}-{now:.3f}",
            event_type="heartbeat",
            timestamp=now,
            source=SOURCE,
            data=data,
        )

    def health_event(self) -> dict[str, Any]:
        """Data of a `system_health` event of the bus."""
        data = {
            "component": SOURCE,
            "status": self.health.state,
            "uptime": self._uptime_s(),
            "memory_usage": self._memory_mb(),
        }
        if self.health.problems:
            data["details"] = {"problems": self._problems()}
        return data

    def _counts(self) -> dict[str, Any]:
        journal, totals = self._journal, self._intake.totals
        return {
            "state": self.health.state,
            "problems": self._problems(),
            "epoch": journal.epoch,
            "journal_id": journal.journal_id,
            "first_seq": journal.first_seq,
            "last_seq": journal.last_seq,
            "accepted": totals.accepted,
            "duplicates": totals.duplicates,
            "rejected": totals.rejected,
            "conflicts": totals.conflicts,
        }

    def _problems(self) -> list[dict[str, Any]]:
        return [msgspec.structs.asdict(p) for p in self.health.problems]

    def _uptime_s(self) -> float:
        return round(self._monotonic() - self._started, 3)

    # Both open a file: without a free descriptor, what was so last is said again.

    def memory_bytes(self) -> int:
        with contextlib.suppress(OSError):
            self._last_memory_bytes = self._process.memory_info().rss
        return self._last_memory_bytes

    def _cpu_percent(self) -> float:
        with contextlib.suppress(OSError):
            self._last_cpu_percent = self._process.cpu_percent()
        return self._last_cpu_percent

    def _memory_mb(self) -> float:
        return round(self.memory_bytes() / 1e6, 1)


def _loss_facts(loss: LostRange) -> LossFacts:
    if loss.last_seq is None:
        what = f"what followed event {loss.first_seq - 1}"
    elif loss.last_seq == loss.first_seq:
        what = f"event {loss.first_seq}"
    elif loss.is_left_out:
        what = f"perhaps some of seq {loss.first_seq} to {loss.last_seq}"
    else:
        what = f"events {loss.first_seq} to {loss.last_seq}"
    return LossFacts(what, loss.found_at, loss.reason, loss.file)
