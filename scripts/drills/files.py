"""Rows 12 and 13: files removed under way, and bad or missing at the start."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from damage import journal_events
from harness import Trial, drill
from system import wait_until

NOTICED_S = 5.0
TOLD_S = 10.0
STORED_S = 30.0
PARTS = ("", "-wal", "-shm")
SPARE_SEQS = 100_000
"""What docs/operations.md says is left out behind a journal that may have gone on."""

BEHIND_EVENTS = 1_000


@drill(
    row=12,
    name="file-removed",
    fault="database or journal, or the -wal or -shm of one alone, is removed or moved away while"
    " it is open; every other time its daemon is killed after that",
    long="10 times each",
    plant="nobody looks whether the files are there",
    breaks="is there again after",
)
def file_removed(trial: Trial) -> None:
    up = trial.start(fault="files-unwatched" if trial.planted else "")
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    settings = trial.system.settings
    back_s = []
    kills = 0
    for number in range(trial.count(1, 10)):
        for name, path in (("collect", settings.db), ("bus", settings.journal)):
            for part in PARTS:
                back_s.append(_take_away(trial, name, path, part, number))
                if trial.rng.random() < 0.5:  # then what it had open does not help it any more
                    kills += 1
                    killed_at = time.time()
                    up.signal(name, signal.SIGKILL)
                    wait_until(
                        lambda at=killed_at: trial.next_stored(at), "events are stored again"
                    )
                time.sleep(trial.rng.uniform(0.5, 2.0))
    trial.note("put back max s", round(max(back_s), 1))
    trial.note("killed after it", f"{kills} of {len(back_s)}")
    trial.expect(up.process.poll() is None, "`bitten up` ended")


def _take_away(trial: Trial, name: str, path: Path, part: str, number: int) -> float:
    """Take one file from a daemon; how long until all that it writes to is there again."""
    assert trial.up is not None
    up, gone = trial.up, Path(f"{path}{part}")
    daemon = wait_until(lambda: up.child(name), f"`bitten {name}` runs")
    wait_until(lambda: _has_open(daemon.pid, path), f"`bitten {name}` has {path.name} open")
    told = up.log.read_text().count("was removed or replaced")
    how = trial.rng.choice(("rm", "mv"))
    if how == "rm":
        gone.unlink()
    else:
        gone.rename(f"{gone}.moved-{number}")
    removed_at = time.time()
    took_s = trial.expect_within(
        NOTICED_S, lambda: _has_open(daemon.pid, path), f"{gone.name} is there again after {how}"
    )
    trial.expect_within(
        TOLD_S,
        lambda: up.log.read_text().count("was removed or replaced") > told,
        f"the log tells of {gone.name}",
    )
    trial.expect_within(TOLD_S, trial.problems, f"status tells of {gone.name}")
    wait_until(lambda: trial.next_stored(removed_at), "events are stored again")
    trial.expect(up.child(name) == daemon, f"`bitten {name}` ended when it lost {gone.name}")
    return took_s


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has the files open that are at this path now."""
    try:
        there = {_identity(Path(f"{path}{part}")) for part in PARTS}
        held = set()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            held.add(_identity(descriptor))
    except FileNotFoundError:
        return False
    return there <= held


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


