"""The drills' checker sees each way in which an event can be lost, repeated or changed."""

from __future__ import annotations

import re
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import System
from invariant import Lost, Verdict, check
from record import Record, RecordWriter
from system import ONE_BATCH_AN_EVENT

EVENTS = 10
PUBLISH = f"""
from event_bus import event_bridge
for n in range({EVENTS}):
    event_id = event_bridge.user_action(
        {{"action": "x"}}, source="drill", causation_id=str(n))
assert event_bridge.flush(10)
print(event_id)
"""


class Finished:
    """A system in which a publisher has published and everything has ended."""

    def __init__(self, system: System, directory: Path) -> None:
        self.settings = system.settings
        bus, collector = system.start_bus(), system.start_collector()
        done = system.script(PUBLISH)
        assert done.returncode == 0, done.stderr
        system.wait_stored()
        for daemon in (collector, bus):
            daemon.terminate()
            assert daemon.wait(10) == 0
        self.path = directory / "record"
        self.record = RecordWriter(self.path)
        self.record.name(done.stdout[:20])
        for field in ("attempted", "returned", "acked"):
            self.record[field] = EVENTS
        self.record["finished"] = self.record["flushed"] = 1
        self.in_database(ONE_BATCH_AN_EVENT)

    def check(self, lost: Lost | None = None) -> Verdict:
        settings = self.settings
        return check(
            journal=settings.journal,
            db=settings.db,
            spool=settings.spool,
            records=[Record(self.path)],
            lost=lost,
        )

    def in_database(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.settings.db)) as db, db:
            return db.execute(sql).fetchall()

    def in_journal(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.settings.journal)) as db, db:
            return db.execute(sql).fetchall()


@pytest.fixture
def finished(system: System, tmp_path: Path) -> Finished:
    return Finished(system, tmp_path)


def test_what_is_whole_passes_and_is_counted(finished: Finished) -> None:
    verdict = finished.check()
    figures = verdict.figures
    assert not verdict.breaches
    assert (figures.published, figures.acked, figures.stored) == (EVENTS, EVENTS, EVENTS)
    assert (figures.waiting, figures.dropped, figures.duplicates, figures.holes) == (0, 0, 0, 0)


def seq_of(n: int) -> str:
    """SQL for where the publisher's event of that number is stored."""
    return f"(SELECT first_seq FROM _batch WHERE n = {n})"


