"""A server of a peer as a process that ends with the measurement."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

START_S = 60.0
STOP_S = 20.0


def missing(program: str, *modules: str) -> str:
    """Which of a server and its Python client's modules is not installed; empty if none."""
    if shutil.which(program) is None:
        return f"{program} is not installed"
    absent = [m for m in modules if importlib.util.find_spec(m) is None]
    return f"Python's {absent[0]} is not installed: scripts/install bench" if absent else ""


@contextlib.contextmanager
def running(
    argv: Sequence[str | Path],
    log: Path,
    port: int,
    *,
    env: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """A server that listens on a port, stopped in the end. Raises SystemExit if it never does."""
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=env)
    try:
        deadline = time.monotonic() + START_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(encoding="utf-8", errors="replace").strip()[-2_000:]
                raise SystemExit(f"{argv[0]} did not start: {said}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