@drill(
    row=13,
    name="file-bad-at-start",
    fault="database or journal wiped, scribbled over, empty or missing at start, or its -wal, or"
    " both of them, removed after a SIGKILL of both daemons",
    long="4 times each",
    plant="what is damaged is deleted",
    breaks="is not kept as .corrupt",
)
def file_bad_at_start(trial: Trial) -> None:
    """The journal's own files come last: from then on it has not everything any more, and what
    becomes of the database could not be foretold to the event."""
    settings = trial.system.settings
    rounds = range(trial.count(1, 4))
    for path in (settings.db, settings.journal):
        for _ in rounds:
            for how in ("wiped", "scribbled over", "empty", "missing"):
                _start_on_bad(trial, path, how)
            if path == settings.db:
                _start_without_wal_of_database(trial)
            else:
                _start_without_wal_of_journal(trial, is_behind=False)
                _start_without_wal_of_journal(trial, is_behind=True)
                _start_without_wal_of_journal(trial, is_behind=False, nor_of_database=True)
    trial.start()
    trial.settle()
    verdict = trial.check()
    trial.note("acknowledged and lost with a -wal", verdict.figures.lost)
    gaps = trial.system.sql("SELECT first_seq, last_seq FROM _gap ORDER BY first_seq")
    trial.expect(
        gaps == trial.lost.gaps, f"the database names {gaps} as gaps, gone are {trial.lost.gaps}"
    )


def _start_on_bad(trial: Trial, path: Path, how: str) -> None:
    settings = trial.system.settings
    up = trial.start()
    load = trial.load or trial.publish()
    started_at = time.time()
    wait_until(lambda: trial.next_stored(started_at), f"events are stored, {path.name}")
    # All that is in the journal is in the database too: either will do.
    load.pause()
    wait_until(lambda: load.waiting() == 0, "all is acknowledged")
    wait_until(trial.all_stored, "the database has caught up")
    up.stop()
    before = len(list(settings.home.glob("*.corrupt-*")))
    _spoil(path, how, trial.rng)
    last = _last_stored(settings.db) if path == settings.journal else 0
    up = trial.start(fault="corrupt-deleted" if trial.planted else "")
    load.pause()
    restarted_at = time.time()
    trial.expect_within(
        STORED_S,
        lambda: trial.next_stored(restarted_at),
        f"events are stored again with {path.name} {how}",
    )
    if path == settings.journal:
        _excuse_spare_seqs(trial, how, last)
    aside = len(list(settings.home.glob("*.corrupt-*")))
    trial.expect(
        aside > before or how in ("missing", "scribbled over"),
        f"{path.name} was {how} and is not kept as .corrupt-<time>",
    )
    up.stop()


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


class _Held:
    """What the files of a home hold after both daemons were killed: `journal` and `stored` are ids
    by seq, `last_stored` is the last seq of which the database has account; the others are the
    same without the -wal files."""

    def __init__(self, trial: Trial) -> None:
        settings, to = trial.system.settings, trial.directory / "held"
        self.journal = {
            s: i for s, (i, _) in journal_events(_copy(settings.journal, to))[0].items()
        }
        self.last_stored = _last_stored(_copy(settings.db, to))
        bare = _copy(settings.journal, to, parts=("",))
        self.bare_last = max(journal_events(bare)[0], default=0)
        with closing(sqlite3.connect(bare)) as db:
            losses = db.execute("SELECT max(last_seq) FROM lost_range").fetchone()[0] or 0
        self.bare_last = max(self.bare_last, losses)
        self.bare_last_stored = _last_stored(_copy(settings.db, to, parts=("",)))
        shutil.rmtree(to)


def _copy(path: Path, to: Path, *, parts: tuple[str, ...] = ("", "-wal")) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for part in parts:
        shutil.copy(f"{path}{part}", to)
    return to / path.name


def _last_stored(db: Path) -> int:
    with closing(sqlite3.connect(db)) as database:
        return max(
            database.execute(f"SELECT coalesce(max({seq}), 0) FROM {table}").fetchone()[0]
            for seq, table in (("seq", "_event"), ("last_seq", "_gap"))
        )


