"""A disk that remembers: every write and sync of the SQLite files, and images of what a power
loss could have left of them.

The model is the usual one (as in SQLite's own crash tests): what a file held at its last sync is
safe; of the writes since then each may be there, or not, or in part, sector by sector, in any
combination. Deleting and cutting a file count as writes.
"""

from __future__ import annotations

import atexit
import os
import pickle
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import apsw

SECTOR_BYTES = 512
VFS = "recorder"


class Op(NamedTuple):
    """One act on a file; `kind` is write, truncate, sync, delete or mark."""

    at_ns: int
    kind: str
    file: str
    offset: int = 0
    data: bytes = b""


class Recorder(apsw.VFS):
    """SQLite's usual files, with every act noted in `ops`, timed by the system-wide monotonic
    clock so that the records of two processes can be laid side by side.

    With `lies` a sync is answered and neither done nor noted, as by a disk with a lying cache.
    """

    def __init__(self, *, lies: bool) -> None:
        super().__init__(VFS, "")
        self.ops: list[Op] = []
        self.lies = lies

    def note(self, kind: str, path: str, offset: int = 0, data: bytes = b"") -> None:
        self.ops.append(Op(time.monotonic_ns(), kind, Path(path).name, offset, data))

    def xOpen(self, name: Any, flags: list[int]) -> _File:
        return _File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self.note("delete", filename)
        if syncdir:
            self.note("sync", filename)


class _File(apsw.VFSFile):
    def __init__(self, recorder: Recorder, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._recorder = recorder
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._recorder.note("write", self._path, offset, bytes(data))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._recorder.note("truncate", self._path, newsize)

    def xSync(self, flags: int) -> None:
        if not self._recorder.lies:
            super().xSync(flags)
            self._recorder.note("sync", self._path)


class Disk:
    """Files as the acts on them leave them: `apply` the acts in order, then `crash` at any time."""

    def __init__(self) -> None:
        self._safe: dict[str, bytearray | None] = {}
        self._pending: dict[str, list[Op]] = {}

    def apply(self, op: Op) -> None:
        if op.kind == "mark":
            return
        if op.kind != "sync":
            self._pending.setdefault(op.file, []).append(op)
            return
        if self._safe.get(op.file) is None:
            self._sync_directory()
        for waiting in self._pending.pop(op.file, []):
            self._safe[op.file] = _applied(self._safe.get(op.file), waiting)

    def _sync_directory(self) -> None:
        """SQLite syncs the directory with the first sync of a new journal or WAL."""
        for name, waiting in self._pending.items():
            if any(op.kind == "delete" for op in waiting):
                self._safe[name] = None
                self._pending[name] = []

    def crash(self, directory: Path, rng: random.Random) -> None:
        """Write to `directory` what a power loss now might leave."""
        kept = rng.choice((0.0, 0.5, 0.9, 1.0))
        for name in {*self._safe, *self._pending}:
            content = self._safe.get(name)
            content = None if content is None else bytearray(content)
            for op in self._pending.get(name, []):
                if rng.random() < kept:
                    content = _applied(content, op)
                elif op.kind == "write" and rng.random() < 0.3:
                    content = _torn(content, op, rng)
            if content is not None:
                (directory / name).write_bytes(content)


def _applied(content: bytearray | None, op: Op) -> bytearray | None:
    if op.kind == "delete":
        return None
    content = bytearray() if content is None else content
    if op.kind == "truncate":
        del content[op.offset :]
        content.extend(bytes(op.offset - len(content)))
    else:
        _put(content, op.offset, op.data)
    return content


def _torn(content: bytearray | None, op: Op, rng: random.Random) -> bytearray:
    content = bytearray() if content is None else content
    for at in range(0, len(op.data), SECTOR_BYTES):
        if rng.random() < 0.5:
            _put(content, op.offset + at, op.data[at : at + SECTOR_BYTES])
    return content


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def arm(path: str) -> None:
    """Record what this daemon does to its files; at its end it is in the file `path`-<pid>.

    Among the acts are marks: the highest seq that the bus had told anybody of by then.
    """
    from event_bus import database, protocol
    from event_bus.journal import Journal
    from event_bus.replies import Replies

    recorder = Recorder(lies=path.endswith("-lies"))

    def connect(
        file: Path, flags: int = database.READ_WRITE, *, busy_timeout_ms: int = 5_000
    ) -> apsw.Connection:
        db = apsw.Connection(str(file), flags=flags, vfs=VFS)
        db.set_busy_timeout(busy_timeout_ms)
        return db

    load, reply = Journal._load, Replies.send
    opened: list[Journal] = []

    def remembering(self: Journal) -> None:
        load(self)
        opened.append(self)

    def marking(self: Replies, route: list[bytes], verb: bytes, *frames: bytes) -> None:
        if verb in (protocol.ACK, protocol.BATCHES):
            recorder.note("mark", "acked", opened[-1].last_seq)
        reply(self, route, verb, *frames)

    database.connect = connect
    Journal._load = remembering  # type: ignore[method-assign]
    Replies.send = marking  # type: ignore[method-assign]

    def save() -> None:
        with Path(f"{path}-{os.getpid()}").open("wb") as out:
            pickle.dump([tuple(op) for op in recorder.ops], out)

    atexit.register(save)


def load(paths: Iterable[Path]) -> list[Op]:
    """The acts of several daemons in the order of time."""
    ops: list[Op] = []
    for path in paths:
        with path.open("rb") as file:
            ops += [Op(*op) for op in pickle.load(file)]
    return sorted(ops, key=lambda op: op.at_ns)
