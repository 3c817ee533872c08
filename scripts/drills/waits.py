"""How long threads were ready to run and had no CPU, as the kernel counts it (schedstat).

On two cores shared by eight publishers, two daemons and whatever else, that is most of what a
clock shows. A delay less these waits is what the program itself made one wait for.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path


class OwnWaits:
    """Of this process's Python threads: what one waits for a CPU, those that want the interpreter
    wait as well."""

    def __init__(self) -> None:
        self._threads = 0
        self._files: list[int] = []

    def total_ns(self) -> int:
        if threading.active_count() != self._threads:  # the delivery thread has come
            for file in self._files:
                os.close(file)
            ids = [t.native_id for t in threading.enumerate()]
            self._files = [os.open(f"/proc/self/task/{i}/schedstat", os.O_RDONLY) for i in ids]
            self._threads = len(ids)
        return sum(int(os.pread(f, 100, 0).split()[1]) for f in self._files)


def waited_ns(pid: int) -> int:
    """Of the main thread of another process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
    except OSError:
        return 0
