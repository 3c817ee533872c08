"""What else in a home knows how far its journal went, once its end or all of it is gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

AUDIT = "audit.json"
END = "last_seq.json"


class EndNote:
    """Tells beside the journal how far it has come. It is never synced: it outlives its process,
    though not always a power loss, and so knows of commits that were in a removed -wal alone.

    Raises OSError if it cannot be made; what cannot be noted later is not.
    """

    def __init__(self, home: Path, journal_id: str, last_seq: int) -> None:
        head = b'{"journal_id":"%s","journal":{"last_seq":' % journal_id.encode()
        self._at = len(head)
        new = home / f"{END}.new"  # the note before it stays until this one is there
        self._fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(self._fd, head + b"%20d}}\n" % last_seq, 0)
            new.replace(home / END)
        except OSError:
            self.close()
            raise

    def write(self, last_seq: int) -> None:
        """Note a commit, before anybody hears of it."""
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, b"%20d" % last_seq, self._at)

    def close(self) -> None:
        os.close(self._fd)


class _Part(msgspec.Struct, frozen=True):
    seq: int = 0
    last_seq: int = 0
    journal_id: str | None = None


class _Trace(msgspec.Struct, frozen=True):
    """What these files and the manifest of a backup have of it."""

    home: str | None = None
    journal_id: str | None = None
    tally: _Part | None = None
    database: _Part | None = None
    journal: _Part | None = None


def last_known(home: Path, backup_dir: Path, journal_id: str | None = None) -> tuple[int, str]:
    """The highest seq that the last bus, an audit or a backup tells of, and the file; (0, "") if
    none does.

    With `journal_id`, of that journal alone: one begun anew counts again.
    """
    files = [home / END, home / AUDIT, *backup_dir.glob("*Z/manifest.json")]
    found = ((_last_seq(file, home, journal_id), str(file)) for file in files)
    return max((known for known in found if known[0]), default=(0, ""))


def _last_seq(file: Path, home: Path, journal_id: str | None) -> int:
    if not file.is_file():  # a pipe would never end
        return 0
    try:
        trace = msgspec.json.decode(file.read_bytes(), type=_Trace)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return 0
    if trace.home not in (None, str(home)):  # backups of several homes may lie together
        return 0
    parts = [part for part in (trace.tally, trace.database, trace.journal) if part]
    if journal_id not in (None, trace.journal_id, *(part.journal_id for part in parts)):
        return 0
    return max((max(part.seq, part.last_seq) for part in parts), default=0)
