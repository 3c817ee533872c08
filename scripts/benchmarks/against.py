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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

Figures = dict[str, float]

NOT_COMPARED = ("machine", "rounds", "events")
FORMER_NAMES = {
    "call_tight": "calls back_to_back up",
    "call_up": "calls paced up",
    "call_away": "calls paced filling",
    "to_sub_socket": "latency socket 1000",
    "to_subscriber": "latency subscriber 1000",
    "idle": "load idle",
}
"""What revisions without `--quick` call their figures."""


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


def measure(tree: Path, arguments: Sequence[str]) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [tree / "scripts/bench", "--rounds", "1", "--json", file.name, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return flat(json.loads(Path(file.name).read_text(encoding="utf-8")))


def flat(results: Any, *path: str) -> Figures:
    """One figure a name, of the results of one round."""
    if isinstance(results, list):
        return flat(results[0], *path) if results else {}
    if isinstance(results, dict):
        figures: Figures = {}
        for key, value in results.items():
            if path or key not in NOT_COMPARED:
                figures |= flat(value, *path, key if path else FORMER_NAMES.get(key, key))
        return figures
    return {" ".join(path): results} if isinstance(results, int | float) else {}


def knows_quick(tree: Path) -> bool:
    """Earlier revisions measure a fixed set of figures, all of them quick ones."""
    return "--quick" in (tree / "scripts/benchmarks/__main__.py").read_text(encoding="utf-8")


def compare(revision: str, rounds: int, size: list[str], sections: list[str]) -> None:
    """Print each figure's median on both sides, and the median of the rounds' ratios.

    `size` and `sections` are arguments for both sides; the quick ones without `sections`.
    """
    with checkout(revision) as tree:
        arguments = {
            side: size + ((sections or ["--quick"]) if knows_quick(side) else [])
            for side in (tree, ROOT)
        }
        sides: dict[Path, list[Figures]] = {tree: [], ROOT: []}
        for i in range(rounds):
            for side in sorted(sides, reverse=bool(i % 2)):
                sides[side].append(measure(side, arguments[side]))
    before, now = sides.values()
    print(f"{rounds} rounds, {revision} and this checkout in turn: medians, ratio (min to max)")
    print(f"{'':<36} {revision[:12]:>12} {'now':>12}  ratio")
    for name in before[0]:
        if name not in now[0]:
            continue
        was, is_now = [f[name] for f in before], [f[name] for f in now]
        ratios = [b / a for a, b in zip(was, is_now, strict=True) if a]
        shown = "-"
        if ratios:
            middle = statistics.median(ratios)
            shown = f"{middle:.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:<36} {statistics.median(was):>12,.1f} {statistics.median(is_now):>12,.1f}"
            f"  {shown}",
        )
