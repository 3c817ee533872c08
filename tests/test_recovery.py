"""A damaged, empty, missing or moved journal: what can be read is served again, no more."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from disks import small_disk
from system import System, wait_until

from collector.audit import audit
from event_bus import database, envelope
from event_bus.carve import Pages, carve, read_batch
from event_bus.envelope import Envelope
from event_bus.errors import JournalDamaged, JournalError, JournalFailed, JournalFull
from event_bus.journal import DamagedBatch, Journal
from event_bus.journal_format import PAGE_BYTES, Batch, LostRange
from event_bus.protocol import Client
from event_bus.recovery import SPARE_SEQS, mark_damaged, open_journal, put_back
from event_bus.traces import END

TOKEN = "0123456789abcdef0123"


def line(event_id: str, size: int) -> bytes:
    return b'{"event_id":"%s","pad":"%s"}\n' % (event_id.encode(), b"x" * size)


def fill(journal: Journal, batches: int, rng: random.Random) -> None:
    """Batches of one producer and of foreign ids, some longer than a page."""
    n = journal.last_seq
    for _ in range(batches):
        count = rng.randrange(1, 6)
        size = rng.choice((20, 20, 200, 3_000))
        first = n + 1
        producer = journal.producer(TOKEN)
        if rng.random() < 0.8:
            producer.last_n = first + count - 1
            lines = [line(f"{TOKEN}-{i}", size) for i in range(first, first + count)]
            runs, opaque = [(producer, first, producer.last_n, 0)], []
        else:
            names = [f'foreign "{i}"' for i in range(first, first + count)]
            lines = [line(name.replace('"', '\\"'), size) for name in names]
            runs, opaque = [], [(name, i) for i, name in enumerate(names)]
        journal.append(lines, count, 1_000.0 + rng.random(), runs=runs, opaque_ids=opaque)
        n += count


def served(journal: Journal) -> dict[int, Batch]:
    """Every batch that can be fetched, as a consumer fetches them."""
    found = {}
    seq = journal.first_seq
    while seq <= journal.last_seq:
        try:
            batches = journal.read(seq, 50_000)
        except DamagedBatch as e:
            assert e.next_seq > seq
            seq = e.next_seq
            continue
        for batch in batches:
            found[batch.first_seq] = batch
        seq = batches[-1].first_seq + batches[-1].count
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def path(home: Path) -> Path:
    return home / "journal.db"


def recovered(path: Path) -> Journal:
    """Opened with a clock that shows the same moment for a while, and the next one after it."""
    moments = itertools.chain([1_769_860_800.0] * 2, itertools.repeat(1_769_860_801.0))
    return open_journal(path, path.with_name("bitten_events.db"), lambda: next(moments))


@pytest.fixture
def kept(path: Path) -> Iterator[dict[int, Batch]]:
    """A journal with 120 batches, 20 of them trimmed, closed again: what it serves."""
    journal = Journal(path)
    fill(journal, 120, random.Random(1))
    journal.trim(journal.read(60, 1)[0].first_seq)
    journal.save_consumers({"reader": (70, 5.0)})
    before = served(journal)
    journal.close()
    yield before


def test_carving_a_sound_journal_finds_all_of_it(path: Path, kept: dict[int, Batch]) -> None:
    with Pages(path) as pages:
        carved = carve(pages)
        assert {s: read_batch(pages, s, carved.batches[s]) for s in kept} == kept
    assert carved.consumers == {"reader": (70, 5.0)}
    assert carved.producers[TOKEN].last_n > 0
    assert carved.end() == max(s + b.count - 1 for s, b in kept.items())
    assert carved.meta["trimmed_seq"] == min(kept) - 1


def test_what_lies_in_the_wal_alone_is_carved_too(home: Path, path: Path) -> None:
    journal = Journal(path)
    fill(journal, 40, random.Random(2))
    copied = home / "copy.db"
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copied}{suffix}")
    assert copied.stat().st_size < 20 * PAGE_BYTES
    with Pages(copied) as pages:
        carved = carve(pages)
        found = {s: read_batch(pages, s, carved.batches[s]) for s in carved.batches}
    assert found == served(journal)
    journal.close()


def pages_of(path: Path, batches: dict[int, Batch]) -> dict[int, set[int]]:
    """The pages that each batch lies on."""

    class Watched(Pages):
        touched: set[int]

        def versions(self, number: int) -> Iterator[bytes]:
            self.touched.add(number)
            return super().versions(number)

    found = {}
    with Watched(path) as pages:
        pages.touched = set()
        carved = carve(pages)
        for first_seq in batches:
            pages.touched = set()
            number, cell, _ = carved.batches[first_seq]
            read_batch(pages, first_seq, (number, cell, 0))
            # Reading one cell asks for its leaf and for nothing but its own overflow pages.
            found[first_seq] = pages.touched
    return found


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bits_never_serve_a_wrong_event_nor_hide_a_sound_batch(
    home: Path, path: Path, kept: dict[int, Batch], seed: int
) -> None:
    db = sqlite3.connect(path)
    db.execute("VACUUM")  # no second copies in free pages: each batch lies where it is read
    db.close()
    places = pages_of(path, kept)
    good = path.read_bytes()
    rng = random.Random(seed)
    for case in range(30):
        for leftover in home.iterdir():
            leftover.unlink()
        damaged = bytearray(good)
        hit = set()
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            at = rng.randrange(len(damaged))
            damaged[at] ^= 1 << rng.randrange(8)
            hit.add(at // PAGE_BYTES + 1)
        path.write_bytes(damaged)
        found: dict[int, Batch] = {}
        for _ in range(3):
            try:
                journal = recovered(path)
            except JournalError as e:
                # One bit in 250,000 says that another program or version wrote this file.
                assert 1 in hit and ("version" in str(e) or "not a journal" in str(e)), (case, e)
                found = kept
                break
            try:
                found = served(journal)
                break
            except JournalDamaged as e:
                mark_damaged(path, str(e))
            finally:
                journal.close()
        else:
            pytest.fail(f"case {case}: it does not come to rest")
        wrong = [s for s, b in found.items() if s in kept and kept[s] != b]
        unknown = [s for s in found if s not in kept and s >= min(kept)]
        hidden = [s for s in kept if s not in found and not places[s] & hit]
        assert (wrong, unknown, hidden) == ([], [], []), f"case {case}, pages {hit}"


@pytest.mark.parametrize("destroyed", [1, 3, 20])
def test_journal_with_its_first_pages_destroyed_gives_back_the_rest(
    home: Path, path: Path, kept: dict[int, Batch], destroyed: int
) -> None:
    places = pages_of(path, kept)
    events_database(home, 200)
    before = Journal(path)
    identity = before.journal_id
    before.close()
    with path.open("r+b") as file:
        file.write(bytes(destroyed * PAGE_BYTES))
    journal = recovered(path)
    found = served(journal)
    untouched = {s for s, where in places.items() if min(where) > destroyed}
    # With the page that says what was trimmed, older batches come back that nobody needs.
    since = min(kept) if destroyed == 1 else 200
    assert {s for s in found if s >= since} == {s for s in untouched if s >= since}
    assert all(kept[s] == b for s, b in found.items() if s in kept)
    assert all(x.first_seq > 200 for x in journal.losses)
    assert journal.last_seq == max(s + b.count - 1 for s, b in kept.items())
    (aside,) = home.glob("journal.db.corrupt-*Z")
    assert aside.name == "journal.db.corrupt-20260131T120000Z"
    assert aside.stat().st_size >= destroyed * PAGE_BYTES
    assert aside.name in journal.recovered
    assert "the next start" not in journal.recovered
    if destroyed == 1:
        assert journal.journal_id == identity
        assert journal.losses == []
        assert journal.consumers() == {"reader": (70, 5.0)}
        producer = journal.producers[TOKEN]
        last = max(s for s, b in kept.items() if TOKEN.encode() in b.body)
        assert producer.last_n == last + kept[last].count - 1
        assert journal.seq_of_native(producer, last) == last
        foreign = next(s for s, b in kept.items() if b"foreign" in b.body)
        assert journal.seq_of_opaque(f'foreign "{foreign}"') == foreign
    count = journal.last_seq
    fill(journal, 5, random.Random(3))
    assert journal.last_seq > count
    journal.close()


def test_lost_range_is_named_skipped_and_remembered(path: Path, kept: dict[int, Batch]) -> None:
    middle = sorted(kept)[50]
    with path.open("r+b") as file:
        where = path.read_bytes().find(kept[middle].body[:40])
        file.seek(where + 30)
        file.write(b"\0\0\0")
    mark_damaged(path, "as found by a test")
    journal = recovered(path)
    (loss,) = journal.losses
    assert (loss.first_seq, loss.last_seq) == (middle, middle + kept[middle].count - 1)
    assert (loss.reason, loss.told) == ("as found by a test", False)
    with pytest.raises(DamagedBatch) as caught:
        journal.read(middle, 1_000)
    assert (caught.value.first_seq, caught.value.next_seq) == (middle, loss.last_seq + 1)
    before = journal.read(sorted(kept)[49], 1 << 30)
    assert before[-1].first_seq == sorted(kept)[49]  # it ends before the hole
    journal.losses_are_told()
    journal.close()
    again = recovered(path)
    assert again.recovered == ""
    assert [x.told for x in again.losses] == [True]
    again.close()


def test_truncated_journal_goes_on_after_what_it_is_known_to_have_had(
    path: Path, kept: dict[int, Batch]
) -> None:
    os.truncate(path, path.stat().st_size // 2 // PAGE_BYTES * PAGE_BYTES)
    journal = recovered(path)
    found = served(journal)
    assert 0 < len(found) < len(kept)
    assert all(kept[s] == b for s, b in found.items())
    assert journal.losses
    lost = {seq for x in journal.losses for seq in range(x.first_seq, (x.last_seq or 0) + 1)}
    have = {seq for b in found.values() for seq in range(b.first_seq, b.first_seq + b.count)}
    assert lost | have == set(range(min(kept), journal.last_seq + 1))
    assert not lost & have
    journal.close()


def events_database(home: Path, last_seq: int) -> None:
    db = sqlite3.connect(home / "bitten_events.db")
    db.execute("CREATE TABLE _event (seq)")
    db.execute("CREATE TABLE _gap (last_seq)")
    db.execute("CREATE TABLE _meta (key, value)")
    db.execute("INSERT INTO _event VALUES (?)", (last_seq,))
    db.commit()
    db.close()


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "blank"])
def test_nothing_left_of_a_journal_goes_on_after_what_the_database_holds(
    home: Path, path: Path, kept: dict[int, Batch], damage: str
) -> None:
    events_database(home, 5_000)
    path.unlink()
    if damage == "empty":
        path.touch()
    elif damage == "garbage":
        path.write_bytes(b"no database at all" * 1_000)
    elif damage == "blank":
        db = sqlite3.connect(path)
        db.execute("PRAGMA journal_mode=WAL")
        db.close()
    journal = recovered(path)
    origin = 5_001 + SPARE_SEQS  # a collector may store what it fetched before
    assert (journal.origin_seq, journal.first_seq, journal.last_seq) == (origin, origin, origin - 1)
    (loss,) = journal.losses
    assert (loss.first_seq, loss.last_seq) == (5_001, None)
    assert journal.append([b"a\n"], 1, 0.0, runs=[], opaque_ids=[]) == origin
    journal.close()
    assert len(list(home.glob("journal.db.corrupt-*"))) == (damage != "missing")
    again = recovered(path)
    assert (again.origin_seq, again.last_seq, again.recovered) == (origin, origin, "")
    again.close()


def test_first_start_of_all_is_no_recovery(path: Path) -> None:
    journal = recovered(path)
    assert (journal.origin_seq, journal.recovered, journal.losses) == (1, "", [])
    journal.close()


def test_seq_goes_on_after_the_database_if_it_holds_more_than_is_left(
    home: Path, path: Path, kept: dict[int, Batch]
) -> None:
    events_database(home, 9_000)
    mark_damaged(path, "as found by a test")
    journal = recovered(path)
    assert served(journal) == kept
    assert journal.last_seq == 9_000 + SPARE_SEQS
    assert journal.origin_seq == 1
    journal.close()


def test_wal_without_its_journal_is_not_lost(home: Path, path: Path) -> None:
    journal = Journal(path)
    fill(journal, 40, random.Random(2))
    before = served(journal)
    shutil.copy(f"{path}-wal", home / "kept")
    journal.close()
    path.unlink()
    (home / "kept").rename(f"{path}-wal")
    journal = recovered(path)
    assert served(journal) == before
    assert [f.name for f in home.glob("*.corrupt-*")] == ["journal.db.corrupt-20260131T120000Z-wal"]
    journal.close()


def test_recovery_cut_short_is_finished_by_the_next_start(
    home: Path, path: Path, kept: dict[int, Batch]
) -> None:
    shutil.copy(path, home / "journal.recovered")  # sealed, and the process died
    path.write_bytes(b"damaged")
    (home / "journal.recovering").write_bytes(b"an older attempt")
    journal = recovered(path)
    assert served(journal) == kept
    assert len(list(home.glob("journal.db.replaced-*"))) == 1
    journal.close()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "-wal", "-shm", "new -wal"])
def test_journal_taken_away_under_a_running_bus_is_put_back_whole(
    home: Path, path: Path, kept: dict[int, Batch], how: str
) -> None:
    journal = recovered(path)
    fill(journal, 10, random.Random(4))
    before = served(journal)
    assert journal.is_in_place()
    if how == "removed":
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
    elif how == "moved":
        path.rename(home / "elsewhere")
    elif how == "new -wal":
        (home / "other").touch()
        (home / "other").replace(f"{path}-wal")
    elif how.startswith("-"):
        Path(f"{path}{how}").unlink()
    else:
        other = Journal(home / "other.db")
        other.close()
        (home / "other.db").replace(path)
    assert not journal.is_in_place()
    fill(journal, 1, random.Random(5))  # acknowledged before anybody noticed
    expected = served(journal)
    put_back(journal, lambda: 1_769_860_800.0)
    assert journal.is_in_place()
    assert served(journal) == expected
    assert len(expected) == len(before) + 1
    fill(journal, 1, random.Random(6))
    expected = served(journal)
    files = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
    assert [f.stat().st_mode & 0o777 for f in files] == [0o600] * 3
    journal.close()
    again = recovered(path)
    assert served(again) == expected
    again.close()


def test_recovery_without_room_says_so_and_leaves_the_damaged_journal_for_the_next_try(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        path = disk / "journal.db"
        journal = Journal(path)
        fill(journal, 80, random.Random(7))
        expected = served(journal)
        journal.close()
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 200_000))
        mark_damaged(path, "as found by a test")
        with pytest.raises(JournalFull, match="no space left for"):
            recovered(path)
        assert sorted(p.name for p in disk.iterdir()) == [
            "ballast",
            "journal.db",
            "journal.db.damaged",
        ]
        ballast.unlink()
        journal = recovered(path)
        assert served(journal) == expected
        journal.close()


def damage(path: Path, *first_seqs: int) -> None:
    db = sqlite3.connect(path)
    db.executemany(
        "UPDATE batch SET crc32 = crc32 + 1 WHERE first_seq = ?", [(s,) for s in first_seqs]
    )
    db.commit()
    db.close()


def fill_evenly(journal: Journal, batches: int) -> None:
    """Batches of ten events."""
    for first in range(journal.last_seq + 1, journal.last_seq + 10 * batches, 10):
        lines = [line(f'foreign "{n}"'.replace('"', "-"), 20) for n in range(first, first + 10)]
        journal.append(lines, 10, 1_000.0, runs=[], opaque_ids=[])


@pytest.mark.parametrize(
    "order", [[(11, 20), (11, 30)], [(21, 30), (11, 30)], [(15, 20), (11, 40)]]
)
def test_each_lost_event_is_told_once_however_its_damage_is_found(
    path: Path, order: list[tuple[int, int]]
) -> None:
    journal = Journal(path)
    fill_evenly(journal, 5)
    new = [journal.record_loss(LostRange(a, b, 1.0, "CRC-32", "f")) for a, b in order]
    told = [
        seq for loss in itertools.chain(*new) for seq in range(loss.first_seq, loss.last_seq + 1)
    ]
    assert sorted(told) == list(range(11, order[-1][1] + 1))
    assert journal.record_loss(LostRange(12, order[-1][1], 1.0, "CRC-32", "f")) == []
    known = sum(loss.events or 0 for loss in journal.losses)
    assert known == len(told)
    journal.close()
    again = Journal(path)
    assert sum(loss.events or 0 for loss in again.losses) == known
    again.close()


def test_all_losses_are_told_however_many_they_are(path: Path) -> None:
    journal = Journal(path)
    fill_evenly(journal, 300)
    lost = [LostRange(seq, seq, 1.0, "CRC-32", "f") for seq in range(1, 3_000, 2)]
    journal.record_loss(*lost)
    journal.record_loss(LostRange(4_001, 4_010, 1.0, "gone", "f"))
    told: list[int] = []
    for _ in range(3):
        journal.close()
        journal = Journal(path)
        assert (journal.first_seq, journal.last_seq) == (1, 4_010)
        told += [loss.first_seq for loss in journal.losses if not loss.told]
        journal.losses_are_told()
    assert sorted(told) == [*range(1, 3_000, 2), 4_001]
    assert all(loss.told for loss in journal.losses)
    journal.close()


def test_second_recovery_remembers_what_the_first_one_lost(path: Path) -> None:
    journal = Journal(path)
    fill_evenly(journal, 6)
    journal.record_loss(LostRange(11, 20, 2.0, "CRC-32", "journal.db"))
    journal.record_loss(LostRange(1_000, None, 3.0, "gone", "x"))
    journal.losses_are_told()
    journal.close()
    damage(path, 11, 21)
    mark_damaged(path, "as found by a test")
    journal = recovered(path)
    found = sorted((x.first_seq, x.last_seq, x.told) for x in journal.losses)
    assert found == [(11, 20, True), (21, 30, False), (1_000, None, True)]
    assert journal.last_seq == 60
    journal.losses_are_told()
    journal.close()
    mark_damaged(path, "once more")
    again = recovered(path)
    assert sorted((x.first_seq, x.last_seq, x.told) for x in again.losses) == [
        (first, last, True) for first, last, _ in found
    ]
    again.close()


def test_recovery_that_is_sealed_is_not_made_again(
    home: Path, path: Path, kept: dict[int, Batch]
) -> None:
    shutil.copy(path, home / "journal.recovered")
    mark_damaged(path, "as found by a test")  # the process died before it could take this away
    journal = recovered(path)
    assert journal.recovered == ""
    assert served(journal) == kept
    journal.close()


def test_sound_journal_that_ends_before_the_database_never_gives_out_a_seq_again(
    home: Path, path: Path, kept: dict[int, Batch]
) -> None:
    journal = Journal(path)
    last, identity = journal.last_seq, journal.journal_id
    journal.close()
    events_database(home, last + 70)
    journal = recovered(path)
    assert (journal.journal_id, journal.last_seq) == (identity, last + 70 + SPARE_SEQS)
    assert served(journal) == kept
    spare, lost = journal.losses
    assert (lost.first_seq, lost.last_seq) == (last + 1, last + 70)
    assert f"ends at {last}" in lost.reason
    assert (spare.first_seq, spare.last_seq) == (last + 71, last + 70 + SPARE_SEQS)
    journal.close()
    again = recovered(path)
    assert again.losses == [spare, lost]
    again.close()


def test_start_that_dies_noting_a_lost_end_gives_out_no_seq_again(
    home: Path, path: Path, kept: dict[int, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = max(s + b.count - 1 for s, b in kept.items())
    events_database(home, last + 70)

    looks = 0
    unknown_part = Journal._unknown_part

    def dying(journal: Journal, loss: LostRange) -> list[LostRange]:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise KeyboardInterrupt
        return unknown_part(journal, loss)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "_unknown_part", dying)
        recovered(path)
    journal = recovered(path)
    assert journal.last_seq == last + 70 + SPARE_SEQS
    journal.close()


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_lost_journal_is_not_begun_anew_while_the_database_cannot_be_asked(
    home: Path, path: Path, kept: dict[int, Batch], damage: str
) -> None:
    events_database(home, 5_000)
    path.unlink()
    if damage == "garbage":
        path.write_bytes(b"no database at all" * 1_000)
    other = database.connect(home / "bitten_events.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(JournalFailed, match=r"bitten_events\.db.* locked; end the other program's"):
        recovered(path)
    other.close()
    assert len(list(home.glob("journal*"))) == (damage == "garbage")
    journal = recovered(path)
    assert journal.origin_seq == 5_001 + SPARE_SEQS
    journal.close()


def test_sound_journal_is_served_though_the_database_is_locked(
    home: Path, path: Path, kept: dict[int, Batch]
) -> None:
    events_database(home, 100)
    other = database.connect(home / "bitten_events.db")
    other.execute("BEGIN EXCLUSIVE")
    journal = recovered(path)
    assert served(journal) == kept
    journal.close()
    other.close()


def audited(home: Path, journal_id: str, seq: int) -> None:
    mark = {"version": 1, "journal_id": journal_id, "opening": [1, "x"], "tally": {"seq": seq}}
    (home / "audit.json").write_bytes(msgspec.json.encode(mark))


def test_start_that_dies_beginning_after_lost_events_calls_them_lost_the_next_time(
    home: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited(home, "0123456789abcdef", 9_000)

    def start() -> Journal:
        db = home / "bitten_events.db"
        return open_journal(path, db, lambda: 1_769_860_800.0, backup_dir=home / "backup")

    def dying(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "record_loss", dying)
        start()
    journal = start()
    assert {(r.first_seq, r.last_seq) for r in journal.losses} == {(1, 9_000), (9_001, None)}
    assert journal.origin_seq == journal.last_seq + 1 == 9_001
    journal.close()


@pytest.mark.parametrize("damage", ["garbage", "older copy", "end"])
def test_seq_goes_on_after_what_an_audit_tells_of_the_journal(
    home: Path, path: Path, kept: dict[int, Batch], damage: str
) -> None:
    journal = Journal(path)
    audited(home, journal.journal_id, 9_000)
    journal.close()
    if damage == "garbage":
        path.write_bytes(b"no database at all" * 1_000)
    elif damage == "end":
        mark_damaged(path, "as found by a test")
    db = home / "bitten_events.db"
    journal = open_journal(path, db, lambda: 1_769_860_800.0, backup_dir=home / "backup")
    assert journal.last_seq == 9_000 + SPARE_SEQS
    journal.close()


def test_audit_of_a_journal_before_says_nothing_about_a_sound_one(
    home: Path, path: Path, kept: dict[int, Batch]
) -> None:
    audited(home, "0123456789abcdef", 9_000)
    db = home / "bitten_events.db"
    journal = open_journal(path, db, lambda: 1_769_860_800.0, backup_dir=home / "backup")
    assert journal.losses == []
    journal.close()


def test_database_of_another_bus_says_nothing_about_a_sound_journal(
    home: Path, path: Path, kept: dict[int, Batch]
) -> None:
    events_database(home, 5_000)
    db = sqlite3.connect(home / "bitten_events.db")
    db.execute("INSERT INTO _meta VALUES ('journal_id', 'another')")
    db.commit()
    db.close()
    journal = recovered(path)
    assert journal.losses == []
    journal.close()


def test_gap_at_the_end_of_the_database_counts_as_much_as_an_event(home: Path, path: Path) -> None:
    events_database(home, 100)
    db = sqlite3.connect(home / "bitten_events.db")
    db.execute("INSERT INTO _gap VALUES (150)")
    db.commit()
    db.close()
    journal = recovered(path)
    assert journal.origin_seq > 150
    journal.close()


def test_recovery_goes_on_after_what_a_durable_consumer_has_read(
    path: Path, kept: dict[int, Batch]
) -> None:
    journal = Journal(path)
    last = journal.last_seq
    journal.save_consumers({"reader": (last + 41, 5.0)})
    journal.close()
    mark_damaged(path, "as found by a test")
    journal = recovered(path)
    assert served(journal) == kept
    assert journal.last_seq == last + 40 + SPARE_SEQS
    assert [(x.first_seq, x.last_seq) for x in reversed(journal.losses)] == [
        (last + 1, last + 40),
        (last + 41, last + 40 + SPARE_SEQS),
    ]
    assert journal.consumers() == {"reader": (last + 41, 5.0)}
    journal.close()
    mark_damaged(path, "once more")
    again = recovered(path)
    assert again.last_seq == last + 40 + SPARE_SEQS
    again.close()


PUBLISH = """
import sys
from collector.audit import audit
from event_bus import event_bridge
for i in range(int(sys.argv[1])):
    event_bridge.market_data({"symbol": "EURUSD", "bid": i + 1, "ask": i + 2})
