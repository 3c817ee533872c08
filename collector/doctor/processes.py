"""Who holds a lock, a file or a port, as far as this user may see it. From /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from collector.wal import file_locks

_NAME_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Process:
    """`name` is its command line, shortened; `pid` is 0 if it is another user's and hidden."""

    pid: int
    name: str = ""
    user: str = ""
    stopped: bool = False
    started_at: float = 0.0

    @classmethod
    def of(cls, pid: int) -> Process:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                words = process.cmdline() or [process.name()]
                return cls(
                    pid=pid,
                    name=" ".join([Path(words[0]).name, *words[1:]])[:_NAME_CHARACTERS],
                    user=process.username(),
                    stopped=process.status() == psutil.STATUS_STOPPED,
                    started_at=process.create_time(),
                )
        except (psutil.Error, ValueError):  # gone by now, or not ours to see
            return cls(pid=max(pid, 0))

    def __str__(self) -> str:
        if not self.pid:
            return "another user's process"
        return f"process {self.pid} ({self.name})" if self.name else f"process {self.pid}"


def lock_owner(path: Path) -> Process | None:
    """The process that holds a lock file, None if nobody does."""
    return next((Process.of(lock.pid) for lock in file_locks(path)), None)


def users(paths: Iterable[Path]) -> dict[int, bool]:
    """Processes that have one of these files open: pid to whether it may write."""
    wanted = {p.resolve() for p in paths}
    found: dict[int, bool] = {}
    for pid in psutil.pids():
        try:
            fds = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:  # gone, or another user's
            continue
        for fd in fds:
            try:
                if fd.readlink() in wanted:
                    found[pid] = found.get(pid, False) or _is_writable(pid, fd.name)
            except OSError:  # closed meanwhile
                continue
    return found


def _is_writable(pid: int, fd: str) -> bool:
    for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def listeners(urls: Iterable[str]) -> dict[str, Process]:
    """Who listens on these addresses; what is no tcp address, or free, is left out."""
    ports = {u.rpartition(":")[2]: u for u in urls if u.startswith("tcp://")}
    found = {}
    for connection in psutil.net_connections("tcp"):
        address: Any = connection.laddr
        if connection.status == psutil.CONN_LISTEN and str(address.port) in ports:
            found[ports[str(address.port)]] = Process.of(connection.pid or 0)
    return found
