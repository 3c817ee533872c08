"""The outbox: events of one process that wait for the broker, in memory and then in the spool."""

from __future__ import annotations

import threading
from collections import deque

from event_bus.errors import BittenError
from event_bus.last_loss import LastLoss
from event_bus.settings import Settings
from event_bus.spool import Spool


class Outbox:
    """Lines (without their newline) in the order of their numbers, oldest in the spool.

    `put` may be called from any thread holding `lock`; the rest belongs to the delivery thread,
    or to `Bridge.close` once that has ended. The lock may be taken again by the thread that holds
    it: a signal handler or a finalizer may emit an event in the middle of an emit.
    """

    def __init__(self, settings: Settings, token: str) -> None:
        self._settings = settings
        self._max_events = settings.outbox_max_events
        self._max_bytes = settings.outbox_max_bytes
        self.lock = threading.RLock()
        self.lines: deque[bytes] = deque()
        self.size_bytes = 0
        self.spool = Spool(settings.spool / f"{token}.ndjson", settings.spool_max_bytes)
        self.last_loss = LastLoss(settings.spool)

    def has_room(self, size: int) -> bool:
        return len(self.lines) < self._max_events and self.size_bytes + size <= self._max_bytes

    @property
    def crowded(self) -> bool:
        """Memory is more than half full."""
        return 2 * len(self.lines) > self._max_events or 2 * self.size_bytes > self._max_bytes

    def put(self, line: bytes) -> None:
        self.lines.append(line)
        self.size_bytes += len(line) + 1

    def take(self, max_events: int, max_bytes: int) -> list[bytes]:
        """The oldest lines in memory, past `max_bytes` by one line at the most."""
        taken: list[bytes] = []
        size = 0
        while self.lines and size < max_bytes and len(taken) < max_events:
            line = self.lines.popleft()
            taken.append(line)
            size += len(line) + 1
        with self.lock:
            self.size_bytes -= size
        return taken

    def put_back(self, lines: list[bytes]) -> None:
        with self.lock:
            self.lines.extendleft(reversed(lines))
            self.size_bytes += sum(map(len, lines)) + len(lines)

    def spill(self, max_events: int, max_bytes: int) -> str:
        """Move memory to the spool's end; why not all of it could be moved, or empty."""
        while self.lines:
            lines = self.take(max_events, max_bytes)
            problem = self.spool_lines(lines)
            if problem:
                self.put_back(lines)
                return problem
        return ""

    def spool_lines(self, lines: list[bytes], *, over_limit: bool = False) -> str:
        """Append to the spool; why that was not possible, or empty."""
        try:
            self._settings.make_home()
            body = b"\n".join(lines) + b"\n"
            return (
                "" if self.spool.append(body, len(lines), over_limit=over_limit) else "spool full"
            )
        except (OSError, BittenError) as e:
            return str(e)

    def release(self) -> None:
        """Let go of its files, leaving what they hold to the broker."""
        self.spool.release()
        self.last_loss.release()
