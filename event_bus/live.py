"""Live events: the XPUB socket of port 5570 and who subscribed to what."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.event_schema import TOPIC_PREFIX, Registry
from event_bus.intake import Committed

MAX_KNOWN_TOPICS = 10_000

_encode = msgspec.json.Encoder().encode


class LiveEvents:
    """Sends committed events to the subscribers of their topics. Owns no socket, uses one."""

    def __init__(self, socket: zmq.Socket[Any], registry: Registry) -> None:
        self._socket = socket
        self._registry = registry
        self._prefixes: set[bytes] = set()
        self._wanted: dict[str, bool] = {}

    @property
    def subscriptions(self) -> list[str]:
        return sorted(p.decode("utf-8", "replace") for p in self._prefixes)

    def take_subscriptions(self) -> None:
        while True:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if message[:1] == b"\1":
                self._prefixes.add(message[1:])
            elif message[:1] == b"\0":
                self._prefixes.discard(message[1:])
        self._wanted.clear()

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
        self._socket.send_multipart([f"{TOPIC_PREFIX}heartbeat".encode(), envelope.encode(event)])

    def _is_wanted(self, topic: str) -> bool:
        wanted = self._wanted.get(topic)
        if wanted is None:
            encoded = topic.encode()
            wanted = any(encoded.startswith(p) for p in self._prefixes)
            if len(self._wanted) > MAX_KNOWN_TOPICS:
                self._wanted.clear()
            self._wanted[topic] = wanted
        return wanted
