"""Live events: the XPUB socket of port 5570 and who subscribed to what.

With keys the socket is in libzmq's manual mode: nothing is subscribed but what is granted here.
libzmq can neither end one connection nor take back a grant later. So where somebody has more than
he may, the port is closed and opened again: everybody connects anew within a second, is granted
what he may have then, and sees by `seq` what he missed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from event_bus import envelope
from event_bus.allow_list import ALWAYS_READABLE, Rights
from event_bus.envelope import Envelope
from event_bus.event_schema import TOPIC_PREFIX, Registry
from event_bus.intake import Committed
from event_bus.zap import Zap, key_of

log = logging.getLogger(__name__)

MAX_KNOWN_TOPICS = 10_000
MAX_SUBSCRIPTIONS = 10_000
"""Different ones at a time. libzmq needs 1.4 KB for one of 24 bytes."""

MAX_SUBSCRIPTIONS_BYTES = 1 << 20
MAX_NARROWED = 500
"""Different ones of a key that may not read everything, those included that it ended: each is
compared with all topics, and what was granted for it stays until the connection ends."""

MAX_SEEN_TOPICS = 2_000
MAX_MESSAGES_A_TURN = 1_000
FLOOD_PAUSE_S = 5.0
_WILDCARD = "*?["

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class _Granted:
    """To one key. The sets stay empty if it reads everything."""

    rights: Rights
    asked: set[bytes] = field(default_factory=set)
    grants: set[bytes] = field(default_factory=set)


class LiveEvents:
    """Sends committed events to the subscribers of their topics. Owns no socket, uses one."""

    def __init__(
        self,
        socket: zmq.Socket[Any],
        registry: Registry,
        zap: Zap | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket = socket
        self._registry = registry
        self._zap = zap
        self._monotonic = monotonic
        self._endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._closed = False
        self._open_at = 0.0
        self._topics: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        # Each prefix's subscriptions, by key; the key is empty on a bus without keys.
        self._prefixes: dict[bytes, Counter[str]] = {}
        self._prefix_bytes = 0
        self._wanted: dict[str, bool] = {}
        self._granted: dict[str, _Granted] = {}

    @property
    def subscriptions(self) -> list[str]:
        return sorted(p.decode("utf-8", "replace") for p in self._prefixes)

    def take_subscriptions(self) -> None:
        for _ in range(MAX_MESSAGES_A_TURN):
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            message, prefix = frame.bytes, frame.bytes[1:]
            key = key_of(frame) if self._zap is not None else ""
            if message[:1] == b"\1":
                if prefix not in self._prefixes:
                    self._prefixes[prefix] = Counter()
                    self._prefix_bytes += len(prefix)
                self._prefixes[prefix][key] += 1
                if self._zap is not None:
                    self._grant(self._zap, key, prefix)
                self._end_flood()
            elif message[:1] == b"\0":
                self._count_off(prefix, key)
                rights = self._zap.rights(key) if self._zap is not None else None
                if rights is not None and rights.reads_all:
                    self._socket.unsubscribe(prefix)
            elif self._zap is not None:
                # libzmq 4.3.5 now takes each subscription that waits for the next one's sender's.
                self._zap.door.keep_out(key)
                self.disconnect(f"{self._name(key)} sent what is no subscription")
        self._wanted.clear()

    def _count_off(self, prefix: bytes, key: str) -> None:
        keys = self._prefixes.get(prefix)
        if keys is None:
            return
        if key not in keys:  # a connection ended: libzmq does not say whose
            key = next(iter(keys))
        keys[key] -= 1
        if not keys[key]:
            del keys[key]
        if not keys:
            del self._prefixes[prefix]
            self._prefix_bytes -= len(prefix)

    def _grant(self, zap: Zap, key: str, prefix: bytes) -> None:
        """Subscribe the sender of the message just received to what it may have of `prefix`.

        That stays until its connection ends, for another subscription of it may need the same;
        its own end filters by what it asked for.
        """
        rights = zap.rights(key)
        if rights is None:
            return
        granted = self._granted.setdefault(key, _Granted(rights))
        grants = {prefix}
        if not rights.reads_all:
            granted.asked.add(prefix)
            if len(granted.asked) > MAX_NARROWED:
                zap.door.keep_out(key)
                self.disconnect(f"{rights.name} has more than {MAX_NARROWED} subscriptions")
                return
            grants = narrow(prefix, rights, self._known_topics())
            granted.grants.update(grants)
            if not grants:
                log.warning(
                    "%s subscribed to %r, but may read nothing of it live (%s)",
                    rights.name,
                    prefix.decode("utf-8", "backslashreplace"),
                    ", ".join(rights.subscribe) or "no right to subscribe",
                )
        for grant in grants:
            self._socket.subscribe(grant)

    def _known_topics(self) -> set[str]:
        return self._topics | set(self._registry.types)

    def _end_flood(self) -> None:
        """There is no telling libzmq to forget: if it is too much, everybody has to go."""
        count, size = len(self._prefixes), self._prefix_bytes
        if count <= MAX_SUBSCRIPTIONS and size <= MAX_SUBSCRIPTIONS_BYTES:
            return
        reason = f"{count} different subscriptions of {size} bytes are over the limit"
        if self._zap is None:
            self.disconnect(reason, pause_s=FLOOD_PAUSE_S)
            return
        sizes: Counter[str] = Counter()
        for prefix, keys in self._prefixes.items():
            sizes.update(dict.fromkeys(keys, len(prefix)))
        ((key, _),) = sizes.most_common(1)
        self._zap.door.keep_out(key)
        self.disconnect(f"{reason}, most of them from {self._name(key)}")

    def _name(self, key: str) -> str:
        rights = self._zap.rights(key) if self._zap is not None else None
        return rights.name if rights is not None else f"key {key}"

    def apply_rights(self) -> str:
        """Nobody keeps a subscription that he may not have any more; what is wrong with the
        allow-list, if anything is."""
        zap = self._zap
        if zap is None:
            return ""
        zap.refresh()
        for key, granted in self._granted.items():
            if zap.rights(key) != granted.rights:
                self.disconnect(f"the rights of {granted.rights.name} were changed")
                break
        return zap.problem

    def disconnect(self, reason: str, *, pause_s: float = 0.0) -> None:
        """End every connection to this port, and open it again after `pause_s`."""
        log.warning("live subscribers have to connect anew: %s", reason)
        with contextlib.suppress(zmq.ZMQError):  # not bound just now
            self._socket.unbind(self._endpoint)
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_SUBSCRIPTIONS):
                self._socket.recv(zmq.NOBLOCK)
        self._forget()
        self._closed = True
        self._open_at = self._monotonic() + pause_s
        self.reopen()

    def reopen(self) -> None:
        """Open the port if it is closed and its time has come; tried each second."""
        if not self._closed or self._monotonic() < self._open_at:
            return
        try:
            self._socket.bind(self._endpoint)
        except zmq.ZMQError as e:  # libzmq is still letting go of it
            log.info("cannot listen on %s yet: %s", self._endpoint, e.strerror)
        else:
            self._closed = False

    def publish(self, committed: Committed) -> None:
        if not self._prefixes:
            return
        send = self._socket.send_multipart
        received_at = b'"received_at":%s}' % _encode(committed.received_at)
        seq = committed.first_seq
        for body in committed.bodies:
            for line in body.split(b"\n")[:-1]:
                event = envelope.decode(line)
                topic = self._registry.types[event.event_type].topic(event.data)
                if self._is_wanted(topic):
                    send([topic.encode(), b'%s,"seq":%d,%s' % (line[:-1], seq, received_at)])
                seq += 1

    def publish_heartbeat(self, event: Envelope) -> None:
        self.reopen()
        self._socket.send_multipart([f"{TOPIC_PREFIX}heartbeat".encode(), envelope.encode(event)])

    def _is_wanted(self, topic: str) -> bool:
        wanted = self._wanted.get(topic)
        if wanted is None:
            encoded = topic.encode()
            if self._zap is not None:
                self._end_leak(topic, encoded)
            wanted = any(encoded.startswith(p) for p in self._prefixes)
            if len(self._wanted) > MAX_KNOWN_TOPICS:
                self._wanted.clear()
            self._wanted[topic] = wanted
        return wanted

    def _end_leak(self, topic: str, encoded: bytes) -> None:
        """A topic that is new here may begin like one that was granted, and not be allowed."""
        if len(self._topics) > MAX_SEEN_TOPICS:
            self._topics.clear()
        name = topic.removeprefix(TOPIC_PREFIX)
        self._topics.add(name)
        for granted in self._granted.values():
            has_it = any(encoded.startswith(g) for g in granted.grants)
            if has_it and not granted.rights.may_read(name):
                self.disconnect(f"{granted.rights.name} may not read the new topic {topic}")
                return


def narrow(prefix: bytes, rights: Rights, known: set[str]) -> set[bytes]:
    """The part of a subscription that a key may have, as prefixes to subscribe it to.

    `known` are event types and topics without `bitten.`. ZeroMQ compares prefixes, so
    `bitten.price` is not granted if `bitten.price_alert` exists and is not allowed; what comes
    after `bitten.price.` then may be.
    """
    forbidden = [(TOPIC_PREFIX + topic).encode() for topic in known if not rights.may_read(topic)]
    granted = set()
    for pattern in (*rights.subscribe, ALWAYS_READABLE):
        is_open = pattern.endswith("*")
        for stretch in _stretches(pattern, known):
            for allowed in stretch:
                if allowed.startswith(prefix):
                    part = allowed
                elif prefix.startswith(allowed) and (is_open or allowed[-1:] == b"."):
                    part = prefix
                else:
                    continue
                if not any(topic.startswith(part) for topic in forbidden):
                    granted.add(part)
                    break
    return granted


def _stretches(pattern: str, known: set[str]) -> list[tuple[bytes, ...]]:
    """For each topic or stretch of topics that a pattern allows: its prefixes, widest first."""
    wild = min((pattern.find(c) for c in _WILDCARD if c in pattern), default=-1)
    if wild == len(pattern) - 1 and pattern[wild] == "*":
        return [((TOPIC_PREFIX + pattern[:wild]).encode(),)]
    names = {pattern}
    if wild >= 0:
        only = Rights("", "", subscribe=(pattern,))
        names = {topic for topic in known if only.may_read(topic)}
    exact = [(TOPIC_PREFIX + name).encode() for name in names]
    return [(topic, topic + b".") for topic in exact]
