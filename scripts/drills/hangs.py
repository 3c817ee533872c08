"""Row 23: peers that are stopped and go on later."""

from __future__ import annotations

import os
import signal
import time

import psutil
from harness import Trial, drill
from subscribers import Peers, check_seen, last_seq
from system import wait_until

CUT_S = 5.0
NOISE_S = 2.0
"""What a busy machine and our own look at it add to the five seconds."""

GROWTH_BYTES = 64 << 20
"""The queue of one subscriber is 20,000 frames at the most, some 10 MB, until it is cut."""


@drill(
    row=23,
    name="hung-peer",
    fault="SIGSTOP of a subscriber, of the collector, of the bus",
    long="5 rounds of 20 s each",
    plant="the bus does not ask its peers whether they live",
    breaks="a hung subscriber is cut",
)
def hung_peer(trial: Trial) -> None:
    up = trial.start(fault="no-heartbeats" if trial.planted else "")
    load = trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    load.wait_started()
    hang_s = trial.seconds(4.0, 20.0)
    for _ in range(trial.count(1, 5)):
        _hang_subscriber(trial, hang_s)
        _hang_daemon(trial, "collect", hang_s)
        _hang_daemon(trial, "bus", hang_s)
    trial.note("stopped for s", hang_s)
    trial.expect(up.process.poll() is None, "`bitten up` ended")


def _bus(trial: Trial) -> psutil.Process:
    assert trial.up is not None
    bus = trial.up.child("bus")
    assert bus is not None
    return bus


def _hang_subscriber(trial: Trial, hang_s: float) -> None:
    """It is cut, its queue is freed, and it has every event when it goes on."""
    peers = Peers(trial)
    from_seq = last_seq(trial) + 1
    # Its topic of its own shows in the bus's status while it is connected.
    topic = f"bitten.peer-{os.getpid()}-{from_seq}"
    until_seq = from_seq + round(1_000 * (hang_s + CUT_S + 5))
    peer = peers.start(from_seq, until_seq, 0, "--topic", topic)
    before = _bus(trial).memory_info().rss

    def is_subscribed() -> bool:
        status = trial.system.status(2.0)
        return status is not None and topic in status["subscriptions"]

    wait_until(is_subscribed, "the subscriber is connected")
    peer[0].send_signal(signal.SIGSTOP)
    cut_s = trial.expect_within(
        CUT_S + NOISE_S, lambda: not is_subscribed(), "a hung subscriber is cut"
    )
    time.sleep(hang_s)
    grown = _bus(trial).memory_info().rss - before
    trial.expect(grown < GROWTH_BYTES, f"the bus grew by {grown >> 20} MB for a hung subscriber")
    peer[0].send_signal(signal.SIGCONT)
    found = Peers.result(peer)
    check_seen(trial, "the subscriber that hung", found["seen"], from_seq)
    trial.note("cut after s", f"{cut_s:.1f}")
    trial.note("missed and fetched", found["missed"])


def _hang_daemon(trial: Trial, name: str, hang_s: float) -> None:
    """Nobody is slowed (INV has the calls), it goes on in the same process, and all is stored."""
    assert trial.up is not None
    pid = trial.up.signal(name, signal.SIGSTOP)
    time.sleep(hang_s)
    psutil.Process(pid).send_signal(signal.SIGCONT)
    continued_at = time.time()
    after_s = trial.expect_within(
        30.0, lambda: trial.next_stored(continued_at), f"events are stored after {name} went on"
    )
    child = trial.up.child(name)
    trial.expect(child and child.pid == pid, f"{name} was ended for having been stopped")
    trial.note(f"{name} stored again after s", f"{after_s:.1f}")
