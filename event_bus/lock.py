"""Locks that name their owner and vanish with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from event_bus.errors import StartError


class FileLock:
    """Hold `path` exclusively until `close` or the end of the process.

    Raises StartError naming the process that holds it. Not a POSIX record lock: that one goes as
    soon as this process closes any other descriptor of the file. A child that is forked without
    exec holds it too; the daemons fork none.
    """

    def __init__(self, path: Path, what: str) -> None:
        try:
            is_new = not path.exists()
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if is_new:
                os.fchmod(self._fd, 0o600)  # whatever the umask
        except OSError as e:
            raise StartError(
                f"cannot open {path}: {e.strerror}", hint="make the directory writable"
            ) from e
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise StartError(
                f"{what} is already running here: process {owner} holds {path}",
                hint="stop it first, or use another BITTEN_HOME",
            ) from e
        with contextlib.suppress(OSError):  # on a full disk the lock has no name, and holds
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._fd)
