"""Row 5: a journal that is not what was written."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import struct
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

from daemons import Up
from harness import Trial, all_stored, drill
from invariant import Figures, Verdict
from system import System, wait_until

TOLD_S = 10.0
PAGE_BYTES = 8_192


@drill(
    row=5,
    name="journal-damage",
    fault="bits of the journal flip, pages are wiped or its end is cut off, the bus being down",
    long="30 times",
    plant="the bus does not look at checksums",
    breaks="is served as seq",
)
def journal_damage(trial: Trial) -> None:
    """The collector has nothing of it yet: what is damaged is nowhere else."""
    environ = os.environ | (trial.fault_environ("no-checksums") if trial.planted else {})
    figures = Figures()
    hits = 0
    for number in range(trial.count(3, 30)):
        home = trial.directory / f"home-{number}"
        system = System(home, environ=environ)
        system.start_bus()
        _emit(system, trial.rng.randrange(1_000, 3_000))
        system.close()  # by SIGKILL: some of it is in the WAL
        journal = system.settings.journal
        truth, _ = journal_events(journal)
        # A batch is hit for sure in every other trial, and where it lies for good.
        if number % 2 == 0:
            _checkpoint(journal)
        hit = _damage(journal, trial.rng, "body" if number % 2 == 0 else None)
        sound, unsound = _readable_events(journal, trial.directory / "copy")
        unsound &= set(truth)  # what is read of a page of zeros never was an event
        hits += bool(unsound)
        # Supervised: damage that is found under way ends the bus, and the next start mends it.
        trial.up = up = Up(system, trial.directory)
        up.wait_serving()
        _emit(system, 100)
        wait_until(lambda s=system: all_stored(s), f"all is stored after {hit}", 60)
        stored = {
            seq: (event_id, json.loads(data))
            for seq, event_id, data in system.sql("SELECT seq, event_id, data FROM events")
        }
        wrong = [s for s, event in truth.items() if s in stored and stored[s] != event]
        gone = [s for s in truth if s not in stored]
        needless = [s for s in gone if s in sound]
        if gone:
            trial.expect_within(
                TOLD_S,
                lambda s=system, lost=gone: set(lost) <= _told(s),  # type: ignore[misc]
                f"{hit}: journal_loss events name all that is gone",
            )
        named = _told(system)
        silent = [s for s in gone if s not in named]
        trial.expect(not wrong, f"{hit}: another event is served as seq {wrong[:1]}")
        trial.expect(not silent, f"{hit}: {len(silent)} events are gone and nothing says so")
        trial.expect(not needless, f"{hit}: {len(needless)} events are gone that were sound")
        unnamed = sorted(unsound - named)
        trial.expect(
            not unnamed,
            f"{hit}: {len(unnamed)} damaged are not named, such as {unnamed[:1]} of {len(truth)}",
        )
        trial.expect(len(gone) < len(truth), f"{hit}: nothing was recovered")
        ids = {event_id for event_id, _ in stored.values()}
        trial.expect(len(ids) == len(stored), f"{hit}: an event is stored twice")
        figures.published += len(truth)
        figures.acked += len(truth)
        figures.stored += len(truth) - len(gone)
        figures.holes += len(silent)
        up.kill()
        system.close()
        shutil.rmtree(home)
    trial.expect(hits, "no batch was hit: nothing was proved")
    trial.note("trials in which a batch was hit", hits)
    trial.note("lost and named", figures.acked - figures.stored)
    trial.verdict = Verdict(figures)


def _told(system: System) -> set[int]:
    """The seqs that stored `journal_loss` events name."""
    rows = system.sql("SELECT first_seq, coalesce(last_seq, first_seq + 100000) FROM journal_loss")
    return {s for a, b in rows for s in range(a, b + 1)}


def _emit(system: System, count: int) -> None:
    """Publish in groups of some tens, as a journal of daily use has them."""
    code = (
        "import sys; from event_bus import event_bridge as b\n"
        "for i in range(int(sys.argv[1])):\n"
        "    b.market_data({'symbol': 'EURUSD', 'bid': i, 'ask': i + 1})\n"
        "    i % 40 or b.flush(5)\n"
        "sys.exit(not b.flush(30))\n"
    )
    done = system.script(code, str(count))
    assert done.returncode == 0, done.stderr


Events = dict[int, tuple[str, Any]]
"""Id and data by seq."""


def journal_events(path: Path) -> tuple[Events, set[int]]:
    """Of the batches that can be read: the events of the sound ones, the seqs of the others."""
    events: Events = {}
    unsound: set[int] = set()
    with closing(sqlite3.connect(path)) as db:
        for first, count, at, crc, body in db.execute("SELECT * FROM batch"):
            try:
                sound = zlib.crc32(body, zlib.crc32(struct.pack("<qqd", first, count, at))) == crc
            except (struct.error, TypeError):  # a flipped bit has changed the type of a value
                unsound.add(first)
                continue
            if not sound:
                unsound |= set(range(first, first + count))
                continue
            for seq, line in enumerate(body.splitlines(), first):
                event = json.loads(line)
                events[seq] = event["event_id"], event["data"]
    return events, unsound


def _readable_events(path: Path, copy: Path) -> tuple[Events, set[int]]:
    """The same of a damaged journal, left as it is; nothing, if SQLite cannot read it."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, copy)
    (copy / f"{path.name}-shm").unlink(missing_ok=True)
    try:
        return journal_events(copy / path.name)
    except sqlite3.Error:
        return {}, set()


def _checkpoint(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _damage(path: Path, rng: random.Random, kind: str | None) -> str:
    """Damage the journal or its WAL; says how. `body` is a bit of an event, in the journal.

    The end of the WAL is not cut off: that cannot be told from a power loss in the middle of a
    write, which costs nobody anything that was acknowledged.
    """
    files = [f for f in (path, Path(f"{path}-wal")) if f.exists() and f.stat().st_size > 64 << 10]
    file = path if kind == "body" else rng.choice(files)
    size = file.stat().st_size
    kind = kind or rng.choice(("bits", "page", "first page", *(("cut",) if file == path else ())))
    with file.open("r+b") as f:
        if kind == "cut":
            f.truncate(rng.randrange(size * 6 // 10, size))
        elif kind == "body":
            at = file.read_bytes().index(b'"bid":', rng.randrange(size // 2)) + len(b'"bid":')
            f.seek(at)
            digit = f.read(1)[0] ^ 1  # another digit: what is read is as good as before
            f.seek(at)
            f.write(bytes([digit]))
        elif kind == "bits":
            for _ in range(rng.choice((1, 8, 64))):
                at = rng.randrange(size)
                f.seek(at)
                byte = f.read(1)[0] ^ (1 << rng.randrange(8))
                f.seek(at)
                f.write(bytes([byte]))
        else:
            f.seek(0 if kind == "first page" else rng.randrange(size // PAGE_BYTES) * PAGE_BYTES)
            f.write(bytes(PAGE_BYTES))
    return f"{kind} of {file.name}"
