"""The figures as SVG for docs/performance.md, readable on a light and on a dark page."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Results = dict[str, Any]

INK = "#808890"  # 3.5:1 or more on white and on near-black
OURS, THEIRS, THIRD = "#3b82c4", "#9aa3ab", "#d9822b"
STYLE = {
    "figure.figsize": (7.2, 3.2),
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "bitten",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.transparent": True,
}
LATENCIES = {
    "socket": ("SUB socket", OURS),
    "subscriber": ("Subscriber", THIRD),
    "stored": ("row in SQLite", THEIRS),
}
LINES = {"p50": "-", "p99": "--"}


def draw(results: Results, directory: Path) -> list[Path]:
    """A file for each chart whose figures are there; what they are called."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, chart in CHARTS.items():
        with contextlib.suppress(KeyError):  # that section was not measured
            path = directory / f"bench-{name}.svg"
            _save(chart, results, path)
            drawn.append(path)
    return drawn


def _save(chart: Callable[[Results, Any], None], results: Results, path: Path) -> None:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as e:
        raise SystemExit(f"--svg needs the extra `bench`: scripts/install bench ({e})") from None
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        chart(results, figure.subplots())
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _throughput(results: Results, axes: Any) -> None:
    bars = {"BITTEN": results["publishers"]["1"], **results["peers"]}
    names = sorted(bars, key=lambda name: statistics.median(bars[name]))
    middles = [statistics.median(bars[name]) for name in names]
    colors = [OURS if name.startswith("BITTEN") else THEIRS for name in names]
    axes.bar_label(axes.barh(names, middles, color=colors, height=0.6), fmt="{:,.0f}", padding=4)
    axes.set_xlim(0, max(middles) * 1.15)
    axes.set_xlabel("events/s, first publish to last commit in SQLite")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)


def _latency(results: Results, axes: Any) -> None:
    rates: list[int] = []
    for kind, by_rate in results["latency"].items():
        name, color = LATENCIES[kind]
        rates = [int(rate) for rate in by_rate]
        for percentile, line in LINES.items():
            values = [figures[percentile] for figures in by_rate.values()]
            axes.plot(rates, values, line, marker="o", ms=4, color=color)
        axes.plot([], [], color=color, label=name)
    for percentile, line in LINES.items():
        axes.plot([], [], line, color=INK, label=percentile)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(rates, [f"{rate:,}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("events/s")
    axes.set_ylabel("ms after the bridge call")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
    _legend_above(axes, 5)


def _growth(results: Results, axes: Any) -> None:
    sizes = list(results["growth"])
    for i, (key, name, color) in enumerate(
        (("empty_rates", "into an empty database", THEIRS), ("rates", "on top", OURS))
    ):
        middles = [statistics.median(results["growth"][size][key]) for size in sizes]
        at = [x + (i - 0.5) * 0.36 for x in range(len(sizes))]
        bars = axes.bar(at, middles, width=0.34, color=color, label=name)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=9)
    axes.set_xticks(range(len(sizes)), [f"{int(size):,}" for size in sizes])
    axes.set_xlabel("events stored before")
    axes.set_ylabel("events/s")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.12)
    _legend_above(axes, 2)


def _calls(results: Results, axes: Any) -> None:
    states = {"up": "bus up", "away": "bus away", "filling": "spool filling"}
    labels = []
    for y, (pace, state) in enumerate(_each_call(results, states)):
        figures = results["calls"][pace][state]
        values = list(figures.values())
        axes.plot((values[0], values[-1]), (y, y), color=INK, alpha=0.4, lw=1)
        for value, color, name in zip(values, (OURS, THEIRS, THIRD), figures, strict=True):
            axes.plot(value, y, "o", ms=7, color=color, label=name if y == 0 else None)
        labels.append(f"{'back to back' if pace == 'back_to_back' else '5,000/s'}, {states[state]}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xscale("log")
    axes.set_xlabel("µs in the caller's thread")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x")
    axes.invert_yaxis()
    _legend_above(axes, 3)


def _legend_above(axes: Any, columns: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)


def _each_call(results: Results, states: dict[str, str]) -> Iterator[tuple[str, str]]:
    for pace in results["calls"]:
        for state in states:
            yield pace, state


CHARTS: dict[str, Callable[[Results, Any], None]] = {
    "throughput": _throughput,
    "latency": _latency,
    "growth": _growth,
    "calls": _calls,
}
