"""The size of the write-ahead log, and which processes hold locks on the database.

SQLite empties the log only when nobody reads from it: one SELECT that never ends makes it grow
for as long as it lasts.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

MAX_WAL_BYTES = 64 << 20
"""Without a reader it has 16 to 18 MB, in small batches and in large ones."""

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
    try:
        shm = Path(f"{path}-shm").stat()
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    file = f"{os.major(shm.st_dev):02x}:{os.minor(shm.st_dev):02x}:{shm.st_ino}"
    found: dict[int, str] = {}
    for line in lines:
        # 1: POSIX  ADVISORY  READ 4711 00:2a:12345 123 127
        fields = line.split()
        if "->" in fields or len(fields) < 8 or fields[5] != file:
            continue
        pid, first = int(fields[4]), int(fields[6])
        last = first if fields[7] == "EOF" else int(fields[7])
        if pid > 0 and pid != os.getpid() and first <= locks[-1] and last >= locks[0]:
            found[pid] = f"process {pid} ({_name(pid)})"
    return list(found.values())


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "gone by now"
