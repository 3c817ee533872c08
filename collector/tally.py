"""Counting what the database holds, from where the last audit stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import apsw
import msgspec

from collector.ledger import Held, Range, lost_by_journal, tell_apart
from collector.reader import Reader
from collector.seqs import Seqs, between, merged, without
from event_bus.envelope import NATIVE_ID, PRODUCER

CHUNK_EVENTS = 100_000
"""Counted in one statement: its sort fits the cache, and a hole is looked for in this many."""

MAX_FAULTS = 1_000
"""Ranges that are remembered. With more of them nothing is vouched for, and all is read again."""

_NUMBERED = "typeof(n) = 'integer'"
"""A foreign id may end in more digits than SQLite has integers."""

# The batches from seq ?1 to ?2; of events before the first one's nobody knows the ids.
_BATCHES = """
WITH b AS (
    SELECT first_seq, lead(first_seq, 1, ?2 + 1) OVER (ORDER BY first_seq) - 1 AS last_seq,
        producer, n
    FROM (
        SELECT first_seq, producer, n FROM _batch
        WHERE first_seq BETWEEN
            coalesce((SELECT max(first_seq) FROM _batch WHERE first_seq <= ?1), ?1) AND ?2
        UNION ALL
        SELECT ?1, NULL, NULL WHERE NOT EXISTS (SELECT 1 FROM _batch WHERE first_seq <= ?1)))
"""
# And their events, as `ids`.
_IDS = f"""
{_BATCHES}, ids AS (
    SELECT e.seq, e.source, b.producer,
        CASE typeof(b.n) WHEN 'integer' THEN b.n + e.seq - b.first_seq ELSE b.n END AS n
    FROM b CROSS JOIN _event e ON e.seq BETWEEN max(b.first_seq, ?1) AND b.last_seq)
"""

CLOCK_SLACK_S = 3_600.0
"""The clock may have been set by so much while a process ran."""

Run = tuple[str, int, int, int]
"""A producer's token, first and last n, and the seq of the first."""

_RUNS = """
CREATE TEMP TABLE run (
    first_seq INTEGER PRIMARY KEY, last_seq INTEGER, token TEXT, producer INTEGER, first_n INTEGER);
CREATE TEMP TABLE opaque (seq INTEGER PRIMARY KEY, event_id TEXT);
"""


class Tally(msgspec.Struct, kw_only=True):
    """What was counted up to `seq`: by process, by source where ids name no process, and the
    ranges that are not as they should be. `unowned` are lost, and the journal had forgotten whose
    they were."""

    seq: int = 0
    producers: dict[str, Held] = {}
    foreign: dict[str, Held] = {}
    truncated: int = 0
    faults: list[Range] = []
    unowned: Seqs = []

    @property
    def is_small(self) -> bool:
        skips = sum(len(held.skips) for held in self.producers.values())
        return len(self.faults) + len(self.unowned) + skips <= MAX_FAULTS

    def holds(self, producer: str) -> Held:
        return self.producers.setdefault(producer, Held())

    def holds_foreign(self, source: str) -> Held:
        return self.foreign.setdefault(source, Held(source=source))


class Names(dict[int, str]):
    """Id in `_name` to its text."""

    def __init__(self, db: apsw.Connection) -> None:
        super().__init__()
        self._db = db

    def __missing__(self, key: int) -> str:
        row: Any = self._db.execute("SELECT name FROM _name WHERE id = ?", (key,)).fetchone()
        self[key] = row[0] if row else ""
        return self[key]


