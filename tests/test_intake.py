"""Intake: what is accepted, recognised as sent before, refused and kept aside."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.errors import JournalError
from event_bus.event_schema import Registry
from event_bus.intake import MAX_BATCH_LINES, Intake, Receipt
from event_bus.journal import Journal
from event_bus.rejection import MAX_RAW_BYTES_A_MINUTE, RawAllowance

TOKEN = "0123456789abcdef0123"
OTHER = "0123456789abcdef4567"


def event(event_id: str, **data: Any) -> bytes:
    """A canonical line of a user_action, its newline included."""
    return envelope.encode_lines(
        [
            Envelope(
                event_id=event_id,
                event_type="user_action",
                timestamp=1.5,
                source="test",
                data={"action": "a", **data},
            )
        ]
    )


def run(first: int, last: int, token: str = TOKEN) -> bytes:
    return b"".join(event(f"{token}-{n}", n=n) for n in range(first, last + 1))


class Opened:
    """An intake on a journal that can be closed and opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1_000.0
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.path)
        self.intake = Intake(self.journal, Registry(), lambda: self.now)

    def restart(self) -> None:
        self.journal.close()
        self.open()

    def take(self, batch: bytes, report: str | None = None) -> Receipt:
        receipt = self.intake.take(batch, report)
        self.intake.commit()
        return receipt

    def counts(self, batch: bytes) -> tuple[int, int, int, int]:
        r = self.take(batch)
        return r.accepted, r.duplicates, r.rejected, r.conflicts

    def events(self) -> list[Envelope]:
        batches = self.journal.read(1, 1 << 30)
        found = [e for b in batches for e in envelope.decode_lines(b.body)]
        assert len(found) == self.journal.last_seq == sum(b.count for b in batches)
        assert [b.first_seq for b in batches] == sorted(b.first_seq for b in batches)
        return found

    def ids(self) -> list[str]:
        return [e.event_id for e in self.events() if e.event_type == "user_action"]

    def rejections(self) -> list[dict[str, Any]]:
        return [e.data for e in self.events() if e.event_type == "event_rejected"]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    made = Opened(tmp_path / "journal.db")
    yield made
    made.journal.close()


Restart = Callable[[Opened], None]
restarts = pytest.mark.parametrize(
    "between", [lambda o: None, Opened.restart], ids=["same process", "after a restart"]
)


@restarts
def test_batch_sent_again_is_counted_and_not_stored(opened: Opened, between: Restart) -> None:
    assert opened.counts(run(1, 5)) == (5, 0, 0, 0)
    between(opened)
    assert opened.counts(run(1, 5)) == (0, 5, 0, 0)
    assert opened.counts(run(4, 8)) == (3, 2, 0, 0)
    assert opened.ids() == [f"{TOKEN}-{n}" for n in range(1, 9)]


@restarts
@pytest.mark.parametrize("style", ["native", "foreign"])
def test_ids_in_any_order_with_repeats_are_stored_once(
    opened: Opened, between: Restart, style: str
) -> None:
    ids = [f"{TOKEN}-{n}" if style == "native" else f"order/{n} ünï" for n in range(1, 41)]
    sent = random.Random(7).sample(ids * 5, k=200)
    opened.counts(b"".join(map(event, sent[:100])))
    between(opened)
    receipt = opened.take(b"".join(map(event, sent[100:])))
    assert receipt.accepted + receipt.duplicates == 100
    assert sorted(opened.ids()) == sorted(ids)


def test_repeats_within_one_batch_cost_one_commit(opened: Opened) -> None:
    twice = b"".join(event(f"{TOKEN}-{n}") * 2 + event(f"x{n}") * 2 for n in range(1, 201))
    receipt = opened.intake.take(twice)
    assert (receipt.accepted, receipt.duplicates) == (400, 400)
    assert opened.intake.committed == []


def test_batch_sent_again_within_one_group_is_recognised(opened: Opened) -> None:
    opened.intake.take(run(1, 5))
    assert opened.intake.take(run(1, 5)).duplicates == 5
    opened.intake.commit()
    assert len(opened.ids()) == 5


