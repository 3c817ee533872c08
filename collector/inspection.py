"""Looking for damage that the writer does not come across."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import apsw

from collector import wal
from event_bus import database

PAUSE_S = 5.0
SHARE = 0.01
"""Of one core's time that looking may take."""

STEPS = 10_000
"""Pages and rows between two looks at whether to go on; some milliseconds."""

MAX_WAL_BYTES = wal.MAX_WAL_BYTES // 2
"""Above this it may not grow while one looks; it is a problem from twice that on."""


class Inspection:
    """Runs `PRAGMA quick_check` in a thread of its own, at once and then again and again.

    `damage` is what it found, empty as long as that is nothing. A small database is looked at
    every five seconds, a large one as often as a hundredth of one core's time allows. It sees
    broken pages; a changed value in a whole page it cannot see. The log cannot be emptied while
    it reads: where that grows meanwhile, it gives way, and tries again later.
    """

    def __init__(self, path: Path) -> None:
        self.damage = ""
        self._path = path
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inspection", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._closing.wait(pause_s) and not self.damage:
            began = time.monotonic()
            try:
                self._look()
            except (apsw.NotADBError, apsw.CorruptError) as e:
                self.damage = str(e)
            except apsw.Error:
                pass  # locked, removed, given way: the writer tells, or the next look does
            pause_s = max(PAUSE_S, (time.monotonic() - began) / SHARE)

    def _look(self) -> None:
        # It keeps the size that it has had once, so that only a larger one says that it grows.
        most_wal_bytes = max(MAX_WAL_BYTES, wal.wal_bytes(self._path))

        def gives_way() -> bool:
            return self._closing.is_set() or wal.wal_bytes(self._path) > most_wal_bytes

        # A connection of its own each time: what an older one has cached would hide the damage.
        with contextlib.closing(database.connect(self._path, database.READ_ONLY)) as db:
            db.set_progress_handler(gives_way, STEPS)
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone() or ("ok",)
            if verdict != "ok":
                lines = str(verdict).splitlines()
                if len(lines) > 1 and lines[0].startswith("***"):  # which database of one
                    del lines[0]
                self.damage = " ".join(" ".join(lines).split())

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
