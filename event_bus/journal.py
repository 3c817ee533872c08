"""The journal: every accepted event, in order, on disk before anybody hears of it.

`journal.db` is SQLite in WAL mode with synchronous=FULL: a commit returns after its fsync. What
its tables hold is told in journal_format.py. One process writes; it holds the lock of its home.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apsw
import msgspec

from event_bus import database
from event_bus.errors import JournalDamaged, JournalError
from event_bus.journal_file import DAMAGE_HINT, JournalFile
from event_bus.journal_format import (
    LOST_RANGE,
    WAL_HOLDS_MORE,
    Batch,
    LostRange,
    Producer,
    Run,
    checksum,
    is_intact,
)
from event_bus.traces import END, EndNote

log = logging.getLogger(__name__)

MAX_REMEMBERED_LOSSES = 1_000

MAX_TRIMMED_BATCHES = 200
MAX_TRIMMED_BYTES = 32 << 20
"""At once: events that come meanwhile wait for it, some 8 ms (SQLite reads all that it frees)."""

_LAST = "SELECT * FROM batch ORDER BY first_seq DESC LIMIT 1"
_LOSSES = "SELECT * FROM lost_range ORDER BY told, first_seq DESC LIMIT ?"
_ADD_LOSS = "INSERT OR IGNORE INTO lost_range VALUES (?,?,?,?,?,?)"
_FIRST = "SELECT * FROM batch ORDER BY first_seq LIMIT 1"


class DamagedBatch(JournalError):
    """The events from `first_seq` to before `next_seq` are not what was written, or not there."""

    def __init__(self, path: Path, first_seq: int, next_seq: int) -> None:
        what = f"events {first_seq} to {next_seq - 1} are damaged (CRC-32), lost or left out"
        super().__init__(f"{path}: {what}")
        self.first_seq = first_seq
        self.next_seq = next_seq


class Journal(JournalFile):
    """Opens the journal at `path`, or creates it with `origin_seq` as its first seq.

    Raises JournalError, also from every method; JournalDamaged, one of them, if the file is not
    what was written. With `create` False a file without tables is damaged too.
    """

    _end_note: EndNote | None = None

    def _load(self) -> None:
        """Make what the last run committed safe, count this start, and learn where it ends."""
        self._lines: tuple[int, list[bytes]] = (0, [])
        self.lacks_wal = not self._had_wal and self._meta(WAL_HOLDS_MORE) == 1
        """What the last run committed last is gone."""
        with database.transaction(self._db):
            self._db.execute(LOST_RANGE)
            self._db.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
        # After a failed fsync the next can lie: the last commits may be in memory alone. A
        # checkpoint writes and syncs them anew.
        self._checkpoint("FULL")
        self.journal_id: str = self._meta("journal_id")
        self.epoch: int = self._meta("epoch")
        self.origin_seq: int = self._meta("origin_seq", 1)  # 0.1.0 did not write it
        """The first seq that this journal ever had; above 1 if it follows a lost one."""
        self.recovered = ""
        """Why this start had to make a new file of a damaged one; empty if it had not."""
        self.losses = self._load_losses()
        """The newest first; of very many those that are not told yet."""
        # Both ends decide which seq comes next and which is refused: they have to be right.
        for row in (self._row(_FIRST), self._row(_LAST)):
            if row and not is_intact(*row):
                raise JournalDamaged(
                    f"{self.path}: the batch at seq {row[0]} is damaged (CRC-32)", hint=DAMAGE_HINT
                )
        self.last_seq: int = max(
            row[0] + row[1] - 1 if row else 0,
            self._meta("trimmed_seq"),
            self._row("SELECT coalesce(max(last_seq), 0) FROM lost_range")[0],
        )
        self.first_seq = self._first_seq()
        self.producers = self._load_producers()

    def note_end(self) -> None:
        """From now on tell beside the file how far it has come."""
        if self._end_note is not None:
            self._end_note.close()
            self._end_note = None
        try:
            self._end_note = EndNote(self.path.parent, self.journal_id, self.last_seq)
        except OSError as e:
            log.warning("cannot write %s: %s", self.path.with_name(END), e.strerror)

    def close(self) -> None:
        if self._end_note is not None:
            self._end_note.close()
            self._end_note = None
        super().close()

    def append(
        self,
        lines: Iterable[bytes],
        count: int,
        received_at: float,
        *,
        runs: list[Run],
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
                (
                    first_seq,
                    count,
                    received_at,
                    checksum(first_seq, count, received_at, body),
                    body,
                ),
            )
            self._insert_ids(first_seq, received_at, runs, opaque_ids)
            db.execute("COMMIT")
        except apsw.Error as e:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise self._write_error(e) from e
        self.last_seq += count
        if self._end_note is not None:
            self._end_note.write(self.last_seq)
        for p, *_ in runs:
            p.last_seen = received_at
        self._keep_wal_short()
        return first_seq

    def _insert_ids(
        self,
        first_seq: int,
        received_at: float,
        runs: list[Run],
        opaque_ids: list[tuple[str, int]],
    ) -> None:
        db = self._db
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

    def index(
        self,
        first_seq: int,
        received_at: float,
        *,
        runs: list[Run],
        opaque_ids: list[tuple[str, int]],
    ) -> None:
        """Note where ids lie of events that are not in this journal any more, so that one that is
        sent again is recognised; the arguments are those of `append`. Raises JournalError."""
        try:
            with database.transaction(self._db):
                self._insert_ids(first_seq, received_at, runs, opaque_ids)
        except apsw.Error as e:
            raise self._write_error(e) from e

    def read(self, from_seq: int, max_bytes: int) -> list[Batch]:
        """Batches from the one that holds `from_seq` on, at least one, past `max_bytes` by one at
        the most; empty at the end of the journal.

        Ends before a damaged or lost batch; raises DamagedBatch if that is the first one.
        """
        batches: list[Batch] = []
        size = 0
        want = lost_from = from_seq
        try:
            start = self._row(
                "SELECT first_seq FROM batch WHERE first_seq <= ? ORDER BY first_seq DESC LIMIT 1",
                from_seq,
            )
            for first_seq, count, received_at, crc, body in self._db.execute(
                "SELECT * FROM batch WHERE first_seq >= ? ORDER BY first_seq",
                (start[0] if start else from_seq,),
            ):
                if not is_intact(first_seq, count, received_at, crc, body):
                    if batches:
                        break
                    lost_from = min(lost_from, max(first_seq, self.first_seq))
                    continue
                if first_seq + count <= want:
                    lost_from = first_seq + count
                    continue
                if first_seq > want:
                    if batches:
                        break
                    raise DamagedBatch(self.path, lost_from, first_seq)
                batches.append(Batch(first_seq, count, received_at, body))
                want = first_seq + count
                size += len(body)
                if size >= max_bytes:
                    break
        except apsw.Error as e:
            raise self._read_error(e) from e
        if not batches and from_seq <= self.last_seq:
            raise DamagedBatch(self.path, lost_from, self.last_seq + 1)
        return batches

    def line(self, seq: int) -> bytes | None:
        """The canonical line with that seq, without its newline; None if its batch is damaged."""
        first_seq, lines = self._lines
        if not first_seq <= seq < first_seq + len(lines):
            # Kept, because events that are sent again come by the batch.
            try:
                batches = self.read(seq, 1)
            except DamagedBatch:
                return None
            if not batches:
                raise JournalDamaged(
                    f"{self.path}: an id leads to seq {seq}, past its end", hint=DAMAGE_HINT
                )
            (batch,) = batches
            first_seq, lines = self._lines = batch.first_seq, batch.body.split(b"\n")[:-1]
        return lines[seq - first_seq]

    def seq_at(self, received_at: float) -> int:
        """The first seq received at or after that time; one past the end if there is none."""
        row = self._row("SELECT min(first_seq) FROM batch WHERE received_at >= ?", received_at)
        return row[0] if row[0] is not None else self.last_seq + 1

    def seq_of_native(self, producer: Producer, n: int) -> int | None:
        # Runs do not overlap: if the last that begins by then is too short, no other has it.
        row = self._row(
            "SELECT first_seq + ?2 - first_n, last_n FROM run WHERE producer = ?1"
            " AND first_n <= ?2 ORDER BY first_n DESC LIMIT 1",
            producer.id,
            n,
        )
        return row[0] if row and row[1] >= n else None

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
        return {name: (seq, seen) for name, seq, seen in self._rows("SELECT * FROM consumer")}

    def save_consumers(self, consumers: dict[str, tuple[int, float]]) -> None:
        try:
            with database.transaction(self._db):
                self._db.execute("DELETE FROM consumer")
                self._db.executemany(
                    "INSERT INTO consumer VALUES (?,?,?)",
                    [(name, seq, seen) for name, (seq, seen) in consumers.items()],
                )
        except apsw.Error as e:
            raise self._write_error(e) from e

    def adopt(
        self, *, journal_id: str | None, epoch: int, trimmed_seq: int, losses: list[LostRange]
    ) -> None:
        """Become another journal's successor: its identity (a new one if None), its starts, what
        it had trimmed, and what it knew to be lost. Raises JournalError."""
        self.journal_id = journal_id or self.journal_id
        values = {"journal_id": self.journal_id, "epoch": epoch, "trimmed_seq": trimmed_seq}
        try:
            with database.transaction(self._db):
                self._db.executemany(
                    "UPDATE meta SET value = ?2 WHERE key = ?1", list(values.items())
                )
                self._db.executemany(_ADD_LOSS, map(msgspec.structs.astuple, losses))
        except apsw.Error as e:
            raise self._write_error(e) from e
        self.last_seq = trimmed_seq
        self.losses = self._load_losses()

    def save_producers(self) -> None:
        """Write all that is known of producers. Raises JournalError."""
        try:
            with database.transaction(self._db):
                self._db.executemany(
                    "INSERT OR REPLACE INTO producer VALUES (?,?,?,?,?,?)",
                    map(msgspec.structs.astuple, self.producers.values()),
                )
        except apsw.Error as e:
            raise self._write_error(e) from e

    def record_loss(self, *losses: LostRange) -> list[LostRange]:
        """Keep account of what is not known to be lost yet of these ranges, and return that; one
        at the end moves the end. All of it or nothing. Raises JournalError."""
        new: list[LostRange] = []
        try:
            with database.transaction(self._db):
                for loss in losses:
                    parts = self._unknown_part(loss)
                    self._db.executemany(_ADD_LOSS, map(msgspec.structs.astuple, parts))
                    new += parts
        except apsw.Error as e:
            raise self._write_error(e) from e
        self.losses[:0] = reversed(new)
        self.last_seq = max([self.last_seq, *(loss.last_seq or 0 for loss in losses)])
        return new

    def _unknown_part(self, loss: LostRange) -> list[LostRange]:
        """What no row covers; one of unknown length covers the seq that it begins with."""
        end = loss.last_seq or loss.first_seq
        parts: list[LostRange] = []
        at = loss.first_seq
        for first, last in self._db.execute(
            "SELECT first_seq, coalesce(last_seq, first_seq) AS last FROM lost_range"
            " WHERE first_seq <= ? AND last >= ? ORDER BY first_seq",
            (end, at),
        ):
            if first > at:
                parts.append(msgspec.structs.replace(loss, first_seq=at, last_seq=first - 1))
            at = max(at, last + 1)
        if at <= end:
            parts.append(msgspec.structs.replace(loss, first_seq=at))
        return parts

    def losses_are_told(self) -> None:
        """The `journal_loss` events of all in `losses` are stored. Raises JournalError."""
        try:
            with database.transaction(self._db):
                self._db.executemany(
                    "UPDATE lost_range SET told = 1 WHERE first_seq = ?",
                    [(loss.first_seq,) for loss in self.losses if not loss.told],
                )
        except apsw.Error as e:
            raise self._write_error(e) from e
        self.losses = self._load_losses()

    def _load_losses(self) -> list[LostRange]:
        rows = self._rows(_LOSSES, MAX_REMEMBERED_LOSSES)
        found = [msgspec.structs.replace(LostRange(*row), told=bool(row[-1])) for row in rows]
        return sorted(found, key=lambda loss: -loss.first_seq)

    def seq_to_trim(self, *, older_than: float, max_bytes: int) -> int:
        """The seq before which everything may go by age, as far as one `trim` comes; by size, a
        tenth of the journal more."""
        # A journal that is held past its age is old up to its young end: never look that far.
        row = self._row(
            "SELECT first_seq FROM (SELECT first_seq, received_at FROM batch ORDER BY first_seq"
            " LIMIT ?) WHERE received_at >= ? ORDER BY first_seq LIMIT 1",
            MAX_TRIMMED_BATCHES,
            older_than,
        ) or self._row(
            "SELECT first_seq FROM batch ORDER BY first_seq LIMIT 1 OFFSET ?", MAX_TRIMMED_BATCHES
        )
        by_age = row[0] if row else self.last_seq + 1
        if self.size_bytes() <= max_bytes:
            return by_age
        return max(by_age, self.first_seq + (self.last_seq - self.first_seq) // 10 + 1)

    def trim(self, before_seq: int, *, max_batches: int = MAX_TRIMMED_BATCHES) -> int:
        """Remove up to `max_batches` whole batches that end before that seq, or as many as have
        MAX_TRIMMED_BYTES; returns how many."""
        cut = removed = size = 0
        try:
            for first_seq, count, body_bytes in self._db.execute(
                "SELECT first_seq, count, length(body) FROM batch WHERE first_seq < ?1"
                " AND first_seq + count <= ?1 ORDER BY first_seq LIMIT ?2",
                (before_seq, max_batches),
            ):
                size += body_bytes
                if removed and size > MAX_TRIMMED_BYTES:
                    break
                removed += 1
                cut = first_seq + count
            if not removed:
                return 0
            with database.transaction(self._db):
                self._db.execute("DELETE FROM batch WHERE first_seq < ?", (cut,))
                # By that index, or all runs of each of these producers would be read.
                forgotten: list[Any] = self._db.execute(
                    "UPDATE producer SET forgotten_n = max(forgotten_n, gone.n) FROM"
                    " (SELECT producer AS id, max(last_n) AS n FROM run INDEXED BY run_first_seq"
                    "  WHERE first_seq < ? GROUP BY 1) AS gone"
                    " WHERE producer.id = gone.id RETURNING token, forgotten_n",
                    (cut,),
                ).fetchall()
                self._db.execute("DELETE FROM run WHERE first_seq < ?", (cut,))
                self._db.execute("DELETE FROM opaque_id WHERE seq < ?", (cut,))
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'trimmed_seq'", (cut - 1,))
        except apsw.Error as e:
            raise self._write_error(e) from e
        self.first_seq = cut
        for token, n in forgotten:
            self.producers[token].forgotten_n = n
        self._keep_wal_short()
        return removed

    def reload_producers(self) -> None:
        """Know of producers what is on disk."""
        self.producers = self._load_producers()

    def _first_seq(self) -> int:
        """A range that was lost before anything was trimmed counts as part of the journal."""
        lost = self._row(
            "SELECT min(first_seq) FROM lost_range WHERE last_seq NOT NULL AND first_seq > ?",
            self._meta("trimmed_seq"),
        )
        row = self._row("SELECT min(first_seq) FROM batch")
        first = row[0] if row[0] is not None else self.last_seq + 1
        return int(first if lost[0] is None else min(first, lost[0]))

    def _load_producers(self) -> dict[str, Producer]:
        rows = self._rows("SELECT id, token, last_n, forgotten_n, last_seen, report FROM producer")
        producers = {row[1]: Producer(*row) for row in rows}
        self._next_producer = max((p.id for p in producers.values()), default=0) + 1
        return producers
