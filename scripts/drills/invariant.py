"""INV: what must hold after every fault, read from the files with Python's own sqlite3.

Nothing here asks the bus or uses its code: the publishers' records say what was promised, the
journal and the database what became of it.
"""

from __future__ import annotations

import json
import re
import sqlite3
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import Record

OWN_TYPES = ("bridge_loss", "event_rejected", "journal_loss")
_ID = re.compile(rb'\{"event_id":"((?:[^"\\]|\\.)*)"')
_NATIVE = re.compile(r"([0-9a-f]{20})-([1-9][0-9]*)")
MAX_BREACHES = 20


@dataclass
class Figures:
    """Of events. `published` are calls that gave an id back, `acked` those the bus promised to
    keep, `waiting` acked by nobody yet and in memory or spool, `killed` those that were in the
    memory of a publisher that was SIGKILLed (not promised), `dropped` counted by the bridges,
    `lost` those that the drill's fault destroyed, as it says itself; `stored` rows of publishers,
    `duplicates` ids stored more than once, `holes` seqs that are missing and were not reported
    lost."""

    published: int = 0
    acked: int = 0
    stored: int = 0
    waiting: int = 0
    killed: int = 0
    dropped: int = 0
    lost: int = 0
    refused: int = 0
    duplicates: int = 0
    holes: int = 0
    slow_calls: int = 0
    slowest_call_ms: float = 0.0
    slowest_blocked_ms: float = 0.0


@dataclass
class Lost:
    """What the drill's fault destroys, to the event. Nothing else may be missing.

    `gaps` are the ranges of seq that the database may lack, if it names them in `_gap`; `cuts`
    those that the journal may lack between two batches, if it names them in `lost_range`; `ids`
    the acknowledged events that were nowhere else.
    """

    gaps: list[tuple[int, int]] = field(default_factory=list)
    cuts: list[tuple[int, int]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)


@dataclass
class Verdict:
    figures: Figures = field(default_factory=Figures)
    breaches: list[str] = field(default_factory=list)


def check(
    *,
    journal: Path,
    db: Path,
    spool: Path,
    records: Iterable[Record] | None,
    lost: Lost | None = None,
) -> Verdict:
    """Compare everything. Call it when all publishers have ended and both daemons are stopped.

    `records` is None if the drill has publishers of its own; a load that published nothing is a
    breach.
    """
    verdict = Verdict()
    lost = lost or Lost()
    with _open(db) as database:
        _check_integrity(database, db, verdict)
        stored = list(database.execute("SELECT seq, event_id, event_type FROM events ORDER BY seq"))
        calls = dict(
            database.execute("SELECT event_id, causation_id FROM events WHERE source = 'drill'")
        )
        # Without an id is what could not be read, such as the line that a kill cut short.
        refused = {i for (i,) in database.execute("SELECT event_id FROM rejected_events") if i}
        gaps = list(database.execute("SELECT first_seq, last_seq FROM _gap"))
    _check_seqs([s for s, _, _ in stored], gaps, lost.gaps, verdict)
    ids = Counter(i for _, i, _ in stored)
    twice = [i for i, n in ids.items() if n > 1]
    verdict.figures.duplicates = sum(ids[i] - 1 for i in twice)
    if twice:
        _breach(verdict, f"{len(twice)} ids are stored more than once, such as {twice[0]}")
    with _open(journal) as log:
        _check_integrity(log, journal, verdict)
        _check_journal(log, {s: i for s, i, _ in stored}, gaps, lost.cuts, verdict)
    spooled = _spooled(spool)
    by_token = _by_token(stored)
    # Not acknowledged when it was destroyed, it was sent again, and is there.
    gone = lost.ids.difference(ids)
    for record in records or ():
        _check_publisher(
            record, by_token.get(record.token, []), calls, refused, gone, spooled, verdict
        )
    if not (stored if records is None else verdict.figures.published):
        _breach(verdict, "nothing was published")
    return verdict


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: the drill did not get that far")
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def _breach(verdict: Verdict, text: str) -> None:
    if len(verdict.breaches) < MAX_BREACHES:
        verdict.breaches.append(text)


def _check_integrity(db: sqlite3.Connection, path: Path, verdict: Verdict) -> None:
    result = db.execute("PRAGMA integrity_check").fetchone()[0]
    if result != "ok":
        _breach(verdict, f"integrity_check of {path.name}: {result}")


def _check_seqs(
    seqs: list[int], gaps: list[tuple[int, int]], lost: list[tuple[int, int]], verdict: Verdict
) -> None:
    """Every seq from 1 to the last is stored, or in a gap that the drill expects."""
    for gap in gaps:
        if not any(first <= gap[0] and gap[1] <= last for first, last in lost):
            _breach(verdict, f"the database has an unexpected gap: seq {gap[0]} to {gap[1]}")
    top = max([seqs[-1] if seqs else 0, *(last for _, last in gaps)])
    missing = set(range(1, top + 1)).difference(seqs, *(range(a, b + 1) for a, b in gaps))
    verdict.figures.holes = len(missing)
    if missing:
        _breach(verdict, f"{len(missing)} seqs are missing in the database, from {min(missing)}")


