"""A pm2 daemon of its own, for tests and for the drill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from system import System

CONFIG = Path(__file__).parent.parent / "pm2_config.json"


class Pm2:
    """A pm2 daemon of its own, and a checkout that has only what pm2 needs of ours."""

    def __init__(self, system: System, directory: Path) -> None:
        self.system = system
        self.directory = directory
        self.environ = {**system.environ, "PM2_HOME": str(directory / "pm2")}
        (directory / ".venv" / "bin").mkdir(parents=True)
        (directory / ".venv" / "bin" / "bitten").symlink_to(Path(sys.executable).parent / "bitten")
        shutil.copy(CONFIG, directory)

    def __call__(self, *argv: str) -> str:
        done = subprocess.run(
            ["pm2", *argv],
            cwd=self.directory,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def apps(self) -> dict[str, dict[str, Any]]:
        listed = self("jlist")
        return {a["name"]: a for a in json.loads(listed[listed.index("[") :])}

    def logs(self) -> str:
        """What both daemons have written to stderr so far."""
        return "".join(p.read_text() for p in (self.directory / "pm2" / "logs").glob("*error*"))
