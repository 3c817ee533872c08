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
    exec holds it too; the daemons fork none. With `and_directory` the directory is locked besides,
    so that it is held though somebody removes the file.
    """

    def __init__(self, path: Path, what: str, *, and_directory: bool = False) -> None:
        self._path = path
        self._what = what
        self._directory_fd: int | None = None
        self._take()
        if and_directory:
            try:
                self._lock_directory()
            except BaseException:
                os.close(self._fd)
                raise

    def _take(self) -> None:
        path = self._path
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
            raise self._is_held(f"process {owner} holds {path}") from e
        with contextlib.suppress(OSError):  # on a full disk the lock has no name, and holds
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _lock_directory(self) -> None:
        directory = self._path.parent
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise StartError(
                f"cannot open {directory}: {e.strerror}", hint="make it readable"
            ) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise self._is_held(f"a process holds {directory}") from e
        if self._directory_fd is not None:
            os.close(self._directory_fd)
        self._directory_fd = fd

    def _is_held(self, by: str) -> StartError:
        return StartError(
            f"{self._what} is already running here: {by}",
            hint="stop it first, or use another BITTEN_HOME",
        )

    def keep(self) -> None:
        """Take it again if its file, or the directory, was removed or moved away.

        Raises StartError if another process holds what is there now.
        """
        if not _is_at(self._path, self._fd):
            held = self._fd
            try:
                self._take()
            except StartError:
                self._fd = held
                raise
            os.close(held)
        if self._directory_fd is not None and not _is_at(self._path.parent, self._directory_fd):
            self._lock_directory()

    def close(self) -> None:
        os.close(self._fd)
        if self._directory_fd is not None:
            os.close(self._directory_fd)


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False
