"""What every check is given, and the one way in which checks open SQLite files."""

from __future__ import annotations

import contextlib
import shlex
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from collector.doctor.finding import CannotTell, Finding
from event_bus import database, keys
from event_bus.settings import Settings

BUSY_TIMEOUT_MS = 200
_STEPS = 10_000
"""Steps of SQLite's machine between two looks at the time: well under a millisecond."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """`status` is the bus's account of itself, None if it does not answer. `bitten` is the
    command with the options that make it mean this home. Checks end by `deadline`, in seconds of
    time.monotonic."""

    settings: Settings
    bitten: str
    now: float
    status: dict[str, Any] | None
    deadline: float
    key_problem: str = ""
    """Why this home's key cannot be used, if it cannot."""
    refused: str = ""
    """Why the bus, which answers, does not say how it is, if it does not."""

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[apsw.Connection]:
        """A read-only connection whose queries end by the deadline. Raises CannotTell.

        A file that nobody has open is read as one that cannot change: SQLite would put a `-wal`
        and a `-shm` beside it, and could not read it at all where that is forbidden.
        """
        if not path.exists():
            raise CannotTell(f"there is no {path}")
        flags, name = database.READ_ONLY, path
        if not Path(f"{path}-wal").exists():
            flags |= apsw.SQLITE_OPEN_URI
            name = Path(f"file:{urllib.parse.quote(str(path))}?immutable=1")
        try:
            db = database.connect(name, flags, busy_timeout_ms=BUSY_TIMEOUT_MS)
            try:
                db.set_progress_handler(lambda: time.monotonic() > self.deadline, _STEPS)
                yield db
            finally:
                db.close()
        except apsw.InterruptError as e:
            raise TimeoutError(f"reading {path} took too long") from e
        except apsw.Error as e:
            raise CannotTell(f"cannot read {path}: {e}") from e

    def bus(self) -> dict[str, Any]:
        """The bus's account of itself. Raises CannotTell if it is away."""
        if self.status is None:
            raise CannotTell("the bus does not answer")
        return self.status

    @property
    def is_client(self) -> bool:
        """Whether this is the home of a second machine: a key for a bus elsewhere, and no bus."""
        directory = self.settings.keys
        return (
            not keys.is_loopback(self.settings.ingress_url)
            and not keys.secret_file(directory, keys.BUS).exists()
            and keys.public_file(directory, keys.BUS).exists()
            and keys.secret_file(directory, keys.CLIENT).exists()
        )

    @property
    def is_own_bus(self) -> bool:
        """Whether the bus that answers keeps its files in this home."""
        return self.status is not None and (
            Path(self.status["home"]).resolve() == self.settings.home.resolve()
        )

    @property
    def wal_paths(self) -> dict[Path, Path]:
        """Database and journal, with their write-ahead logs."""
        return {p: Path(f"{p}-wal") for p in (self.settings.db, self.settings.journal)}


Check = Callable[[Context], Iterator[Finding]]


def row(db: apsw.Connection, sql: str, *values: Any) -> Any:
    """The first row of a query, None if there is none."""
    return db.execute(sql, values).fetchone()


def rows(db: apsw.Connection, sql: str, *values: Any) -> list[Any]:
    return db.execute(sql, values).fetchall()


def quoted(path: Path) -> str:
    """A path as the shell takes it."""
    return shlex.quote(str(path))
