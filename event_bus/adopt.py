"""Adoption: broker and bridges take over what dead processes left in the spool directory."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

from event_bus.last_loss import notes
from event_bus.spool import open_locked

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 8 << 20
"""No event is as long, and no message may be longer."""

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
"""Too many connections: that passes, and the broker goes on meanwhile."""

STALE_AFTER_S = 60.0
"""Age of a half-made copy; its owner locks it a moment after it has made it."""


class SpoolAdopter:
    """Reads spool files that nobody holds the lock of, chunk by chunk, and removes them; the notes
    of what could not be spooled come after them, each as the event that it stands for.

    `read` gives a chunk; `done` when it is in the journal, or `rewind` when that failed.
    """

    def __init__(self, directory: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._directory = directory
        self._chunk_bytes = chunk_bytes
        self._fd = -1
        self._path = directory
        self._offset = 0
        self._fed = 0
        self._note = b""
        self._left: set[Path] = set()

    @property
    def pending(self) -> bool:
        return self._fd >= 0

    def look(self) -> None:
        """Take hold of one spool file whose process is gone, if there is one."""
        if self._fd >= 0:
            return
        try:
            self._look()
        except OSError as e:
            if e.errno not in _NO_DESCRIPTOR:
                raise

    def _look(self) -> None:
        self._remove_half_made_copies()
        told = {note.path: note for note in notes(self._directory)}
        for path in [*sorted(self._directory.glob("*.ndjson")), *told]:
            if path in self._left:
                continue
            try:
                fd = open_locked(path)
            except (FileNotFoundError, BlockingIOError):
                continue  # delivered meanwhile, or its process is alive and delivers it
            except OSError as e:
                if e.errno in _NO_DESCRIPTOR:
                    raise
                self._leave(path, e)
                continue
            if path in told or os.fstat(fd).st_size:
                log.info("adopting %s", path)
                self._fd, self._path, self._offset, self._fed = fd, path, 0, 0
                self._note = told[path].event() if path in told else b""
                return
            path.unlink(missing_ok=True)
            os.close(fd)

    def _remove_half_made_copies(self) -> None:
        """A process died while it copied its spool; what it copied is still in the original."""
        for path in self._directory.glob("*.new"):
            try:
                if time.time() - path.stat().st_mtime < STALE_AFTER_S:
                    continue
                fd = open_locked(path)
            except OSError:
                continue  # finished meanwhile, or its process is alive, or it cannot be touched
            path.unlink(missing_ok=True)
            os.close(fd)

    def read(self) -> bytes:
        """The next chunk of the file in hand; empty if there is none."""
        if self._fd < 0:
            return b""
        if self._note:
            self._fed = len(self._note)
            return self._note
        try:
            chunk = os.pread(self._fd, self._chunk_bytes, self._offset)
            end = chunk.rfind(b"\n") + 1
            if not end:  # one line longer than a chunk, or a last line cut short by a crash
                chunk = os.pread(self._fd, MAX_LINE_BYTES, self._offset)
                end = chunk.find(b"\n") + 1 or len(chunk)
        except OSError as e:
            self._leave(self._path, e)
            self.release()
            return b""
        self._fed = end
        return chunk[:end]

    def _leave(self, path: Path, error: OSError) -> None:
        """Say once that a file cannot be read; it is tried again by the next process."""
        log.error("cannot adopt %s: %s; its events wait there", path, error.strerror)
        self._left.add(path)

    def done(self) -> None:
        """The chunk that was read is on disk in the journal."""
        if self._fd < 0 or (self._note and not self._fed):
            return
        self._offset += self._fed
        self._fed = 0
        if self._offset >= os.fstat(self._fd).st_size:
            self._path.unlink(missing_ok=True)
            self.release()
            self.look()

    def rewind(self) -> None:
        """The chunk that was read is not in the journal: it will be read again."""
        self._fed = 0

    def release(self) -> None:
        """Let go of the file, leaving what it holds to whoever looks next."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._offset = self._fed = 0
        self._note = b""
