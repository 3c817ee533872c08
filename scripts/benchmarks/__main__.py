"""Measures the bus on this machine; see docs/performance.md for what each line means."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import against
import mix
import side_by_side
from running import bench, percentile

from collector.store import Store
from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.event_schema import Registry
from event_bus.subscriber import Batch

BATCH = 4_000
BACK_TO_BACK = 1e9


def end_to_end(count: int, publishers: int = 1) -> dict[str, float]:
    """Events/s from the first publish to the last commit, and what is left behind."""
    with bench() as b:
        before = b.stored()
        each = count // publishers
        count = each * publishers
        published = b.publish_together([[str(each)]] * publishers)
        started = min(p["started"] for p in published)
        acked_at = max(p["started"] + p["acked_after_s"] for p in published)
        warm_up = publishers
        stored_at = b.wait_stored(before + count + warm_up)
        memory = {name: p.memory_info().rss / 1e6 for name, p in b.daemons.items()}
        b.close()
        return {
            "rate": count / (stored_at - started),
            "acked_rate": count / (acked_at - started),
            "bytes": b.db.stat().st_size / (before + count + warm_up),
            "bus_mb": memory["bus"],
            "collector_mb": memory["collect"],
        }


def store_alone(count: int) -> float:
    """Events/s at which the collector's store takes the same events from memory."""
    token = envelope.new_producer()
    lines = [
        envelope.encode(
            Envelope(
                event_id=f"{token}-{i + 1}",
                event_type=event_type,
                timestamp=time.time(),
                source="publisher",
                data=data,
                **fields,
            )
        )
        for i, (event_type, data, fields) in enumerate(mix.events(min(count, 20_000)))
    ]
    pool = [
        envelope.decode_lines(b"\n".join(lines[i : i + BATCH])) for i in range(0, len(lines), BATCH)
    ]
    with tempfile.TemporaryDirectory(prefix="bitten-bench-") as directory:
        store = Store(Path(directory) / "bitten_events.db", Registry())
        seq = 1
        begin = time.monotonic()
        while seq <= count:
            events = pool[(seq // BATCH) % len(pool)]
            store.write([Batch(seq, time.time(), events)], "bench")
            seq += len(events)
        elapsed = time.monotonic() - begin
        store.close()
    return (seq - 1) / elapsed


def call_times(count: int, rate: float, *, away: bool) -> dict[str, float]:
    """Microseconds that a bridge call takes in the caller's thread."""
    with bench(daemons=() if away else ("bus", "collect")) as b:
        arguments = [str(count), str(rate), *(["--away"] if away else [])]
        ns = b.publish(*arguments)["call_ns"]
    return {f"p{p:g}": percentile(ns, p) / 1000 for p in (50, 99, 99.9)}


def latency(kind: str, count: int, rate: float) -> dict[str, float]:
    """Milliseconds from a bridge call to the subscriber's hands."""
    with bench() as b:
        subscriber = b.start("subscriber.py", kind, str(count))
        assert subscriber.stdout is not None
        subscriber.stdout.readline()
        b.publish(str(count), str(rate))
        seconds = json.loads(subscriber.communicate()[0])
    return {f"p{p:g}": percentile(seconds, p) * 1000 for p in (50, 99)}


def idle(seconds: float) -> dict[str, float]:
    """Percent of one core that each daemon takes while nothing happens."""
    with bench() as b:
        for p in b.daemons.values():
            p.cpu_percent()
        time.sleep(seconds)
        return {name: p.cpu_percent() for name, p in b.daemons.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a minute, for checking that it works")
    parser.add_argument("--events", type=int, help="events a round end to end")
    parser.add_argument("--rounds", type=int, help="rounds; medians are shown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--against", metavar="REV", help="compare with that revision, in turn")
    parser.add_argument("--no-peers", action="store_true", help="measure no other system")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then
    if options.against:
        size = ["--short"] if options.short else []
        size += ["--events", str(options.events)] if options.events else []
        against.compare(options.against, options.rounds or (1 if options.short else 5), size)
        return
    count = options.events or (50_000 if options.short else 1_000_000)
    rounds = options.rounds or (1 if options.short else 3)
    calls = 5_000 if options.short else 50_000
    results: dict[str, Any] = {"events": count, "rounds": rounds}
    runs, alone = [], []
    for _ in range(rounds):  # interleaved, so that a slow minute slows both
        runs.append(end_to_end(count))
        alone.append(store_alone(min(count, 300_000)))
    results["end_to_end"] = runs
    results["store_alone"] = alone
    results["call_tight"] = call_times(calls, BACK_TO_BACK, away=False)
    results["call_up"] = call_times(calls, 5_000, away=False)
    results["call_away"] = call_times(calls, 5_000, away=True)
    results["to_sub_socket"] = latency("pub", calls // 5, 1_000)
    results["to_subscriber"] = latency("fetch", calls // 5, 1_000)
    results["idle"] = idle(3 if options.short else 20)
    _print(results)
    if not options.no_peers:
        results["peers"] = side_by_side.measure(end_to_end, min(count, 300_000), rounds)
        side_by_side.show(results["peers"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def _print(results: dict[str, Any]) -> None:
    runs = results["end_to_end"]

    def spread(values: Sequence[float], form: str = ",.0f") -> str:
        middle = statistics.median(values)
        return f"{middle:{form}}  ({min(values):{form}} to {max(values):{form}})"

    rate = [r["rate"] for r in runs]
    alone = results["store_alone"]
    ratio = [a / b for a, b in zip(rate, alone, strict=True)]
    up, away = results["call_up"], results["call_away"]
    pub, fetch = results["to_sub_socket"], results["to_subscriber"]
    rows = [
        ("end to end, fsync before ack, events/s", spread(rate)),
        ("  acknowledged, events/s", spread([r["acked_rate"] for r in runs])),
        ("store alone from memory, events/s", spread(alone)),
        ("  end to end / store alone", spread(ratio, ".2f")),
        ("database, bytes an event", spread([r["bytes"] for r in runs], ".1f")),
        ("bus after the run, MB", spread([r["bus_mb"] for r in runs], ".1f")),
        ("collector after the run, MB", spread([r["collector_mb"] for r in runs], ".1f")),
        ("bridge call back to back, µs", _percentiles(results["call_tight"])),
        ("bridge call at 5,000/s, bus up, µs", _percentiles(up)),
        ("bridge call at 5,000/s, bus away, µs", _percentiles(away)),
        ("publish to SUB socket at 1,000/s, ms", _percentiles(pub, ".2f")),
        ("publish to Subscriber at 1,000/s, ms", _percentiles(fetch, ".2f")),
        (
            "idle, percent of a core",
            f"bus {results['idle']['bus']:.1f}  collector {results['idle']['collect']:.1f}",
        ),
    ]
    print(f"{results['events']:,} events a round, {results['rounds']} rounds: median (min to max)")
    for name, value in rows:
        print(f"{name:<42} {value}")


def _percentiles(values: dict[str, float], form: str = ".1f") -> str:
    return "  ".join(f"{name} {value:{form}}" for name, value in values.items())


main()
