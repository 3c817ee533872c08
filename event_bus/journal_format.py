"""The format of journal.db: its tables, and what makes a row of it believable.

A row of `batch` is what one commit took in: `count` canonical lines whose seqs start at
`first_seq`. Its CRC-32 covers the whole row, so that a row which damage has moved to another seq
is found out as well. `run` and `opaque_id` say where an event id lies, which is how an event that
is sent again is recognised: `run` for ids of the form <producer>-<n> (one row a contiguous
stretch), `opaque_id` for any other string. `lost_range` names the events that are not there any
more though they were never trimmed; `last_seq` is NULL where nobody knows how far it went.

`meta` says in `wal_holds_more` whether the file alone is all there is. It is 1 in what is copied
out of the -wal, and the first thing that the -wal holds after that is that it is 0: so it is 1 only
in a file whose -wal was taken away.
"""

from __future__ import annotations

import struct
import zlib

import apsw
import msgspec

APPLICATION_ID = 0x4249544A  # "BITJ"
VERSION = 1
PAGE_BYTES = 8192

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE batch (
    first_seq INTEGER PRIMARY KEY, count INTEGER NOT NULL, received_at REAL NOT NULL,
    crc32 INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX batch_received_at ON batch (received_at);
CREATE TABLE producer (
    id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE,
    last_n INTEGER NOT NULL, forgotten_n INTEGER NOT NULL DEFAULT 0,
    last_seen REAL NOT NULL, report TEXT);
CREATE TABLE run (
    producer INTEGER NOT NULL, first_n INTEGER NOT NULL, last_n INTEGER NOT NULL,
    first_seq INTEGER NOT NULL, PRIMARY KEY (producer, first_n)) WITHOUT ROWID;
CREATE INDEX run_first_seq ON run (first_seq);
CREATE TABLE opaque_id (event_id TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX opaque_id_seq ON opaque_id (seq);
CREATE TABLE consumer (name TEXT PRIMARY KEY, next_seq INTEGER NOT NULL, last_seen REAL NOT NULL)
    WITHOUT ROWID;
"""

LOST_RANGE = """
CREATE TABLE IF NOT EXISTS lost_range (
    first_seq INTEGER PRIMARY KEY, last_seq INTEGER, found_at REAL NOT NULL,
    reason TEXT NOT NULL, file TEXT NOT NULL, told INTEGER NOT NULL DEFAULT 0)
"""

WAL_HOLDS_MORE = "wal_holds_more"


class Batch(msgspec.Struct, frozen=True):
    """Consecutive events: line i of `body` has seq `first_seq` + i."""

    first_seq: int
    count: int
    received_at: float
    body: bytes


class Producer(msgspec.Struct):
    """One process's events. `last_n` is the highest n taken in, `forgotten_n` the highest n
    whose place is no longer known because the journal was trimmed. `report` is the last account
    the producer gave of itself, as sent."""

    id: int
    token: str
    last_n: int
    forgotten_n: int = 0
    last_seen: float = 0.0
    report: str | None = None


Run = tuple[Producer, int, int, int]
"""A producer's first n, last n, and the index of the first in its batch."""


LEFT_OUT = "nobody knows whether there were any: these seqs are not given out"
"""How the reason of a range begins that was left out at a recovery: most or all of it never was an
event's."""


class LostRange(msgspec.Struct, frozen=True):
    """Events that the journal had and has not any more. `last_seq` is None if nobody knows how
    many they were; `file` is where what is left of them was put, `told` whether the
    `journal_loss` event is stored."""

    first_seq: int
    last_seq: int | None
    found_at: float
    reason: str
    file: str
    told: bool = False

    @property
    def is_left_out(self) -> bool:
        return self.reason.startswith(LEFT_OUT)

    @property
    def events(self) -> int | None:
        """How many they are; None if nobody knows."""
        if self.last_seq is None or self.is_left_out:
            return None
        return self.last_seq - self.first_seq + 1

    def __str__(self) -> str:
        until = self.last_seq or "an unknown end"
        if self.is_left_out:
            return f"seqs {self.first_seq} to {until} are left out: {self.reason}"
        return f"events {self.first_seq} to {until} are lost: {self.reason}"


def checksum(first_seq: int, count: int, received_at: float, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<qqd", first_seq, count, received_at)))


def is_intact(first_seq: int, count: int, received_at: float, crc32: int, body: bytes) -> bool:
    """Whether a row of `batch` is what was written."""
    try:
        if crc32 == checksum(first_seq, count, received_at, body):
            return True
        # As early journals had it, over the body alone.
        return crc32 == zlib.crc32(body) and count == body.count(b"\n")
    except (struct.error, TypeError, AttributeError):  # damage has changed the type of a value
        return False


def is_damage(error: apsw.Error) -> bool:
    """Whether the file is at fault, and not its disk, its rights or another process.

    A constraint that fails means that the ids on disk contradict what was read of them, an error
    in SQL that a table is not there.
    """
    if isinstance(error, apsw.IOError):
        return getattr(error, "extendedresult", 0) in (
            apsw.SQLITE_IOERR_READ,
            apsw.SQLITE_IOERR_SHORT_READ,
            apsw.SQLITE_IOERR_CORRUPTFS,
        )
    damage = (apsw.CorruptError, apsw.NotADBError, apsw.ConstraintError, apsw.SQLError)
    return isinstance(error, damage)
