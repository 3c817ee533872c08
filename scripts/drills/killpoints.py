"""The instants at which a process of the drill kills itself, and how it gets there.

`POINTS` lists them by name. A fault `kill:<point>:<hit>:<file>` makes the process that comes to the
point for the <hit>th time remove <file> and die by SIGKILL; once <file> is gone, nobody else does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

_KEPT: list[apsw.VFS] = []

SMALL_CHECKPOINT_PAGES = 20
"""So that checkpoints come in seconds, not after 32 MB."""


@dataclass(frozen=True)
class Point:
    """`program` is `bus`, `collect` or `publisher.py`. `window` is the part of the work that it
    is in, `most` the highest hit that is worth waiting for. `needs` is what the drill prepares:
    `orphan` a spool file of a dead process, `away` a bus that comes later, `full` a spool so full
    that its space is given back, `new` files that are not there yet."""

    name: str
    program: str
    window: str
    arm: Callable[[Callable[[], None]], None]
    most: int = 20
    needs: str = ""


class Trigger:
    """Counts down; the last one kills."""

    def __init__(self, hit: int, once: Path) -> None:
        self._left = hit
        self._once = once

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0 and self._once.exists():
            self._once.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def arm(argument: str) -> None:
    name, hit, once = argument.split(":", 2)
    point = BY_NAME[name]
    if Path(sys.orig_argv[1] if point.program.endswith(".py") else sys.orig_argv[-1]).name == (
        point.program
    ):
        point.arm(Trigger(int(hit), Path(once)))


def _method(module: str, cls: str, method: str, when: str) -> Callable[[Any], None]:
    """Dies before or after a method."""

    def arm(trigger: Callable[[], None]) -> None:
        __import__(module)
        owner = getattr(sys.modules[module], cls)
        original = getattr(owner, method)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                trigger()
            result = original(*args, **kwargs)
            if when == "after":
                trigger()
            return result

        setattr(owner, method, replaced)

    return arm


def _reply(when: str) -> Callable[[Any], None]:
    """Dies before or after the broker hands an acknowledgement to its socket."""

    def arm(trigger: Callable[[], None]) -> None:
        from event_bus.replies import Replies

        original = Replies.send

        def replaced(self: Any, route: Any, verb: bytes, *frames: bytes) -> None:
            if verb == b"ack" and when == "before":
                trigger()
            original(self, route, verb, *frames)
            if verb == b"ack" and when == "after":
                trigger()

        Replies.send = replaced  # type: ignore[method-assign]

    return arm


def _within(module: str, cls: str, method: str, inner: Any) -> Callable[[Any], None]:
    """Dies at the inner point, but only inside that method."""

    def arm(trigger: Callable[[], None]) -> None:
        inside: list[int] = []
        inner(lambda: trigger() if inside else None)
        __import__(module)
        owner = getattr(sys.modules[module], cls)
        original = getattr(owner, method)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            inside.append(1)
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()

        setattr(owner, method, replaced)

    return arm


def _disk(suffix: str, operation: str, when: str) -> Callable[[Any], None]:
    """Dies before or after SQLite writes or syncs the file, or half-way through a write."""

    def arm(trigger: Callable[[], None]) -> None:
        class File(apsw.VFSFile):
            def __init__(self, name: Any, flags: list[int]) -> None:
                path = name.filename() if isinstance(name, apsw.URIFilename) else name
                self._watched = str(path).endswith(suffix)
                super().__init__("", name, flags)

            def xWrite(self, data: Any, offset: int) -> None:
                if self._watched and operation == "write":
                    if when == "before":
                        trigger()
                    if when == "half-way":
                        super().xWrite(bytes(data)[: len(data) // 2], offset)
                        trigger()
                super().xWrite(data, offset)
                if self._watched and operation == "write" and when == "after":
                    trigger()

            def xSync(self, flags: int) -> None:
                if self._watched and operation == "sync" and when == "before":
                    trigger()
                super().xSync(flags)
                if self._watched and operation == "sync" and when == "after":
                    trigger()

        class Disk(apsw.VFS):
            def __init__(self) -> None:
                super().__init__("drill", "")

            def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
                return File(name, flags)

        _KEPT.append(Disk())
        _connect_through_it()

    return arm


def _connect_through_it() -> None:
    from event_bus import database

    def connect(
        path: Path, flags: int = database.READ_WRITE, *, busy_timeout_ms: int = 5_000
    ) -> apsw.Connection:
        db = apsw.Connection(str(path), flags=flags, vfs="drill")
        db.set_busy_timeout(busy_timeout_ms)
        return db

    database.connect = connect


def _often(inner: Any) -> Callable[[Any], None]:
    """The inner point, with checkpoints every few pages."""

    def arm(trigger: Callable[[], None]) -> None:
        inner(trigger)
        from collector.store import Store
        from event_bus import journal_file

        journal_file.CHECKPOINT_PAGES = SMALL_CHECKPOINT_PAGES
        original = Store.__init__

        def replaced(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self._db.execute(f"PRAGMA wal_autocheckpoint={SMALL_CHECKPOINT_PAGES}")

        Store.__init__ = replaced  # type: ignore[method-assign]

    return arm


def _call(name: str, when: str, owner: Any = os) -> Callable[[Any], None]:
    """Dies before, after or half-way through a call of the spool to the system."""

    def arm(trigger: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            spooling = "spool" in sys._getframe(1).f_code.co_filename
            if spooling and when == "before":
                trigger()
            if spooling and when == "half-way":
                fd, data, *rest = args
                original(fd, data[: len(data) // 2], *rest)
                trigger()
            result = original(*args, **kwargs)
            if spooling and when == "after":
                trigger()
            return result

        setattr(owner, name, replaced)

    return arm


def _points() -> list[Point]:
    def journal(m: str, when: str) -> Any:
        return _method("event_bus.journal", "Journal", m, when)

    def store(m: str, when: str) -> Any:
        return _method("collector.store", "Store", m, when)

    def live(m: str, when: str) -> Any:
        return _method("event_bus.live", "LiveEvents", m, when)

    def adopter(m: str, when: str) -> Any:
        return _method("event_bus.adopt", "SpoolAdopter", m, when)

    def in_trim(operation: str, when: str) -> Any:
        inner = _disk("journal.db-wal", operation, when)
        return _within("event_bus.journal", "Journal", "trim", inner)

    both, three = ("before", "after"), ("before", "half-way", "after")
    wal, db_wal, db = "journal.db-wal", "bitten_events.db-wal", "bitten_events.db"
    found = []
    for w in three:
        found += [
            Point(f"journal-write-{w}", "bus", "append", _disk(wal, "write", w)),
            Point(f"journal-made-{w}", "bus", "append", _disk(wal, "write", w), needs="new"),
            Point(f"trim-write-{w}", "bus", "trim", in_trim("write", w), 3),
            Point(
                f"journal-checkpoint-{w}",
                "bus",
                "append",
                _often(_disk("journal.db", "write", w)),
            ),
            Point(f"database-write-{w}", "collect", "store", _disk(db_wal, "write", w), 40),
            Point(f"database-made-{w}", "collect", "store", _disk(db_wal, "write", w), 40, "new"),
            Point(
                f"database-checkpoint-{w}", "collect", "store", _often(_disk(db, "write", w)), 40
            ),
            Point(f"spool-write-{w}", "publisher.py", "spool", _call("pwrite", w), 3, "away"),
        ]
    for w in both:
        found += [
            Point(f"journal-sync-{w}", "bus", "fsync", _disk(wal, "sync", w)),
            Point(
                f"journal-checkpoint-sync-{w}",
                "bus",
                "fsync",
                _often(_disk("journal.db", "sync", w)),
                3,
            ),
            Point(f"append-{w}", "bus", "append", journal("append", w)),
            Point(f"publish-{w}", "bus", "publish", live("publish", w)),
            Point(f"ack-{w}", "bus", "ack", _reply(w), 50),
            Point(f"cursor-{w}", "bus", "cursor", journal("save_consumers", w), 2),
            Point(f"trim-{w}", "bus", "trim", journal("trim", w), 2),
            Point(f"adopt-{w}", "bus", "spool", adopter("done", w), 1, "orphan"),
            Point(f"store-rows-{w}", "collect", "store", store("_write_events", w)),
            Point(f"store-{w}", "collect", "store", store("write", w)),
            Point(f"fetch-{w}", "collect", "cursor", _method(*_CLIENT, "send", w)),
            Point(f"spool-delivered-{w}", "publisher.py", "spool", _method(*_SPOOL, w), 1, "away"),
            Point(
                f"spool-removed-{w}", "publisher.py", "spool", _call("unlink", w, Path), 1, "away"
            ),
            Point(
                f"spool-copied-{w}", "publisher.py", "spool", _call("replace", w, Path), 2, "full"
            ),
        ]
    return sorted(found, key=lambda p: (p.program, p.window, p.name))


_CLIENT = ("event_bus.protocol", "Client")
_SPOOL = ("event_bus.spool", "Spool", "delivered")

POINTS = _points()
BY_NAME = {p.name: p for p in POINTS}
