"""Runs the fuzzing targets, each in a process of its own, and prints what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import words

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FINDINGS = ROOT / "build" / "fuzzing"
SHORT_SEED = 1
MODEL_EXAMPLES = 1_000

CHEAP_RUNS = 1_000_000
DEAR_RUNS = 100_000
"""A whole run, and one of targets that go through sockets or files."""

SHORT_CASES = {
    "envelope": 20_000,
    "intake": 20_000,
    "protocol": 3_000,
    "delivery": 20_000,
    "cursor": 20_000,
    "adoption": 5_000,
    "schema": 5_000,
    "config": 5_000,
}
DEAR = ("protocol", "adoption", "schema", "config")


class Outcome(NamedTuple):
    cases: int
    edges: int
    seconds: float
    problem: str
    output: str


def main() -> int:
    options = _options()
    if options.model:
        return _run_model(options.runs or MODEL_EXAMPLES, options.seed)
    if importlib.util.find_spec("atheris") is None:
        print(
            "scripts/fuzz: NOT RUN: atheris is not installed; it has packages for Linux on x86-64"
            " with Python 3.11 to 3.13",
            file=sys.stderr,
        )
        return 1
    names = [options.target] if options.target else list(SHORT_CASES)
    if options.repeat:
        return subprocess.run(
            [sys.executable, HERE / "worker.py", names[0], options.repeat], check=False
        ).returncode
    seed = options.seed if options.seed is not None else _any_seed(options.short)
    print(f"{'target':<10} {'cases':>9} {'edges':>6} {'cases/s':>8}  (seed {seed})", flush=True)
    failed = False
    for name in names:
        outcome = run_target(name, _runs(name, options), seed)
        rate = outcome.cases / max(outcome.seconds, 0.001)
        print(f"{name:<10} {outcome.cases:>9,} {outcome.edges:>6,} {rate:>8,.0f}", flush=True)
        if outcome.problem:
            failed = True
            print(outcome.output, f"\n{name}: {outcome.problem}", sep="", flush=True)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--short", action="store_true", help="what CI runs, with a fixed seed")
    parser.add_argument("--target", choices=list(SHORT_CASES), help="this one only")
    parser.add_argument("--runs", type=int, help="cases for each target, or examples of the model")
    parser.add_argument("--seed", type=int, help="the same seed and program make the same cases")
    parser.add_argument("--repeat", metavar="FILE", help="run one saved case of --target")
    parser.add_argument("--model", action="store_true", help="the stateful model, at length")
    options = parser.parse_args()
    if options.repeat and not options.target:
        parser.error("--repeat needs --target")
    return options


def _any_seed(short: bool) -> int:
    # libFuzzer takes 0 for "choose one", which could not be repeated.
    return SHORT_SEED if short else int.from_bytes(os.urandom(3), "big") + 1


def _runs(name: str, options: argparse.Namespace) -> int:
    if options.runs:
        return int(options.runs)
    if options.short:
        return SHORT_CASES[name]
    return DEAR_RUNS if name in DEAR else CHEAP_RUNS


def run_target(name: str, runs: int, seed: int) -> Outcome:
    """Fuzz one target in a process of its own, from its seeds on."""
    FINDINGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch, "corpus")
        corpus.mkdir()
        tokens = Path(scratch, "tokens")
        tokens.write_text(words.as_dictionary())
        started = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                HERE / "worker.py",
                name,
                f"-seed={seed}",
                f"-runs={runs}",
                f"-dict={tokens}",
                f"-artifact_prefix={FINDINGS}/{name}-",
                "-timeout=30",
                "-rss_limit_mb=2048",
                "-print_final_stats=1",
                str(corpus),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        seconds = time.monotonic() - started
    output = done.stdout.decode("utf-8", "backslashreplace")
    executed = re.findall(r"^(?:stat::number_of_executed_units: |#)(\d+)", output, re.M)
    cases = max(map(int, executed), default=0)
    edges = max(map(int, re.findall(r" cov: (\d+)", output)), default=0)
    problem = ""
    if done.returncode:
        saved = re.search(r"Test unit written to (\S+)", output)
        problem = (
            f"FAILED; repeat it: scripts/fuzz --target {name} --repeat {saved[1]}"
            if saved
            else f"FAILED with code {done.returncode}"
        )
    elif cases < runs:
        problem = f"FAILED: only {cases} of {runs} cases were run"
    story = "".join(re.findall(r"^(?!#\d|INFO:|stat::).*\n", output, re.M))
    return Outcome(cases, edges, seconds, problem, story[-6_000:])


def _run_model(examples: int, seed: int | None) -> int:
    """`tests/test_model.py` with other numbers each time, and more of them."""
    seed = _any_seed(False) if seed is None else seed
    print(f"model: {examples:,} examples, seed {seed}", flush=True)
    started = time.monotonic()
    command = [sys.executable, HERE / "model.py", str(examples), str(seed)]
    code = subprocess.run(command, cwd=ROOT / "tests", check=False).returncode
    print("failed" if code else f"all hold, {time.monotonic() - started:.0f} s")
    return code


sys.exit(main())
