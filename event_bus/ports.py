"""The bus's two ports: where they may be, what they take from strangers, who holds them."""

from __future__ import annotations

import logging
import resource
from pathlib import Path
from typing import Any

import psutil
import zmq

from event_bus import keys, protocol
from event_bus.allow_list import FILE, AllowList
from event_bus.errors import KeysError, StartError
from event_bus.settings import Settings
from event_bus.zap import EVENTS, INGRESS

log = logging.getLogger(__name__)

SUBSCRIBER_HIGH_WATER_MARK = 20_000
MAX_UNREAD_REPLIES = 64
"""Replies kept for a client that does not read them; with their size, a bound in bytes."""

MAX_UNREAD_REQUESTS = 64
"""Requests of one connection that are read ahead of the bus; the rest waits in its sender."""

MAX_SUBSCRIPTION_BYTES = 2_048
"""Longest message that the events port takes: a topic has at most 1,092 bytes."""

MAX_UNREAD_SUBSCRIPTIONS = 100
HANDSHAKE_MS = 5_000
PROBE_MS = 1_000
PROBE_TIMEOUT_MS = 3_500
"""A peer that hangs is cut after at most the sum of both."""

BACKLOG = 1_024


def allow_list(settings: Settings) -> AllowList | None:
    """Who may connect to a bus with these settings; None if it has no keys. Changes nothing.

    Raises KeysError if a key or the list cannot be used, StartError if other machines could reach
    a bus without keys.
    """
    if keys.has_bus_key(settings.keys):
        keys.bus_secret(settings.keys)
        return AllowList(settings.keys / FILE)
    for name in ("events_url", "ingress_url"):
        url = getattr(settings, name)
        if not keys.is_loopback(url):
            raise StartError(
                f"{name} is {url}, which other machines can reach, and there is no key for the bus"
                f" in {settings.keys}: whoever reaches it could read and publish everything",
                hint="run `bitten keys new`, and `bitten keys allow NAME …` for others; or listen"
                " on 127.0.0.1",
            )
    return None


def listen(
    context: zmq.Context[Any], kind: int, url: str, setting: str, directory: Path | None
) -> zmq.Socket[Any]:
    """A socket bound to `url`; with keys if `directory`, where they are, is given.

    Raises StartError if the port is not to be had, KeysError if the key is not.
    """
    sock: zmq.Socket[Any] = context.socket(kind)
    try:
        sock.linger = 500
        sock.handshake_ivl = HANDSHAKE_MS
        sock.heartbeat_ivl = PROBE_MS
        sock.heartbeat_timeout = PROBE_TIMEOUT_MS
        sock.backlog = BACKLOG
        if kind == zmq.XPUB:
            sock.sndhwm = SUBSCRIBER_HIGH_WATER_MARK
            sock.rcvhwm = MAX_UNREAD_SUBSCRIPTIONS
            sock.maxmsgsize = MAX_SUBSCRIPTION_BYTES
        else:
            sock.maxmsgsize = protocol.MAX_MESSAGE_BYTES
            sock.sndhwm = MAX_UNREAD_REPLIES
            sock.rcvhwm = MAX_UNREAD_REQUESTS
        if directory is not None:
            keys.use_bus_key(sock, directory, EVENTS if kind == zmq.XPUB else INGRESS)
            if kind == zmq.XPUB:
                sock.setsockopt(zmq.XPUB_MANUAL, 1)
        sock.bind(url)
    except KeysError:
        sock.close()
        raise
    except zmq.ZMQError as e:
        sock.close()
        raise StartError(
            f"cannot listen on {url}: {e.strerror}{_port_owner(url)}",
            hint=f"stop what listens there or set BITTEN_{setting.upper()}",
        ) from e
    return sock


def raise_descriptor_limit() -> int:
    """As many connections as the system lets this process have; the limit of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _port_owner(url: str) -> str:
    """Which process holds the port, as far as this user may see it; empty if none does."""
    port = url.rpartition(":")[2]
    for connection in psutil.net_connections("tcp"):
        address: Any = connection.laddr
        if connection.status == psutil.CONN_LISTEN and str(address.port) == port:
            if connection.pid is None:
                return f": port {port} is held by another user's process"
            try:
                name = psutil.Process(connection.pid).name()
            except psutil.Error:  # it has just ended
                name = "gone by now"
            return f": port {port} is held by process {connection.pid} ({name})"
    return ""
