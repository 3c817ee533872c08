"""How a process whose whole work is to carry events treats its memory."""

from __future__ import annotations

import gc


def collect_rarely() -> None:
    """Have Python look for cycles of objects rarely. Events hold none, and to look for some took
    as long as to decode them (`scripts/bench`). For daemons: a host process decides for itself."""
    gc.freeze()
    gc.set_threshold(100_000)
