"""What a process lost as it ended, for a disk that has no room for a line that says so.

It is told by the name of an empty file in the spool, which takes no space for data:
`<producer>-<n>-<source>.lost-<dropped>-<dropped in all>`. The broker, or a bridge of that home,
makes the `bridge_loss` event `<producer>-<n>` of it: the same one each time, so it counts once.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.parse
from pathlib import Path

import msgspec

from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.spool import open_locked

REASON = "the spool could not be written as the process ended"

_NAME = re.compile(
    r"(?P<producer>[0-9a-f]{20})-(?P<n>[1-9]\d{0,17})-(?P<source>.+)"
    r"\.lost-(?P<dropped>[1-9]\d{0,17})-(?P<total>[1-9]\d{0,17})",
    re.ASCII,
)
_MAX_SOURCE = 160
"""Characters of the quoted source in a name, which has 255 at most."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """`dropped` events of `source`, `total` with those that it told before; `n` is the number of
    the event that says so."""

    path: Path
    producer: str
    n: int
    source: str
    dropped: int
    total: int

    def event(self) -> bytes:
        """Its `bridge_loss` event as a canonical line, with its newline. Raises OSError."""
        at = self.path.stat().st_mtime
        data = {
            "producer": self.producer,
            "dropped": self.dropped,
            "dropped_total": self.total,
            "reason": REASON,
            "last_at": at,
        }
        event_id = f"{self.producer}-{self.n}"
        event = Envelope(
            event_id=event_id,
            event_type="bridge_loss",
            timestamp=at,
            source=self.source,
            data=data,
        )
        return envelope.encode(event) + b"\n"


def notes(directory: Path) -> list[Note]:
    """What processes left, those of one process in order."""
    found = [note for path in directory.glob("*.lost-*") if (note := _read(path)) is not None]
    return sorted(found, key=lambda note: (note.producer, note.n))


def _read(path: Path) -> Note | None:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    source = urllib.parse.unquote(match["source"], errors="replace")
    numbers = {name: int(match[name]) for name in ("n", "dropped", "total")}
    return Note(path=path, producer=match["producer"], source=source, **numbers)


class LastLoss:
    """The note of one process, which holds its lock: it is taken in once the process is gone.

    Not safe for two threads.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1
        self._note: Note | None = None

    def make(self, line: bytes) -> bool:
        """Leave a note of what the `bridge_loss` event in `line` says; False if that cannot be."""
        event = envelope.decode(line)
        producer, _, n = event.event_id.partition("-")
        note = Note(
            path=self._directory,
            producer=producer,
            n=int(n),
            source=str(event.source),
            dropped=event.data["dropped"],
            total=event.data["dropped_total"],
        )
        note = self._named(note)
        try:
            self._fd = open_locked(note.path, os.O_CREAT)
        except BlockingIOError:
            return True  # taken in at this moment
        except OSError:
            return False
        self._note = note
        return True

    def add(self, line: bytes) -> bool:
        """Add a further loss to the note; False if there is none."""
        if self._note is None:
            return False
        data = envelope.decode(line).data
        dropped = self._note.dropped + data["dropped"]
        note = self._named(
            msgspec.structs.replace(self._note, dropped=dropped, total=data["dropped_total"])
        )
        with contextlib.suppress(OSError):  # then it tells of less
            self._note.path.rename(note.path)
            self._note = note
        return True

    def _named(self, note: Note) -> Note:
        source = note.source
        while len(quoted := urllib.parse.quote(source, safe="")) > _MAX_SOURCE:
            source = source[:-1]
        name = f"{note.producer}-{note.n}-{quoted}.lost-{note.dropped}-{note.total}"
        return msgspec.structs.replace(note, path=self._directory / name)

    def release(self) -> None:
        """Let go of the note, which is then the broker's."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._note = -1, None
