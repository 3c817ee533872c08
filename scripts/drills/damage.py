"""Rows 5, 12 and 13: files damaged, removed or replaced, at start and under way."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import time
from pathlib import Path

from harness import Trial, all_stored, drill
from invariant import Figures, Verdict
from system import System, wait_until

NOTICED_S = 5.0
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
    for number in range(trial.count(3, 30)):
        home = trial.directory / f"home-{number}"
        system = System(home, environ=environ)
        system.start_bus()
        _emit(system, trial.rng.randrange(1_000, 3_000))
        system.close()  # by SIGKILL: some of it is in the WAL
        truth = _journal_ids(system.settings.journal)
        hit = _damage(system.settings.journal, trial.rng)
        system.start_bus()
        _emit(system, 100)
        system.start_collector()
        wait_until(lambda s=system: all_stored(s), f"all is stored after {hit}", 60)
        stored = dict(system.sql("SELECT seq, event_id FROM events"))
        gaps = system.sql("SELECT first_seq, last_seq FROM _gap")
        told = system.sql("SELECT first_seq, last_seq FROM journal_loss")
        wrong = [s for s, i in truth.items() if s in stored and stored[s] != i]
        silent = [
            s for s in truth if s not in stored and not any(a <= s <= b for a, b in (*gaps, *told))
        ]
        gone = [s for s in truth if s not in stored]
        trial.expect(not wrong, f"{hit}: another event is served as seq {wrong[:1]}")
        trial.expect(not silent, f"{hit}: {len(silent)} events are gone and nothing says so")
        trial.expect(not gone or told, f"{hit}: no journal_loss event tells of the loss")
        trial.expect(len(gone) < len(truth), f"{hit}: nothing was recovered")
        trial.expect(len(set(stored.values())) == len(stored), f"{hit}: an event is stored twice")
        figures.published += len(truth)
        figures.acked += len(truth)
        figures.stored += len(truth) - len(gone)
        figures.holes += len(silent)
        system.close()
        shutil.rmtree(home)
    trial.note("lost and named", figures.acked - figures.stored)
    trial.verdict = Verdict(figures)


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


def _journal_ids(path: Path) -> dict[int, str]:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        ids = {}
        for first, body in db.execute("SELECT first_seq, body FROM batch"):
            for seq, line in enumerate(body.splitlines(), first):
                ids[seq] = json.loads(line)["event_id"]
    return ids


def _damage(path: Path, rng: random.Random) -> str:
    """Damage the journal or its WAL; says how.

    The end of the WAL is not cut off: that cannot be told from a power loss in the middle of a
    write, which costs nobody anything that was acknowledged.
    """
    files = [f for f in (path, Path(f"{path}-wal")) if f.exists() and f.stat().st_size > 64 << 10]
    file = rng.choice(files)
    size = file.stat().st_size
    kind = rng.choice(("bits", "page", "first page", *(("cut",) if file == path else ())))
    with file.open("r+b") as f:
        if kind == "cut":
            f.truncate(rng.randrange(size * 6 // 10, size))
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


@drill(
    row=12,
    name="file-removed",
    fault="the database or the journal is removed or moved away while it is open",
    long="10 times each",
    plant="the collector leaves out one event",
    breaks="seqs are missing",
)
def file_removed(trial: Trial) -> None:
    up = trial.start(fault="one-event-dropped" if trial.planted else "")
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    settings = trial.system.settings
    noticed = []
    for number in range(trial.count(1, 10)):
        for path in (settings.db, settings.journal):
            how = trial.rng.choice(("rm", "mv"))
            if how == "rm":
                path.unlink()
            else:
                path.rename(path.with_suffix(f".moved-{number}"))
            removed_at = time.time()
            noticed.append(
                trial.expect_within(
                    NOTICED_S, path.exists, f"{path.name} is there again after {how}"
                )
            )
            wait_until(lambda at=removed_at: trial.next_stored(at), "events are stored again")
            time.sleep(trial.rng.uniform(0.5, 2.0))
    trial.note("put back max s", round(max(noticed), 1))
    trial.expect(up.process.poll() is None, "`bitten up` ended")


@drill(
    row=13,
    name="file-bad-at-start",
    fault="database or journal wiped, scribbled over, empty or missing at start",
    long="4 times each",
    plant="the collector leaves out one event",
    breaks="seqs are missing",
)
def file_bad_at_start(trial: Trial) -> None:
    settings = trial.system.settings
    for number in range(trial.count(1, 4)):
        for path in (settings.db, settings.journal):
            for how in ("wiped", "scribbled over", "empty", "missing"):
                planted = trial.planted and number == 0
                up = trial.start(fault="one-event-dropped" if planted else "")
                load = trial.load or trial.publish()
                started_at = time.time()
                wait_until(
                    lambda at=started_at: trial.next_stored(at), f"events are stored, {path.name}"
                )
                # All that is in the journal is in the database too: either will do.
                load.pause()
                wait_until(lambda on=load: on.waiting() == 0, "all is acknowledged")
                wait_until(trial.all_stored, "the database has caught up")
                up.stop()
                before = len(list(settings.home.glob("*.corrupt-*")))
                _spoil(path, how, trial.rng)
                up = trial.start()
                load.pause()
                restarted_at = time.time()
                trial.expect_within(
                    30,
                    lambda at=restarted_at: trial.next_stored(at),  # type: ignore[misc]
                    f"events are stored again with {path.name} {how}",
                )
                aside = len(list(settings.home.glob("*.corrupt-*")))
                trial.expect(
                    aside > before or how in ("missing", "scribbled over"),
                    f"{path.name} was {how} and is not kept as .corrupt-<time>",
                )
                up.stop()
    trial.start()


def _spoil(path: Path, how: str, rng: random.Random) -> None:
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        with path.open("r+b") as f:
            for _ in range(1 if how == "wiped" else 20):
                f.seek(0 if how == "wiped" else rng.randrange(size))
                f.write(bytes(4096) if how == "wiped" else rng.randbytes(512))
