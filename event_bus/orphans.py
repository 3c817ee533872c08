"""Orphans: a bridge sends what dead processes of its home left in the spool.

The bus does so in its own home; on another machine nobody else would. One small batch is on its
way at a time, and only while the process has nothing of its own to send.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import zmq

from event_bus import protocol
from event_bus.adopt import SpoolAdopter

BATCH_BYTES = 64 << 10
"""An event of the process's own that comes meanwhile is not held up by more."""

ACK_TIMEOUT_S = 2.0
LOOK_S = 5.0
PREFIX = b"orphan-"
"""Of the request ids, which the bridge's own batches share the connection with."""


class Orphans:
    """`due` is when to look again; `none_left` is set while no file is known that waits for us.

    A file is let go of when anything goes wrong, and begun again from its start: the bus
    recognises what it has. Not safe for two threads.
    """

    def __init__(self, directory: Path, none_left: threading.Event) -> None:
        self._adopter = SpoolAdopter(directory, BATCH_BYTES)
        self._none_left = none_left
        self._requests = 0
        self._request_id = self._answer = b""
        self._sent_at = 0.0
        self.due = 0.0

    @property
    def on_the_way(self) -> bool:
        return bool(self._request_id)

    def proceed(self, socket: zmq.Socket[Any]) -> None:
        """Look if it is time, and send the next batch of what was found. Raises OSError."""
        now = time.monotonic()
        if self._request_id:
            if self._answer == protocol.ACK:
                self._request_id = self._answer = b""
                self._adopter.done()
            else:
                if self._answer or now - self._sent_at > ACK_TIMEOUT_S:
                    self.let_go()
                return
        if not self._adopter.pending:
            if now < self.due:
                return
            self.due = now + LOOK_S
            self._adopter.look()
        body = self._adopter.read()
        if not body:
            self._none_left.set()
            return
        self._none_left.clear()
        self._requests += 1
        self._request_id = b"%b%d" % (PREFIX, self._requests)
        self._sent_at = now
        try:
            socket.send_multipart([protocol.PUBLISH, self._request_id, body], zmq.NOBLOCK)
        except zmq.Again:
            self.let_go()

    def answered(self, verb: bytes, request_id: bytes) -> None:
        """The bus has answered; `proceed` acts on it."""
        if request_id == self._request_id:
            self._answer = verb

    def look_at_once(self) -> None:
        self.due = 0.0

    def let_go(self) -> None:
        """Leave the file to whoever looks next, which may be us."""
        self._request_id = self._answer = b""
        self._adopter.release()
        self.due = time.monotonic() + LOOK_S
