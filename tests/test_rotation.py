"""Which backups make room for a newer one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from collector.manifest import DATABASE, DatabaseFacts, JournalFacts, Manifest
from collector.rotation import rotate
from event_bus import database


def backup(folder: Path, name: str, journal_id: str, *, stored: int, last: int) -> Path:
    """One of a journal that goes from 1 to `last`, with a database that goes to `stored`."""
    path = folder / name
    path.mkdir()
    (path / DATABASE).touch()
    with contextlib.closing(database.connect(path / DATABASE)) as db:
        db.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, event_id TEXT)")
        ids = [(seq, f"{journal_id}-{seq}") for seq in range(1, stored + 1)]
        db.executemany("INSERT INTO events VALUES (?,?)", ids)
    Manifest(
        version="0",
        made_at=0.0,
        home="/home",
        database=DatabaseFacts(
            journal_id=journal_id,
            last_seq=stored,
            events=stored,
            gaps=0,
            holes=0,
            held=[(1, stored)],
            last_event=ids[-1],
        ),
        journal=JournalFacts(
            journal_id=journal_id,
            first_seq=1,
            last_seq=last,
            events=last,
            lost=0,
            held=[(1, last)],
        ),
        files={},
    ).write(path)
    return path


@pytest.mark.parametrize("journal_id", ["same", "other"])
def test_events_of_a_journal_that_was_begun_anew_do_not_make_up_for_those_of_the_one_before(
    tmp_path: Path, journal_id: str
) -> None:
    older = backup(tmp_path, "2026-01-31T12-00-00Z", "same", stored=5, last=5)
    # Its collector has not come to seq 5 yet, so that the last event of both cannot be compared.
    newer = backup(tmp_path, "2026-02-01T12-00-00Z", journal_id, stored=3, last=8)
    removed, kept = rotate(tmp_path, 1, newer)
    if journal_id == "same":
        assert (removed, kept) == ([older], [])
    else:
        assert removed == []
        assert [(k.path, k.seqs) for k in kept] == [(older, [(1, 5)])]
