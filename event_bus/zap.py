"""ZAP (https://rfc.zeromq.org/spec/27/): libzmq asks here whether a key may connect."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85

from event_bus.allow_list import AllowList, Rights

log = logging.getLogger(__name__)

ENDPOINT = "inproc://zeromq.zap.01"
EVENTS = "events"
INGRESS = "ingress"
LOG_INTERVAL_S = 60.0
KEEP_OUT_S = 60.0
MAX_REMEMBERED = 1_000


class Door:
    """Decides who may connect, from the allow-list. No sockets. `monotonic` gives seconds."""

    def __init__(self, allowed: AllowList, monotonic: Callable[[], float]) -> None:
        self.allowed = allowed
        self.refused = 0
        # Requests without the right to them, by the key's name, or by the key if it has none now.
        self.forbidden: Counter[str] = Counter()
        self.publish_forbidden: Counter[str] = Counter()
        """Those of them that wanted to publish: the events wait with their senders."""
        self._monotonic = monotonic
        self._logged: dict[str, float] = {}
        self._kept_out: dict[str, float] = {}

    def answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to a ZAP request: its user id is the key, so that rights can change later."""
        version, request_id, domain, address, _, mechanism, *credentials = request
        key = ""
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            key = z85.encode(credentials[0]).decode()
        rights = self.allowed[key]
        kept_out = domain == EVENTS.encode() and self._is_kept_out(key)
        if rights is not None and not kept_out:
            return [version, request_id, b"200", b"OK", key.encode(), b""]
        self.refused += 1
        where = address.decode("ascii", "backslashreplace")
        if not kept_out and self._is_news(where):
            log.warning(
                "refused a connection from %s: its key %s is not in %s"
                " (`bitten keys allow NAME 'KEY' …` lets it in)",
                where,
                key or "is missing",
                self.allowed.path,
            )
        return [version, request_id, b"400", b"this key is not allowed here", b"", b""]

    def keep_out(self, key: str) -> None:
        """Refuse this key on the events port for a minute."""
        if len(self._kept_out) >= MAX_REMEMBERED:
            self._kept_out.clear()
        self._kept_out[key] = self._monotonic() + KEEP_OUT_S

    def _is_kept_out(self, key: str) -> bool:
        return self._monotonic() < self._kept_out.get(key, 0.0)

    def forbid(self, key: str, reason: str, *, publishes: bool) -> None:
        """Count a request that a connected key has no right to, and log it once a minute."""
        rights = self.allowed[key]
        name = rights.name if rights is not None else key
        self.forbidden[name] += 1
        if publishes:
            self.publish_forbidden[name] += 1
        if self._is_news(key):
            log.warning("refused a request of %s: %s", name, reason)

    def _is_news(self, subject: str) -> bool:
        """True once in LOG_INTERVAL_S for each subject."""
        now = self._monotonic()
        if now - self._logged.get(subject, now - LOG_INTERVAL_S) < LOG_INTERVAL_S:
            return False
        if len(self._logged) >= MAX_REMEMBERED:
            self._logged.clear()
        self._logged[subject] = now
        return True


class Zap:
    """The socket that libzmq asks, for all sockets of one context."""

    def __init__(
        self, context: zmq.Context[Any], allowed: AllowList, monotonic: Callable[[], float]
    ) -> None:
        self.door = Door(allowed, monotonic)
        self.socket: zmq.Socket[Any] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ENDPOINT)

    @property
    def problem(self) -> str:
        return self.door.allowed.problem

    def answer(self) -> None:
        """Answer what libzmq asks now, by the list as it is now."""
        self.refresh()
        while self.socket.poll(0):
            self.socket.send_multipart(self.door.answer(self.socket.recv_multipart()))

    def refresh(self) -> None:
        """Look at the allow-list again."""
        before = self.problem
        self.door.allowed.refresh()
        if self.problem and self.problem != before:
            log.error("%s; the last good one stays in force", self.problem)

    def rights(self, key: str) -> Rights | None:
        """What a connected key may do now; None if it is no longer allowed."""
        return self.door.allowed[key]


def key_of(frame: zmq.Frame) -> str:
    """The public key that a received frame came with; empty if it came with none."""
    try:
        key = frame.get("User-Id")
    except zmq.ZMQError:
        return ""
    return key if isinstance(key, str) else ""
