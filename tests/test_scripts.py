"""What the README tells a newcomer to type, in a clone of this repository with an empty HOME."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import System, wait_until

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(300)
def test_fresh_clone_starts_with_one_command(system: System, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    # With what is not committed yet, so that a test before a commit tests what will be committed.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = clone / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
            target.chmod((ROOT / name).stat().st_mode)
    environ = {
        **{k: v for k, v in system.environ.items() if k not in ("BITTEN_HOME", "PYTHONPATH")},
        "HOME": str(tmp_path),
    }
    start = subprocess.Popen(
        ["scripts/start"],
        cwd=clone,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def answers() -> bool:
        assert start.poll() is None, start.communicate()[0]
        return system.status(0.2) is not None

    try:
        wait_until(answers, "the bus answers", timeout_s=240)
        bitten = clone / ".venv" / "bin" / "bitten"
        done = subprocess.run(
            [bitten, "emit", "user_action", "action=x"],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        db = tmp_path / ".bitten" / "bitten_events.db"
        wait_until(db.exists, "the collector has made the database")
    finally:
        os.killpg(start.pid, signal.SIGINT)
        output, _ = start.communicate(timeout=60)
    assert start.returncode == 0, output
