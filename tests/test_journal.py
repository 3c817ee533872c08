"""The journal on disk: what a commit promises, what damage and age do to it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest
from disks import small_disk
from faulty import Faults

from event_bus import database, journal_file
from event_bus.errors import JournalDamaged, JournalError, JournalFull
from event_bus.journal import DamagedBatch, Journal
from event_bus.journal_format import PAGE_BYTES


def append(journal: Journal, text: str, received_at: float = 0.0, size: int = 0) -> int:
    """Append one batch with a line for each letter, padded to `size` bytes."""
    lines = [c.encode().ljust(size, b".") + b"\n" for c in text]
    return journal.append(lines, len(lines), received_at, runs=[], opaque_ids=[])


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal.db")
    yield made
    made.close()


def reopened(journal: Journal) -> Journal:
    journal.close()
    return Journal(journal.path)


def test_every_commit_is_synced_to_disk(journal: Journal) -> None:
    opened = reopened(journal)
    assert opened._row("PRAGMA synchronous") == (2,)  # FULL
    assert opened._row("PRAGMA journal_mode") == ("wal",)
    opened.close()


def test_files_are_readable_by_their_owner_only(journal: Journal) -> None:
    append(journal, "a")
    files = list(journal.path.parent.glob("journal.db*"))
    assert len(files) == 3
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}


def test_read_returns_whole_batches_from_the_one_that_holds_the_seq(journal: Journal) -> None:
    assert journal.read(1, 1000) == []
    assert [append(journal, t, i) for i, t in enumerate(["ab", "c", "def"])] == [1, 3, 4]
    assert [(b.first_seq, b.count, b.body) for b in journal.read(2, 1000)] == [
        (1, 2, b"a\nb\n"),
        (3, 1, b"c\n"),
        (4, 3, b"d\ne\nf\n"),
    ]
    assert [b.first_seq for b in journal.read(2, 1)] == [1]
    assert [b.first_seq for b in journal.read(2, 5)] == [1, 3]
    assert [b.first_seq for b in journal.read(6, 1000)] == [4]
    assert journal.read(7, 1000) == []
    assert [journal.line(seq) for seq in (6, 1, 3)] == [b"f", b"a", b"c"]


def test_seq_epoch_and_identity_go_on_after_a_restart_even_with_nothing_left(
    journal: Journal,
) -> None:
    append(journal, "abc", 5.0)
    assert journal.trim(4) == 1
    again = reopened(journal)
    assert (again.last_seq, again.first_seq) == (3, 4)
    assert again.journal_id == journal.journal_id
    assert again.epoch == journal.epoch + 1
    assert append(again, "d") == 4
    again.close()


def test_journal_begins_at_1_and_so_does_one_that_does_not_say(journal: Journal) -> None:
    assert journal.origin_seq == 1
    journal._db.execute("DELETE FROM meta WHERE key = 'origin_seq'")
    again = reopened(journal)
    assert again.origin_seq == 1
    again.close()


def test_damaged_batch_is_found_out_and_the_others_are_served(journal: Journal) -> None:
    for text in ("ab", "cd", "ef"):
        append(journal, text)
    journal._db.execute(
        "UPDATE batch SET body = CAST('cD' || char(10) AS BLOB) WHERE first_seq = 3"
    )
    again = reopened(journal)
    assert [b.first_seq for b in again.read(1, 1000)] == [1]
    with pytest.raises(DamagedBatch, match=r"events 3 to 4 are damaged \(CRC-32\)") as caught:
        again.read(3, 1000)
    assert caught.value.next_seq == 5
    assert [b.first_seq for b in again.read(5, 1000)] == [5]
    assert again.line(4) is None
    again.close()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            "DROP TABLE batch; PRAGMA application_id=1",
            "is not a journal of this bus; move it aside",
        ),
        ("PRAGMA user_version=2", "has version 2, this program knows 1; install"),
        ("PRAGMA application_id=1", "its header is damaged; the next start makes a new one"),
        ("DROP TABLE meta", "no such table: meta; the next start makes a new one"),
    ],
)
def test_foreign_or_other_version_is_refused_in_one_line(
    journal: Journal, damage: str, complaint: str
) -> None:
    journal._db.execute(damage)
    with pytest.raises(JournalError) as caught:
        reopened(journal)
    assert complaint in str(caught.value)
    assert str(journal.path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(5000)]
)
def test_file_that_is_no_database_is_damaged_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(content)
    with pytest.raises(JournalDamaged, match="file is not a database"):
        Journal(path)
    assert path.read_bytes() == content


def test_start_that_died_while_creating_the_journal_is_made_good(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    db = apsw.Connection(str(path))
    db.execute("PRAGMA page_size=8192")
    db.execute("PRAGMA journal_mode=WAL")
    db.close()
    assert path.stat().st_size > 0
    journal = Journal(path)
    assert append(journal, "a") == 1
    journal.close()


def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"cannot open .*gone/journal\.db"):
        Journal(tmp_path / "gone" / "journal.db")


def test_trim_by_age_stops_at_the_first_batch_that_is_young(journal: Journal) -> None:
    for text, received_at in [("ab", 10.0), ("cd", 20.0), ("ef", 15.0), ("gh", 30.0)]:
        append(journal, text, received_at)
    large = 1 << 40
    assert journal.seq_to_trim(older_than=5.0, max_bytes=large) == 1
    assert journal.seq_to_trim(older_than=16.0, max_bytes=large) == 3  # 5 and 6 came after 20.0
    assert journal.seq_to_trim(older_than=25.0, max_bytes=large) == 7
    assert journal.seq_to_trim(older_than=99.0, max_bytes=large) == 9
    assert journal.trim(7) == 3
    assert (journal.first_seq, journal.last_seq) == (7, 8)


def test_trim_keeps_the_batch_that_holds_the_seq(journal: Journal) -> None:
    append(journal, "abcd")
    assert journal.trim(4) == 0
    assert journal.trim(5) == 1


def test_trim_by_size_ends_below_the_bound(journal: Journal) -> None:
    for n in range(40):
        append(journal, "ab", float(n), size=10_000)
    bound = journal.size_bytes() // 2
    while journal.trim(journal.seq_to_trim(older_than=-1.0, max_bytes=bound)):
        pass
    assert journal.size_bytes() <= bound
    assert 1 < journal.first_seq < journal.last_seq == 80
    assert journal.read(journal.first_seq, 1)[0].first_seq == journal.first_seq


def one_by_one(journal: Journal, events: int) -> None:
    """Batches of one event each, all of one producer, received at 0.0, 1.0, 2.0, …"""
    producer = journal.producer("0123456789abcdef0123")
    with journal.filling():
        for n in range(journal.last_seq + 1, journal.last_seq + events + 1):
            producer.last_n = n
            run = (producer, n, n, 0)
            journal.append([b"x\n"], 1, n - 1.0, runs=[run], opaque_ids=[])


def steps(journal: Journal, action: Callable[[], object]) -> int:
    """How many instructions of SQLite's machine it takes, in hundreds."""
    count = 0

    def step() -> bool:
        nonlocal count
        count += 1
        return False

    journal._db.set_progress_handler(step, 100)
    action()
    journal._db.set_progress_handler(None)
    return count


