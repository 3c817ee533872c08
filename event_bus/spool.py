"""The spool: a file of newline-delimited events that one process could not deliver yet."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_LOCK_TRIES = 100


class Spool:
    """A first-in first-out file of lines at `path`, at most `max_bytes` long.

    Made with the first line and removed with the last. The owner holds its lock, so that the
    broker knows which files are orphans. Not safe for two threads. Raises OSError.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.events = 0
        self._fd = -1
        self._size = 0
        self._read = 0
        self._delivered = 0

    def __bool__(self) -> bool:
        return self.events > 0

    @property
    def unread(self) -> bool:
        return self._read < self._size

    def append(self, body: bytes, events: int, *, over_limit: bool = False) -> bool:
        """Add whole lines; False, with nothing written, if they do not fit."""
        if self._size + len(body) > self.max_bytes and not over_limit:
            return False
        if self._fd < 0:
            self._fd = _open_locked(self.path)
        written = 0
        try:
            while written < len(body):
                written += os.pwrite(self._fd, body[written:], self._size + written)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(body)
        self.events += events
        return True

    def read(self, max_bytes: int) -> bytes:
        """The next whole lines that were not read yet, about `max_bytes`.

        Raises OSError if they are not there any more.
        """
        chunk = os.pread(self._fd, max_bytes, self._read)
        end = chunk.rfind(b"\n") + 1
        while not end and max_bytes < self._size - self._read:
            max_bytes *= 2
            chunk = os.pread(self._fd, max_bytes, self._read)
            end = chunk.rfind(b"\n") + 1
        if not end:
            raise OSError(f"{self.path} was cut by somebody else: {self.events} events are gone")
        self._read += end
        return chunk[:end]

    def delivered(self, size: int, events: int) -> None:
        """The oldest `size` bytes that were read, holding that many events, are acknowledged."""
        self._delivered += size
        self.events -= events
        if self._delivered == self._size:
            self.path.unlink(missing_ok=True)
            self.release()

    def rewind(self) -> None:
        """What was read but not delivered will be read again."""
        self._read = self._delivered

    def release(self) -> None:
        """Let go of the file, leaving what it holds to the broker."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._size = self._read = self._delivered = self.events = 0


def _open_locked(path: Path) -> int:
    for _ in range(_LOCK_TRIES):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except OSError:
            # The broker took the new file for an orphan, and removes it; it needs a moment.
            time.sleep(0.001)
        os.close(fd)
    raise OSError(f"cannot lock {path}")