def test_recognising_a_batch_of_the_same_group_commits_nothing(opened: Opened) -> None:
    """A part that was committed on the way was not counted when the rest of its group failed."""
    opened.intake.take(run(1, 5))
    receipt = opened.intake.take(event("x") + b"bad\n" + run(3, 5) + event(f"{TOKEN}-4", n=0))
    assert (receipt.accepted, receipt.duplicates, receipt.rejected, receipt.conflicts) == (
        1,
        3,
        1,
        1,
    )
    assert opened.journal.last_seq == 0
    opened.intake.commit()
    assert opened.intake.totals.accepted == len(opened.ids()) == 6


def test_two_producers_interleaved_in_one_batch_are_both_in_order(opened: Opened) -> None:
    batch = b"".join(run(n, n) + run(n, n, OTHER) for n in range(1, 6))
    assert opened.counts(batch) == (10, 0, 0, 0)
    assert opened.counts(batch) == (0, 10, 0, 0)
    assert opened.counts(run(1, 6)) == (1, 5, 0, 0)
    assert [i for i in opened.ids() if i.startswith(OTHER)] == [f"{OTHER}-{n}" for n in range(1, 6)]


@pytest.mark.parametrize("event_id", [f"{TOKEN}-1", f"{TOKEN}-0", f"{TOKEN}-01", "a", "\x00"])
def test_id_seen_again_with_other_content_is_a_conflict_and_kept_aside(
    opened: Opened, event_id: str
) -> None:
    for pending in (True, False):  # before and after it is in the journal
        take = opened.intake.take if pending else opened.take
        first = event(event_id + str(pending), n=1)
        other = event(event_id + str(pending), n=2)
        assert take(first).accepted == 1
        receipt = take(other)
        assert (receipt.conflicts, receipt.duplicates, receipt.rejected) == (1, 0, 0)
        assert "was seen before with other content" in receipt.refusals[0].reason
        opened.intake.commit()
        kept = opened.rejections()[-1]
        assert kept["rule"] == "conflict"
        assert base64.b64decode(kept["raw"]) == other.rstrip(b"\n")
    assert opened.intake.totals.conflicts == 2
    assert [e.data["n"] for e in opened.events() if e.event_type == "user_action"] == [1, 1]


def test_same_event_in_another_spelling_is_a_duplicate(opened: Opened) -> None:
    opened.take(event("a", x=1.0))
    spelled = b'{"data": {"action": "\\u0061", "x": 1.00}, "timestamp": 15e-1, "source": "test",'
    spelled += b' "event_type": "user_action", "event_id": "a"}'
    assert opened.counts(spelled) == (0, 1, 0, 0)


