"""The size of the write-ahead log, and which processes hold locks on the database.

SQLite empties the log only when nobody reads from it: one SELECT that never ends makes it grow
for as long as it lasts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

MAX_WAL_BYTES = 64 << 20
"""Without a reader it has some 33 MB."""

# Bytes of the -shm file that SQLite's locks lie on (https://sqlite.org/walformat.html, 2.3.1).
WRITE_LOCK = range(120, 121)
READ_LOCKS = range(123, 128)


def wal_bytes(path: Path) -> int:
    try:
        return Path(f"{path}-wal").stat().st_size
    except OSError:
        return 0


def holders(path: Path, locks: range) -> list[str]:
    """The other processes that hold one of these locks on the database, as `process 7 (sqlite3)`.

    Empty where the kernel does not tell: outside Linux, or of processes in another container.
    """
    found: dict[int, str] = {}
    for lock in file_locks(Path(f"{path}-shm")):
        overlaps = lock.first <= locks[-1] and lock.last >= locks[0]
        if lock.pid > 0 and lock.pid != os.getpid() and overlaps:
            found[lock.pid] = f"process {lock.pid} ({_name(lock.pid)})"
    return list(found.values())


@dataclass(frozen=True)
class Lock:
    """From the first locked byte to the last one; a lock to the file's end counts as one byte."""

    pid: int
    first: int
    last: int


def file_locks(path: Path) -> list[Lock]:
    """The locks that are held on a file; none where it is not there or the kernel does not tell."""
    try:
        stat = path.stat()
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    file = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    held = []
    for line in lines:
        # 1: POSIX  ADVISORY  READ 4711 00:2a:12345 123 127; one who waits has "->" in it
        fields = line.split()
        if "->" not in fields and len(fields) >= 8 and fields[5] == file:
            first = int(fields[6])
            last = first if fields[7] == "EOF" else int(fields[7])
            held.append(Lock(int(fields[4]), first, last))
    return held


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "gone by now"
