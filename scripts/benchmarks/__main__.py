"""Measures the bus on this machine; see docs/performance.md for what each line means."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import against
import calls
import charts
import fanout
import footprint
import growth
import latency
import limits
import machine
import parts
import report
import side_by_side
import storage
from peers.peer import check
from running import Bench, bench
from sizes import FULL, SHORT, Sizes

from event_bus.memory import collect_rarely

Results = dict[str, Any]


def end_to_end(count: int, publishers: int = 1) -> dict[str, float]:
    """Events/s from the first publish to the last commit, and what is left behind."""
    with bench() as b:
        before = b.stored()
        each = count // publishers
        count = each * publishers
        cpu = b.cpu_s()
        published = b.publish_together([[str(each)]] * publishers)
        started = min(p["started"] for p in published)
        acked_at = max(p["started"] + p["acked_after_s"] for p in published)
        total = before + count + publishers  # each had one event more, to be warm
        stored_at = b.wait_stored(total)
        memory = {name: p.memory_info().rss / 1e6 for name, p in b.daemons.items()}
        cpu = {name: seconds - cpu[name] for name, seconds in b.cpu_s().items()}
        b.close()
        check(b.db, [each + 1] * publishers, "this bus")
        return {
            "rate": count / (stored_at - started),
            "publisher_us": sum(p["cpu_s"] for p in published) / count * 1e6,
            "bus_us": cpu["bus"] / count * 1e6,
            "collector_us": cpu["collect"] / count * 1e6,
            "acked_rate": count / (acked_at - started),
            "bytes": b.db.stat().st_size / total,
            "bus_mb": memory["bus"],
            "collector_mb": memory["collect"],
        }


class Run:
    """The sections of one run. Each is a method that returns what it found, by name."""

    def __init__(self, sizes: Sizes, sections: list[str], *, quick: bool) -> None:
        self._sizes = sizes
        self._sections = sections
        self._quick = quick
        self._largest: Bench | None = None
        self._closing = contextlib.ExitStack()

    def results(self, keep: Callable[[Results], None]) -> Results:
        """What all sections found; `keep` is given what there is after each of them."""
        found: Results = {
            "machine": machine.facts(),
            "events": self._sizes.events,
            "rounds": self._sizes.rounds,
        }
        with self._closing:
            for name in self._sections:
                print(f"measuring: {name} …", file=sys.stderr)
                found |= SECTIONS[name](self)
                keep(found)
        return found

    def end_to_end(self) -> Results:
        """events/s from the bridge to SQLite, with the store alone in turn"""
        runs, alone = [], []
        for _ in range(self._sizes.rounds):  # interleaved, so that a slow minute slows both
            runs.append(end_to_end(self._sizes.events))
            alone.append(limits.store_alone(min(self._sizes.events, 300_000)))
        return {"end_to_end": runs, "store_alone": alone}

    def peers(self) -> Results:
        """other systems that do the same work, in turn with one and four publishers of this one"""
        return side_by_side.measure(end_to_end, self._sizes.side_by_side, self._sizes.rounds)

    def limits(self) -> Results:
        """what pyzmq and the disk can do alone"""
        return {"limits": limits.limits(self._sizes.limits_s)}

    def parts(self) -> Results:
        """processor time of each step alone"""
        return {"parts": parts.parts(self._sizes.rounds)}

    def calls(self) -> Results:
        """a bridge call in the caller's thread: bus up, away, and the spool filling"""
        return {"calls": calls.calls(self._sizes.calls, self._sizes.call_processes)}

    def latency(self) -> Results:
        """from the bridge call to a subscriber and to SQLite, by rate"""
        rates = (1_000,) if self._quick else self._sizes.rates
        sizes = self._sizes
        return {"latency": latency.latency(rates, sizes.latency_s, sizes.latency_events)}

    def growth(self) -> Results:
        """rate, latency, queries and memory as the database grows"""
        sizes = self._sizes
        found = {}
        for size in sizes.grown:
            with self._grown(size) as home:
                found[str(size)] = growth.growth(
                    home,
                    size,
                    on_top=sizes.on_top,
                    rounds=sizes.rounds,
                    query_runs=sizes.query_runs,
                    latency_s=sizes.latency_s,
                )
        return {"growth": found}

    def startup(self) -> Results:
        """ready again after a crash with the largest database"""
        size = self._sizes.grown[-1]
        with self._grown(size) as home:
            return {
                "startup": {"events": size, "crashes": growth.startup(home, self._sizes.restarts)}
            }

    def subscribers(self) -> Results:
        """the rate end to end with live subscribers"""
        sizes = self._sizes
        return {
            "subscribers": fanout.subscribers(sizes.subscribers, sizes.fanned_out, sizes.rounds)
        }

    def load(self) -> Results:
        """memory and processor time of the daemons"""
        return {"load": footprint.load(self._sizes.load_s, self._sizes.events)}

    def storage(self) -> Results:
        """bytes an event, by type"""
        return {"storage": storage.storage(self._sizes.types, self._sizes.of_a_type)}

    @contextlib.contextmanager
    def _grown(self, size: int) -> Iterator[Bench]:
        """A home of that size; the largest is filled once for all sections that need it."""
        if size < self._sizes.grown[-1]:
            with growth.grown(size) as home:
                yield home
        else:
            if self._largest is None:
                self._largest = self._closing.enter_context(growth.grown(size))
            yield self._largest


SECTIONS: dict[str, Callable[[Run], Results]] = {
    "end_to_end": Run.end_to_end,
    "peers": Run.peers,
    "limits": Run.limits,
    "parts": Run.parts,
    "calls": Run.calls,
    "latency": Run.latency,
    "growth": Run.growth,
    "startup": Run.startup,
    "subscribers": Run.subscribers,
    "load": Run.load,
    "storage": Run.storage,
}
QUICK = ["end_to_end", "calls", "latency"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a minute, to see that it works")
    parser.add_argument("--list", action="store_true", help="name the sections")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="NAME", help="measure these sections"
    )
    parser.add_argument(
        "--quick", action="store_true", help="what --against compares: " + ", ".join(QUICK)
    )
    parser.add_argument("--events", type=int, help="events a round end to end")
    parser.add_argument("--rounds", type=int, help="rounds; medians are shown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--svg", type=Path, metavar="DIR", help="draw charts into that directory")
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="JSON",
        help="show an earlier run, measure nothing",
    )
    parser.add_argument("--against", metavar="REV", help="compare with that revision, in turn")
    options = parser.parse_args()
    if options.list:
        for name, section in SECTIONS.items():
            print(f"{name:<12} {section.__doc__}")
        return
    if options.against:
        size = ["--short"] if options.short else []
        size += ["--events", str(options.events)] if options.events else []
        sections = ["--only", *options.only] if options.only else []
        rounds = options.rounds or (1 if options.short else 5)
        against.compare(options.against, rounds, size, sections)
        return

    def keep(results: Results) -> None:
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    if options.earlier:
        results = json.loads(options.earlier.read_text(encoding="utf-8"))
    else:
        collect_rarely()  # what the parts can do alone is measured here
        # The daemons that are measured end with this process, whoever ends it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        sizes = SHORT if options.short else FULL
        given = {"events": options.events, "rounds": options.rounds}
        sizes = replace(sizes, **{name: n for name, n in given.items() if n})
        sections = options.only or (QUICK if options.quick else list(SECTIONS))
        results = Run(sizes, sections, quick=options.quick).results(keep)
    print(report.text(results))
    if options.svg:
        for path in charts.draw(results, options.svg):
            print(f"drawn: {path}", file=sys.stderr)


main()
