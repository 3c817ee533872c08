"""Where moments lie in the database, found by its keys alone: no query here reads it whole."""

from __future__ import annotations

from functools import cached_property

import apsw

from collector.doctor.context import row
from collector.doctor.finding import CannotTell
from collector.layout import is_blank

DAY_S = 86_400.0


class History:
    """`db` is a connection to the events database. Raises CannotTell if it holds no events."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        last = None if is_blank(db) else row(db, "SELECT max(seq) FROM _event")[0]
        if last is None:
            raise CannotTell("there are no events in the database yet")
        self.last_seq: int = last

    @cached_property
    def first_at(self) -> float:
        """When the oldest event that is here was received."""
        return float(row(self.db, "SELECT received_at FROM _batch ORDER BY first_seq LIMIT 1")[0])

    def received_at(self, seq: int) -> float:
        found = row(
            self.db,
            "SELECT received_at FROM _batch WHERE first_seq <= ? ORDER BY first_seq DESC LIMIT 1",
            seq,
        )
        return float(found[0]) if found else 0.0

    def seq_at(self, when: float) -> int:
        """The first seq received at or after that time; one past the end if there is none."""
        low, high = 1, self.last_seq + 1
        while low < high:
            middle = (low + high) // 2
            if self.received_at(middle) < when:
                low = middle + 1
            else:
                high = middle
        return low

    def name(self, name_id: int | None) -> str:
        if name_id is None:
            return "no source"
        return str(row(self.db, "SELECT name FROM _name WHERE id = ?", name_id)[0])