FAULTS: dict[str, tuple[Callable[[Finished], Any], str]] = {
    "an acknowledged event is missing": (
        lambda f: f.record.__setitem__("acked", EVENTS + 1),
        "1 acknowledged events of record are not stored",
    ),
    "a published event is nowhere": (
        lambda f: f.record.__setitem__("returned", EVENTS + 2),
        "2 are unaccounted for",
    ),
    "more is stored than was published": (
        lambda f: f.record.__setitem__("attempted", EVENTS - 1),
        "events of record are stored, it published 9",
    ),
    "a row is gone": (
        lambda f: f.in_database("DELETE FROM _event WHERE seq = " + seq_of(5)),
        "1 seqs are missing in the database",
    ),
    "the last row is gone": (
        lambda f: f.in_database("DELETE FROM _event WHERE seq = " + seq_of(10)),
        "1 acknowledged events",
    ),
    "a row is there twice": (
        lambda f: (
            f.in_database(
                "INSERT INTO _event (seq, type, timestamp, data)"
                f" SELECT seq + 50, type, timestamp, data FROM _event WHERE seq = {seq_of(5)}"
            ),
            f.in_database(
                "INSERT INTO _batch"
                " SELECT first_seq + 50, received_at, producer, n FROM _batch"
                f" WHERE first_seq = {seq_of(5)}"
            ),
        ),
        "1 ids are stored more than once",
    ),
    "two rows have changed places": (
        lambda f: f.in_database("UPDATE _batch SET n = 13 - n WHERE n IN (6, 7)"),
        "events of record are not in order",
    ),
    "two calls have changed places": (
        lambda f: f.in_database(
            "UPDATE _event SET causation_id = 11 - causation_id"
            f" WHERE seq IN ({seq_of(6)}, {seq_of(7)})"
        ),
        "calls of record are stored out of order",
    ),
    "the journal is not what was written": (
        lambda f: f.in_journal("UPDATE batch SET body = CAST(replace(body, 'x', 'y') AS BLOB)"),
        "the journal is damaged",
    ),
    "a batch of the journal is gone": (
        lambda f: f.in_journal(
            "DELETE FROM batch WHERE first_seq = (SELECT max(first_seq) FROM batch)"
        ),
        "the journal",
    ),
    "a gap that nobody expects": (
        lambda f: f.in_database(
            "INSERT INTO _gap (first_seq, last_seq, found_at) VALUES (9, 9, 0)"
        ),
        "unexpected gap: seq 9 to 9",
    ),
    "a call raised": (
        lambda f: f.record.__setitem__("raised", 1),
        "1 calls of record raised",
    ),
    "a call blocked": (
        lambda f: f.record.__setitem__("blocked", 1),
        "took over 20 ms",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(finished: Finished, fault: str) -> None:
    plant, expected = FAULTS[fault]
    plant(finished)
    assert re.search(expected, "\n".join(finished.check().breaches)), finished.check()


def test_gap_does_not_excuse_a_hole_elsewhere(finished: Finished) -> None:
    finished.in_database("DELETE FROM _event WHERE seq = " + seq_of(5))
    finished.in_database("INSERT INTO _gap (first_seq, last_seq, found_at) VALUES (1, 3, 0)")
    breaches = "\n".join(finished.check(Lost(gaps=[(1, 3)])).breaches)
    assert "1 seqs are missing in the database" in breaches


def test_load_that_published_nothing_proves_nothing(finished: Finished) -> None:
    for field in ("attempted", "returned", "acked"):
        finished.record[field] = 0
    assert "nothing was published" in finished.check().breaches


def test_gap_that_the_drill_expects_is_allowed(finished: Finished) -> None:
    finished.in_database(
        "INSERT INTO _gap (first_seq, last_seq, found_at)"
        " SELECT max(seq) + 1, max(seq) + 2, 0 FROM _event"
    )
    finished.in_journal("DELETE FROM batch")
    assert not finished.check(Lost(gaps=[(1, 1_000)])).breaches


def cut(finished: Finished, *, is_named: bool) -> tuple[int, int]:
    """Journal and database go on with one event after seqs that neither has; those seqs."""
    ((last,),) = finished.in_database("SELECT max(seq) FROM events")
    hole = last + 1, last + 100
    seq, body = last + 101, b'{"event_id":"behind"}\n'
    crc = zlib.crc32(body, zlib.crc32(struct.pack("<qqd", seq, 1, 0.0)))
    finished.in_journal(f"INSERT INTO batch VALUES ({seq}, 1, 0.0, {crc}, x'{body.hex()}')")
    if is_named:
        for first, until in ((hole[0], hole[0] + 9), (hole[0] + 10, hole[1])):
            finished.in_journal(f"INSERT INTO lost_range VALUES ({first}, {until}, 0.0, '', '', 1)")
    finished.in_database(
        "INSERT INTO _event (seq, type, timestamp, data)"
        f" SELECT {seq}, type, timestamp, data FROM _event WHERE seq = {seq_of(5)}"
    )
    finished.in_database(f"INSERT INTO _batch VALUES ({seq}, 0.0, NULL, 'behind')")
    finished.in_database(
        f"INSERT INTO _gap (first_seq, last_seq, found_at) VALUES ({hole[0]}, {hole[1]}, 0)"
    )
    return hole


def test_cut_that_is_expected_and_named_is_allowed(finished: Finished) -> None:
    hole = cut(finished, is_named=True)
    assert finished.check(Lost(gaps=[hole], cuts=[hole])).breaches == []


def test_cut_that_the_journal_does_not_name_is_seen(finished: Finished) -> None:
    hole = cut(finished, is_named=False)
    breaches = "\n".join(finished.check(Lost(gaps=[hole], cuts=[hole])).breaches)
    assert f"the journal does not name seq {hole[0]} to {hole[1]} as lost" in breaches


@pytest.mark.parametrize("more", [-1, 1])
def test_cut_that_is_not_the_expected_one_is_seen(finished: Finished, more: int) -> None:
    first, last = cut(finished, is_named=True)
    breaches = finished.check(Lost(gaps=[(first, last)], cuts=[(first, last + more)])).breaches
    assert re.search(f"the journal goes from seq {first - 1} to {last + 1}", "\n".join(breaches))


@pytest.mark.parametrize(("n", "expected"), [(11, ""), (12, "1 acknowledged events")])
def test_destroyed_event_excuses_itself_and_no_other(
    finished: Finished, n: int, expected: str
) -> None:
    for field in ("attempted", "returned", "acked"):
        finished.record[field] = EVENTS + 1
    token = Record(finished.path).token
    verdict = finished.check(Lost(ids={f"{token}-{n}"}))
    assert bool(verdict.breaches) == bool(expected)
    assert re.search(expected, "\n".join(verdict.breaches))
    assert verdict.figures.lost == 1
