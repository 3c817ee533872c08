"""Faults that a drill plants into a daemon's own process, by replacing parts of the product.

Loaded by inject/sitecustomize.py, before the daemon's first line. Each function here is a fault;
its name (with `-` for `_`) is what DRILL_FAULT says.
"""

from __future__ import annotations

import atexit
import os
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
    """The collector leaves out one event of its third write."""
    if _program() != "collect":
        return
    from collector.store import Store

    write = Store._write_events
    writes = [0]

    def forgetful(self: Any, first_seq: int, events: list[Any]) -> None:
        writes[0] += 1
        write(self, first_seq, events)
        if writes[0] == 3:
            self._db.execute("DELETE FROM _event WHERE seq = ?", (first_seq,))

    Store._write_events = forgetful  # type: ignore[method-assign]


def ack_what_is_refused(_: str) -> None:
    """The broker answers a group that it could not write as if it had."""
    if _program() != "bus":
        return
    from event_bus import protocol
    from event_bus.replies import Replies

    fail = Replies.fail

    def lying(self: Any, route: list[bytes], code: str, *rest: Any) -> None:
        if code.startswith("storage_"):
            receipt = b'{"accepted":1,"duplicates":0,"rejected":0,"conflicts":0,"refusals":[]}'
            self.send(route, protocol.ACK, receipt)
        else:
            fail(self, route, code, *rest)

    Replies.fail = lying  # type: ignore[method-assign]


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


def never_red(_: str) -> None:
    """The bus finds nothing wrong, whatever it is."""
    from event_bus import health

    health.find_problems = lambda _: []


def files_unwatched(_: str) -> None:
    """Bus and collector do not look whether their files are still there."""
    if _program() == "bus":
        from event_bus.journal_file import JournalFile

        JournalFile.is_in_place = lambda _: True  # type: ignore[method-assign]
    if _program() == "collect":
        from collector.store import Store

        Store.check_file = lambda _: None  # type: ignore[method-assign]


def corrupt_deleted(_: str) -> None:
    """What would be put aside as damaged is deleted."""
    rename = Path.rename

    def deleting(self: Path, target: Any) -> Any:
        if ".corrupt-" not in str(target):
            return rename(self, target)
        self.unlink()
        return Path(target)

    Path.rename = deleting  # type: ignore[method-assign]


def wal_uncut(_: str) -> None:
    """The collector does not cut its write-ahead log."""
    if _program() != "collect":
        return
    from collector.store import Store

    init = Store.__init__

    def unlimited(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._db.execute("PRAGMA journal_size_limit=-1")

    Store.__init__ = unlimited  # type: ignore[method-assign]
    Store.shrink_wal = lambda _: False  # type: ignore[method-assign]


def leak(_: str) -> None:
    """The bus opens a file each second and does not close it."""
    if _program() != "bus":
        return
    from event_bus.status import BrokerStatus

    heartbeat = BrokerStatus.heartbeat

    def leaking(self: Any) -> Any:
        os.open(os.devnull, os.O_RDONLY)
        return heartbeat(self)

    BrokerStatus.heartbeat = leaking  # type: ignore[method-assign]


def descriptors_needed(_: str) -> None:
    """The bus cannot do without a free file descriptor."""
    if _program() != "bus":
        return
    from event_bus.status import BrokerStatus

    BrokerStatus._memory_bytes = (  # type: ignore[method-assign]
        lambda self: self._process.memory_info().rss
    )


def slow_exit(_: str) -> None:
    """The process takes three seconds to end."""
    atexit.register(time.sleep, 3)


def no_heartbeats(_: str) -> None:
    """The bus does not ask its peers whether they live."""
    from event_bus import ports

    ports.PROBE_MS = 0


def times_put_right(_: str) -> None:
    """The collector takes a timestamp that cannot be true for the time of receipt."""
    if _program() != "collect":
        return
    from collector.store import Store

    write = Store.write

    def mending(self: Any, batches: list[Any], journal_id: str) -> int:
        for batch in batches:
            for event in batch.events:
                if abs(event.timestamp - batch.received_at) >= 86_400:
                    event.timestamp = batch.received_at
        return write(self, batches, journal_id)

    Store.write = mending  # type: ignore[method-assign]


def unescaped(_: str) -> None:
    """Commands print what comes from others as it is."""
    import re

    from event_bus.cli import escape

    escape._CONTROL = re.compile(r"(?!)")


def raw_clock(_: str) -> None:
    """The bus trims by what the clock says, wherever it jumps."""
    if _program() != "bus":
        return
    from event_bus.housekeeping import Housekeeping

    Housekeeping._steady_now = lambda self: self._clock()  # type: ignore[method-assign]


def watch_acks(directory: str) -> None:
    """No fault: each acknowledgement that the bus hands out once strace has made a sync fail is a
    line in the file `acked-late`."""
    if _program() != "bus":
        return
    from event_bus import protocol
    from event_bus.replies import Replies

    log, late = Path(directory) / "bus.log", Path(directory) / "acked-late"
    reply = Replies.send

    def watching(self: Any, route: list[bytes], verb: bytes, *frames: bytes) -> None:
        if verb == protocol.ACK and b"(INJECTED)" in log.read_bytes():
            with late.open("a") as out:
                out.write("1\n")
        reply(self, route, verb, *frames)

    Replies.send = watching  # type: ignore[method-assign]


def sync_forgiven(_: str) -> None:
    """The bus does not mind the first commit that fails."""
    if _program() != "bus":
        return
    from event_bus.errors import JournalError
    from event_bus.intake import Intake

    commit = Intake.commit
    forgiven: list[Exception] = []

    def forgiving(self: Any) -> None:
        try:
            commit(self)
        except JournalError as e:
            if forgiven:
                raise
            forgiven.append(e)

    Intake.commit = forgiving  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[str], None]] = {
    "clock": clock,
    "never-red": never_red,
    "files-unwatched": files_unwatched,
    "corrupt-deleted": corrupt_deleted,
    "wal-uncut": wal_uncut,
    "leak": leak,
    "descriptors-needed": descriptors_needed,
    "slow-exit": slow_exit,
    "no-heartbeats": no_heartbeats,
    "times-put-right": times_put_right,
    "unescaped": unescaped,
    "raw-clock": raw_clock,
    "sync-forgiven": sync_forgiven,
    "watch-acks": watch_acks,
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