class Count:
    """One reading of the database, within one read transaction: from `tally.seq` to `last_seq`.

    `runs` and `opaque` are what the journal says lies there. Raises apsw.Error.
    """

    def __init__(self, reader: Reader, tally: Tally, last_seq: int) -> None:
        self._db = reader.db
        self._names = Names(reader.db)
        self._tally = tally
        self._last_seq = last_seq
        self._refused: dict[str, list[int]] | None = None

    def run(self, runs: Iterable[Run], opaque: Iterable[tuple[str, int]]) -> None:
        """Bring the tally up to `last_seq`."""
        first, last = self._tally.seq + 1, self._last_seq
        self._db.execute(_RUNS)
        try:
            self._load(runs, opaque)
            for low in range(first, last + 1, CHUNK_EVENTS):
                self._count(low, min(low + CHUNK_EVENTS - 1, last))
            self._refusals(first, last)
            self._losses(first, last)
            self._compare(first, last)
        finally:
            self._db.execute("DROP TABLE temp.run; DROP TABLE temp.opaque")
        self._tally.seq = last

    def _count(self, low: int, high: int) -> None:
        for gap in gaps(self._db, low, high):
            self._miss(max(gap.first_seq, low), min(gap.last_seq or high, high))
        found: list[Any] = self._db.execute(
            f"{_IDS} SELECT producer, iif(producer IS NULL, source, NULL) AS source, count(*),"
            f" min(n) FILTER (WHERE {_NUMBERED}), max(n) FILTER (WHERE {_NUMBERED}), max(seq)"
            " FROM ids GROUP BY 1, 2",
            (low, high),
        ).fetchall()
        if sum(row[2] for row in found) != high - low + 1:
            self._find_holes(low, high)
        self._tally.unowned = merged(self._tally.unowned)
        for producer, source, events, first_n, last_n, last_seq in found:
            if producer is None:
                self._foreign(source).stored += events
                continue
            token = self._names[producer]
            held = self._tally.holds(token)
            held.stored += events
            held.source = held.source or self._first_source(producer, low, high)
            if first_n is None or not PRODUCER.fullmatch(token):
                continue  # a foreign id that looks like a numbered one
            if first_n <= held.last_n:
                held.skips.clear()
            is_run = first_n == held.last_n + 1 and last_n - first_n == events - 1
            if not is_run and between(self._tally.unowned, held.last_seq, last_seq):
                self._skips(producer, token, low, high)
            held.last_n, held.last_seq = max(held.last_n, last_n), last_seq

    def _skips(self, producer: int, token: str, low: int, high: int) -> None:
        """Note which numbers of a process are nowhere between two of its events, where events are
        lost between these too."""
        held = self._tally.holds(token)
        last_n, last_seq = held.last_n, held.last_seq
        for n, seq in self._db.execute(
            f"{_IDS} SELECT n, seq FROM ids WHERE producer = ?3 AND {_NUMBERED} ORDER BY seq",
            (low, high, producer),
        ):
            if n <= last_n:  # it comes late, so that order tells nothing of those before
                held.skips.clear()
            last_seq = last_seq or self._seq_before(token, seq)
            if n > last_n + 1 and between(self._tally.unowned, last_seq, seq):
                numbers = n - last_n - 1 - self._rejected(token, last_n + 1, n - 1)
                if numbers:
                    held.skips.append((numbers, last_seq, seq))
            last_n, last_seq = max(last_n, n), seq

    def _seq_before(self, token: str, seq: int) -> int:
        """A seq from before a process began, the first event of which is at `seq`: by the time in
        its token (docs/protocol.md). 0 if that tells nothing."""
        began_at = int(token[:12], 16) / 1_000 - CLOCK_SLACK_S
        row: Any = self._db.execute(
            "SELECT first_seq FROM _batch WHERE first_seq < ?1 AND received_at < ?2 AND ?2 <="
            " (SELECT received_at FROM _batch WHERE first_seq <= ?1"
            "  ORDER BY first_seq DESC LIMIT 1)"
            " ORDER BY first_seq DESC LIMIT 1",
            (seq, began_at),
        ).fetchone()
        return row[0] if row else 0

    def _rejected(self, token: str, first_n: int, last_n: int) -> int:
        """How many of these numbers the bus refused."""
        if self._refused is None:
            self._refused = {}
            if self._has("_rows_rejected_events", "event_id", "raw_bytes"):
                sql = "SELECT DISTINCT event_id FROM _rows_rejected_events"
                for (event_id,) in self._db.execute(sql):
                    refused, n = _split(event_id)
                    self._refused.setdefault(refused, []).append(n)
        return sum(first_n <= n <= last_n for n in self._refused.get(token, ()))

    def _first_source(self, producer: int, low: int, high: int) -> str:
        row: Any = self._db.execute(
            f"{_IDS} SELECT source FROM ids WHERE producer = ?3 LIMIT 1",
            (low, high, producer),
        ).fetchone()
        return self._names[row[0]] if row[0] is not None else ""

    def _foreign(self, source: int | None) -> Held:
        return self._tally.holds_foreign("" if source is None else self._names[source])

    def _refusals(self, first: int, last: int) -> None:
        """What the bus and the bridges refused; from their accounts of it."""
        if not self._has("_rows_rejected_events", "event_id", "raw_bytes"):
            return
        for producer, own_source, rule, event_id, source, cut in self._db.execute(
            "SELECT (SELECT b.producer FROM _batch b WHERE b.first_seq <= r.seq"
            "  ORDER BY b.first_seq DESC LIMIT 1),"
            " e.source, r.rule, r.event_id, r.source, octet_length(r.raw) < r.raw_bytes"
            " FROM _rows_rejected_events r JOIN _event e ON e.seq = r.seq"
            " WHERE r.seq BETWEEN ? AND ? ORDER BY r.seq",
            (first, last),
        ):
            tally = self._tally
            tally.truncated += bool(cut)
            conflict = rule is not None and self._names[rule] == "conflict"
            token, n = _split(event_id)
            if own_source is None or self._names[own_source] != "event_bus":
                tally.holds(self._names[producer] if producer else "").refused += 1
            elif not token:
                held = self._foreign(source)
                held.conflicts += conflict
                held.rejected += not conflict
            elif conflict:
                tally.holds(token).conflicts += 1
            else:
                held = tally.holds(token)
                if n > held.rejected_n:  # or it was sent again, as its answer was lost
                    held.rejected += 1
                    held.rejected_n = n

    def _losses(self, first: int, last: int) -> None:
        """What bridges said that they dropped."""
        if not self._has("_rows_bridge_loss", "dropped_total", "reason"):
            return
        for token, total, reason in self._db.execute(
            "SELECT producer, coalesce(dropped_total, dropped), reason FROM _rows_bridge_loss"
            " WHERE seq BETWEEN ? AND ? ORDER BY seq",
            (first, last),
        ):
            held = self._tally.holds(str(token))
            if isinstance(total, int) and total > held.dropped:
                held.dropped = total
                held.reason = self._names[reason] if isinstance(reason, int) else ""

    def _has(self, table: str, *columns: str) -> bool:
        found = {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}
        return found.issuperset(columns)

    def _load(self, runs: Iterable[Run], opaque: Iterable[tuple[str, int]]) -> None:
        ids: dict[str, int] = {}

        def rows() -> Iterator[tuple[int, int, str, int, int]]:
            for token, first_n, last_n, first_seq in runs:
                if token not in ids:
                    row: Any = self._db.execute(
                        "SELECT id FROM _name WHERE name = ?", (token,)
                    ).fetchone()
                    ids[token] = row[0] if row else -1
                yield first_seq, first_seq + last_n - first_n, token, ids[token], first_n

        self._db.executemany("INSERT OR IGNORE INTO temp.run VALUES (?,?,?,?,?)", rows())
        self._db.executemany("INSERT OR IGNORE INTO temp.opaque VALUES (?2,?1)", opaque)

    def _compare(self, first: int, last: int) -> None:
        """Note rows that hold another event than the journal says."""
        differing = self._db.execute(
            f"{_BATCHES} SELECT e.seq, r.token FROM b CROSS JOIN temp.run r ON r.first_seq BETWEEN"
            "  coalesce((SELECT max(first_seq) FROM temp.run WHERE first_seq <= b.first_seq),"
            "   b.first_seq) AND b.last_seq AND r.last_seq >= b.first_seq"
            " CROSS JOIN _event e ON e.seq"
            "  BETWEEN max(b.first_seq, r.first_seq, ?1) AND min(b.last_seq, r.last_seq)"
            " WHERE b.producer IS NOT r.producer"
            "  OR b.n - b.first_seq IS NOT r.first_n - r.first_seq"
            " UNION ALL"
            " SELECT e.seq, NULL FROM temp.opaque o CROSS JOIN events e ON e.seq = o.seq"
            " WHERE o.seq BETWEEN ?1 AND ?2 AND e.event_id IS NOT o.event_id ORDER BY 1",
            (first, last),
        )
        for seq, token in differing:
            if token is not None:
                self._tally.holds(token).missing += 1
            self._note("differs", seq, seq)

    def _find_holes(self, low: int, high: int) -> None:
        """Note what has no row and lies in no recorded gap."""
        for first, last in self._db.execute(
            "SELECT previous + 1, a - 1 FROM (SELECT a, max(b) OVER"
            " (ORDER BY a, b ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS previous FROM"
            " (SELECT ?1 - 1 AS a, ?1 - 1 AS b"
            "  UNION ALL SELECT seq, seq FROM _event WHERE seq BETWEEN ?1 AND ?2"
            "  UNION ALL SELECT max(first_seq, ?1), min(last_seq, ?2) FROM _gap"
            "   WHERE last_seq >= ?1 AND first_seq <= ?2"
            "  UNION ALL SELECT ?2 + 1, ?2 + 1)) WHERE a > previous + 1",
            (low, high),
        ):
            self._note("hole", first, last)
            self._miss(first, last)

    def _note(self, kind: str, first: int, last: int) -> None:
        events = last - first + 1
        before = self._tally.faults[-1] if self._tally.faults else None
        if before is not None and (before.kind, before.last_seq) == (kind, first - 1):
            before.last_seq = last
            before.events += events
        else:
            self._tally.faults.append(
                Range(kind=kind, first_seq=first, last_seq=last, events=events)
            )

    def _miss(self, low: int, high: int) -> None:
        """Count the events of a range without rows as missing, whose they are by the journal."""
        owned: Seqs = []
        for token, first, last in self._db.execute(
            "SELECT token, max(first_seq, ?1), min(last_seq, ?2) FROM temp.run"
            " WHERE last_seq >= ?1 AND first_seq <= ?2 UNION ALL"
            " SELECT NULL, seq, seq FROM temp.opaque WHERE seq BETWEEN ?1 AND ?2",
            (low, high),
        ):
            owned.append((first, last))
            if token is not None:
                self._tally.holds(token).missing += last - first + 1
        self._tally.unowned += without([(low, high)], merged(owned))


