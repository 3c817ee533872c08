"""Runs fault drills and prints what held; see docs/drills.md."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from catalogue import DRILLS
from harness import NOT_RUN, Result, run, unmet

SEED = 1
COLUMNS = {
    "published": "publ.",
    "acked": "acked",
    "stored": "stored",
    "waiting": "waiting",
    "killed": "killed",
    "dropped": "dropped",
    "lost": "lost",
    "duplicates": "dupl.",
    "holes": "holes",
}
_KNOWN = {d.name: d for d in DRILLS}


def main() -> int:
    arguments = _arguments()
    chosen = DRILLS if "all" in arguments.name else [_KNOWN[n] for n in arguments.name]
    if not chosen:
        _print_list()
        return 0
    print(f"seed {arguments.seed}", file=sys.stderr)
    results = []
    for one in chosen:
        planted = f", with the plant: {one.plant}" if arguments.plant else ""
        print(f"row {one.row} {one.name}: {one.fault}{planted} …", file=sys.stderr, flush=True)
        results.append(
            run(
                one,
                seed=arguments.seed,
                short=arguments.short,
                length=arguments.length,
                planted=arguments.plant,
            )
        )
    _print_table(results)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"seed": arguments.seed, "drills": [asdict(r) for r in results]}, indent=1)
        )
    return _exit_code(results, named="all" not in arguments.name, planted=arguments.plant)


def _exit_code(results: list[Result], *, named: bool, planted: bool) -> int:
    """1 if a drill broke, or a planted one did not; 2 if one asked for by name did not run."""
    wanted = "BROKEN" if planted else "held"
    found = {r.result for r in results}
    if found - {wanted, NOT_RUN}:
        return 1
    return 2 if named and NOT_RUN in found else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/drill",
        description="Inject faults into a bus under load and check that nothing is lost.",
        epilog="Examples: scripts/drill; scripts/drill --short all; scripts/drill sigkill"
        " --seed 7 --length 0.1; scripts/drill --plant --short all. Exit code: 0 all held (with"
        " --plant: all broke), 1 one did not, 2 one that was named could not run here.",
    )
    parser.add_argument("name", nargs="*", help="a drill, or `all`; without one they are listed")
    parser.add_argument("--seed", type=int, default=SEED, help="of all that is random")
    parser.add_argument("--short", action="store_true", help="the quick form, as in CI")
    parser.add_argument("--length", type=float, default=1.0, help="times the usual length")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--plant", action="store_true", help="with each drill's planted fault: it must break"
    )
    arguments = parser.parse_args()
    unknown = [n for n in arguments.name if n not in {*_KNOWN, "all"}]
    if unknown:
        parser.error(f"no drill {unknown[0]}; known are {', '.join(_KNOWN)}")
    return arguments


def _print_list() -> None:
    for one in DRILLS:
        missing = unmet(one.needs)
        print(f"{one.row:3} {one.name:22} {one.fault} ({one.long})")
        print(f"{'':26} plant: {one.plant}{f'; not here: {missing}' if missing else ''}")


def _print_table(results: list[Result]) -> None:
    heads = " ".join(f"{head:>7}" for head in COLUMNS.values())
    print(f"row {'drill':18} {'result':6} {'s':>6} {heads}  slowest call ms, with a CPU at hand")
    for r in results:
        line = f"{r.row:3} {r.drill:18} "
        if r.reason:
            print(f"{line}{r.result} {r.reason}")
            continue
        line += f"{r.result:6} {r.seconds:6.1f} "
        if r.figures:
            line += " ".join(f"{r.figures[name]:7}" for name in COLUMNS)
            line += f"  {r.figures['slowest_call_ms']:.1f}"
            line += f", {r.figures['slowest_blocked_ms']:.1f}"
        print(line)
        if r.notes:
            print("     ", "; ".join(f"{name} {value}" for name, value in r.notes.items()))
        for text in r.breaches:
            print("      BROKEN:", " ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
