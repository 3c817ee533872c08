"""Each section of `scripts/bench` measures something, and what it found can be shown again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import against
import charts
import pytest
import report
import targets

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "scripts" / "benchmarks"

SECTIONS = {
    "end_to_end": {
        "end_to_end": {
            *("rate", "acked_rate", "bytes", "bus_mb", "collector_mb"),
            *("publisher_us", "bus_us", "collector_us"),
        },
        "store_alone": None,
    },
    "peers": {"publishers": {"1", "4"}, "peers": None, "missing": None},
    "limits": {"limits": {"transfer_single", "transfer_batched", "fsync"}},
    "parts": {"parts": None},
    "calls": {"calls": {"back_to_back", "paced"}},
    "latency": {"latency": {"socket", "subscriber", "stored"}},
    "growth": {"growth": {"2000", "20000"}},
    "startup": {"startup": {"events", "crashes"}},
    "subscribers": {"subscribers": {"0", "10"}},
    "load": {"load": {"idle", "usual", "full"}},
    "storage": {"storage": {"market_data", "mix"}},
}
"""Its keys in the results, and the keys below them."""

LATENCY = {"p50": 0.5, "p99": 5.0, "rate": 1_000.0, "missed": 0}
CALL = {"p50": 4.0, "p99": 10.0, "p99.9": 400.0}
QUERIES = {"seed": {"events": 40.0}, "lookup": {"by event_id": 0.1}}
GROWN = {
    "rates": [90_000.0, 95_000.0],
    "empty_rates": [100_000.0, 100_000.0],
    "stored_ms": LATENCY,
    "queries_ms": QUERIES,
    "bytes": 99.0,
    "bus_mb": 45.0,
    "collect_mb": 60.0,
}
MADE_UP: dict[str, Any] = {
    "machine": {
        "cores": 2,
        "cpu": "made up",
        "file_system": "ext4",
        "python": "3.11",
        "date": "2026-01-01",
        "commit": "abc",
    },
    "events": 1_000,
    "rounds": 2,
    "end_to_end": [
        {"rate": r, "acked_rate": r, "bytes": 99.0, "bus_mb": 45.0, "collector_mb": 50.0}
        | {"publisher_us": 5.0, "bus_us": 3.0, "collector_us": 6.0}
        for r in (100_000.0, 110_000.0)
    ],
    "store_alone": [150_000.0, 160_000.0],
    "missing": {"another": "it is not installed"},
    "peers": {"Redis Streams, AOF everysec": [40_000.0, 41_000.0], "the plain way": [1e3, 1e3]},
    "publishers": {"1": [100_000.0, 110_000.0], "4": [90_000.0, 99_000.0]},
    "calls": {
        pace: {"up": CALL, "away": CALL, "filling": CALL, "dropped_while_away": 0}
        for pace in ("back_to_back", "paced")
    },
    "latency": {
        kind: dict.fromkeys(("100", "1000", "50000"), LATENCY)
        for kind in ("socket", "subscriber", "stored")
    },
    "growth": dict.fromkeys(("100000", "1000000", "10000000"), GROWN),
    "startup": {
        "events": 10_000_000,
        "crashes": [{"ready_s": 1.0, "caught_up_s": 2.0, "behind": 9}],
    },
}


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH, *arguments], capture_output=True, text=True, check=False
    )


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    _, _, block = report.text(results).partition("\ntargets\n")
    rows = [line.rsplit("  ", 1) for line in block.splitlines()]
    return {row[0].split("  ")[1].strip(): row[1].strip() for row in rows}


def test_list_names_every_section() -> None:
    done = bench("--list")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SECTIONS)


def test_unknown_section_is_wrong_use() -> None:
    done = bench("--only", "latencies")
    assert done.returncode == 2
    assert "latencies" in done.stderr


@pytest.mark.parametrize("section", SECTIONS)
def test_section_measures(section: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = bench("--short", "--only", section, "--events", "2000", "--json", file)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert results.keys() == {"machine", "events", "rounds", *SECTIONS[section]}
    for name, keys in SECTIONS[section].items():
        found = results[name]
        first = found[0] if isinstance(found, list) else found
        assert keys is None or set(first) == keys
        figures = against.flat(found, name)
        assert figures or name == "missing"
        assert not [figure for figure in figures.values() if not figure >= 0]
    assert "\ntargets\n" in done.stdout


def test_earlier_run_is_shown_and_drawn_again(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps(MADE_UP))
    done = bench("--from", file, "--svg", tmp_path / "svg")
    assert done.returncode == 0, done.stderr
    assert done.stdout == report.text(MADE_UP) + "\n"
    drawn = sorted((tmp_path / "svg").iterdir())
    assert [path.stem for path in drawn] == sorted(f"bench-{name}" for name in charts.CHARTS)
    for path in drawn:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_chart_of_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    results = {"calls": MADE_UP["calls"]}
    assert [path.stem for path in charts.draw(results, tmp_path)] == ["bench-calls"]
    assert [path.stem for path in tmp_path.iterdir()] == ["bench-calls"]


def test_targets_are_reached_missed_or_not_measured() -> None:
    found = verdicts(MADE_UP)
    assert set(found) == {target.name for target in targets.TARGETS}
    assert found["end to end / Redis Streams, AOF everysec"] == "reached"
    assert found["end to end / NATS JetStream, default sync"] == "not measured"
    assert found["four publishers / one"] == "missed"
    assert found["bridge call back to back, bus away: p99.9, µs"] == "reached"
    assert found["publish to SUB socket at 1,000/s: p50, ms"] == "missed"
    assert found["ready after a crash at ten million, s"] == "reached"


def test_figure_on_the_wrong_side_of_its_target_is_missed() -> None:
    slow = json.loads(json.dumps(MADE_UP))
    slow["growth"]["10000000"]["queries_ms"]["seed"]["events"] = 50.1
    slow["calls"]["paced"]["filling"]["p99.9"] = 501.0
    slow["publishers"] = {"1": [1_000.0] * 2, "4": [900.0] * 2}
    slow["end_to_end"] = [run | {"rate": 1_000.0} for run in slow["end_to_end"]]
    changed = {
        name for name, verdict in verdicts(slow).items() if verdict != verdicts(MADE_UP)[name]
    }
    assert changed == {
        "handbook's slowest query at ten million, ms",
        "bridge call at 5,000/s, bus away: p99.9, µs",
        "end to end / Redis Streams, AOF everysec",
        "end to end / the plain way",
        "end to end / store alone from memory",
    }


def test_figures_of_an_earlier_revision_are_found_by_their_present_names() -> None:
    earlier = {
        "events": 1_000,
        "end_to_end": [{"rate": 5.0}],
        "store_alone": [7.0],
        "call_tight": {"p50": 1.0},
        "to_sub_socket": {"p99": 2.0},
    }
    figures = against.flat(earlier)
    assert figures == {
        "end_to_end rate": 5.0,
        "store_alone": 7.0,
        "calls back_to_back up p50": 1.0,
        "latency socket 1000 p99": 2.0,
    }
    assert figures.keys() <= against.flat(MADE_UP).keys()