def gaps(db: apsw.Connection, first: int, last: int, left_out: Seqs | None = None) -> list[Range]:
    """Recorded gaps that touch the range, with how many events in it they hide; what was
    `left_out` as ranges of that kind."""
    columns = {row[1] for row in db.execute("PRAGMA table_info(_gap)")}
    reason = "reason" if "reason" in columns else "''"
    found = []
    rows: Any = db.execute(
        f"SELECT first_seq, last_seq, found_at, {reason}"
        " FROM _gap WHERE last_seq >= ?1 AND first_seq <= ?2 ORDER BY first_seq",
        (first, last),
    ).fetchall()
    for a, b, at, why in rows:
        gap = Range(kind="gap", first_seq=a, last_seq=b, at=at, reason=why or "")
        found += tell_apart(gap, left_out or [])
    for r in found:
        within = max(r.first_seq, first), min(r.last_seq or last, last)
        stored: Any = db.execute(
            "SELECT count(*) FROM _event WHERE seq BETWEEN ? AND ?", within
        ).fetchone()
        r.events = max(0, within[1] - within[0] + 1 - stored[0])
    return found


def journal_losses(db: apsw.Connection) -> list[Range]:
    """What the bus told that its journal lost; as far as it is missing here, it is a gap."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'journal_loss'").fetchone():
        return []
    return [
        lost_by_journal(a, b, at, str(reason))
        for a, b, at, reason in db.execute(
            "SELECT l.first_seq, l.last_seq, e.timestamp, l.reason FROM journal_loss l"
            " JOIN _event e ON e.seq = l.seq ORDER BY l.first_seq"
        )
    ]


def _split(event_id: Any) -> tuple[str, int]:
    """Token and number of an id that names its process; ("", 0) of any other."""
    native = NATIVE_ID.fullmatch(event_id) if isinstance(event_id, str) else None
    return (native[1], int(native[2])) if native else ("", 0)
