"""Looking for damage that the writer does not come across."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import apsw

from event_bus import database

PAUSE_S = 5.0
SHARE = 0.01
"""Of one core's time that looking may take."""


class Inspection:
    """Runs `PRAGMA quick_check` in a thread of its own, at once and then again and again.

    `damage` is what it found, empty as long as that is nothing. A small database is looked at
    every five seconds, a large one as often as a hundredth of one core's time allows. It sees
    broken pages; a changed value in a whole page it cannot see.
    """

    def __init__(self, path: Path) -> None:
        self.damage = ""
        self._path = path
        self._closing = threading.Event()
        self._db: apsw.Connection | None = None
        self._lock = threading.Lock()
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
                pass  # locked, removed, interrupted: the writer tells, or the next look does
            pause_s = max(PAUSE_S, (time.monotonic() - began) / SHARE)

    def _look(self) -> None:
        # A connection of its own each time: what an older one has cached would hide the damage.
        db = database.connect(self._path, database.READ_ONLY)
        with self._lock:
            self._db = db
        try:
            if not self._closing.is_set():
                (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone() or ("ok",)
                if verdict != "ok":
                    lines = str(verdict).splitlines()
                    if len(lines) > 1 and lines[0].startswith("***"):  # which database of one
                        del lines[0]
                    self.damage = " ".join(" ".join(lines).split())
        finally:
            with self._lock:
                self._db = None
            db.close()

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            if self._db is not None:
                self._db.interrupt()
        self._thread.join()