def _start_and_kill(trial: Trial, *, is_behind: bool) -> _Held:
    """Both daemons by SIGKILL, under load; with `is_behind` the journal has much that the
    database has not."""
    up = trial.start()
    started_at = time.time()
    wait_until(lambda: trial.next_stored(started_at), "events are stored")
    load = trial.load or trial.publish()
    if is_behind:
        up.signal("collect", signal.SIGSTOP)
    acked = load.acked()
    wait_until(lambda: load.acked() > acked + BEHIND_EVENTS, "the bus takes events")
    up.process.send_signal(signal.SIGSTOP)  # it would start them again
    for name in ("bus", "collect"):
        up.signal(name, signal.SIGKILL)
        wait_until(lambda one=name: up.child(one) is None, f"`bitten {name}` is gone")
    up.kill()
    return _Held(trial)


def _start_again(trial: Trial, what: str) -> None:
    trial.start()
    restarted_at = time.time()
    trial.expect_within(
        STORED_S, lambda: trial.next_stored(restarted_at), f"events are stored again without {what}"
    )


def _start_without_wal_of_database(trial: Trial) -> None:
    """The journal has all of it."""
    held = _start_and_kill(trial, is_behind=False)
    wal = Path(f"{trial.system.settings.db}-wal")
    wal.unlink()
    trial.expect(held.last_stored > held.bare_last_stored, f"nothing was in {wal.name} alone")
    _start_again(trial, wal.name)
    wait_until(trial.all_stored, "the database has caught up")
    trial.note("refilled without the -wal", held.last_stored - held.bare_last_stored)
    assert trial.up is not None
    trial.up.stop()


def _start_without_wal_of_journal(
    trial: Trial, *, is_behind: bool, nor_of_database: bool = False
) -> None:
    """What neither the database nor the rest of the journal has is gone, and all of it is named."""
    held = _start_and_kill(trial, is_behind=is_behind)
    wal = Path(f"{trial.system.settings.journal}-wal")
    wal.unlink()
    last_stored = held.last_stored
    if nor_of_database:
        Path(f"{trial.system.settings.db}-wal").unlink()
        last_stored = held.bare_last_stored
    kept = max(held.bare_last, last_stored)
    gone = {seq: event_id for seq, event_id in held.journal.items() if seq > kept}
    trial.expect(max(held.journal) > held.bare_last, f"nothing was in {wal.name} alone")
    behind = max(held.journal) - held.last_stored
    trial.expect(behind >= BEHIND_EVENTS or not is_behind, f"the database was {behind} behind")
    # What was committed last the bus may have told nobody, nor noted.
    note = json.loads((trial.system.home / "last_seq.json").read_text())
    end = max(kept, note["journal"]["last_seq"])
    trial.lost.ids |= set(gone.values())
    trial.lost.gaps.append((kept + 1, end + SPARE_SEQS))
    trial.lost.cuts.append((held.bare_last + 1, end + SPARE_SEQS))
    _start_again(trial, wal.name)
    named = [(held.bare_last + 1, end), (end + 1, end + SPARE_SEQS)]
    trial.expect_within(
        TOLD_S,
        lambda: _told(trial, held.bare_last) == [(a, b) for a, b in named if a <= b],
        f"journal_loss events name {named} without {wal.name}",
    )
    trial.expect("journal" in trial.problems(), f"status does not tell of {wal.name}")
    assert trial.up is not None
    trial.up.stop()


def _told(trial: Trial, after_seq: int) -> list[tuple[int, int]]:
    """What stored `journal_loss` events name behind a seq."""
    return sorted(
        set(
            trial.system.sql(
                "SELECT first_seq, last_seq FROM journal_loss WHERE first_seq > ?", after_seq
            )
        )
    )


def _excuse_spare_seqs(trial: Trial, how: str, last: int) -> None:
    """A journal of which nothing is left goes on behind spare seqs; one that was scribbled over
    may have to, and then it says so."""
    spare = last + 1, last + SPARE_SEQS
    with closing(sqlite3.connect(f"file:{trial.system.settings.journal}?mode=ro", uri=True)) as db:
        named = spare in db.execute("SELECT first_seq, last_seq FROM lost_range").fetchall()
    if named or how in ("empty", "missing"):
        trial.lost.gaps.append(spare)