BAD = {
    "unknown type": (event("b").replace(b"user_action", b"no_such"), "event_type", "event_type"),
    "wrong type": (event("b").replace(b'"a"', b"1"), "type", "data.action"),
    "missing field": (event("b").replace(b'action":', b'other":'), "required", "data"),
    "the bus's own": (event("b").replace(b"user_action", b"heartbeat"), "event_type", "event_type"),
    "NaN": (event("b").replace(b'"a"', b"NaN"), "finite", ""),
    "envelope": (event("b").replace(b"1.5", b"null"), "envelope", "timestamp"),
    "not JSON": (b"\x00garbage\x1b[2J\n", "json", ""),
    "not UTF-8": (event("b").replace(b'"a"', b'"\xff\xfe"'), "utf8", ""),
    "empty": (b"\n", "json", ""),
    "key twice": (b'{"\\ud800":1,"\\ud800":2}\n', "uniqueKeys", "\\ud800"),
    "too large": (event("b").replace(b'"a"', b'"' + b"x" * (1 << 20) + b'"'), "maxBytes", ""),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_line_is_kept_byte_for_byte_and_disturbs_nothing_else(
    opened: Opened, kind: str
) -> None:
    bad, rule, path = BAD[kind]
    receipt = opened.take(run(1, 3) + bad + run(4, 6), '{"pid":1}')
    assert (receipt.accepted, receipt.rejected) == (6, 1)
    assert [r.line for r in receipt.refusals] == [3]
    assert opened.ids() == [f"{TOKEN}-{n}" for n in range(1, 7)]
    (kept,) = opened.rejections()
    assert base64.b64decode(kept["raw"]) == bad.removesuffix(b"\n")
    assert kept["raw_bytes"] == len(bad) - 1
    assert (kept["rule"], kept.get("path", "")) == (rule, path)
    assert kept["reason"] == receipt.refusals[0].reason
    assert opened.journal.producers[TOKEN].report == '{"pid":1}'
    assert opened.take(run(1, 6)).duplicates == 6


def test_rejection_names_source_type_and_id_of_a_readable_event(opened: Opened) -> None:
    opened.take(event("b").replace(b'"a"', b"1"))
    (kept,) = opened.rejections()
    assert (kept["source"], kept["event_type"], kept["event_id"]) == ("test", "user_action", "b")


def test_batch_of_too_many_lines_is_refused_and_kept_as_one(opened: Opened) -> None:
    garbage = b"\n" * (MAX_BATCH_LINES + 1)
    receipt = opened.take(garbage)
    assert receipt.rejected == MAX_BATCH_LINES + 1
    assert len(receipt.refusals) == 1
    (kept,) = opened.rejections()
    assert kept["rule"] == "maxLines"
    assert base64.b64decode(kept["raw"]) == garbage


def test_empty_batch_and_batch_without_last_newline_are_taken(opened: Opened) -> None:
    assert opened.counts(b"") == (0, 0, 0, 0)
    assert opened.counts(run(1, 2).rstrip(b"\n")) == (2, 0, 0, 0)


def test_seq_has_no_holes_over_restarts_and_a_clock_that_goes_back(opened: Opened) -> None:
    for now, n in [(5_000.0, 1), (100.0, 3), (9_000.0, 5)]:
        opened.now = now
        opened.take(run(n, n + 1))
        opened.restart()
    batches = opened.journal.read(1, 1 << 30)
    assert [(b.first_seq, b.count) for b in batches] == [(1, 2), (3, 2), (5, 2)]
    assert [b.received_at for b in batches] == [5_000.0, 100.0, 9_000.0]
    assert len(opened.ids()) == 6


def fail_writes(journal: Journal) -> None:
    journal._db.execute("PRAGMA query_only=1")  # SQLite itself refuses to write from here on


def test_events_of_a_failed_commit_are_new_when_they_are_sent_again(opened: Opened) -> None:
    opened.take(run(1, 3))
    counts = msgspec.structs.astuple(opened.intake.totals)
    fail_writes(opened.journal)
    opened.intake.take(run(4, 6))
    opened.intake.take(event("foreign") + run(1, 1, OTHER) + b"bad\n")
    with pytest.raises(JournalError, match="cannot write"):
        opened.intake.commit()
    assert opened.intake.committed[1:] == []
    assert msgspec.structs.astuple(opened.intake.totals) == counts
    opened.journal._db.execute("PRAGMA query_only=0")
    assert opened.counts(run(4, 6)) == (3, 0, 0, 0)
    assert opened.counts(event("foreign") + run(1, 1, OTHER)) == (2, 0, 0, 0)
    assert opened.journal.last_seq == len(opened.events()) == 8


def test_event_whose_place_was_trimmed_is_still_recognised(opened: Opened) -> None:
    opened.take(run(1, 5))
    opened.take(run(6, 6))
    opened.journal.trim(6)
    opened.restart()
    assert opened.counts(run(1, 7)) == (1, 6, 0, 0)
    assert opened.journal.last_seq == 7


def test_resend_of_a_damaged_batch_is_counted_and_ends_nothing(opened: Opened) -> None:
    for first in (1, 4, 7):
        opened.take(run(first, first + 2))
    opened.journal._db.execute("UPDATE batch SET body = zeroblob(length(body)) WHERE first_seq = 4")
    opened.restart()
    assert opened.counts(run(4, 10)) == (1, 6, 0, 0)


def test_report_that_is_too_long_is_left_out(opened: Opened) -> None:
    opened.take(run(1, 1), "x" * 5_000)
    assert opened.journal.producers[TOKEN].report is None


def test_each_key_has_a_minutes_allowance_of_raw_bytes() -> None:
    now = 5.0
    allowance = RawAllowance(lambda: now)
    assert allowance.spend("a", 1_000) == 1_000
    assert allowance.spend("a", 1 << 20) == MAX_RAW_BYTES_A_MINUTE - 1_000
    assert allowance.spend("a", 1) == 0
    assert allowance.spend("b", 1) == 1
    now += 60.0
    assert allowance.spend("a", 1) == 1