@pytest.mark.parametrize("trimmed", [0, 1, 200])
def test_trimming_takes_no_longer_in_a_journal_of_many_batches(
    journal: Journal, trimmed: int
) -> None:
    def turn() -> None:
        before = journal.seq_to_trim(older_than=1e9, max_bytes=1 << 40)
        # What a slow consumer has not stored stays, however old it is.
        assert journal.trim(min(before, journal.first_seq + trimmed)) == trimmed

    one_by_one(journal, 1_000)
    few = steps(journal, turn)
    one_by_one(journal, 9_000)
    assert steps(journal, turn) <= few + 10


def test_trim_removes_no_more_than_some_bytes_at_once(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("event_bus.journal.MAX_TRIMMED_BYTES", 2_500)
    for size in (1_000, 1_000, 1_000, 9_000, 1):
        append(journal, "a", size=size)
    assert [journal.trim(6) for _ in range(5)] == [2, 1, 1, 1, 0]


def test_trimming_much_while_nothing_is_published_does_not_make_the_wal_long(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("event_bus.journal_file.CHECKPOINT_PAGES", 100)
    one_by_one(journal, 5_000)
    append(journal, "a")
    longest = 0
    while journal.trim(journal.last_seq):
        longest = max(longest, journal.wal_bytes)
    assert longest < 200 * PAGE_BYTES


def test_place_of_an_id_that_is_not_there_is_not_looked_for_in_all_runs(journal: Journal) -> None:
    one_by_one(journal, 5_000)
    producer = next(iter(journal.producers.values()))
    few = steps(journal, lambda: journal.seq_of_native(producer, 1))
    assert steps(journal, lambda: journal.seq_of_native(producer, 5_001)) <= few + 1
    assert journal.seq_of_native(producer, 5_001) is None


def test_seq_at_a_time_is_the_first_received_from_then_on(journal: Journal) -> None:
    for text, received_at in [("ab", 10.0), ("cd", 30.0), ("ef", 20.0)]:
        append(journal, text, received_at)
    assert [journal.seq_at(t) for t in (0.0, 10.0, 15.0, 25.0, 31.0)] == [1, 1, 3, 3, 7]


@pytest.mark.parametrize("column", ["first_seq", "count", "received_at", "body"])
def test_row_that_damage_has_changed_in_any_column_is_not_served(
    journal: Journal, column: str
) -> None:
    for text in ("ab", "cd", "ef"):
        append(journal, text, 10.0)
    changed = {"first_seq": "4", "count": "1", "received_at": "11.0", "body": "x'630a640b'"}
    journal._db.execute(f"UPDATE batch SET {column} = {changed[column]} WHERE first_seq = 3")
    with pytest.raises(DamagedBatch):
        journal.read(3, 1000)
    assert [b.first_seq for b in journal.read(5, 1000)] == [5]


def test_journal_whose_rows_have_a_checksum_of_the_body_alone_is_read(journal: Journal) -> None:
    append(journal, "ab", 10.0)
    journal._db.execute("UPDATE batch SET crc32 = ?", (zlib.crc32(b"a\nb\n"),))
    again = reopened(journal)
    assert [b.body for b in again.read(1, 1000)] == [b"a\nb\n"]
    again.close()


@pytest.mark.parametrize("seq", [1, 5])
def test_damage_at_either_end_is_found_at_the_start(journal: Journal, seq: int) -> None:
    for text in ("ab", "cd", "ef"):
        append(journal, text)
    journal._db.execute("UPDATE batch SET count = 1 WHERE first_seq = ?", (seq,))
    with pytest.raises(JournalDamaged, match=f"the batch at seq {seq} is damaged"):
        reopened(journal)


def test_consumers_are_remembered_and_forgotten(journal: Journal) -> None:
    journal.save_consumers({"a": (3, 1.5), "b": (1, 2.5)})
    journal.save_consumers({"a": (4, 3.5)})
    again = reopened(journal)
    assert again.consumers() == {"a": (4, 3.5)}
    again.close()


def test_full_disk_refuses_and_loses_nothing_and_is_used_again_when_it_has_room(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", 2) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1_000_000))
        journal = Journal(disk / "journal.db")
        written = 0
        with pytest.raises(JournalFull, match=r"no space left for .*journal\.db; free some"):
            for _ in range(100):
                append(journal, "a", size=100_000)
                written += 1
        assert 0 < written == journal.last_seq
        ballast.unlink()
        assert append(journal, "b") == written + 1
        again = reopened(journal)
        assert sum(b.count for b in again.read(1, 1 << 30)) == written + 1
        again.close()


@pytest.mark.parametrize("rolls_back", [False, True])
@pytest.mark.parametrize("write", range(4))
def test_full_disk_while_trimming_is_a_full_disk_whoever_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int, rolls_back: bool
) -> None:
    faults = Faults()
    monkeypatch.setattr(database, "connect", faults.connect)
    journal = Journal(tmp_path / "journal.db")
    append(journal, "ab")
    append(journal, "c")
    faults.fail_write(write, rolls_back=rolls_back)
    with pytest.raises(JournalFull):
        journal.trim(3)
    assert [b.first_seq for b in journal.read(1, 1000)] == [1, 3]
    assert journal.trim(3) == 1
    journal.close()


@pytest.mark.parametrize("number", range(3, 9))
def test_full_disk_while_the_wal_is_copied_makes_no_loss_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Of its nine writes the first three are the append itself."""
    faults = Faults()
    monkeypatch.setattr(database, "connect", faults.connect)
    monkeypatch.setattr(journal_file, "CHECKPOINT_PAGES", 1)
    journal = Journal(tmp_path / "journal.db")
    faults.fail_write(number, rolls_back=False)
    journal.append([b"x\n"], 1, 0.0, runs=[], opaque_ids=[])
    journal.close()
    again = Journal(tmp_path / "journal.db")
    assert (again.lacks_wal, again.last_seq) == (False, 1)
    again.close()
