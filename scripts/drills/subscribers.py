"""Rows 22 and 24: a slow subscriber, and those that come late."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from harness import Trial, drill
from system import wait_until

from event_bus.subscriber import Subscriber

PEER = str(Path(__file__).parent / "peer.py")
SLOW_RATE = 100
ROUND_EVENTS = 41_000
"""Two bursts: twice what the bus keeps for a subscriber."""

JOIN_RATE = 5_000
P99_RATIO = 1.1
P99_NOISE_MS = 2.0


class Peers:
    """Subscriber processes of a trial; what they print is read from files, not pipes."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._started = 0

    def start(
        self, from_seq: int, until_seq: int, rate: float = 0, *options: str
    ) -> tuple[subprocess.Popen[str], Path]:
        self._started += 1
        path = self._trial.directory / f"peer-{self._started}"
        with path.open("w") as out:
            process = self._trial.system.popen(
                PEER, str(from_seq), str(until_seq), str(rate), *options, stdout=out
            )
        wait_until(lambda: path.stat().st_size, "the subscriber is there")
        return process, path

    @staticmethod
    def result(peer: tuple[subprocess.Popen[str], Path]) -> dict[str, Any]:
        process, path = peer
        assert process.wait(120) == 0, path.read_text()[-1000:]
        found: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
        return found


def last_seq(trial: Trial) -> int:
    """The bus's last seq now."""
    status = wait_until(lambda: trial.system.status(2.0), "the bus answers")
    return int(status["last_seq"])


def check_seen(trial: Trial, who: str, seen: list[list[Any]], first_seq: int) -> None:
    """What a subscriber saw is what the journal has, in order, from `first_seq` on."""
    seqs = [s for s, _ in seen]
    trial.expect(seqs, f"{who} saw nothing")
    if seqs and seqs != list(range(first_seq, first_seq + len(seqs))):
        missing = len(set(range(first_seq, max(seqs) + 1)) - set(seqs))
        trial.breach(f"{who} missed {missing} events and saw {len(seqs) - len(set(seqs))} twice")


@drill(
    row=22,
    name="slow-subscriber",
    fault="a subscriber of live frames that reads 100 a second",
    long="10 rounds of 20 s",
    plant="a subscriber that does not fetch what it missed",
    breaks="the slow subscriber missed",
)
def slow_subscriber(trial: Trial) -> None:
    trial.start()
    load = trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    peers = Peers(trial)
    options = ["--no-fetch"] if trial.planted else []
    p99_ms: dict[bool, list[float]] = {True: [], False: []}
    missed = 0
    filled_s = []
    # One by one, with and without the slow one in turn: what else the machine does hits both.
    for i in range(2 * trial.count(1, 10)):
        from_seq = last_seq(trial) + 1
        until_seq = from_seq + ROUND_EVENTS
        with_slow = i % 2 == 1
        slow = peers.start(from_seq, until_seq, SLOW_RATE, *options) if with_slow else None
        fast = peers.start(from_seq, until_seq)
        for _ in range(2):
            load.burst()
            time.sleep(trial.seconds(1.0, 8.0))
        found = Peers.result(fast)
        check_seen(trial, "a fast subscriber", found["seen"], from_seq)
        p99_ms[with_slow].append(found["latency_s"][int(len(found["latency_s"]) * 0.99)] * 1000)
        if slow is not None:
            slow[0].send_signal(signal.SIGUSR1)
            found = Peers.result(slow)
            check_seen(trial, "the slow subscriber", found["seen"], from_seq)
            trial.expect(found["gaps"], "the slow subscriber saw no gap: it was not slow enough")
            missed += found["missed"]
            filled_s.append(found["filled_s"])
    without, beside = statistics.median(p99_ms[False]), statistics.median(p99_ms[True])
    trial.note("frames missed", missed)
    trial.note("filled within s", f"{max(filled_s):.2f}")
    trial.note("p99 of others ms", f"{without:.0f} alone, {beside:.0f} beside it")
    if not trial.short:  # one round of each says nothing
        slower = beside > P99_RATIO * without and beside - without > P99_NOISE_MS
        trial.expect(not slower, f"others' p99 went from {without:.0f} to {beside:.0f} ms")


@drill(
    row=24,
    name="late-join",
    fault="subscribers that join at 5,000 events/s, from the past into what is live",
    long="100 joins",
    plant="a subscriber that does not fetch what came before",
    breaks="missed",
)
def late_join(trial: Trial) -> None:
    trial.start()
    load = trial.publish(rate=1_000 if trial.short else JOIN_RATE)
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    load.wait_started()
    peers = Peers(trial)
    joins = trial.count(4, 100)
    events = 0
    seen: list[list[Any]] = []
    for i in range(joins):
        last = last_seq(trial)
        from_seq = trial.rng.randint(max(1, last - 20_000), last)
        # Far enough past the hand-over from what was to what is.
        until_seq = last + trial.rng.randint(200, 2_000)
        if i % 2 and not trial.planted:
            seen = _by_subscriber_class(trial, from_seq, until_seq)
        else:
            options = ["--no-fetch"] if trial.planted else []
            seen = Peers.result(peers.start(from_seq, until_seq, 0, *options))["seen"]
        check_seen(trial, f"join {i + 1}", seen, from_seq)
        events += len(seen)
    trial.note("joins", joins)
    trial.note("events seen", events)
    trial.settle()
    trial.check()
    stored = dict(trial.system.sql("SELECT seq, event_id FROM events"))
    trial.expect(
        all(stored.get(seq) == event_id for seq, event_id in seen),
        "the last to join saw other events than are stored",
    )


def _by_subscriber_class(trial: Trial, from_seq: int, until_seq: int) -> list[list[Any]]:
    seen: list[list[Any]] = []
    with Subscriber(start=from_seq, timeout_s=30.0, settings=trial.system.settings) as subscriber:
        for event in subscriber:
            seen.append([event.seq, event.event_id])
            if event.seq >= until_seq:
                break
    return seen
