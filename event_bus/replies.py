"""How the broker answers a request."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from event_bus import protocol
from event_bus.protocol import ErrorReply
from event_bus.zap import Zap

_encode = msgspec.json.Encoder().encode


class Replies:
    """Sends answers by the ingress socket, which it does not own. A route is what came before the
    verb of the request, and then its id."""

    def __init__(self, socket: zmq.Socket[Any], zap: Zap | None) -> None:
        self._socket = socket
        self._zap = zap

    def send(self, route: list[bytes], verb: bytes, *frames: bytes) -> None:
        """Never waits."""
        *peer, request_id = route
        # What a peer that does not read leaves beyond the high-water mark is dropped.
        self._socket.send_multipart([*peer, verb, request_id, *frames], zmq.NOBLOCK)

    def fail(
        self, route: list[bytes], code: str, message: str, first_seq: int | None = None
    ) -> None:
        """Answer with an error; docs/protocol.md lists the codes. `first_seq` is where to go on."""
        error = ErrorReply(code=code, message=message, first_seq=first_seq)
        self.send(route, protocol.ERROR, _encode(error))

    def forbid(
        self, route: list[bytes], key: str, message: str, *, publishes: bool = False
    ) -> None:
        """Answer that a key lacks a right, and have it counted; `publishes` if its events wait."""
        if self._zap is not None:
            self._zap.door.forbid(key, message, publishes=publishes)
        self.fail(route, "forbidden", message)
