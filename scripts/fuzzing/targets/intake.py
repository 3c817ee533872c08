"""Batches into the intake and a real journal, against a dictionary of what was taken in."""

from __future__ import annotations

from pathlib import Path

import msgspec
import words

from event_bus import envelope
from event_bus.errors import RejectedEvent
from event_bus.event_schema import Registry
from event_bus.intake import Intake, _is_own
from event_bus.journal import Journal

BETWEEN = b"\xff\xfe"
"""Ends a batch within a case. No UTF-8 has these bytes."""

CASES_A_JOURNAL = 2_000


def seeds() -> list[bytes]:
    token = words.TOKEN
    run = [words.small_line(f"{token}-{n}") for n in range(1, 7)]
    foreign = [words.small_line(f"order/{n}") for n in range(3)]
    return [
        *words.lines(),
        b"".join(run),
        BETWEEN.join([b"".join(run[:3]), b"".join(run[:5]), b"".join(run[2:])]),
        BETWEEN.join([run[3] + run[0], foreign[0] + run[1], foreign[0] + foreign[1]]),
        BETWEEN.join([run[0], words.small_line(f"{token}-1", other=1)]),
        b"garbage\n" + run[0] + b"\n" + run[1],
    ]


class Target:
    def __init__(self, home: Path) -> None:
        self._home = home
        self._registry = Registry()
        self._cases = 0
        self._journal: Journal | None = None

    def __call__(self, data: bytes) -> None:
        if self._journal is None or self._cases >= CASES_A_JOURNAL:
            self._begin()
        self._cases += 1
        own = self._intake.totals.rejected + self._intake.totals.conflicts
        before = self._journal.last_seq
        accepted = []
        for batch in data.split(BETWEEN):
            expected = self._expect(batch)
            receipt = self._intake.take(batch)
            assert msgspec.structs.astuple(receipt)[:4] == tuple(map(len, expected))
            assert len(receipt.refusals) == receipt.rejected + receipt.conflicts
            accepted += expected[0]
        self._intake.commit()
        totals = self._intake.totals
        own = totals.rejected + totals.conflicts - own
        assert self._journal.last_seq == before + len(accepted) + own
        stored = [
            line
            for b in self._journal.read(before + 1, 1 << 30)
            for line in b.body.split(b"\n")[:-1]
        ]
        for line in stored:
            envelope.read(line) if len(line) < envelope.MAX_EVENT_BYTES else None
        theirs = [line for line in stored if b'"source":"event_bus"' not in line]
        assert theirs == [line for line in accepted if b'"source":"event_bus"' not in line]

    def _begin(self) -> None:
        if self._journal is not None:
            self._journal.close()
        for path in self._home.iterdir():
            path.unlink()
        self._cases = 0
        self._known: dict[str, bytes] = {}
        self._journal = Journal(self._home / "journal.db")
        self._intake = Intake(self._journal, self._registry, lambda: 1.0)

    def _expect(self, batch: bytes) -> tuple[list[bytes], list[bytes], list[bytes], list[bytes]]:
        """Accepted, duplicate, rejected and conflicting lines, by the strict path alone."""
        sorted_out: tuple[list[bytes], ...] = ([], [], [], [])
        lines = batch.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            try:
                event = envelope.read(line)
                event_type = self._registry.get(event.event_type)
                event_type.check(event.data)
                if _is_own(event_type) or event.event_id.startswith(self._intake._token):
                    raise RejectedEvent("the bus's own", rule="event_type")
            except RejectedEvent:
                sorted_out[2].append(line)
                continue
            canonical = envelope.encode(event)
            known = self._known.setdefault(event.event_id, canonical)
            if known is canonical:
                sorted_out[0].append(canonical)
            else:
                sorted_out[1 if known == canonical else 3].append(line)
        return sorted_out  # type: ignore[return-value]
