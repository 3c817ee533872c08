"""Backups by the clock: a child process of the collector, so that its loop never waits."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable

from collector.manifest import Manifest, backups
from event_bus.errors import BackupError
from event_bus.settings import Settings
from event_bus.supervisor import dying_with_parent

log = logging.getLogger("bitten.backup")

RETRY_S = 600.0
NICENESS = 19
STOP_S = 5.0
KEPT = "kept beyond"
"""How the lines begin in which `bitten backup` says which older ones it did not remove."""


class BackupSchedule:
    """Starts `bitten backup` every `backup_interval_s` and sees how it ends.

    `problem` says why the last one failed, or that one does not end; empty if neither. When the
    last one was made is read from `backup_dir`, so that a restart changes nothing.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self.problem = ""
        self._settings = settings
        self._clock = clock
        self._due_at: float | None = None
        self._began_at = 0.0
        self._child: subprocess.Popen[str] | None = None

    def turn(self, now: float) -> None:
        """What is due at `now`, seconds of a monotonic clock. Never waits, never raises."""
        if not self._settings.backup_interval_s:
            return
        if self._child is not None:
            if self._child.poll() is not None:
                self._end(self._child, now)
                self._child = None
            elif now >= self._began_at + self._settings.backup_interval_s:
                self.problem = (
                    f"a backup has not come to its end within {self._settings.backup_interval_s} s:"
                    f" process {self._child.pid}, into {self._settings.backup_dir}"
                )
        elif self._due_at is None:
            self._due_at = now + self._wait_s()
        elif now >= self._due_at:
            try:
                self._child, self._began_at = self._start(), now
            except OSError as e:
                self._fail(f"cannot start `bitten backup`: {e.strerror}", now)

    def close(self) -> None:
        """End a backup that is being made; the next one removes what it leaves."""
        if self._child is not None:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.communicate(timeout=STOP_S)
            self._child = None

    def _wait_s(self) -> float:
        """Until the first one: an interval after the newest there is, by wall-clock time once."""
        try:
            newest = backups(self._settings.backup_dir)[-1:]
            made_at = Manifest.read(newest[0]).made_at if newest else 0.0
        except BackupError:
            made_at = 0.0
        age = max(0.0, self._clock() - made_at)
        return max(0.0, self._settings.backup_interval_s - age)

    def _start(self) -> subprocess.Popen[str]:
        die_with_us = dying_with_parent()

        def prepare() -> None:
            die_with_us()
            os.nice(NICENESS)

        return subprocess.Popen(
            [sys.executable, "-P", "-m", "event_bus", "backup"],
            env={
                **os.environ,
                "BITTEN_HOME": str(self._settings.home),
                "BITTEN_DB": str(self._settings.db),
                "BITTEN_BACKUP_DIR": str(self._settings.backup_dir),
                "BITTEN_BACKUP_KEEP": str(self._settings.backup_keep),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a Ctrl-C is for us
            preexec_fn=prepare,
        )

    def _end(self, child: subprocess.Popen[str], now: float) -> None:
        output, _ = child.communicate()
        lines = output.strip().splitlines() or [f"`bitten backup` ended with {child.returncode}"]
        if child.returncode:
            self._fail(lines[-1].removeprefix("bitten: "), now)
            return
        log.info("backup made: %s", lines[0])
        for line in lines:
            if line.startswith(KEPT):
                log.warning("%s", line)
        self.problem = ""
        self._due_at = now + self._settings.backup_interval_s

    def _fail(self, why: str, now: float) -> None:
        retry_s = min(RETRY_S, self._settings.backup_interval_s)
        log.error("no backup could be made, tried again in %.0f s: %s", retry_s, why)
        self.problem = f"no backup could be made: {why}"
        self._due_at = now + retry_s
