"""Supervision without pm2: the bus and the collector as children of one foreground process."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable

from event_bus.errors import StartError
from event_bus.settings import Settings

log = logging.getLogger("bitten.up")

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 15.0
STEADY_S = 3.0
"""A child that lived this long starts over with the first delay."""

KILL_AFTER_S = 10.0
_HOPELESS = (2, 4)
"""Exit codes of wrong settings, and of files, ports and locks that are not to be had."""

_PR_SET_PDEATHSIG = 1


class Supervisor:
    """Runs `bitten bus` and `bitten collect` with the given settings and restarts them.

    Restarts wait 0.1 s, then twice as long each time up to 15 s. A bus that cannot start at all
    ends everything: `run` then raises StartError, the reason being on its own line. Without the
    collector the bus keeps everything in its journal, so that one is tried for ever.
    """

    def __init__(self, settings: Settings) -> None:
        self._environ = {
            **os.environ,
            "BITTEN_HOME": str(settings.home),
            "BITTEN_DB": str(settings.db),
            "BITTEN_EVENTS_URL": settings.events_url,
            "BITTEN_INGRESS_URL": settings.ingress_url,
        }
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Supervise until SIGINT or SIGTERM, then stop both."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        ended = await asyncio.gather(
            self._keep("bus"), self._keep("collect"), return_exceptions=True
        )
        for error in ended:
            if error is not None:
                raise error

    async def _keep(self, name: str) -> None:
        """Keep one child running until we stop."""
        loop = asyncio.get_running_loop()
        delay_s = FIRST_DELAY_S
        first = True
        while True:
            started = loop.time()
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                # -P: legacy folders are called event_bus too, and `-m` would look here first.
                *("-P", "-m", "event_bus", name),
                env=self._environ,
                start_new_session=True,  # a Ctrl-C is for us; we tell the children
                preexec_fn=dying_with_parent(),
            )
            code = await self._until_exit_or_stop(child)
            if self._stopping.is_set():
                return
            if loop.time() - started >= STEADY_S:
                delay_s = FIRST_DELAY_S
            elif first and name == "bus" and code in _HOPELESS:
                self._stopping.set()
                raise StartError(f"`bitten {name}` cannot start (exit code {code}, reason above)")
            first = False
            log.error("`bitten %s` ended (%s); starting it again in %g s", name, code, delay_s)
            try:
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            except TimeoutError:
                delay_s = min(delay_s * 2, MAX_DELAY_S)
            else:
                return

    async def _until_exit_or_stop(self, child: asyncio.subprocess.Process) -> int:
        exited = asyncio.ensure_future(child.wait())
        stopped = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({exited, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not exited.done():
            child.terminate()
            await asyncio.wait({exited}, timeout=KILL_AFTER_S)
            if not exited.done():
                log.error("process %d does not stop; killing it", child.pid)
                child.kill()
        return await exited


def dying_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: has the kernel send the child SIGTERM when this process dies."""
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare
