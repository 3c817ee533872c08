"""What a backup is: a directory named by its UTC time, with a manifest of what lies in it.

A directory without `.part` at its end is whole: it got its name after everything in it had been
verified and synced.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from pathlib import Path

import msgspec

from collector.seqs import Seqs, merged
from event_bus.errors import BackupError

FORMAT = 1
DATABASE = "bitten_events.db"
JOURNAL = "journal.db"
CONFIG = "config.yaml"
SCHEMAS = "schemas"
MANIFEST = "manifest.json"
PART = ".part"

_TIME = "%Y-%m-%dT%H-%M-%SZ"
_FILE = re.compile(r"bitten_events\.db|journal\.db|config\.yaml|schemas/[^/]+\.json")
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ")


class File(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


class DatabaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`events` are stored up to `last_seq`; `gaps` more are recorded there as gone from the
    journal, and `holes` are missing without a record. `journal_id` is None before the first.
    `held` are the seqs of those stored, `last_event` is seq and id of the last of them."""

    journal_id: str | None
    last_seq: int
    events: int
    gaps: int
    holes: int
    held: Seqs = []
    last_event: tuple[int, str] | None = None


class JournalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The journal goes from `first_seq` to `last_seq` and holds `events` of them; `lost` more are
    damaged, which the database has or the bus has recorded as lost. `held` are their seqs."""

    journal_id: str
    first_seq: int
    last_seq: int
    events: int
    lost: int
    held: Seqs = []


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`made_at` is Unix seconds before the first byte was copied: everything acknowledged until
    then is in the backup. `files` has everything but the manifest, by path."""

    format: int = FORMAT
    version: str
    made_at: float
    home: str
    database: DatabaseFacts | None
    journal: JournalFacts | None
    files: dict[str, File]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def last_seq(self) -> int:
        """The last event of the backup."""
        return max(part.last_seq for part in (self.database, self.journal) if part is not None)

    @property
    def held(self) -> Seqs:
        """The seqs of all its events."""
        parts = [part for part in (self.database, self.journal) if part is not None]
        return merged(seqs for part in parts for seqs in part.held)

    @property
    def journal_id(self) -> str | None:
        """Of the bus that the backup is of; None if it was of no event."""
        parts = [part for part in (self.journal, self.database) if part is not None]
        return parts[0].journal_id

    @property
    def stored_seq(self) -> int:
        """The last event that the database has dealt with."""
        return self.database.last_seq if self.database is not None else 0

    @property
    def missing(self) -> tuple[int, int] | None:
        """The first and last seq that neither the database has nor, any more, the journal."""
        if self.journal is None:
            return None
        first, last = self.stored_seq + 1, self.journal.first_seq - 1
        return (first, last) if first <= last else None

    def write(self, folder: Path) -> None:
        path = folder / MANIFEST
        path.touch(0o600)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises BackupError if `folder` is no backup that this program knows."""
        path = folder / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as e:
            raise BackupError(
                f"{folder} is not a backup: cannot read {path.name}: {e.strerror}",
                hint="`bitten backup --list` shows those there are",
            ) from e
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise BackupError(f"{path} is damaged: {e}", hint="use another backup") from e
        if manifest.format != FORMAT:
            raise BackupError(
                f"{folder} has format {manifest.format}, this program knows {FORMAT}",
                hint=f"install bitten-event-bus {manifest.version}, which made it",
            )
        if not all(_FILE.fullmatch(name) for name in manifest.files):
            raise BackupError(f"{path} names files that no backup has", hint="use another backup")
        return manifest

    def check(self, name: str, path: Path) -> None:
        """Raise BackupError unless the file at `path` is what was backed up as `name`."""
        hint = "copy it again, or use another backup"
        try:
            found = File.of(path)
        except OSError as e:
            raise BackupError(f"cannot read {path}: {e.strerror}", hint=hint) from e
        if found != self.files[name]:
            raise BackupError(f"{name} of the backup is not what was written (SHA-256)", hint=hint)


def name_at(moment: float) -> str:
    """The directory name of a backup made at that Unix time."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime(_TIME)


def unfinished(folder: Path) -> list[Path]:
    """What backups that did not come to their end have left in `folder`. Raises OSError."""
    return [
        path
        for path in folder.iterdir()
        if path.name.endswith(PART)
        and _NAME.fullmatch(path.name.removesuffix(PART))
        and path.is_dir()
        and not path.is_symlink()
    ]


def backups(folder: Path) -> list[Path]:
    """The finished backups in `folder`, oldest first. Raises BackupError if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise BackupError(
            f"cannot read {folder}: {e.strerror}", hint="check its owner and rights"
        ) from e
