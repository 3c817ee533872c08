"""The journal: every accepted event, in order, on disk before anybody hears of it.

`journal.db` is SQLite in WAL mode with synchronous=FULL: a commit returns after its fsync. A row
of `batch` is what one commit took in: `count` canonical lines whose seqs start at `first_seq`,
with a CRC-32 of the body. `run` and `opaque_id` say where an event id lies, which is how an
event that is sent again is recognised: `run` for ids of the form <producer>-<n> (one row a
contiguous stretch), `opaque_id` for any other string. One process writes; it holds the lock of
its home.
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apsw
import msgspec

from event_bus import database
from event_bus.errors import JournalError, JournalFull

APPLICATION_ID = 0x4249544A  # "BITJ"
VERSION = 1

_SCHEMA = """
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


_READ_HINT = "restore a backup of it, or move it aside"


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


class DamagedBatch(JournalError):
    """The events from `first_seq` to before `next_seq` are not what was written."""

    def __init__(self, path: Path, first_seq: int, next_seq: int) -> None:
        super().__init__(f"{path}: events {first_seq} to {next_seq - 1} are damaged (CRC-32)")
        self.next_seq = next_seq


class Journal:
    """Opens or creates the journal at `path`. Raises JournalError, also from every method."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.touch(0o600)  # the WAL beside it takes over these rights
            self._db = database.connect(path)
            # By what it holds, not by its size: a start may have died while creating it.
            if self._row("SELECT count(*) FROM sqlite_master")[0] == 0:
                self._create()
            self._check_version()
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA wal_autocheckpoint=4000")
            self._db.execute("PRAGMA journal_size_limit=67108864")
            with self._db:
                self._db.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
            self.journal_id: str = self._meta("journal_id")
            self.epoch: int = self._meta("epoch")
            self.origin_seq: int = self._meta("origin_seq", 1)  # 0.1.0 did not write it
            """The first seq that this journal ever had; above 1 if it follows a lost one."""
            last = self._row(
                "SELECT first_seq + count - 1 FROM batch ORDER BY first_seq DESC LIMIT 1"
            )
            self.last_seq: int = last[0] if last else self._meta("trimmed_seq")
            self.first_seq = self._first_seq()
            self.producers = self._load_producers()
        except (apsw.Error, OSError) as e:
            raise JournalError(
                f"cannot open {path}: {e}",
                hint="check the disk and its rights; if the file is damaged, restore a backup of it"
                " or move it aside",
            ) from e
        self._lines: tuple[int, list[bytes]] = (0, [])

    def _create(self) -> None:
        self._db.execute("PRAGMA page_size=8192")
        self._db.execute("PRAGMA journal_mode=WAL")
        with self._db:
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version={VERSION}")
            self._db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [
                    ("journal_id", secrets.token_hex(8)),
                    ("epoch", 0),
                    ("trimmed_seq", 0),
                    ("origin_seq", 1),
                ],
            )

    def _check_version(self) -> None:
        application = self._row("PRAGMA application_id")[0]
        version = self._row("PRAGMA user_version")[0]
        if application != APPLICATION_ID:
            raise JournalError(f"{self.path} is not a journal of this bus", hint="move it aside")
        if version != VERSION:
            raise JournalError(
                f"{self.path} has version {version}, this program knows {VERSION}",
                hint="install the bitten-event-bus that wrote it, or move it aside",
            )

    def append(
        self,
        lines: Iterable[bytes],
        count: int,
        received_at: float,
        *,
        runs: list[tuple[Producer, int, int, int]],
        opaque_ids: list[tuple[str, int]],
    ) -> int:
        """Store canonical batches as one, and return the first event's seq after the fsync.

        `runs` are (producer, first n, last n, index of the first event), `opaque_ids` are
        (event id, index). Nothing is stored if this raises; `reload_producers` then forgets what
        was noted of them meanwhile.
        """
        first_seq = self.last_seq + 1
        body = b"".join(lines)
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            db.execute(
                "INSERT INTO batch VALUES (?,?,?,?,?)",
                (first_seq, count, received_at, zlib.crc32(body), body),
            )
            if runs:
                db.executemany(
                    "INSERT INTO run VALUES (?,?,?,?)",
                    [(p.id, first, last, first_seq + at) for p, first, last, at in runs],
                )
                db.executemany(
                    "INSERT INTO producer VALUES (?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET "
                    "last_n = excluded.last_n, last_seen = excluded.last_seen, "
                    "report = excluded.report",
                    [
                        (p.id, p.token, p.last_n, p.forgotten_n, received_at, p.report)
                        for p in {p.id: p for p, *_ in runs}.values()
                    ],
                )
            if opaque_ids:
                db.executemany(
                    "INSERT INTO opaque_id VALUES (?,?)",
                    [(event_id, first_seq + at) for event_id, at in opaque_ids],
                )
            db.execute("COMMIT")
        except apsw.Error as e:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise self._write_error(e) from e
        self.last_seq += count
        for p, *_ in runs:
            p.last_seen = received_at
        return first_seq

    def read(self, from_seq: int, max_bytes: int) -> list[Batch]:
        """Batches from the one that holds `from_seq` on, at least one, past `max_bytes` by one at
        the most; empty at the end of the journal.

        Ends before a damaged batch; raises DamagedBatch if that is the first one.
        """
        batches: list[Batch] = []
        size = 0
        try:
            start = self._row(
                "SELECT first_seq FROM batch WHERE first_seq <= ? ORDER BY first_seq DESC LIMIT 1",
                from_seq,
            )
            for first_seq, count, received_at, crc, body in self._db.execute(
                "SELECT * FROM batch WHERE first_seq >= ? ORDER BY first_seq",
                (start[0] if start else from_seq,),
            ):
                if first_seq + count <= from_seq:
                    continue
                if zlib.crc32(body) != crc:
                    if not batches:
                        raise DamagedBatch(self.path, first_seq, first_seq + count)
                    break
                batches.append(Batch(first_seq, count, received_at, body))
                size += len(body)
                if size >= max_bytes:
                    break
        except apsw.Error as e:
            raise JournalError(f"cannot read {self.path}: {e}", hint=_READ_HINT) from e
        return batches

    def line(self, seq: int) -> bytes | None:
        """The canonical line with that seq, without its newline; None if its batch is damaged."""
        first_seq, lines = self._lines
        if not first_seq <= seq < first_seq + len(lines):
            # Kept, because events that are sent again come by the batch.
            try:
                batch = self.read(seq, 1)[0]
            except DamagedBatch:
                return None
            first_seq, lines = self._lines = batch.first_seq, batch.body.split(b"\n")[:-1]
        return lines[seq - first_seq]

    def seq_at(self, received_at: float) -> int:
        """The first seq received at or after that time; one past the end if there is none."""
        row = self._row("SELECT min(first_seq) FROM batch WHERE received_at >= ?", received_at)
        return row[0] if row[0] is not None else self.last_seq + 1

    def seq_of_native(self, producer: Producer, n: int) -> int | None:
        row = self._row(
            "SELECT first_seq + ?2 - first_n FROM run WHERE producer = ?1 AND first_n <= ?2 "
            "AND last_n >= ?2 ORDER BY first_n DESC LIMIT 1",
            producer.id,
            n,
        )
        return row[0] if row else None

    def seq_of_opaque(self, event_id: str) -> int | None:
        row = self._row("SELECT seq FROM opaque_id WHERE event_id = ?", event_id)
        return row[0] if row else None

    def producer(self, token: str) -> Producer:
        """The producer with that token, a new one if need be; stored with its first run."""
        known = self.producers.get(token)
        if known is None:
            known = self.producers[token] = Producer(self._next_producer, token, 0)
            self._next_producer += 1
        return known

    def consumers(self) -> dict[str, tuple[int, float]]:
        """Durable consumers: name to (next seq they will ask for, Unix seconds last seen)."""
        return {name: (seq, seen) for name, seq, seen in self._db.execute("SELECT * FROM consumer")}

    def save_consumers(self, consumers: dict[str, tuple[int, float]]) -> None:
        try:
            with self._db:
                self._db.execute("DELETE FROM consumer")
                self._db.executemany(
                    "INSERT INTO consumer VALUES (?,?,?)",
                    [(name, seq, seen) for name, (seq, seen) in consumers.items()],
                )
        except apsw.Error as e:
            raise self._write_error(e) from e

    def size_bytes(self) -> int:
        """Bytes in use, free pages not counted."""
        pages = self._row("PRAGMA page_count")[0] - self._row("PRAGMA freelist_count")[0]
        return int(pages * self._row("PRAGMA page_size")[0])

    def has_room(self, size_bytes: int) -> bool:
        """Whether the journal's disk has that much space now."""
        probe = self.path.with_suffix(".probe")
        try:
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            finally:
                os.close(fd)
                probe.unlink()
        except OSError:
            return False
        return True

    def seq_to_trim(self, *, older_than: float, max_bytes: int) -> int:
        """The seq before which everything may go by age; by size, a tenth of the journal more."""
        # From the old end on, and not by the index, which would be read to its young end.
        row = self._row(
            "SELECT first_seq FROM batch NOT INDEXED WHERE received_at >= ? "
            "ORDER BY first_seq LIMIT 1",
            older_than,
        )
        by_age = row[0] if row else self.last_seq + 1
        if self.size_bytes() <= max_bytes:
            return by_age
        return max(by_age, self.first_seq + (self.last_seq - self.first_seq) // 10 + 1)

    def trim(self, before_seq: int, *, max_batches: int = 200) -> int:
        """Remove up to `max_batches` whole batches that end before that seq; returns how many."""
        try:
            rows: list[Any] = self._db.execute(
                "SELECT first_seq, count FROM batch WHERE first_seq + count <= ? "
                "ORDER BY first_seq LIMIT ?",
                (before_seq, max_batches),
            ).fetchall()
            if not rows:
                return 0
            cut: int = rows[-1][0] + rows[-1][1]
            with self._db:
                self._db.execute("DELETE FROM batch WHERE first_seq < ?", (cut,))
                self._db.execute(
                    "UPDATE producer SET forgotten_n = max(forgotten_n, (SELECT max(last_n)"
                    " FROM run WHERE run.producer = producer.id AND first_seq < ?1))"
                    " WHERE id IN (SELECT producer FROM run WHERE first_seq < ?1)",
                    (cut,),
                )
                self._db.execute("DELETE FROM run WHERE first_seq < ?", (cut,))
                self._db.execute("DELETE FROM opaque_id WHERE seq < ?", (cut,))
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'trimmed_seq'", (cut - 1,))
        except apsw.Error as e:
            raise self._write_error(e) from e
        self.first_seq = cut
        self.reload_producers()
        return len(rows)

    def reload_producers(self) -> None:
        """Know of producers what is on disk."""
        self.producers = self._load_producers()

    def close(self) -> None:
        self._db.close()

    def _first_seq(self) -> int:
        row = self._row("SELECT min(first_seq) FROM batch")
        return row[0] if row[0] is not None else self.last_seq + 1

    def _load_producers(self) -> dict[str, Producer]:
        rows = self._db.execute(
            "SELECT id, token, last_n, forgotten_n, last_seen, report FROM producer"
        )
        producers = {row[1]: Producer(*row) for row in rows}
        self._next_producer = max((p.id for p in producers.values()), default=0) + 1
        return producers

    def _meta(self, key: str, default: Any = None) -> Any:
        row = self._row("SELECT value FROM meta WHERE key = ?", key)
        return default if row is None else row[0]

    def _row(self, sql: str, *values: Any) -> Any:
        try:
            return self._db.execute(sql, values).fetchone()
        except apsw.Error as e:
            raise JournalError(f"cannot read {self.path}: {e}", hint=_READ_HINT) from e

    def _write_error(self, error: apsw.Error) -> JournalError:
        if isinstance(error, apsw.FullError):
            return JournalFull(
                f"no space left for {self.path}", hint="free some; events wait meanwhile"
            )
        return JournalError(
            f"cannot write {self.path}: {error}", hint="check the disk and its rights"
        )
