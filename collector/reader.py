"""The readers' side of bitten_events.db: read-only, never in the writer's way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import apsw
import msgspec

from collector.layout import LAST_SEQ, check_version
from collector.relations import Relation
from event_bus import database
from event_bus.errors import DatabaseError, DatabaseMissing

MAX_LIMIT = (1 << 63) - 1


class Filters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What `query` can ask for. None asks for nothing."""

    event_type: str | None = None
    start_time: float | None = None
    end_time: float | None = None
    source: str | None = None
    user_id: str | int | None = None
    correlation_id: str | int | None = None
    symbol: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=0, le=MAX_LIMIT)] = 100


def _filters(given: dict[str, Any]) -> Filters:
    try:
        return msgspec.convert(given, Filters)
    except msgspec.ValidationError as e:
        words = str(e).replace(" - at `$.", " in `").replace("Object contains", "there is")
        raise ValueError(f"cannot query: {words}") from None


class Reader:
    """A read-only connection. Raises DatabaseError if there is nothing to read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise self._nothing()
        try:
            self.db = database.connect(path, database.READ_ONLY)
            check_version(self.db, path)
            made = self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone()
        except apsw.Error as e:
            raise DatabaseError(f"cannot read {path}: {e}", hint=database.reading_hint(e)) from e
        if made is None:  # the collector is about to
            raise self._nothing()

    def _nothing(self) -> DatabaseMissing:
        return DatabaseMissing(
            f"there is no database at {self.path} yet",
            hint="start the collector with `bitten up`, `bitten collect` or pm2",
        )

    def query(self, **given: Any) -> list[dict[str, Any]]:
        """The newest events that match, newest first; see DataCollector.query_events."""
        filters = _filters(given)
        symbol = filters.symbol
        where = {
            "event_type = ?": filters.event_type,
            "timestamp >= ?": filters.start_time,
            "timestamp < ?": filters.end_time,
            "source = ?": filters.source,
            "user_id = ?": filters.user_id,
            "correlation_id = ?": filters.correlation_id,
        }
        conditions = [sql for sql, value in where.items() if value is not None]
        values = [value for value in where.values() if value is not None]
        if symbol is not None:
            tables = self._tables_with("symbol", filters.event_type)
            arms = " UNION ALL ".join(f'SELECT seq FROM "{t}" WHERE symbol = ?' for t in tables)
            conditions.append(f"seq IN ({arms})" if arms else "0")
            values += [symbol] * len(tables)
        sql = "SELECT * FROM events"
        if conditions:
            sql += f" WHERE {' AND '.join(conditions)}"
        events = self.rows(f"{sql} ORDER BY seq DESC LIMIT ?", *values, filters.limit)
        return [event | {"data": msgspec.json.decode(event["data"])} for event in events]

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """The rows of a query as dictionaries. Raises DatabaseError."""
        try:
            cursor = self.db.execute(sql, values)
            result = []
            names: list[str] = []
            for row in cursor:
                names = names or [d[0] for d in cursor.get_description()]
                result.append(dict(zip(names, row, strict=True)))
            return result
        except apsw.Error as e:
            raise DatabaseError(
                f"cannot read {self.path}: {e}", hint=database.reading_hint(e)
            ) from e

    def last_seq(self) -> int:
        """Everything up to here is stored or recorded as a gap."""
        return int(self.rows(f"{LAST_SEQ} AS seq")[0]["seq"])

    def stats(self) -> dict[str, Any]:
        """See DataCollector.get_stats."""
        by_type = {
            row["name"]: row["stored"]
            for row in self.rows(
                "SELECT name, stored FROM _count JOIN _name ON id = type ORDER BY stored DESC"
            )
        }
        received = self.rows("SELECT value FROM _meta WHERE key = 'events_received'")
        wal = Path(f"{self.path}-wal")
        return {
            "events_received": received[0]["value"] if received else 0,
            "events_stored": sum(by_type.values()),
            "events_rejected": by_type.get("event_rejected", 0),
            "last_seq": self.last_seq(),
            "gaps": self.rows("SELECT * FROM _gap ORDER BY first_seq"),
            "by_type": by_type,
            "database": str(self.path),
            "database_bytes": self.path.stat().st_size,
            "wal_bytes": wal.stat().st_size if wal.exists() else 0,
            "read_at": time.time(),
        }

    def _tables_with(self, column: str, event_type: str | None) -> list[str]:
        relations = [
            msgspec.json.decode(row["definition"], type=Relation)
            for row in self.rows("SELECT definition FROM _relation")
        ]
        return [
            r.table
            for r in relations
            if event_type in (None, r.event_type) and column in {c.name for c in r.columns}
        ]

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
