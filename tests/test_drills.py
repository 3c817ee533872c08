"""The quick drills hold, and each checker goes red when its fault is planted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PATHS = (ROOT / "tests", ROOT / "scripts" / "benchmarks")


def drill(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """As `scripts/drill --short` does, without installing; exit code and results."""
    found = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "drills", "--short", "--json", found, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(found.read_text())["drills"]


QUICK = ("sigkill", "duplicates", "backup")
"""`.ci/run` runs more of them."""


@pytest.mark.parametrize("name", QUICK)
def test_planted_fault_makes_the_drill_red(tmp_path: Path, name: str) -> None:
    code, (result,) = drill(tmp_path, "--plant", name)
    assert (code, result["result"]) == (0, "BROKEN"), result


@pytest.mark.parametrize("name", QUICK)
def test_quick_drill_holds(tmp_path: Path, name: str) -> None:
    code, (result,) = drill(tmp_path, name)
    assert (code, result["result"]) == (0, "held"), "\n".join(result["breaches"])


@pytest.mark.parametrize("plant", [[], ["--plant"]])
def test_drill_that_was_named_and_cannot_run_is_no_success(
    tmp_path: Path, plant: list[str]
) -> None:
    code, (result,) = drill(tmp_path, *plant, "dashboard")
    assert (code, result["result"]) == (2, "not run"), result


def test_drill_of_an_unknown_name_is_wrong_use() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "drills", "sigkil"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no drill sigkil; known are soak, sigkill, " in done.stderr
