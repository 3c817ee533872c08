"""The watchdog: ends a process whose loop is stuck, so that its supervisor starts it again."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)

TICK_S = 5.0
MAX_SILENT_TICKS = 6
EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h; none of those that a supervisor takes for hopeless."""


class Watchdog:
    """Expects `alive` to be called; after six ticks of 5 s without it, it prints the stack of
    every thread and ends the process with exit code 70.

    It counts its own ticks and does not compare clocks: a process that was stopped (SIGSTOP, a
    suspended machine) has had no ticks, and must not be killed when it goes on. Code that keeps
    the interpreter's lock for ever stops the watchdog too. Use it as a context manager.
    """

    def __init__(
        self, what: str, *, tick_s: float = TICK_S, max_silent_ticks: int = MAX_SILENT_TICKS
    ) -> None:
        self._what = what
        self._tick_s = tick_s
        self._max_silent_ticks = max_silent_ticks
        self._heard = threading.Event()
        self._ended = threading.Event()
        self._is_paused = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self) -> None:
        """A sign of life. Cheap, from any thread; long work gives one now and then."""
        self._heard.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Expects nothing within: for one call that takes as long as the disk does, and gives no
        sign of life meanwhile. For the thread that gives the others."""
        self._is_paused = True
        try:
            yield
        finally:
            self.alive()
            self._is_paused = False

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        silent = 0
        while not self._ended.wait(self._tick_s):
            silent = 0 if self._heard.is_set() or self._is_paused else silent + 1
            self._heard.clear()
            if silent >= self._max_silent_ticks:
                self._end()

    def _end(self) -> None:
        log.critical(
            "%s has been stuck for %g s: ending it; where each thread is:",
            self._what,
            self._tick_s * self._max_silent_ticks,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        os._exit(EXIT_CODE)
