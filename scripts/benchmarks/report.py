"""The figures as a table, with what was to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import targets

Results = dict[str, Any]
Row = tuple[str, str]

WIDTH = 50
LATENCY_NAMES = {
    "socket": "publish to SUB socket",
    "subscriber": "publish to Subscriber",
    "stored": "publish to stored",
}
CALL_STATES = {"up": "bus up", "away": "bus away", "filling": "spool filling"}
PACES = {"back_to_back": "back to back", "paced": "at 5,000/s"}
LOADS = {"idle": "idle", "usual": "at 200 events/s", "full": "at full speed"}


def text(results: Results) -> str:
    """What is in the results, by section, one figure a line."""
    lines = [f"{'machine':<{WIDTH}} {_machine(results['machine'])}"]
    lines.append(f"{'of several rounds':<{WIDTH}} median (min to max)")
    for section, rows in ROWS.items():
        if section in results:
            lines.append("")
            lines += [f"{name:<{WIDTH}} {value}".rstrip() for name, value in rows(results)]
    return "\n".join([*lines, "", *_targets(results)])


def _machine(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['cores']} cores, {machine['cpu']}, {machine['file_system']},"
        f" Python {machine['python']}, {machine['date']}, {machine['commit']}"
    )


def _spread(values: Sequence[float], form: str = ",.0f") -> str:
    middle = f"{statistics.median(values):{form}}"
    return f"{middle:<10} ({min(values):{form}} to {max(values):{form}})"


def _percentiles(values: Mapping[str, float], form: str) -> str:
    found = {name: value for name, value in values.items() if name.startswith("p")}
    return "  ".join(f"{name} {f'{value:{form}}':<7}" for name, value in found.items())


def _end_to_end(results: Results) -> Iterator[Row]:
    runs = results["end_to_end"]
    yield f"end to end, {results['events']:,} events, fsync before ack", ""
    yield "  stored, events/s", _spread([r["rate"] for r in runs])
    yield "  acknowledged, events/s", _spread([r["acked_rate"] for r in runs])
    yield "  database, bytes an event", _spread([r["bytes"] for r in runs], ".1f")
    yield "  bus after the run, MB", _spread([r["bus_mb"] for r in runs], ".1f")
    yield "  collector after the run, MB", _spread([r["collector_mb"] for r in runs], ".1f")
    for name in ("publisher", "bus", "collector"):
        used = [r[f"{name}_us"] for r in runs]
        yield f"  {name}, µs of processor time an event", _spread(used, ".2f")


def _peers(results: Results) -> Iterator[Row]:
    ours = results["publishers"]["1"]
    yield "first publish to last commit in SQLite, events/s", "this bus with one publisher / it"
    for number, rates in results["publishers"].items():
        yield f"  this bus, publishers: {number}", _beside(ours, rates)
    for name, rates in results["peers"].items():
        yield f"  {name}", _beside(ours, rates)
    for name, reason in results["missing"].items():
        yield f"  {name}", f"not measured: {reason}"


def _beside(ours: Sequence[float], rates: Sequence[float]) -> str:
    return f"{_spread(rates):<36} {targets.ratio(ours, rates):.2f}"


def _store_alone(results: Results) -> Iterator[Row]:
    yield "store alone from memory, events/s", _spread(results["store_alone"])


def _limits(results: Results) -> Iterator[Row]:
    limits = results["limits"]
    yield "limits", ""
    yield "  pyzmq, an event a message, events/s", f"{limits['transfer_single']:,.0f}"
    yield "  pyzmq, 2,000 events a message, events/s", f"{limits['transfer_batched']:,.0f}"
    yield "  fsyncs of 4 KB/s", f"{limits['fsync']:,.0f}"


def _parts(results: Results) -> Iterator[Row]:
    yield "steps alone, µs of processor time an event", ""
    for name, us in results["parts"].items():
        yield f"  {name}", f"{us:.2f}"


def _calls(results: Results) -> Iterator[Row]:
    yield "bridge call, µs", ""
    for pace, by_state in results["calls"].items():
        for state, name in CALL_STATES.items():
            yield f"  {PACES[pace]}, {name}", _percentiles(by_state[state], ".1f")


def _latency(results: Results) -> Iterator[Row]:
    for kind, by_rate in results["latency"].items():
        yield f"{LATENCY_NAMES[kind]}, ms", ""
        for rate, figures in by_rate.items():
            yield f"  at {int(rate):,}/s", _latency_figures(figures)


def _latency_figures(figures: Mapping[str, float]) -> str:
    missed = f", {figures['missed']:,} missed" if figures["missed"] else ""
    return f"{_percentiles(figures, '.2f')}  {figures['rate']:,.0f}/s achieved{missed}"


def _growth(results: Results) -> Iterator[Row]:
    for size, figures in results["growth"].items():
        yield f"{int(size):,} events stored", ""
        yield "  more of them, events/s", _spread(figures["rates"])
        yield "  in an empty home, events/s", _spread(figures["empty_rates"])
        yield "  publish to stored at 1,000/s, ms", _latency_figures(figures["stored_ms"])
        yield "  database, bytes an event", f"{figures['bytes']:.1f}"
        yield "  bus, MB", f"{figures['bus_mb']:.1f}"
        yield "  collector, MB", f"{figures['collect_mb']:.1f}"
        for kind, label in {"seed": "handbook's query", "lookup": "look up"}.items():
            for name, ms in figures["queries_ms"][kind].items():
                yield f"  {label}: {name}, ms", f"{ms:,.2f}"


def _startup(results: Results) -> Iterator[Row]:
    startup = results["startup"]
    crashes = startup["crashes"]
    yield f"start after a crash, {startup['events']:,} events", ""
    yield "  bus answers, s", _spread([c["ready_s"] for c in crashes], ".2f")
    yield "  collector has caught up, s", _spread([c["caught_up_s"] for c in crashes], ".2f")
    yield "  events it was behind", _spread([c["behind"] for c in crashes])


def _subscribers(results: Results) -> Iterator[Row]:
    yield "live subscribers that read everything, events/s", ""
    for number, figures in results["subscribers"].items():
        share = f"  {figures['received_share']:.1%} received" if int(number) else ""
        yield f"  {number}", f"{_spread(figures['rates'])}{share}"


def _load(results: Results) -> Iterator[Row]:
    yield "memory, and share of a core", ""
    for load, figures in results["load"].items():
        for daemon, name in {"bus": "bus", "collect": "collector"}.items():
            used = f"{figures[f'{daemon}_mb']:.1f} MB  {figures[f'{daemon}_percent']:.1f} %"
            yield f"  {name}, {LOADS[load]}", used


def _storage(results: Results) -> Iterator[Row]:
    yield "bytes an event", ""
    for event_type, figures in results["storage"].items():
        sizes = f"database {figures['database']:<7.1f} journal {figures['journal']:.1f}"
        yield f"  {event_type}", sizes


ROWS = {
    "end_to_end": _end_to_end,
    "peers": _peers,
    "store_alone": _store_alone,
    "limits": _limits,
    "parts": _parts,
    "calls": _calls,
    "latency": _latency,
    "growth": _growth,
    "startup": _startup,
    "subscribers": _subscribers,
    "load": _load,
    "storage": _storage,
}


def _targets(results: Results) -> Iterator[str]:
    yield "targets"
    for target, figure in targets.judged(results):
        if figure is None:
            found, verdict = "-", "not measured"
        else:
            found = f"{figure:,.4g}" if figure < 1000 else f"{figure:,.0f}"
            verdict = "reached" if target.is_reached(figure) else "missed"
        yield f"  {target.name:<{WIDTH - 2}} {found:<10} {target.limit:<18} {verdict}"
