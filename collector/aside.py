"""Databases that were put aside: how they are named, and reading what only they still hold.

Nothing is ever deleted: `bitten_events.db.corrupt-<UTC time>` was damaged,
`bitten_events.db.replaced-<UTC time>` is what the collector had open when somebody put another
file in its place. Their `-wal` and `-shm` go with them, so that SQLite can open them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector import layout
from event_bus import database
from event_bus.envelope import Envelope
from event_bus.errors import DatabaseError
from event_bus.subscriber import Batch

CORRUPT, REPLACED = "corrupt", "replaced"
MAX_CORRUPT_AN_HOUR = 20
READ_EVENTS = 2_000
"""What is read at once; where that fails, halves of it, down to single events."""

_TIME = "%Y%m%dT%H%M%S.%fZ"
_NAME = re.compile(rf"\.({CORRUPT}|{REPLACED})-(\d{{8}}T\d{{6}}\.\d{{6}}Z)")

_SELECT = """SELECT v.*, e.source IS NOT NULL AND v.source IS NULL
FROM events v JOIN _event e ON e.seq = v.seq WHERE v.seq BETWEEN ? AND ? ORDER BY v.seq"""

Found = tuple[int, float, Envelope]
"""seq, received_at, and the event."""


def name_aside(path: Path, kind: str, now: float) -> Path:
    """What a database that is put aside now is called. `now` is Unix seconds."""
    return Path(f"{path}.{kind}-{datetime.fromtimestamp(now, UTC).strftime(_TIME)}")


def move_aside(path: Path, kind: str, now: float) -> Path | None:
    """Rename the database and its -wal and -shm; the new name, None if there was nothing.

    Raises DatabaseError if that happens so often that it does not help.
    """
    recent = [f for f, at in _all(path) if f".{CORRUPT}-" in f.name and now - at < 3600]
    if kind == CORRUPT and len(recent) >= MAX_CORRUPT_AN_HOUR:
        raise DatabaseError(
            f"{path} was damaged {len(recent)} times within an hour",
            hint="check this machine's disk and memory (dmesg, smartctl, memtester);"
            f" the damaged ones are {path}.{CORRUPT}-*",
        )
    new = name_aside(path, kind, now)
    moved = False
    for suffix in reversed(layout.SUFFIXES):  # the file itself last: until then it is not gone
        try:
            Path(f"{path}{suffix}").rename(f"{new}{suffix}")
        except FileNotFoundError:
            continue
        except OSError as e:
            raise DatabaseError(
                f"cannot rename {path}{suffix}: {e.strerror}", hint="make its directory writable"
            ) from e
        moved = True
    return new if moved else None


def put_aside(path: Path) -> list[Path]:
    """The databases put aside from `path`, the newest first."""
    return [f for f, _ in sorted(_all(path), key=lambda found: found[1], reverse=True)]


def _all(path: Path) -> list[tuple[Path, float]]:
    found = []
    for file in path.parent.glob(f"{path.name}.*"):
        match = _NAME.fullmatch(file.name[len(path.name) :])
        if match:
            at = datetime.strptime(match[2], _TIME).replace(tzinfo=UTC)
            found.append((file, at.timestamp()))
    return found


class AsideReader:
    """Reads what can be read of one of them. Raises DatabaseError if that is nothing."""

    def __init__(self, path: Path) -> None:
        with layout.errors("read", path):
            self._db = database.connect(path, database.READ_ONLY)
            try:
                layout.check_version(self._db, path)
                row = self._db.execute(
                    "SELECT value FROM _meta WHERE key = 'journal_id'"
                ).fetchone()
                last = self._db.execute(layout.LAST_SEQ).fetchone()
            except BaseException:
                self._db.close()
                raise
        self.journal_id: str | None = row[0] if row else None
        self.last_seq: int = last[0] if last else 0

    def read(self, first_seq: int, last_seq: int) -> list[Found]:
        """The events from `first_seq` to `last_seq` that can be read, in order."""
        if first_seq > last_seq:
            return []
        try:
            rows = self._db.execute(_SELECT, (first_seq, last_seq)).fetchall()
        except apsw.Error:
            if first_seq == last_seq:
                return []
            middle = (first_seq + last_seq) // 2
            return self.read(first_seq, middle) + self.read(middle + 1, last_seq)
        return [found for found in map(_event, rows) if found is not None]

    def close(self) -> None:
        self._db.close()


def read_all(
    path: Path, first_seq: int, last_seq: int, *, journal_id: str, origin_seq: int
) -> Iterator[list[Found]]:
    """What databases put aside from `path` hold of these events, piece by piece, in order.

    The newest one that has an event gives it. What came from another journal than `journal_id`
    counts only below that one's first seq, `origin_seq`: above, the same seq is another event.
    """
    sources: list[tuple[AsideReader, int]] = []
    try:
        for file in put_aside(path):
            try:
                reader = AsideReader(file)
            except DatabaseError:
                continue  # nothing of it can be read
            until = last_seq if reader.journal_id == journal_id else origin_seq - 1
            sources.append((reader, until))
        if not sources:
            return
        for low in range(first_seq, last_seq + 1, READ_EVENTS):
            high = min(low + READ_EVENTS - 1, last_seq)
            found: dict[int, Found] = {}
            for reader, until in sources:
                if len(found) < high - low + 1:
                    for event in reader.read(low, min(high, until)):
                        found.setdefault(event[0], event)
            yield [found[seq] for seq in sorted(found)]
    finally:
        for reader, _ in sources:
            reader.close()


def batches(found: list[Found]) -> list[Batch]:
    """Events as batches that have no hole inside, each received at one time."""
    # seq minus place is the same as long as there is no hole.
    runs = groupby(enumerate(found), lambda at: (at[1][0] - at[0], at[1][1]))
    result = []
    for _, run in runs:
        events = [event for _, event in run]
        result.append(Batch(events[0][0], events[0][1], [e for _, _, e in events]))
    return result


def _event(row: tuple[Any, ...]) -> Found | None:
    """A row of `events` as it was received; None if part of it cannot be read."""
    seq, event_id, event_type, timestamp, source, user_id, *ids, received_at, data, torn = row
    given = {
        "event_id": event_id,
        "event_type": event_type,
        "timestamp": timestamp,
        "source": source,
        "user_id": user_id,
        "correlation_id": ids[0],
        "causation_id": ids[1],
    }
    present = {name: value for name, value in given.items() if value is not None}
    try:
        if torn:
            return None
        event = msgspec.convert(present | {"data": msgspec.json.decode(data)}, Envelope)
        return seq, msgspec.convert(received_at, float), event
    except (msgspec.MsgspecError, TypeError, UnicodeDecodeError):
        return None
