"""Faults that a drill plants into a daemon's own process, by replacing parts of the product.

Loaded by inject/sitecustomize.py, before the daemon's first line. Each function here is a fault;
its name (with `-` for `_`) is what DRILL_FAULT says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import killpoints


def arm(faults: str) -> None:
    """Several are separated by semicolons; what follows a colon is the fault's own."""
    for fault in faults.split(";"):
        name, _, argument = fault.partition(":")
        FAULTS[name](argument)


def _program() -> str:
    """`bus`, `collect`, `up` or the script's name: what this process is going to be."""
    return sys.orig_argv[-1]


def ack_before_fsync(_: str) -> None:
    """The broker acknowledges at once and commits twice a second."""
    if _program() != "bus":
        return
    from event_bus.intake import Intake

    commit = Intake.commit
    last = [0.0]

    def late(self: Any) -> None:
        if time.monotonic() - last[0] > 0.5:
            last[0] = time.monotonic()
            commit(self)

    Intake.commit = late  # type: ignore[method-assign]


def one_event_dropped(_: str) -> None:
    """The collector leaves out one event of its third batch."""
    if _program() != "collect":
        return
    from collector.store import Store

    write = Store._write_events
    batches = [0]

    def forgetful(self: Any, first_seq: int, received_at: float, events: list[Any]) -> None:
        batches[0] += 1
        write(self, first_seq, received_at, events)
        if batches[0] == 3:
            self._db.execute("DELETE FROM _event WHERE seq = ?", (first_seq,))

    Store._write_events = forgetful  # type: ignore[method-assign]


def ack_what_is_refused(_: str) -> None:
    """The broker answers a group that it could not write as if it had."""
    if _program() != "bus":
        return
    from event_bus import protocol
    from event_bus.broker import Broker

    fail = Broker._fail

    def lying(self: Any, route: list[bytes], code: str, *rest: Any) -> None:
        if code.startswith("storage_"):
            receipt = b'{"accepted":1,"duplicates":0,"rejected":0,"conflicts":0,"refusals":[]}'
            self._reply(route, protocol.ACK, receipt)
        else:
            fail(self, route, code, *rest)

    Broker._fail = lying  # type: ignore[method-assign]


def uncounted_drops(_: str) -> None:
    """Bridges forget every other drop."""
    from event_bus.bridge import Bridge

    Bridge.dropped = property(lambda self: (self.overflowed + self.lost) // 2)  # type: ignore[assignment,misc]


def no_checksums(_: str) -> None:
    """The journal takes every body for good."""
    import zlib

    crc32 = zlib.crc32

    class Alike(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    zlib.crc32 = lambda *a: Alike(crc32(*a))  # type: ignore[assignment]


def record(path: str) -> None:
    """No fault: what bus and collector do to their files is noted, for a power loss to undo."""
    if _program() in ("bus", "collect"):
        disk.arm(path)


def conflicts_unseen(_: str) -> None:
    """The bus does not look at the content of an id that it has seen."""
    if _program() != "bus":
        return
    from event_bus import envelope
    from event_bus.intake import Intake

    stored_line = Intake._stored_line

    def careless(self: Any, event: Any) -> bytes | None:
        return None if stored_line(self, event) is None else envelope.encode(event)

    Intake._stored_line = careless  # type: ignore[method-assign]


def clock(path: str) -> None:
    """The wall clock of bus and collector is off by the seconds that the file says."""
    if _program() not in ("bus", "collect"):
        return
    now = time.time
    time.time = lambda: now() + float(Path(path).read_text() or 0)


def refused_is_gone(_: str) -> None:
    """The bus keeps no account of what it refuses."""
    if _program() != "bus":
        return
    from event_bus.intake import Intake

    Intake._reject = lambda *_: None  # type: ignore[assignment,method-assign]


def any_size(_: str) -> None:
    """The bus sets no bound on the size of a frame."""
    if _program() != "bus":
        return
    from event_bus import protocol

    protocol.MAX_MESSAGE_BYTES = -1


FAULTS: dict[str, Callable[[str], None]] = {
    "clock": clock,
    "any-size": any_size,
    "record": record,
    "refused-is-gone": refused_is_gone,
    "kill": killpoints.arm,
    "ack-what-is-refused": ack_what_is_refused,
    "no-checksums": no_checksums,
    "uncounted-drops": uncounted_drops,
    "ack-before-fsync": ack_before_fsync,
    "conflicts-unseen": conflicts_unseen,
    "one-event-dropped": one_event_dropped,
}
