"""A connection whose writes can be made to fail, put in place of `event_bus.database.connect`."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import apsw

from event_bus import database

real_connect = database.connect
_READS = ("SELECT", "PRAGMA", "ROLLBACK")


class Faults:
    """What the connections made by `connect` do next."""

    def __init__(self) -> None:
        self.connections: list[FaultyConnection] = []
        self._writes_left: int | None = None
        self._rolls_back = False

    def fail_write(self, number: int, *, rolls_back: bool) -> None:
        """The write after so many more finds the disk full. SQLite itself may undo the transaction
        then, or leave that to the program: both happen."""
        self._writes_left, self._rolls_back = number, rolls_back

    def clear(self) -> None:
        self._writes_left = None

    def before(self, db: apsw.Connection, sql: str) -> None:
        if self._writes_left is None or sql.lstrip().upper().startswith(_READS):
            return
        self._writes_left -= 1
        if self._writes_left < 0:
            self._writes_left = None
            if self._rolls_back and db.in_transaction:
                db.execute("ROLLBACK")
            raise apsw.FullError("database or disk is full")

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        connection = FaultyConnection(real_connect(*args, **kwargs), self)
        self.connections.append(connection)
        return connection


class FaultyConnection:
    def __init__(self, db: apsw.Connection, faults: Faults) -> None:
        self._db = db
        self._faults = faults

    def execute(self, sql: str, *values: Any) -> Any:
        self._faults.before(self._db, sql)
        return self._db.execute(sql, *values)

    def executemany(self, sql: str, rows: Any) -> Any:
        self._faults.before(self._db, sql)
        return self._db.executemany(sql, rows)

    def __enter__(self) -> FaultyConnection:
        self._db.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Any:
        return self._db.__exit__(kind, error, trace)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)