def _check_journal(
    log: sqlite3.Connection,
    stored: dict[int, str],
    gaps: list[tuple[int, int]],
    cuts: list[tuple[int, int]],
    verdict: Verdict,
) -> None:
    """Its batches follow each other, are what was written, and are what the database has."""
    named = list(
        log.execute(
            "SELECT first_seq, coalesce(last_seq, first_seq) FROM lost_range ORDER BY first_seq"
        )
    )
    expected = None
    for first_seq, count, received_at, crc, body in log.execute(
        "SELECT * FROM batch ORDER BY first_seq"
    ):
        if expected is not None and first_seq != expected:
            hole = (expected, first_seq - 1)
            if hole not in cuts:
                _breach(verdict, f"the journal goes from seq {expected - 1} to {first_seq}")
            elif not _covers(named, *hole):
                _breach(verdict, f"the journal does not name seq {hole[0]} to {hole[1]} as lost")
        expected = first_seq + count
        lines = body.split(b"\n")[:-1]
        head = zlib.crc32(struct.pack("<qqd", first_seq, count, received_at))
        if zlib.crc32(body, head) != crc or len(lines) != count:
            if not any(a <= first_seq and first_seq + count - 1 <= b for a, b in gaps):
                _breach(verdict, f"the journal is damaged from seq {first_seq} on, and no gap")
            continue
        for seq, line in enumerate(lines, first_seq):
            match = _ID.match(line)
            event_id = json.loads(b'"' + match[1] + b'"') if match else None
            if stored.get(seq) != event_id:
                _breach(
                    verdict,
                    f"seq {seq} is {event_id} in the journal and {stored.get(seq)} in the database",
                )
    last = max(stored, default=0)
    if expected is not None and last >= expected:
        _breach(verdict, f"the database goes to seq {last}, the journal to {expected - 1}")


def _covers(ranges: list[tuple[int, int]], first: int, last: int) -> bool:
    """Whether ranges, in order, leave nothing out from `first` to `last`."""
    for low, high in ranges:
        if low <= first <= high:
            first = high + 1
    return first > last


def _by_token(stored: list[tuple[int, str, str]]) -> dict[str, list[tuple[int, str, bool]]]:
    """The stored events of each native producer in order of seq: (n, id, is the bridge's own)."""
    result: dict[str, list[tuple[int, str, bool]]] = {}
    for _, event_id, event_type in stored:
        match = _NATIVE.fullmatch(event_id)
        if match:
            own = event_type in OWN_TYPES
            result.setdefault(match[1], []).append((int(match[2]), event_id, own))
    return result


def _spooled(spool: Path) -> Counter[str]:
    """Events in spool files, by token."""
    return Counter({p.stem: p.read_bytes().count(b"\n") for p in spool.glob("*.ndjson")})


def _numbers(ids: set[str], token: str) -> set[int]:
    """n of the ids of this producer."""
    return {int(i[21:]) for i in ids if token and i.startswith(f"{token}-")}


def _check_publisher(
    record: Record,
    stored: list[tuple[int, str, bool]],
    calls: dict[str, Any],
    refused: set[str],
    destroyed: set[str],
    spooled: Counter[str],
    verdict: Verdict,
) -> None:
    name = record.path.name
    numbers = [n for n, _, _ in stored]
    excused = _numbers(destroyed, record.token)
    kept = set(numbers) | _numbers(refused, record.token) | excused
    own = sum(1 for _, _, is_own in stored if is_own)
    mine = len(stored) - own
    overflowed = record["attempted"] - record["returned"] - record["refused"]
    lost = min(record["dropped"], record["dropped"] - overflowed)
    if lost < 0 and record["finished"]:
        _breach(verdict, f"{-lost} calls of {name} gave no id, and nothing counted them")
    if lost <= 0:
        missing = [n for n in range(1, record["acked"] + 1) if n not in kept]
    else:  # then acknowledgements have no clean front any more: compare counts
        missing = list(range(max(0, record["acked"] - len(kept))))
    if missing:
        _breach(
            verdict,
            f"{len(missing)} acknowledged events of {name} are not stored, from"
            f" {record.token}-{missing[0]}",
        )
    if numbers != sorted(numbers):
        _breach(verdict, f"events of {name} are not in order")
    order = [int(calls[i]) for _, i, is_own in stored if not is_own]
    if order != sorted(set(order)):
        _breach(verdict, f"calls of {name} are stored out of order or twice")
    if mine > record["attempted"]:
        _breach(verdict, f"{mine} events of {name} are stored, it published {record['attempted']}")
    waiting = spooled[record.token]
    gone = record["returned"] - mine - len(kept - set(numbers)) - waiting - max(0, lost)
    if record["finished"] and gone > 0:
        _breach(
            verdict,
            f"{name} published {record['returned']}: {mine} are stored, {waiting} wait, {lost} were"
            f" counted as dropped, {gone} are unaccounted for",
        )
    if record["raised"]:
        _breach(verdict, f"{record['raised']} calls of {name} raised into the caller")
    if record["blocked"]:
        _breach(
            verdict,
            f"{record['blocked']} calls of {name} took over 20 ms, the slowest"
            f" {record['slowest_blocked_us'] / 1000:.0f} ms, with a CPU at hand",
        )
    figures = verdict.figures
    figures.published += record["returned"]
    figures.acked += record["acked"]
    figures.stored += mine
    figures.waiting += waiting
    figures.killed += 0 if record["finished"] else max(0, gone)
    figures.dropped += record["dropped"]
    figures.lost += len(excused)
    figures.refused += record["refused"]
    figures.slow_calls += record["slow"]
    figures.slowest_call_ms = max(figures.slowest_call_ms, record["slowest_us"] / 1000)
    figures.slowest_blocked_ms = max(
        figures.slowest_blocked_ms, record["slowest_blocked_us"] / 1000
    )
