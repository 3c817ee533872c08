"""Three questions that the demo's database answers, in SQL for any `sqlite3` from 3.31 on."""

from __future__ import annotations

import contextlib
import shlex
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from event_bus.errors import DatabaseError

BUSY_TIMEOUT_S = 5.0


class Query(NamedTuple):
    """A question and the SQL that answers it. No double quotes in it: a shell gets it in those."""

    question: str
    sql: str

    def command(self, db: Path) -> str:
        return f'sqlite3 {shlex.quote(str(db))} "\n{self.sql}"'


class Answer(NamedTuple):
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


PATTERN_PROFIT = Query(
    "Which pattern earned money?",
    """\
SELECT s.pattern_type, count(*) AS trades,
       round(avg(s.confidence), 1) AS confidence,
       round(sum(json_extract(b.data, '$.profit')), 2) AS profit
FROM signal_events s JOIN events b ON b.correlation_id = s.correlation_id
WHERE b.event_type = 'balance_update'
GROUP BY s.pattern_type ORDER BY profit DESC""",
)

DAILY_RANGE = Query(
    "How far did the price move, day by day?",
    """\
SELECT date(created_at, 'unixepoch') AS day, min(bid) AS low, max(bid) AS high,
       round((max(bid) - min(bid)) * 10000, 1) AS pips, count(*) AS ticks
FROM market_data WHERE created_at > strftime('%s', 'now', '-7 days')
GROUP BY day ORDER BY day DESC""",
)

_LAST_SIGNAL = """\
SELECT correlation_id FROM events WHERE event_type = 'balance_update'
ORDER BY seq DESC LIMIT 1"""


def trade_story(db: Path) -> Query | None:
    """The query that tells the last trade that is closed; None if there is none."""
    rows = run(db, _LAST_SIGNAL).rows
    if not rows:
        return None
    return Query(
        "The story of one trade: all of it has one correlation id",
        f"""\
SELECT datetime(timestamp, 'unixepoch') AS utc, event_type, user_id,
       json_extract(data, '$.direction') AS side,
       json_extract(data, '$.confidence') AS conf,
       json_extract(data, '$.open_price') AS price,
       json_extract(data, '$.profit') AS profit
FROM events WHERE correlation_id = '{rows[0][0]}' ORDER BY seq""",
    )


def run(db: Path, sql: str) -> Answer:
    """Run SQL on the database, for reading only, with the SQLite that Python brings.

    Raises DatabaseError.
    """
    try:
        connection = sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
        with contextlib.closing(connection):
            cursor = connection.execute(sql)
            columns = tuple(description[0] for description in cursor.description)
            return Answer(columns, cursor.fetchall())
    except sqlite3.Error as e:
        raise DatabaseError(f"cannot read {db}: {e}") from e
