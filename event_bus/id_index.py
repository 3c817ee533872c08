"""Where ids lie, of events that a new journal takes over and of those that only the database has
left: so that one that is sent again is recognised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import apsw

from event_bus import database
from event_bus.envelope import NATIVE_ID
from event_bus.journal import Journal
from event_bus.journal_format import Run

MAX_INDEXED_EVENTS = 1_000_000
"""Of those that only the database has: more than can be on their way to the bus once more. They
take some seconds."""


def index_stored(journal: Journal, db: Path, after_seq: int, clock: Callable[[], float]) -> None:
    """Learn the ids of events that only the database has, behind the last one that the journal
    has: a sender that was not answered sends them again."""
    found: list[tuple[int, str]] = []
    with contextlib.suppress(apsw.Error):  # what cannot be read is not known
        connection = database.connect(db, database.READ_ONLY, busy_timeout_ms=500)
        with contextlib.closing(connection):
            rows: list[Any] = connection.execute(
                "SELECT seq, event_id FROM events WHERE seq > ? ORDER BY seq DESC LIMIT ?",
                (after_seq, MAX_INDEXED_EVENTS),
            ).fetchall()
            found = [(seq, event_id) for seq, event_id in rows if isinstance(event_id, str)]
    if found:
        first_seq = found[-1][0]
        seqs = {event_id: seq for seq, event_id in found}  # each once, though it is stored twice
        ids = sorted((seq - first_seq, event_id) for event_id, seq in seqs.items())
        runs, opaque_ids = places(ids, journal)
        journal.index(first_seq, clock(), runs=runs, opaque_ids=opaque_ids)


def places(
    ids: Iterable[tuple[int, str]], journal: Journal
) -> tuple[list[Run], list[tuple[str, int]]]:
    """What events add to the index of ids, as `Journal.append` takes it; given are the index of
    each, rising, and its id."""
    runs: list[Run] = []
    opaque_ids: list[tuple[str, int]] = []
    for index, event_id in ids:
        native = NATIVE_ID.fullmatch(event_id)
        if native is None:
            if journal.seq_of_opaque(event_id) is None:
                opaque_ids.append((event_id, index))
            continue
        producer, n = journal.producer(native[1]), int(native[2])
        taker, first, last, at = runs[-1] if runs else (None, 0, 0, 0)
        # Events of others may lie between, and then it is a run of its own.
        if taker is producer and last == n - 1 and at + n - first == index:
            runs[-1] = (producer, first, n, at)
        elif journal.seq_of_native(producer, n) is None:
            runs.append((producer, n, n, index))
        if not producer.last_n:  # no row of it: what came before was trimmed, or is lost
            producer.forgotten_n = n - 1
        producer.last_n = max(producer.last_n, n)
    return runs, opaque_ids
