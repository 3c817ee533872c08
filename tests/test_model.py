"""Journal, deduplication and collector against a list: whatever happens, in whatever order.

The machine publishes, commits, fails, crashes, trims and collects with the real modules on real
files. The reference is a list of what was taken in, in order, cut to what the journal holds when
something is lost that nobody was told is safe. `scripts/fuzz --model` runs it at length.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import msgspec
import pytest
from faulty import Faults, real_connect
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from collector.store import Store
from event_bus import database
from event_bus.consumers import Consumer, Consumers
from event_bus.errors import DatabaseUnavailable, JournalError, JournalFull
from event_bus.event_schema import Registry
from event_bus.intake import Intake
from event_bus.journal import Journal
from event_bus.protocol import BatchHead, FetchReply
from event_bus.subscriber import Batch, Cursor

TOKENS = ("0123456789abcdef0001", "0123456789abcdef0002")
NATIVE = re.compile(r"([0-9a-f]{20})-([1-9][0-9]{0,17})")
CONSUMER = "data_collector"
BAD = {  # not one of them can be taken for an event, whatever the bus knows
    b"": "json",
    b"garbage": "json",
    b'{"event_id":"x"}': "envelope",
    b'{"event_id":"x","event_type":"heartbeat","timestamp":1.0,"data":{}}': "event_type",
    b'{"event_id":"x","event_type":"user_action","timestamp":1.0,"data":{}}': "required",
    b'{"event_id":"x","event_type":"user_action","timestamp":1.0,"data":{"action":NaN}}': "finite",
    b'{"event_id":"x\xff"}': "utf8",
}


class Sent(NamedTuple):
    """A line that was published: of an event, or bad with the rule that it breaks."""

    line: bytes
    event_id: str = ""
    event_type: str = ""
    canonical: bytes = b""
    rule: str = ""


class Entry(NamedTuple):
    """What the journal holds at one seq: an event, or the bus's account of a refused line."""

    event_id: str
    line: bytes
    rule: str = ""


def event(event_id: str, version: int, event_type: str = "user_action", spaced: int = 0) -> Sent:
    document = {
        "event_id": event_id,
        "event_type": event_type,
        "timestamp": 1.5,
        "data": {"action": "a", "version": version},
    }
    canonical = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    line = json.dumps(document).encode() if spaced else canonical
    return Sent(line, event_id, event_type, canonical)


native_ids = st.builds("{}-{}".format, st.sampled_from(TOKENS), st.integers(1, 12))
odd_ids = st.sampled_from(["order/1", "order/2", "é\0", TOKENS[0], f"{TOKENS[0]}-01", "x-1"])
versions = st.sampled_from([0, 0, 0, 0, 1])
types = st.sampled_from(["user_action"] * 4 + ["own_event"])
good = st.builds(event, native_ids | odd_ids, versions, types, versions)
bad = st.sampled_from(sorted(BAD)).map(lambda line: Sent(line, rule=BAD[line]))
mixes = st.lists(good | good | good | bad, min_size=1, max_size=8)


