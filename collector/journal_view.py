"""The journal as the audit reads it: from beside the bus, read-only, at one moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector import ledger
from collector.ledger import Range, Report, Span
from collector.seqs import Seqs, merged
from event_bus import database
from event_bus.errors import JournalError
from event_bus.journal_file import has_wal
from event_bus.journal_format import WAL_HOLDS_MORE


class ProducerRow(msgspec.Struct):
    token: str
    last_n: int
    last_seen: float
    report: Report | None


class JournalView:
    """One read transaction, from its making until `close`. Raises JournalError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self._db = database.connect(path, database.READ_ONLY)
            try:
                self._db.execute("BEGIN")
                meta = dict(self._db.execute("SELECT key, value FROM meta"))
                self.journal_id: str = meta["journal_id"]
                self.origin_seq: int = meta.get("origin_seq", 1)
                self.lacks_wal = meta.get(WAL_HOLDS_MORE) == 1 and not has_wal(path)
                """What was committed last is gone, or will be when the bus starts."""
                trimmed: int = meta["trimmed_seq"]
                first, last = self._row("SELECT min(first_seq), max(first_seq) FROM batch")
                self.losses = self._losses()
                ends = [loss.last_seq for loss in self.losses if loss.last_seq is not None]
                self.last_seq: int = max(0 if last is None else self._end_of(last), trimmed, *ends)
                starts = [r.first_seq for r in self.losses if r.last_seq and r.first_seq > trimmed]
                self.first_seq: int = min([self.last_seq + 1 if first is None else first, *starts])
            except BaseException:
                self._db.close()
                raise

    def producers(self) -> list[ProducerRow]:
        with self._errors():
            return [
                ProducerRow(token, last_n, last_seen, _report(report))
                for token, last_n, last_seen, report in self._db.execute(
                    "SELECT token, last_n, last_seen, report FROM producer"
                )
            ]

    def runs(self, from_seq: int) -> Iterator[tuple[str, int, int, int]]:
        """(token, first n, last n, first seq) of what lies at `from_seq` and after."""
        with self._errors():
            yield from self._db.execute(
                "SELECT token, first_n, run.last_n, first_seq FROM run"
                " JOIN producer ON producer.id = run.producer WHERE first_seq >="
                " coalesce((SELECT max(first_seq) FROM run WHERE first_seq <= ?1), 0)"
                " AND first_seq + run.last_n - first_n >= ?1",
                (from_seq,),
            )

    def opaque_ids(self, from_seq: int) -> Iterator[tuple[str, int]]:
        """(event id, seq) of what lies at `from_seq` and after under an id of another form."""
        with self._errors():
            yield from self._db.execute(
                "SELECT event_id, seq FROM opaque_id WHERE seq >= ?", (from_seq,)
            )

    def spans(self, from_seq: int) -> dict[str, list[Span]]:
        """Of each process what lies at `from_seq` and after, be it lost or not, in order."""
        spans: dict[str, list[Span]] = {}
        for token, n, last_n, first_seq in self.runs(from_seq):
            past = max(0, from_seq - first_seq)
            span = (n + past, first_seq + past, first_seq + last_n - n)
            spans.setdefault(token, []).append(span)
        return {token: sorted(found, key=lambda span: span[1]) for token, found in spans.items()}

    def lost(self) -> Seqs:
        """The seqs that this journal knows to be lost, or left out."""
        return merged((r.first_seq, r.last_seq) for r in self.losses if r.last_seq is not None)

    def last_seq_now(self) -> int:
        """The last seq, as it is by now and not when this view was made."""
        with JournalView(self.path) as now:
            return now.last_seq

    def lose_end(self, known_seq: int) -> None:
        """Count what the file lacks as lost: as far as the journal is known to have gone, by
        `known_seq` or by whoever read it, and what nobody knows of."""
        name = self.path.name
        what = f"{name}-wal is gone"
        if not self.lacks_wal:
            what += f", or {name} is an older copy"
        reason = f"{what}: put back what it was, or start the bus, which records what is lost"
        with self._errors():
            (read_seq,) = self._row("SELECT coalesce(max(next_seq), 1) - 1 FROM consumer")
        first, end = self.last_seq + 1, max(self.last_seq, known_seq, read_seq)
        if first <= end:
            self.losses.append(ledger.lost_by_journal(first, end, None, reason))
        self.losses.append(ledger.lost_by_journal(end + 1, None, None, reason))
        self.last_seq = end

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> JournalView:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _losses(self) -> list[Range]:
        """What this journal knows to be lost."""
        if not self._row("SELECT count(*) FROM sqlite_master WHERE name = 'lost_range'")[0]:
            return []  # made by a bus of before
        return [
            ledger.lost_by_journal(first, last, at, reason)
            for first, last, at, reason in self._db.execute(
                "SELECT first_seq, last_seq, found_at, reason FROM lost_range"
            )
        ]

    def _end_of(self, first_seq: int) -> int:
        (count,) = self._row("SELECT count FROM batch WHERE first_seq = ?", first_seq)
        return int(first_seq + count - 1)

    def _row(self, sql: str, *values: Any) -> Any:
        return self._db.execute(sql, values).fetchone()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (apsw.Error, KeyError) as e:
            raise JournalError(
                f"cannot read {self.path}: {e}", hint=database.reading_hint(e)
            ) from e


def _report(text: str | None) -> Report | None:
    """None if there is none, or a client's that is another thing."""
    try:
        return msgspec.json.decode(text, type=Report) if text else None
    except (msgspec.DecodeError, UnicodeError):
        return None