sys.exit(not event_bridge.flush(30))
"""


def test_bus_started_without_its_wal_loses_no_acknowledged_event_unseen(system: System) -> None:
    bus = system.start_bus()
    collector = system.start_collector()
    assert system.script(PUBLISH, "1000").returncode == 0
    stored = system.wait_stored()
    bus.kill()
    bus.wait()
    Path(f"{system.settings.journal}-wal").unlink()
    system.start_bus()
    assert system.script(PUBLISH, "3000").returncode == 0
    assert system.wait_stored() > stored + SPARE_SEQS
    assert collector.poll() is None
    count = "SELECT count(*) FROM events WHERE event_type = 'market_data'"
    assert system.sql(count) == [(4_000,)]
    first = system.sql("SELECT min(first_seq), max(last_seq) FROM journal_loss")[0]
    assert first[1] >= stored + SPARE_SEQS
    status = system.status()
    assert status is not None
    assert "journal_damaged" in [p["code"] for p in status["problems"]]
    ledger = audit(system.settings)
    assert (ledger.lost, ledger.left_out, ledger.at_least) == (0, SPARE_SEQS, True)
    told = "SELECT first_seq, events FROM journal_loss ORDER BY first_seq"
    assert system.sql(told)[-1][1] is None
    assert system.bitten("audit").returncode == 1
    assert system.bitten("audit", "--accept").returncode == 0


def test_wal_removed_under_a_running_bus_costs_nothing_when_it_is_killed(system: System) -> None:
    bus = system.start_bus()
    assert system.script(PUBLISH, "1000").returncode == 0
    wal = Path(f"{system.settings.journal}-wal")
    wal.unlink()
    assert system.script(PUBLISH, "100").returncode == 0
    wait_until(wal.exists, "the -wal is there again")
    bus.kill()
    bus.wait()
    system.start_bus()
    status = system.status()
    assert status is not None
    assert status["last_seq"] >= 1_100
    assert [p["code"] for p in status["problems"]] == []


def noted(system: System) -> int:
    """The last seq, as the bus told it beside its journal."""
    note = msgspec.json.decode((system.home / END).read_bytes())
    return int(note["journal"]["last_seq"])


@pytest.mark.parametrize("then", ["start", "audit", "backup", "truncated", "unnoted"])
def test_wal_that_nobody_had_read_is_missed_by_the_next_start(system: System, then: str) -> None:
    bus = system.start_bus()
    assert system.script(PUBLISH, "1000").returncode == 0
    bus.kill()
    bus.wait()
    last = noted(system)
    assert last >= 1_000
    wal = Path(f"{system.settings.journal}-wal")
    wal.unlink()
    if then == "unnoted":
        (system.home / END).unlink()
        last = 0
    elif then == "truncated":
        wal.touch()
    elif then != "start":  # a reader makes an empty one
        system.bitten(then)
        assert wal.stat().st_size == 0
    bus = system.start_bus()
    system.start_collector()
    assert system.wait_stored() > SPARE_SEQS
    lost = system.sql("SELECT first_seq, last_seq FROM journal_loss ORDER BY first_seq")
    spare = (last + 1, last + SPARE_SEQS)
    assert lost == ([(1, last), spare] if last else [spare])
    bus.terminate()
    assert bus.wait(10) == 0
    Path(f"{system.settings.journal}-wal").unlink(missing_ok=True)
    system.start_bus()
    system.wait_stored()
    assert len(system.sql("SELECT * FROM journal_loss")) == len(lost)


@pytest.mark.parametrize("how", ["closed", "copied", "checkpointed by another program"])
def test_journal_that_is_whole_without_its_wal_lacks_nothing(
    home: Path, path: Path, kept: dict[int, Batch], how: str
) -> None:
    journal = Journal(path)
    fill(journal, 5, random.Random(1))
    found = served(journal)
    there = home / "there.db"
    if how == "copied":
        journal.copy_to(there)
    if how == "checkpointed by another program":
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{there}{suffix}")
        db = sqlite3.connect(there)
        db.execute("SELECT * FROM meta").fetchall()
        db.close()
    journal.close()
    if how == "closed":
        path.rename(there)
    assert not Path(f"{there}-wal").exists()
    again = Journal(there)
    assert not again.lacks_wal
    assert served(again) == found
    again.close()


def resend(system: System, lines: bytes) -> dict[str, Any]:
    client = Client(system.settings)
    try:
        return client.publish(lines, 10.0)
    finally:
        client.close()


def test_ids_between_which_others_lie_lead_to_their_own_events_after_a_recovery(
    path: Path,
) -> None:
    ids = [f"{TOKEN}-1", "order", f"{TOKEN}-2", f"{TOKEN}-3", "fill", f"{TOKEN}-4"]
    journal = Journal(path)
    producer = journal.producer(TOKEN)
    producer.last_n = 4
    runs = [(producer, 1, 1, 0), (producer, 2, 3, 2), (producer, 4, 4, 5)]
    opaque_ids = [("order", 1), ("fill", 4)]
    journal.append([line(i, 1) for i in ids], 6, 1.0, runs=runs, opaque_ids=opaque_ids)
    journal.close()
    mark_damaged(path, "as a test has it")
    again = recovered(path)
    producer = again.producers[TOKEN]
    assert [again.seq_of_native(producer, n) for n in range(1, 5)] == [1, 3, 4, 6]
    assert [again.seq_of_opaque(i) for i in ("order", "fill")] == [2, 5]
    again.close()


@pytest.mark.parametrize("gone", ["-wal", "journal"])
def test_what_only_the_database_has_left_is_recognised_when_it_is_sent_again(
    system: System, gone: str
) -> None:
    token = envelope.new_producer()
    ids = [f"{token}-{n}" for n in range(1, 101)] + [f"order {n}" for n in range(100)]
    lines = b"".join(
        envelope.encode(
            Envelope(event_id=i, event_type="user_action", timestamp=1.0, data={"action": "x"})
        )
        + b"\n"
        for i in ids
    )
    bus, collector = system.start_bus(), system.start_collector()
    assert resend(system, lines)["accepted"] == 200
    system.wait_stored()
    for daemon in (bus, collector):
        daemon.kill()
        daemon.wait()
    for suffix in ("-wal",) if gone == "-wal" else ("", "-wal", "-shm"):
        Path(f"{system.settings.journal}{suffix}").unlink()
    system.start_bus()
    system.start_collector()
    assert resend(system, lines)["duplicates"] == 200
    assert resend(system, lines.replace(b'-100"', b'-101"'))["accepted"] == 1
    system.wait_stored()
    count = "SELECT count(*), count(DISTINCT event_id) FROM events WHERE event_type = 'user_action'"
    assert system.sql(count) == [(201, 201)]


def test_wal_removed_again_and_again_is_back_within_seconds(system: System) -> None:
    system.start_bus()
    assert system.script(PUBLISH, "100").returncode == 0
    wal = Path(f"{system.settings.journal}-wal")
    for _ in range(3):
        wal.unlink()  # right after the bus has looked
        wait_until(wal.exists, "the -wal is there again", timeout_s=3)


def test_what_an_open_reader_keeps_in_the_wal_alone_is_missed_when_that_is_removed(
    system: System,
) -> None:
    bus = system.start_bus()
    assert system.script(PUBLISH, "10").returncode == 0
    bus.terminate()
    assert bus.wait(10) == 0
    journal = system.settings.journal
    reader = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
    rows = reader.execute("SELECT * FROM meta")
    rows.fetchone()  # the next start can copy nothing of the -wal into the file
    bus = system.start_bus()
    assert system.script(PUBLISH, "100").returncode == 0
    bus.kill()
    bus.wait()
    last = noted(system)
    rows.close()
    reader.close()
    Path(f"{journal}-wal").unlink()
    system.start_bus()
    system.start_collector()
    system.wait_stored()
    lost = system.sql("SELECT first_seq, last_seq FROM journal_loss ORDER BY first_seq")
    assert lost[0][1] == last
    assert last - 101 <= lost[0][0] <= last - 99  # a health event is among them
    assert system.sql("SELECT count(*) FROM events WHERE event_type = 'market_data'") == [(10,)]


def test_wal_that_goes_twice_costs_no_more_than_what_was_in_it(system: System) -> None:
    bus = system.start_bus()
    assert system.script(PUBLISH, "100").returncode == 0
    ends = []
    for _ in range(2):
        bus.kill()
        bus.wait()
        ends.append(noted(system))
        Path(f"{system.settings.journal}-wal").unlink()
        bus = system.start_bus()
        assert system.script(PUBLISH, "10").returncode == 0
    system.start_collector()
    system.wait_stored()
    ledger = audit(system.settings)
    assert (ledger.lost, ledger.left_out) == (ends[1] - SPARE_SEQS, 2 * SPARE_SEQS)


def test_note_of_the_end_counts_though_the_database_is_bound_to_another_journal(
    home: Path, path: Path
) -> None:
    journal = Journal(path)
    fill(journal, 3, random.Random(1))
    journal_id = journal.journal_id
    journal.close()
    events_database(home, 5)
    with closing(sqlite3.connect(home / "bitten_events.db")) as db:
        db.execute("INSERT INTO _meta VALUES ('journal_id', 'feedfeedfeedfeed')")
        db.commit()
    note = {"journal_id": journal_id, "journal": {"last_seq": 100}}
    (home / END).write_bytes(msgspec.json.encode(note))
    journal = open_journal(
        path, home / "bitten_events.db", lambda: 1_769_860_800.0, backup_dir=home / "backup"
    )
    assert journal.last_seq == 100 + SPARE_SEQS
    journal.close()


def test_note_of_the_end_is_there_again_with_the_journal(bus: System) -> None:
    assert bus.script(PUBLISH, "10").returncode == 0
    bus.home.rename(bus.home.with_name("away"))
    wait_until((bus.home / END).exists, "the note is there again")
    assert bus.script(PUBLISH, "10").returncode == 0
    assert noted(bus) >= 20


@pytest.mark.parametrize("there", ["a directory", "a link", "a pipe", "garbage"])
def test_note_that_is_none_stops_no_bus(system: System, there: str) -> None:
    system.settings.make_home()
    note = system.home / END
    if there == "a directory":
        note.mkdir()
    elif there == "a link":
        note.symlink_to(system.home / "elsewhere")
    elif there == "a pipe":
        os.mkfifo(note)
    else:
        note.write_text("x")
    system.start_bus()
    assert system.script(PUBLISH, "10").returncode == 0
    if there != "a directory":
        assert noted(system) >= 10


@pytest.mark.parametrize("asked", ["audit", "doctor", "backup"])
@pytest.mark.parametrize("cut", ["journal", "db"])
def test_who_asks_about_a_file_that_was_cut_to_nothing_destroys_nothing(
    system: System, cut: str, asked: str
) -> None:
    bus = system.start_bus()
    collector = system.start_collector()
    assert system.script(PUBLISH, "50").returncode == 0
    system.wait_stored()
    for process in (bus, collector):
        process.kill()
        process.wait()
    path = getattr(system.settings, cut)
    os.truncate(path, 0)
    size = Path(f"{path}-wal").stat().st_size
    assert size > 0
    assert system.bitten(asked).returncode != 0
    assert Path(f"{path}-wal").stat().st_size == size
    system.start_bus()
    system.start_collector()
    system.wait_stored()
    assert system.sql("SELECT count(*) FROM events WHERE event_type = 'market_data'") == [(50,)]
    assert audit(system.settings).lost == 0
