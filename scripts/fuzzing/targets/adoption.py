"""A spool file of anything: every line of it is taken in or refused, and the file is gone then."""

from __future__ import annotations

import base64
from pathlib import Path

import words

from event_bus import envelope
from event_bus.adopt import SpoolAdopter
from event_bus.event_schema import Registry
from event_bus.intake import Intake
from event_bus.journal import Journal

MAX_FEEDS = 1_000
CASES_A_JOURNAL = 500


def seeds() -> list[bytes]:
    lines = words.lines()
    return [*lines, b"".join(lines), b"".join(lines)[:-7], lines[0] + b"\0" * 50 + lines[1]]


class Target:
    def __init__(self, home: Path) -> None:
        self._home = home
        self._registry = Registry()
        self._spool = home / "spool"
        self._spool.mkdir()
        self._cases = 0
        self._journal: Journal | None = None

    def __call__(self, data: bytes) -> None:
        if self._journal is None or self._cases >= CASES_A_JOURNAL:
            self._begin()
        self._cases += 1
        path = self._spool / f"{words.TOKEN}.ndjson"
        path.write_bytes(data)
        adopter = SpoolAdopter(self._spool)
        adopter.look()
        before, first = self._total(), self._journal.last_seq + 1
        feeds = 0
        while adopter.pending:
            if chunk := adopter.read():
                self._intake.take(chunk)
            self._intake.commit()
            adopter.done()
            feeds += 1
            assert feeds < MAX_FEEDS, "adoption does not end"
        assert not path.exists()
        lines = data.removesuffix(b"\n").split(b"\n") if data else []
        assert self._total() == before + len(lines), "a line got lost"
        stored = [
            envelope.decode(line)
            for b in self._journal.read(first, 1 << 30)
            for line in b.body.split(b"\n")[:-1]
        ]
        own = [e.data for e in stored if e.source == "event_bus" and "raw" in e.data]
        assert all(base64.b64decode(data["raw"]) in lines for data in own), "kept otherwise"

    def _total(self) -> int:
        t = self._intake.totals
        return t.accepted + t.duplicates + t.rejected + t.conflicts

    def _begin(self) -> None:
        if self._journal is not None:
            self._journal.close()
        for path in self._home.glob("journal.db*"):
            path.unlink()
        self._cases = 0
        self._journal = Journal(self._home / "journal.db")
        self._intake = Intake(self._journal, self._registry, lambda: 1.0)
