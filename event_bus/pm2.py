"""What pm2 wants to hear from the processes it runs."""

from __future__ import annotations

import contextlib
import os


def notify_ready() -> None:
    """Tell pm2 (`wait_ready`) that this process serves; without pm2 it does nothing.

    A JSON line on the descriptor NODE_CHANNEL_FD, as node's child_process expects from a child.
    """
    fd = os.environ.get("NODE_CHANNEL_FD")
    if fd is not None and "pm_id" in os.environ:
        with contextlib.suppress(OSError, ValueError):
            os.write(int(fd), b'"ready"\n')
