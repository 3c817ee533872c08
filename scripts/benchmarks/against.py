"""Measure this checkout against another revision of it, side by side in one run.

Each side runs its own `scripts/bench` with its own environment, in turn and in changing order, so
that a slow minute slows both.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

Figures = dict[str, float]


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A work tree of that revision, installed; it is removed again."""
    with tempfile.TemporaryDirectory(prefix="bitten-bench-") as directory:
        tree = Path(directory) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            subprocess.run([tree / "scripts/install"], check=True)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def measure(tree: Path, arguments: list[str]) -> Figures:
    if (tree / "scripts/benchmarks/peers").exists():  # they are the same on both sides
        arguments = [*arguments, "--no-peers"]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [tree / "scripts/bench", "--rounds", "1", "--json", file.name, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return flat(json.loads(Path(file.name).read_text(encoding="utf-8")))


def flat(results: dict[str, Any]) -> Figures:
    """One figure a name, of the results of one round."""
    figures: Figures = {}
    for name, value in results.items():
        only = value[0] if isinstance(value, list) else value
        for part, figure in only.items() if isinstance(only, dict) else [("", only)]:
            figures[f"{name} {part}".strip()] = figure
    return figures


def compare(revision: str, rounds: int, arguments: list[str]) -> None:
    """Print each figure's median on both sides, and the median of the rounds' ratios."""
    with checkout(revision) as tree:
        sides: dict[Path, list[Figures]] = {tree: [], ROOT: []}
        for i in range(rounds):
            for side in sorted(sides, reverse=bool(i % 2)):
                sides[side].append(measure(side, arguments))
    before, now = sides.values()
    print(f"{rounds} rounds, {revision} and this checkout in turn: medians, ratio (min to max)")
    print(f"{'':<26} {revision[:12]:>12} {'now':>12}  ratio")
    for name in before[0]:
        if name in ("rounds", "events") or name not in now[0]:
            continue
        was, is_now = [f[name] for f in before], [f[name] for f in now]
        ratios = [b / a for a, b in zip(was, is_now, strict=True) if a]
        shown = "-"
        if ratios:
            middle = statistics.median(ratios)
            shown = f"{middle:.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:<26} {statistics.median(was):>12,.1f} {statistics.median(is_now):>12,.1f}"
            f"  {shown}",
        )
