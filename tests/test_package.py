"""The package as a whole: import directions, the wheel, what import costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# design: trading → event_bus ← collector, and schemas imports nothing of ours.
FORBIDDEN = {
    "event_bus": {"collector", "trading"},
    "collector": {"trading"},
    "schemas": {"event_bus", "collector", "trading"},
}
ALIAS = ROOT / "event_bus" / "data_collector.py"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = [p for p in (ROOT / package).rglob("*.py") if p != ALIAS]
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative imports break `from event_bridge import`"
                names = [node.module or ""]
            tops = {name.partition(".")[0] for name in names}
            assert not tops & FORBIDDEN[package], f"{path}:{node.lineno} imports {tops}"


def test_wheel_in_a_clean_environment_carries_schemas_and_commands(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    env = tmp_path / "env"
    venv.create(env, with_pip=True)
    pip = [str(env / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True, env=environ)
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    listed = subprocess.run(
        [env / "bin" / "bitten", "schemas", "list"],
        env=clean,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    assert "signal_events" in listed.stdout
    code = "from event_bus.event_bridge import emit; print(emit('user_action', {'action': 'x'}))"
    emitted = subprocess.run(
        [env / "bin" / "python", "-c", code],
        env=clean | {"BITTEN_INGRESS_URL": "ipc:///nowhere/bus"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert emitted.stdout.strip().endswith("-1"), emitted.stderr
    assert list((tmp_path / ".bitten" / "spool").glob("*.ndjson"))
