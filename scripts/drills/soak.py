"""Row 1: bursts for minutes or hours, and nothing that grows."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from harness import Trial, drill
from waits import OwnWaits, waited_ns

from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.protocol import Client

BURST_EVERY_S = 60.0
PROBE_EVERY_S = 0.1
ACK_P99_MS = 50.0
WAL_BYTES = 100 << 20
"""64 MB is what a WAL is cut to; one burst may come on top before it is."""

GROWTH_BYTES = 16 << 20
LONG_ENOUGH_S = 240.0
"""Memory is judged by quarters of the run: the second against the last."""


@drill(
    row=1,
    name="soak",
    fault="bursts of 20,000 events each minute",
    long="10 minutes; --length 60 is ten hours",
    plant="the bus opens a file each second",
    breaks="file descriptors more",
)
def soak(trial: Trial) -> None:
    up = trial.start(fault="leak" if trial.planted else "")
    load = trial.publish()
    load.wait_started()
    length_s = trial.seconds(10, 600)
    probe = Probe(trial)
    children = {name: up.child(name) for name in ("bus", "collect")}
    memory: dict[str, list[int]] = {name: [] for name in children}
    descriptors: dict[str, list[int]] = {name: [] for name in children}
    wal_bytes = 0
    begin = time.monotonic()
    burst_at, sample_at = begin + min(3.0, length_s / 4), begin + 1
    bursts = 0
    while (now := time.monotonic()) < begin + length_s:
        if now >= burst_at:
            burst_at += BURST_EVERY_S
            bursts += 1
            load.burst()
        if now >= sample_at:
            sample_at += 1
            wal_bytes = max(wal_bytes, *(_size(p) for p in trial.system.home.glob("*-wal")))
            for name, child in children.items():
                assert child is not None
                memory[name].append(child.memory_info().rss)
                descriptors[name].append(child.num_fds())
        probe.once()
        time.sleep(PROBE_EVERY_S)
    probe.close()
    trial.note("bursts", bursts)
    trial.note("ack p99 ms", f"{probe.p99_ms(probe.taken):.1f}")
    own_ms = probe.p99_ms(probe.own)
    trial.note("with a CPU at hand", f"{own_ms:.1f}")
    if length_s >= LONG_ENOUGH_S:
        trial.expect(own_ms <= ACK_P99_MS, f"acknowledgements take {own_ms:.0f} ms at p99")
    else:  # the one that waits for a burst is the 99th of 100, and memory still warms up
        trial.note("not judged", f"p99 and memory, in less than {LONG_ENOUGH_S:.0f} s")
    trial.note("WAL MB", wal_bytes >> 20)
    trial.expect(wal_bytes <= WAL_BYTES, f"a WAL grew to {wal_bytes >> 20} MB")
    for name in children:
        _judge_growth(trial, name, memory[name], descriptors[name], length_s)


def _judge_growth(
    trial: Trial, name: str, memory: list[int], descriptors: list[int], length_s: float
) -> None:
    quarter = len(memory) // 4
    early = statistics.median(memory[quarter : 2 * quarter])
    late = statistics.median(memory[-quarter:])
    trial.note(f"{name} MB", f"{early / 1e6:.0f} → {late / 1e6:.0f}")
    if length_s >= LONG_ENOUGH_S:
        trial.expect(
            late - early < GROWTH_BYTES,
            f"{name} grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB",
        )
    more = max(descriptors[-quarter:]) - max(descriptors[: 2 * quarter])
    trial.note(f"{name} descriptors", f"{more:+d}")
    trial.expect(more <= 0, f"{name} has {more} file descriptors more")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Probe:
    """A client that publishes one event at a time and notes how long its acknowledgement takes:
    `taken` by the clock, `own` without what bus and client waited for a CPU. In ms."""

    def __init__(self, trial: Trial) -> None:
        status = trial.system.status()
        assert status is not None
        self._pid = status["pid"]
        self._client = Client(trial.system.settings)
        self._waits = OwnWaits()
        self._token = envelope.new_producer()
        self._n = 0
        self.taken: list[float] = []
        self.own: list[float] = []

    def once(self) -> None:
        self._n += 1
        event = Envelope(
            event_id=f"{self._token}-{self._n}",
            event_type="user_action",
            timestamp=time.time(),
            source="probe",
            data={"action": "probe"},
        )
        waited = waited_ns(self._pid) + self._waits.total_ns()
        begin = time.perf_counter_ns()
        self._client.publish(envelope.encode(event) + b"\n", 30.0)
        taken = time.perf_counter_ns() - begin
        waited = waited_ns(self._pid) + self._waits.total_ns() - waited
        self.taken.append(taken / 1e6)
        self.own.append(max(0, taken - waited) / 1e6)

    @staticmethod
    def p99_ms(times: list[float]) -> float:
        return sorted(times)[int(len(times) * 0.99)]

    def close(self) -> None:
        self._client.close()
