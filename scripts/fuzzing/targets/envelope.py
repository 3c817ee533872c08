"""A batch: what the fast path accepts, the strict one accepts too, as the same bytes."""

from __future__ import annotations

from pathlib import Path

import words

from event_bus import envelope
from event_bus.envelope import MAX_EVENT_BYTES
from event_bus.errors import RejectedEvent


def seeds() -> list[bytes]:
    lines = words.lines()
    return [*lines, b"".join(lines[:3]), b"".join(words.small_line(str(n)) for n in range(4))]


class Target:
    def __init__(self, home: Path) -> None:
        pass

    def __call__(self, batch: bytes) -> None:
        fast = envelope.decode_canonical(batch)
        lines = batch.removesuffix(b"\n").split(b"\n") if batch else []
        strict = []
        for line in lines:
            try:
                event = envelope.read(line)
            except RejectedEvent as e:
                str(e).encode()  # it is told and stored, so it must be text
                assert e.rule
                assert fast is None, "the fast path accepted what the strict one refuses"
                continue
            canonical = envelope.encode(event)
            assert len(canonical) <= MAX_EVENT_BYTES
            assert envelope.encode(envelope.read(canonical)) == canonical
            again = envelope.decode_canonical(canonical + b"\n")
            assert again is not None, "a canonical line is not taken for one"
            assert envelope.encode(again[0]) == canonical
            strict.append(canonical)
        if fast is not None:
            assert [envelope.encode(e) for e in fast] == strict
            assert b"".join(line + b"\n" for line in strict) == batch
