"""The spool: a file of newline-delimited events that one process could not deliver yet."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

_COPY_BYTES = 1 << 20


class Spool:
    """A first-in first-out file of lines at `path`, at most `max_bytes` of them not delivered.

    Made with the first line and removed with the last; in between, the space of delivered lines
    is given back each time they come to half of `max_bytes`. The owner holds its lock, so that the
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
        if self._size - self._delivered + len(body) > self.max_bytes and not over_limit:
            return False
        if self._fd < 0:
            self._fd = self._make()
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
        elif 2 * self._delivered > self.max_bytes:
            with contextlib.suppress(OSError):  # no room for a copy yet
                self._give_space_back()

    def _give_space_back(self) -> None:
        """Go on in a new file that holds only what is not delivered."""
        fd = self._make()
        os.close(self._fd)
        self._fd = fd
        self._size -= self._delivered
        self._read -= self._delivered
        self._delivered = 0

    def _make(self) -> int:
        """A file of what is not delivered, locked before it has the name the broker looks for."""
        new = self.path.with_suffix(".new")
        fd = open_locked(new, os.O_CREAT | os.O_TRUNC)
        os.fchmod(fd, 0o600)  # whatever the umask
        try:
            for offset in range(self._delivered, self._size, _COPY_BYTES):
                chunk = os.pread(self._fd, min(_COPY_BYTES, self._size - offset), offset)
                if os.pwrite(fd, chunk, offset - self._delivered) < len(chunk):
                    raise OSError(errno.ENOSPC, "short write", str(new))
            new.replace(self.path)
        except OSError:
            new.unlink(missing_ok=True)
            os.close(fd)
            raise
        return fd

    def rewind(self) -> None:
        """What was read but not delivered will be read again."""
        self._read = self._delivered

    def release(self) -> None:
        """Let go of the file, leaving what it holds to the broker."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._size = self._read = self._delivered = self.events = 0


def open_locked(path: Path, flags: int = 0) -> int:
    """A descriptor of the file at `path`, locked until it and its copies in children are closed.

    Raises BlockingIOError if somebody holds it, FileNotFoundError if it is gone, and OSError. Not
    a POSIX record lock: that one goes as soon as this process closes the file a second time.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.stat()):
            raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", str(path))
    except OSError:
        os.close(fd)
        raise
    return fd
