"""Which events lie in spool files, by the names of the files and the ids of the lines; and what
processes that could not write theirs say that they lost."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import msgspec

from event_bus import envelope
from event_bus.envelope import NATIVE_LINE
from event_bus.last_loss import REASON, notes

_LOSS = re.compile(rb'^\{"event_id":"[^"\\]*","event_type":"bridge_loss",.*\n', re.MULTILINE)
_CHUNK_BYTES = 1 << 20


class Spooled:
    """The events of one file, as stretches of their numbers. `others` are lines without one,
    `dropped` what its process says that it lost in all."""

    def __init__(self) -> None:
        self.stretches: list[tuple[int, int]] = []
        self.others = 0
        self.dropped = 0
        self.reason = ""
        self.source = ""

    @property
    def last_n(self) -> int:
        return max((last for _, last in self.stretches), default=0)

    def after(self, n: int) -> int:
        """How many events have a number above that, or none."""
        return self.others + sum(
            last - max(first, n + 1) + 1 for first, last in self.stretches if last > n
        )

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""
        for line in _LOSS.findall(lines):
            self._lose(line)
        count = lines.count(b"\n")
        head = NATIVE_LINE.match(lines)
        tail = NATIVE_LINE.match(lines, lines.rfind(b"\n", 0, -1) + 1)
        if head and tail and int(tail[2]) - int(head[2]) == count - 1:
            self._extend(int(head[2]), int(tail[2]))
            return
        numbers = [int(n) for _, n in NATIVE_LINE.findall(lines)]
        self.others += count - len(numbers)
        for n in numbers:
            self._extend(n, n)

    def lose(self, total: int, reason: str) -> None:
        """Take in what its process said."""
        if total > self.dropped:
            self.dropped, self.reason = total, reason

    def _lose(self, line: bytes) -> None:
        try:
            data = envelope.decode_lines(line)[0].data
        except (msgspec.DecodeError, UnicodeError):
            return
        total = data.get("dropped_total", data.get("dropped"))
        if isinstance(total, int):
            self.lose(total, str(data.get("reason", "")))

    def _extend(self, first: int, last: int) -> None:
        if self.stretches and self.stretches[-1][1] == first - 1:
            first = self.stretches.pop()[0]
        self.stretches.append((first, last))


def read_spools(directory: Path) -> dict[str, Spooled]:
    """Process token to what it left. Files that vanish meanwhile were delivered. Raises OSError if
    the directory may not be read."""
    found: dict[str, Spooled] = {}
    with contextlib.suppress(FileNotFoundError):
        os.scandir(directory).close()  # `glob` finds nothing where it may not look
    for path in directory.glob("*.ndjson"):
        try:
            found[path.stem] = _read(path)
        except FileNotFoundError:
            continue
    for note in notes(directory):
        spooled = found.setdefault(note.producer, Spooled())
        spooled.stretches.append((note.n, note.n))  # the event that will say so
        spooled.lose(note.total, REASON)
        spooled.source = spooled.source or note.source
    return found


def _read(path: Path) -> Spooled:
    spooled = Spooled()
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                spooled.source = spooled.source or _source(lines.partition(b"\n")[0])
                spooled.add(lines + newline)
    return spooled


def _source(line: bytes) -> str:
    try:
        source = envelope.decode_lines(line + b"\n")[0].source
    except (msgspec.DecodeError, UnicodeError):
        return ""
    return source or ""
