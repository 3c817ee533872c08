"""The broker: one thread, one loop, one owner of every socket.

A turn of the loop drains what has arrived, validates it, commits it to the journal once, and
only then publishes and acknowledges it. Under load the groups grow by themselves.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from event_bus import ports, protocol
from event_bus.adopt import SpoolAdopter
from event_bus.allow_list import UNLIMITED, Rights
from event_bus.consumers import Consumers
from event_bus.errors import JournalDamaged, JournalError, JournalFull
from event_bus.event_schema import Registry
from event_bus.fetches import Fetches
from event_bus.housekeeping import Housekeeping
from event_bus.intake import Intake, Receipt
from event_bus.live import LiveEvents
from event_bus.lock import FileLock
from event_bus.recovery import mark_damaged, open_journal
from event_bus.replies import Replies
from event_bus.settings import Settings
from event_bus.status import BrokerStatus
from event_bus.unfinished import UnfinishedMessages
from event_bus.watchdog import Watchdog
from event_bus.zap import Zap, key_of

log = logging.getLogger(__name__)

DRAIN_S = 5.0
MAX_GROUP_BYTES = 1 << 20
MAX_GROUP_MESSAGES = 512
MAX_REQUEST_ID_BYTES = 64

_encode = msgspec.json.Encoder().encode


class Broker:
    """Binds both ports and takes the home's lock; `run` serves until `stop`.

    Raises StartError, SettingsError or JournalError before anything is served. `clock` gives Unix
    seconds, `monotonic` the seconds that deadlines are counted in.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._clock = clock
        self._monotonic = monotonic
        settings.make_home()
        allowed = ports.allow_list(settings)
        self._lock = FileLock(settings.home / "bus.lock", "an event bus", and_directory=True)
        self.registry = Registry(settings.schemas)
        self.registry.verify()
        for problem in self.registry.problems:
            log.error("left out: %s", problem)
        self.journal = open_journal(
            settings.journal, settings.db, clock, backup_dir=settings.backup_dir
        )
        self.intake = Intake(self.journal, self.registry, clock)
        self._adopter = SpoolAdopter(settings.spool)
        self._consumers = Consumers(self.journal)
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 65_000)
        self._zap = None if allowed is None else Zap(self._context, allowed, monotonic)
        directory = None if allowed is None else settings.keys
        self._ingress, self._events = (
            ports.listen(self._context, kind, getattr(settings, name), name, directory)
            for kind, name in ((zmq.ROUTER, "ingress_url"), (zmq.XPUB, "events_url"))
        )
        self.ingress_url = self._ingress.getsockopt_string(zmq.LAST_ENDPOINT)
        self.events_url = self._events.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_receive, self._wake_send = socket.socketpair()
        self._wake_send.setblocking(False)
        self._poller = zmq.Poller()
        for source in (self._ingress, self._events, self._wake_receive):
            self._poller.register(source, zmq.POLLIN)
        if self._zap is not None:
            self._poller.register(self._zap.socket, zmq.POLLIN)
        self._watchdog = Watchdog("the event bus")
        self._stopping = False
        self._live = LiveEvents(self._events, self.registry, self._zap, monotonic)
        self._receipts: list[tuple[list[bytes], Receipt]] = []
        self._status = BrokerStatus(self.intake, self._consumers, clock=clock, monotonic=monotonic)
        self._unfinished = UnfinishedMessages(self.ingress_url, self._status.memory_bytes)
        self._housekeeping = Housekeeping(
            settings,
            self.intake,
            self._consumers,
            self._status,
            self._live,
            self._adopter,
            self._watchdog,
            self._lock,
            self._unfinished,
            clock=clock,
            monotonic=monotonic,
        )
        self._replies = Replies(self._ingress, self._zap)
        self._fetches = Fetches(
            self.journal,
            self.registry,
            self._consumers,
            self._replies,
            self._zap,
            self._housekeeping.found_damaged,
            clock=clock,
            monotonic=monotonic,
        )

    def stop(self) -> None:
        """Make `run` return after its turn; may be called from a signal handler or any thread."""
        self._stopping = True
        with contextlib.suppress(OSError):  # awake already, or closed
            self._wake_send.send(b"\0")

    def run(self) -> None:
        """Serve until `stop`. Raises JournalError when the journal cannot be trusted any more."""
        try:
            with self._watchdog:
                self._serve()
        except JournalDamaged as e:
            mark_damaged(self.settings.journal, str(e.args[0]))
            raise
        finally:
            self.close()

    def _serve(self) -> None:
        while not self._stopping:
            self._turn()
        end = self._monotonic() + DRAIN_S
        while self._ingress.poll(0) and self._monotonic() < end:
            self._turn()  # what has arrived by now is still taken in and acknowledged

    def close(self) -> None:
        """Release sockets, journal and lock, in this order; a second call does nothing."""
        if not self._context.closed:
            self._context.destroy(linger=500)
            self._wake_receive.close()
            self._wake_send.close()
            self.journal.close()
            self._lock.close()

    def _turn(self) -> None:
        ready = dict(self._poller.poll(self._timeout_ms()))
        if self._wake_receive.fileno() in ready:
            self._wake_receive.recv(4096)
        if self._zap is not None and self._zap.socket in ready:
            self._zap.answer()
        if self._events in ready:
            self._live.take_subscriptions()
        try:
            if self._ingress in ready:
                self._drain()
            if self.intake.pending_bytes < MAX_GROUP_BYTES and (chunk := self._adopter.read()):
                self.intake.take(chunk)
            self._housekeeping.run_due()
            self.intake.commit()
        except JournalError as e:
            self._refuse_group(e)
        else:
            self._adopter.done()
            if self.intake.committed:
                self._housekeeping.probe_storage()
        for committed in self.intake.committed:
            self._live.publish(committed)
        self.intake.committed.clear()
        for route, receipt in self._receipts:
            self._replies.send(route, protocol.ACK, _encode(receipt))
        self._receipts.clear()
        self._fetches.serve_waiting()

    def _timeout_ms(self) -> int:
        if self._stopping or (self._adopter.pending and self._status.storage_full_since is None):
            return 0
        due = min(self._housekeeping.due, self._fetches.due)
        return max(0, int((due - self._monotonic()) * 1000) + 1)

    # Requests

    def _drain(self) -> None:
        for _ in range(MAX_GROUP_MESSAGES):
            try:
                peer = self._ingress.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            frame = self._ingress.recv(copy=False)  # it knows where it came from
            rest = self._ingress.recv_multipart() if frame.more else []
            frames = [peer, frame.bytes, *rest]
            self._unfinished.heard(frame)
            rights: Rights | None = UNLIMITED
            key = ""
            if self._zap is not None:
                key = key_of(frame)
                rights = self._zap.rights(key)
            # A REQ socket puts an empty frame first and wants it back.
            at = 2 if len(frames) > 2 and not frames[1] else 1
            verb, request_id, *arguments = [*frames[at:], b"", b""][: max(2, len(frames) - at)]
            route = [*frames[:at], request_id[:MAX_REQUEST_ID_BYTES]]
            if len(request_id) > MAX_REQUEST_ID_BYTES:
                self._replies.fail(
                    route,
                    "bad_request",
                    f"a request id has up to {MAX_REQUEST_ID_BYTES} bytes, not {len(request_id)}",
                )
            elif rights is None:
                reason = "this key is not allowed any more"
                self._replies.forbid(route, key, reason, publishes=verb == protocol.PUBLISH)
            elif verb == protocol.PUBLISH and not rights.publish:
                reason = f"the key {rights.name} may publish nothing"
                self._replies.forbid(route, key, reason, publishes=True)
            elif verb == protocol.PUBLISH and arguments:
                self._take(route, arguments, rights)
            elif verb == protocol.FETCH and arguments:
                self._fetches.take(route, arguments[0], key, rights)
            elif verb in (protocol.STATUS, protocol.FORGET) and not rights.reads_all:
                self._replies.forbid(route, key, f"{verb.decode()} needs the right to read all")
            elif verb == protocol.STATUS:
                self._replies.send(route, protocol.STATUS, _encode(self.status()))
            elif verb == protocol.FORGET and arguments:
                self._forget(route, arguments[0])
            else:
                self._replies.fail(
                    route,
                    "bad_request",
                    "expected [verb, request id, body] with publish, fetch, status or forget,"
                    f" got {verb[:20]!r} and {len(arguments)} frames after the request id",
                )
            if self.intake.pending_bytes >= MAX_GROUP_BYTES:
                return

    def _take(self, route: list[bytes], arguments: list[bytes], rights: Rights) -> None:
        reason = self.intake.out_of_turn(arguments[0])
        if reason is not None:
            self._replies.fail(route, "storage_full", reason)
            return
        report = arguments[1].decode("utf-8", "replace") if len(arguments) > 1 else None
        receipt = Receipt()
        self._receipts.append((route, receipt))
        taken = self.intake.take(arguments[0], report, None if rights.publishes_all else rights)
        self._receipts[-1] = (route, taken)

    def _forget(self, route: list[bytes], name: bytes) -> None:
        """A durable consumer will not come back: the journal is not kept for it any more."""
        consumer = name.decode("utf-8", "replace")
        known = self._consumers.get(consumer)
        reply = {
            "consumer": consumer,
            "known": known is not None,
            "lag": self._consumers.lag(known) if known else 0,
        }
        self._consumers.forget(consumer)
        self._replies.send(route, protocol.FORGOTTEN, _encode(reply))

    def _refuse_group(self, error: JournalError) -> None:
        """Nothing of the group is on disk: tell its senders, and go on only if the disk is full."""
        self._adopter.rewind()
        self.intake.forget()
        full = isinstance(error, JournalFull)
        for route, _ in self._receipts:
            self._replies.fail(route, "storage_full" if full else "storage_failed", str(error))
        self._receipts.clear()
        if not full:
            raise error
        self._housekeeping.storage_is_full(str(error))

    def status(self) -> dict[str, Any]:
        """The answer to a status request; docs/protocol.md lists the fields."""
        door = self._zap.door if self._zap is not None else None
        return {
            **self._status.answer(),
            "home": str(self.settings.home),
            "events_url": self.events_url,
            "ingress_url": self.ingress_url,
            "subscriptions": self._live.subscriptions,
            "forbidden": dict(door.forbidden) if door is not None else {},
            "publish_forbidden": dict(door.publish_forbidden) if door is not None else {},
        }
