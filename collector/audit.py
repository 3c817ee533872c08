"""The loss ledger: what was published, what is stored, what waits, and what is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import msgspec

from collector.reader import Reader
from event_bus import database
from event_bus.errors import BusUnavailable, DatabaseError
from event_bus.protocol import Client
from event_bus.settings import Settings

MAX_RANGES = 20


def audit(settings: Settings) -> dict[str, Any]:
    """Compare journal, database and spool.

    Of events: `published` are in the journal or were, `stored` in the database, `waiting` on
    their way from the one to the other, `spooled` on disk for a bus that was away, `holes` missing
    between stored ones, `dropped` given up by bridges whose bounds were reached. `lost` is
    holes + dropped, and `verdict` says it in words. `rejected` and `conflicts` are kept in
    rejected_events; `duplicates` (since the bus started; None while it is away) were recognised.
    Raises DatabaseError if there is no database.
    """
    bus = _bus_status(settings) or _journal_status(settings.journal)
    with Reader(settings.db) as reader:
        count = reader.rows("SELECT count(*) AS n FROM _event")[0]["n"]
        last = reader.last_seq()
        holes = last - count
        rejected = reader.rows(
            "SELECT count(*) AS n, sum(rule = 'conflict') AS conflicts FROM rejected_events"
        )[0]
        announced = reader.rows(
            "SELECT producer, max(dropped_total) AS n FROM bridge_loss GROUP BY producer"
        )
        stored_by = {
            row["token"]: row["n"]
            for row in reader.rows(
                "SELECT name AS token, n FROM (SELECT producer, count(*) AS n FROM _event"
                " WHERE producer IS NOT NULL GROUP BY producer) JOIN _name ON id = producer"
            )
        }
        ranges = _missing_ranges(reader, last) if holes else []
    dropped = {row["producer"]: row["n"] for row in announced}
    producers = []
    for p in bus["producers"]:
        report = _report(p["report"])
        token = p["producer"]
        dropped[token] = max(dropped.get(token) or 0, report.get("dropped", 0))
        producers.append(
            {
                "producer": token,
                "source": report.get("source"),
                "pid": report.get("pid"),
                "published": p["last_n"],
                "stored": stored_by.get(token, 0),
                "dropped": dropped[token],
                "refused": report.get("refused", 0),
                "last_seen": p["last_seen"],
            }
        )
    ledger: dict[str, Any] = {
        "published": bus["last_seq"],
        "stored": count,
        "waiting": max(0, bus["last_seq"] - last),
        "spooled": sum(map(_lines, settings.spool.glob("*.ndjson"))),
        "dropped": sum(dropped.values()),
        "rejected": rejected["n"],
        "conflicts": rejected["conflicts"] or 0,
        "duplicates": bus["duplicates"],
        "holes": holes,
        "missing": ranges,
        "bus": bus["state"],
        "producers": producers,
    }
    ledger["lost"] = ledger["holes"] + ledger["dropped"]
    ledger["verdict"] = _verdict(ledger)
    return ledger


def _verdict(ledger: dict[str, Any]) -> str:
    if not ledger["lost"]:
        return "0 lost"
    parts = []
    if ledger["dropped"]:
        parts.append(f"{ledger['dropped']} dropped by bridges that reached their bounds")
    if ledger["holes"]:
        shown = ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ledger["missing"])
        parts.append(f"{ledger['holes']} missing in the database (seq {shown})")
    return f"{ledger['lost']} lost: {'; '.join(parts)}"


def _missing_ranges(reader: Reader, last: int) -> list[list[int]]:
    """The first ranges of seq from 1 to `last` that are not stored."""
    return [
        [row["lo"], row["hi"]]
        for row in reader.rows(
            "SELECT previous + 1 AS lo, seq - 1 AS hi FROM"
            " (SELECT seq, lag(seq, 1, 0) OVER (ORDER BY seq) AS previous FROM"
            " (SELECT seq FROM _event UNION ALL SELECT ?))"
            " WHERE seq > previous + 1 LIMIT ?",
            last + 1,
            MAX_RANGES,
        )
    ]


def _bus_status(settings: Settings) -> dict[str, Any] | None:
    client = Client(settings.ingress_url)
    try:
        return client.status()
    except BusUnavailable:
        return None
    finally:
        client.close()


def _journal_status(path: Path) -> dict[str, Any]:
    """What the journal itself says while no bus runs on it."""
    if not path.exists():
        raise DatabaseError(f"there is no journal at {path} yet", hint="start the bus: `bitten up`")
    try:
        db = database.connect(path, database.READ_ONLY)
        last = _value(db, "SELECT max(first_seq + count - 1) FROM batch")
        trimmed = _value(db, "SELECT value FROM meta WHERE key = 'trimmed_seq'")
        producers = [
            {"producer": token, "last_n": n, "last_seen": seen, "report": report}
            for token, n, seen, report in db.execute(
                "SELECT token, last_n, last_seen, report FROM producer ORDER BY id"
            )
        ]
        db.close()
    except apsw.Error as e:
        raise DatabaseError(f"cannot read {path}: {e}") from e
    return {
        "state": "away",
        "last_seq": last if last is not None else trimmed,
        "duplicates": None,
        "producers": producers,
    }


def _lines(path: Path) -> int:
    """Events in a spool file; none in one that was delivered meanwhile."""
    try:
        with path.open("rb") as spool:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: spool.read(1 << 20), b""))
    except FileNotFoundError:
        return 0


def _value(db: apsw.Connection, sql: str) -> Any:
    row: Any = db.execute(sql).fetchone()
    return row[0]


def _report(text: str | None) -> dict[str, Any]:
    try:
        report = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {}
    return report if isinstance(report, dict) else {}
