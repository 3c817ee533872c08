"""Rows 16 and 17: clocks that jump, and events whose own time cannot be true."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing

from harness import Trial, drill
from system import wait_until

HOUR_S = 3_600
DAY_S = 86_400
FUTURE_S = 253_402_300_799.0  # the end of 9999


@drill(
    row=16,
    name="clock-steps",
    fault="the clock of bus and collector steps back an hour, then forward a day, then back again",
    long="10 times",
    plant="the bus trims by what the clock says",
    breaks="the journal was cut",
)
def clock_steps(trial: Trial) -> None:
    system = trial.system
    # By age alone a day forward would take everything but what came since.
    system.environ["BITTEN_JOURNAL_MAX_AGE_S"] = str(HOUR_S)
    clock = trial.directory / "clock"
    clock.write_text("0")
    trial.start(fault=f"clock:{clock}" + (";raw-clock" if trial.planted else ""))
    load = trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    for _ in range(trial.count(1, 10)):
        for offset in (-HOUR_S, DAY_S, 0):
            before = system.status() or {}
            clock.write_text(str(offset))
            acked = load.acked()
            wait_until(lambda n=acked: load.acked() > n + 2_000, "the bus goes on")
            cursor = _saved_cursor(trial)
            wait_until(lambda c=cursor: _saved_cursor(trial) != c, "the bus has kept house", 30)
            now = system.status() or {}
            trial.expect(now["last_seq"] > before["last_seq"], "seq does not rise")
            trial.expect(now["first_seq"] == 1, "the journal was cut")
    trial.settle()
    verdict = trial.check()
    seqs = system.sql("SELECT count(*), min(seq), max(seq) FROM events")[0]
    trial.expect(seqs[0] == seqs[2] and seqs[1] == 1, f"count, first, last seq: {seqs}")
    trial.note("journal and database at seq", verdict.figures.stored and seqs[2])


def _saved_cursor(trial: Trial) -> int:
    """Written every five seconds, right before the journal is trimmed; the bus answers nobody
    between the two."""
    with closing(sqlite3.connect(f"file:{trial.system.settings.journal}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT max(next_seq) FROM consumer").fetchone()[0] or 0)


@drill(
    row=17,
    name="strange-timestamps",
    fault="events of 1970, of 9999 and from before 1970",
    long="1,000 of each",
    plant="the collector puts such timestamps right",
    breaks="kept by timestamp",
)
def strange_timestamps(trial: Trial) -> None:
    system = trial.system
    trial.start(fault="times-put-right" if trial.planted else "")
    trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    each = trial.count(50, 1_000)
    strange = (0.0, 1.5, -86_400.0, FUTURE_S)
    code = (
        "import sys; from event_bus import event_bridge as b\n"
        "for t in map(float, sys.argv[2:]):\n"
        "    for i in range(int(sys.argv[1])):\n"
        "        assert b.emit('user_action', {'action': 'odd'}, timestamp=t, source='odd')\n"
        "sys.exit(not b.flush(60))\n"
    )
    begin = time.time()
    done = system.script(code, str(each), *map(str, strange), timeout=120)
    trial.expect(done.returncode == 0, done.stderr)
    trial.settle()
    trial.check()
    kept = dict(
        system.sql("SELECT timestamp, count(*) FROM events WHERE source = 'odd' GROUP BY 1")
    )
    trial.expect(kept == dict.fromkeys(strange, each), f"kept by timestamp: {kept}")
    (early,) = system.sql(
        "SELECT count(*) FROM events WHERE source = 'odd' AND received_at < ?", begin - 1
    )[0]
    trial.expect(early == 0, f"{early} events have a received_at of another time")
    doctor = system.bitten("doctor", "--json", timeout=60)
    trial.expect("timestamp" in doctor.stdout, "`bitten doctor` does not flag them")
    trial.note("kept", sum(kept.values()))
