"""Unfinished messages: libzmq keeps the frames of a message until the last one, without a limit.

It does not say who sends them either. So while the process has more memory than it should, those
connections to the ingress port end that have sent something but no whole message in the last
second. An honest one among them connects anew and sends again what was not acknowledged.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
import struct
from collections.abc import Callable

import psutil
import zmq

log = logging.getLogger(__name__)

MAX_MEMORY_BYTES = 512 << 20
MIN_SENT_BYTES = 16 << 10
"""Below that a connection is let be: libzmq needs 64 bytes for a frame that had 3 on the wire."""

_RECEIVED = slice(128, 136)
"""Of Linux's tcp_info: tcpi_bytes_received."""

_RESET = struct.pack("ii", 1, 0)
"""As SO_LINGER: on, and for no time."""


class UnfinishedMessages:
    """Owns nothing: the connections are libzmq's, and are ended by `shutdown` of their sockets.

    `memory_bytes` says how much the process has. Those of a Unix socket are let be: only users
    who may open its file have one.
    """

    def __init__(self, url: str, memory_bytes: Callable[[], int]) -> None:
        self._port = int(url.rpartition(":")[2]) if url.startswith("tcp:") else None
        self._memory_bytes = memory_bytes
        self._heard: set[int] = set()
        self._ended = False

    def heard(self, frame: zmq.Frame) -> None:
        """A whole message came, with this frame."""
        with contextlib.suppress(zmq.ZMQError):  # ZMTP before 3.0: libzmq does not say
            self._heard.add(int(frame.get(zmq.SRCFD)))

    def look(self) -> None:
        """To be called each second."""
        if self._ended:
            self._ended = False
            with contextlib.suppress(AttributeError):  # glibc keeps what was freed, others do not
                ctypes.CDLL(None).malloc_trim(0)
        if (memory_bytes := self._memory_bytes()) > MAX_MEMORY_BYTES:
            with contextlib.suppress(OSError, psutil.Error):  # no descriptor is free, or no right
                self._end_silent(memory_bytes)
        self._heard.clear()

    def _end_silent(self, memory_bytes: int) -> None:
        for connection in psutil.Process().net_connections("tcp"):
            is_open = connection.status == psutil.CONN_ESTABLISHED
            if not is_open or connection.laddr.port != self._port or connection.fd in self._heard:
                continue
            with (
                contextlib.suppress(OSError),
                socket.fromfd(connection.fd, connection.family, connection.type) as peer,
            ):
                info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.stop)
                received = int.from_bytes(info[_RECEIVED], "little")
                if received >= MIN_SENT_BYTES:
                    # Closed without a reset, a sender that fills the window hears nothing of it.
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    peer.shutdown(socket.SHUT_RDWR)
                    self._ended = True
                    log.warning(
                        "ended the connection from %s:%d, which has sent %d bytes and no whole"
                        " message in the last second: the bus has %d MB of memory, and more than"
                        " %d is too much",
                        *connection.raddr,
                        received,
                        memory_bytes >> 20,
                        MAX_MEMORY_BYTES >> 20,
                    )