class BusMachine(RuleBasedStateMachine):
    batches = Bundle("batches")

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bitten-model-"))
        self.home = self.root / "0"
        self.home.mkdir()
        self.schemas = self.root / "schemas"
        self.schemas.mkdir()
        self.faults = Faults()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(database, "connect", self.faults.connect)
        self.now = 1_000.0
        self.lives = 0
        self.entries: list[Entry] = []
        self.first_seq = 1
        self.ends: list[int] = []  # seq after each journal batch
        self.forgotten: dict[str, int] = {}
        self.safe = 0  # so many entries somebody was told are on disk
        self.stored = 0  # seq up to which the database is
        self.gaps: list[tuple[int, int]] = []
        self.next_n = dict.fromkeys(TOKENS, 1)
        self.open_bus()
        self.open_store()

    def open_bus(self) -> None:
        self.journal = Journal(self.home / "journal.db")
        self.registry = Registry(self.schemas)
        self.registry.verify()
        self.intake = Intake(self.journal, self.registry, lambda: self.now)
        self.consumers = Consumers(self.journal)
        self.base = self.journal.last_seq
        self.counted = [0, 0, 0, 0]
        self.forget_pending()

    def open_store(self) -> None:
        self.store_registry = Registry(self.schemas)
        self.store_registry.verify()
        self.store = Store(self.home / "events.db", self.store_registry)
        self.cursor = Cursor(next_seq=self.store.last_seq + 1, consumer=CONSUMER)
        assert self.store.last_seq == self.stored

    def teardown(self) -> None:
        if not hasattr(self, "root"):
            return
        try:
            self.faults.clear()
            self.commit()
            while self.stored < self.journal.last_seq:
                self.collect(1 << 20)
            self.database_is_the_reference()
        finally:
            for connection in self.faults.connections:
                connection.close()
            self.patch.undo()
            shutil.rmtree(self.root)

    # The reference

    def places(self) -> dict[str, Entry]:
        """What the bus knows ids by: the events that the journal holds or soon will."""
        held = self.entries[self.first_seq - 1 :]
        return {e.event_id: e for e in held if not e.rule}

    def expect(self, batch: list[Sent]) -> tuple[list[Entry], list[int]]:
        """Entries that a batch adds, and accepted, duplicates, rejected, conflicts."""
        places, entries, counts = self.places(), [], [0, 0, 0, 0]
        for sent in batch:
            known = places.get(sent.event_id)
            native = NATIVE.fullmatch(sent.event_id)
            unknown_type = sent.event_type == "own_event" and not self.knows_own_event()
            if sent.rule or unknown_type:
                counts[2] += 1
                entries.append(Entry("", sent.line, sent.rule or "event_type"))
            elif known is not None and known.line != sent.canonical:
                counts[3] += 1
                entries.append(Entry("", sent.line, "conflict"))
            elif known is not None or (
                native and int(native[2]) <= self.forgotten.get(native[1], 0)
            ):
                counts[1] += 1
            else:
                counts[0] += 1
                entries.append(Entry(sent.event_id, sent.canonical))
                places[sent.event_id] = entries[-1]
        return entries, counts

    def knows_own_event(self) -> bool:
        return (self.schemas / "own_event.json").exists()

    def forget_pending(self) -> None:
        """Nothing but what the journal holds is left, and that is all that anybody relied on."""
        assert self.safe <= self.journal.last_seq <= len(self.entries)
        del self.entries[self.journal.last_seq :]
        self.note_batches()

    def note_batches(self) -> None:
        done = self.ends[-1] if self.ends else 1
        for committed in self.intake.committed:
            assert committed.first_seq == done
            done = committed.first_seq + committed.count
            self.ends.append(done)
        self.intake.committed.clear()
        assert done == self.journal.last_seq + 1

    # What publishers do

    @rule(target=batches, batch=mixes)
    def publish_any(self, batch: list[Sent]) -> list[Sent]:
        self.take(batch)
        return batch

    @rule(target=batches, token=st.sampled_from(TOKENS), count=st.integers(1, 6))
    def publish_the_next(self, token: str, count: int) -> list[Sent]:
        first = self.next_n[token]
        self.next_n[token] += count
        batch = [event(f"{token}-{n}", 0) for n in range(first, first + count)]
        self.take(batch)
        return batch

    @rule(batch=batches)
    def publish_again(self, batch: list[Sent]) -> None:
        self.take(batch)

    @rule(batch=batches, data=st.data())
    def publish_a_part_again_in_another_order(self, batch: list[Sent], data: st.DataObject) -> None:
        shuffled = data.draw(st.permutations(batch))
        self.take(shuffled[: data.draw(st.integers(1, len(shuffled)))])

    def take(self, batch: list[Sent]) -> None:
        entries, counts = self.expect(batch)
        self.entries += entries
        try:
            receipt = self.intake.take(b"".join(s.line + b"\n" for s in batch))
        except JournalError:
            self.fail()
            return
        assert list(msgspec.structs.astuple(receipt)[:4]) == counts
        assert sum(counts) == len(batch)
        assert len(receipt.refusals) == counts[2] + counts[3]
        self.counted = [a + b for a, b in zip(self.counted, counts, strict=True)]

    # What the bus does

    @rule(seconds=st.sampled_from([0.0, 1.0, 100.0, -50.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def commit(self) -> None:
        try:
            self.intake.commit()
        except JournalError:
            self.fail()
            return
        assert self.journal.last_seq == len(self.entries)
        self.note_batches()
        self.safe = len(self.entries)

    def fail(self) -> None:
        """What the broker does then: nothing of the group counts."""
        self.intake.forget()
        self.forget_pending()
        since_start = self.entries[self.base :]
        accepted = sum(not entry.rule for entry in since_start)
        refused = len(since_start) - accepted
        totals = self.totals()
        assert (totals[0], totals[2] + totals[3]) == (accepted, refused)
        self.counted = totals  # duplicates of a part that was committed on the way may count

    @rule(number=st.integers(0, 7), rolls_back=st.booleans())
    def disk_fills(self, number: int, rolls_back: bool) -> None:
        self.faults.fail_write(number, rolls_back=rolls_back)

    @rule(seconds=st.integers(0, 200), max_batches=st.integers(1, 4))
    def trim(self, seconds: int, max_batches: int) -> None:
        self.commit()
        if self.journal.last_seq != len(self.entries):
            return
        before = self.journal.seq_to_trim(older_than=self.now - seconds, max_bytes=1 << 30)
        stored, _ = self.consumers.slowest() or (before, "")
        self.cut(min(before, stored), max_batches)

    @rule(data=st.data(), max_batches=st.integers(1, 4))
    def trim_as_if_too_large(self, data: st.DataObject, max_batches: int) -> None:
        self.commit()
        before = data.draw(st.integers(1, self.journal.last_seq + 1))
        stored, _ = self.consumers.slowest() or (before, "")
        self.cut(min(before, stored), max_batches)

    def cut(self, before: int, max_batches: int) -> None:
        whole = [end for end in self.ends if self.first_seq < end <= before][:max_batches]
        try:
            count = self.journal.trim(before, max_batches=max_batches)
        except JournalFull:
            return
        assert count == len(whole)
        if whole:
            for entry in self.entries[self.first_seq - 1 : whole[-1] - 1]:
                native = NATIVE.fullmatch(entry.event_id)
                if native:
                    n = max(self.forgotten.get(native[1], 0), int(native[2]))
                    self.forgotten[native[1]] = n
            self.first_seq = whole[-1]

    @rule()
    def save_consumers(self) -> None:
        try:
            self.consumers.save()
        except JournalFull:
            return

    @rule()
    def forget_the_collector(self) -> None:
        try:
            self.consumers.forget(CONSUMER)
        except JournalFull:
            return

    @rule()
    def restart(self) -> None:
        self.faults.clear()
        self.note_batches()
        self.journal.close()
        self.open_bus()

    @rule()
    def add_a_schema(self) -> None:
        schema = {"type": "object", "properties": {"action": {"type": "string"}}}
        (self.schemas / "own_event.json").write_text(json.dumps(schema))

    @rule(collector_too=st.booleans())
    def crash(self, collector_too: bool) -> None:
        """Everything is as the files are at this moment; what had them open is gone."""
        self.faults.clear()
        self.note_batches()
        self.lives += 1
        home = self.root / str(self.lives)
        home.mkdir()
        if not collector_too:
            self.store.close()
        for path in self.home.iterdir():
            if not path.name.endswith("-shm"):
                shutil.copy(path, home)
        for connection in self.faults.connections:
            connection.close()
        self.faults.connections.clear()
        self.home = home
        self.open_bus()
        self.open_store()

    # What the collector does

    @rule(max_bytes=st.sampled_from([1, 300, 1 << 20]))
    def collect(self, max_bytes: int) -> None:
        batches = self.fetch(max_bytes)
        if batches:
            self.write(batches)

    @rule()
    def collector_dies_before_it_writes(self) -> None:
        self.fetch(1 << 20)
        self.store.close()
        self.faults.clear()
        self.open_store()

    @rule()
    def collector_is_sent_what_it_has_stored(self) -> None:
        batches = self.fetch(1 << 20)
        if batches and self.write(batches):
            with contextlib.suppress(DatabaseUnavailable):
                assert self.store.write(batches, self.journal.journal_id) == 0
            assert self.store.last_seq == self.stored

    def fetch(self, max_bytes: int) -> list[Batch]:
        """As `Broker._fetch` and `DataCollector._receive` do it."""
        assert self.cursor.next_seq == self.stored + 1
        if self.stored + 1 < self.first_seq:
            self.skip()
            return []
        self.consumers[CONSUMER] = Consumer(self.stored + 1, self.now)
        read = self.journal.read(self.stored + 1, max_bytes)
        reply = FetchReply(
            from_seq=self.stored + 1,
            batches=[BatchHead(b.first_seq, b.count, b.received_at) for b in read],
            first_seq=self.journal.first_seq,
            last_seq=self.journal.last_seq,
            journal_id=self.journal.journal_id,
            epoch=self.journal.epoch,
        )
        return self.cursor.take([msgspec.json.encode(reply), *[b.body for b in read]])

    def skip(self) -> None:
        """The journal was trimmed past a collector that it did not know of: a gap, told."""
        gap = (self.stored + 1, self.first_seq - 1)
        try:
            self.store.record_gap(*gap, self.journal.journal_id, "trimmed")
        except DatabaseUnavailable:
            return
        self.gaps.append(gap)
        self.stored = gap[1]
        self.cursor.next_seq = self.first_seq

    def write(self, batches: list[Batch]) -> bool:
        last = batches[-1].first_seq + len(batches[-1].events) - 1
        try:
            if self.store_registry.refresh():
                self.store_registry.verify()
                self.store.learn(self.store_registry)
            new = self.store.write(batches, self.journal.journal_id)
        except DatabaseUnavailable:
            assert self.store.last_seq == self.stored
            self.store.close()
            self.open_store()  # a simple way to ask for the same again
            return False
        assert new == last - self.stored
        self.stored = last
        return True

    # What must hold

    def totals(self) -> list[int]:
        return list(msgspec.structs.astuple(self.intake.totals)[:4])

    @invariant()
    def counts_are_those_of_the_receipts(self) -> None:
        if hasattr(self, "root"):
            assert self.totals() == self.counted

    @invariant()
    def journal_is_the_reference(self) -> None:
        if not hasattr(self, "root"):
            return
        assert self.journal.first_seq == self.first_seq
        seq = self.first_seq
        ids = []
        for batch in self.journal.read(self.first_seq, 1 << 30):
            assert batch.first_seq == seq
            lines = batch.body.split(b"\n")[:-1]
            assert len(lines) == batch.count
            for line in lines:
                entry = self.entries[seq - 1]
                if entry.rule:
                    document = json.loads(line)
                    assert document["event_type"] == "event_rejected"
                    assert document["data"]["rule"] == entry.rule
                    assert base64.b64decode(document["data"]["raw"]) == entry.line
                else:
                    assert line == entry.line
                    ids.append(entry.event_id)
                seq += 1
        assert seq == self.journal.last_seq + 1
        assert len(ids) == len(set(ids))

    @precondition(lambda self: hasattr(self, "root"))
    @rule()
    def database_is_the_reference(self) -> None:
        db = real_connect(self.home / "events.db", apsw.SQLITE_OPEN_READONLY)
        try:
            rows = list(db.execute("SELECT seq, event_id, event_type, data FROM events ORDER BY 1"))
            gaps = list(db.execute("SELECT first_seq, last_seq FROM _gap ORDER BY 1"))
            counted = db.execute("SELECT coalesce(sum(stored), 0) FROM _count").fetchone()
        finally:
            db.close()
        assert gaps == self.gaps
        missing = {seq for first, last in gaps for seq in range(first, last + 1)}
        assert [row[0] for row in rows] == [
            seq for seq in range(1, self.stored + 1) if seq not in missing
        ]
        assert counted == (len(rows),)
        for seq, event_id, event_type, data in rows:
            entry = self.entries[seq - 1]
            if entry.rule:
                assert event_type == "event_rejected"
                assert json.loads(data)["rule"] == entry.rule
            else:
                document = json.loads(entry.line)
                assert (event_id, event_type) == (entry.event_id, document["event_type"])
                assert json.loads(data) == document["data"]


def sizes(**more: Any) -> settings:
    return settings(
        deadline=None,
        stateful_step_count=40,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        **more,
    )


pytestmark = pytest.mark.timeout(400)

TestModel = BusMachine.TestCase
TestModel.settings = sizes(max_examples=40, derandomize=True, database=None)
