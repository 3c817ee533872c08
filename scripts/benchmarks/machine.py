"""What was measured, and on which machine."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import apsw
import psutil
import zmq

from event_bus.version import __version__

ROOT = Path(__file__).parents[2]


def facts() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "version": __version__,
        "commit": _git("describe", "--always", "--dirty"),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(Path(tempfile.gettempdir())),
        "python": platform.python_version(),
        "apsw": apsw.apsw_version(),
        "sqlite_of_the_daemons": apsw.sqlite_lib_version(),
        "sqlite_of_the_queries": sqlite3.sqlite_version,
        "libzmq": zmq.zmq_version(),
        "pyzmq": zmq.__version__,
    }


def _cpu() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0] if names else platform.machine()


def _file_system(path: Path) -> str:
    """The type of the file system that holds it, such as ext4."""
    parents = {str(p) for p in (path.resolve(), *path.resolve().parents)}
    mounts = [p for p in psutil.disk_partitions(all=True) if p.mountpoint in parents]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "unknown"


def _git(*arguments: str) -> str:
    """Empty without git, or outside of a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
