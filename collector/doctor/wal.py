"""The write-ahead logs, and who keeps them from being emptied. From the locks on the `-shm` file:
byte 120 is the writer's, 123 to 127 are readers' (https://sqlite.org/walformat.html#locks)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from collector.doctor.context import Context, quoted
from collector.doctor.finding import CannotTell, Finding, fault, ok, size, warning
from collector.doctor.processes import Process, lock_owner, users
from collector.wal import file_locks

LARGE_BYTES = 128 << 20
"""Twice what bus and collector let a log keep when they empty it."""

HUGE_BYTES = 1 << 30
_WRITER = 120
_READERS = range(123, 128)


@dataclass(frozen=True, kw_only=True)
class Log:
    """A write-ahead log, and the processes that are in the middle of reading its database."""

    path: Path
    bytes: int
    readers: Sequence[Process]


def logs(context: Context) -> Iterator[Finding]:
    for database, wal in context.wal_paths.items():
        if not database.exists():
            continue
        reading = {
            lock.pid for lock in file_locks(Path(f"{database}-shm")) if lock.first in _READERS
        } - {os.getpid(), _own_pid(context, database)}
        yield judge_log(
            Log(
                path=wal,
                bytes=wal.stat().st_size if wal.exists() else 0,
                readers=[Process.of(pid) for pid in sorted(reading)],
            )
        )


def judge_log(log: Log) -> Finding:
    who = ", ".join(map(str, log.readers)) or "nobody just now"
    if log.bytes < LARGE_BYTES:
        return ok(f"{log.path.name} has {size(log.bytes)}; being read by {who}")
    pids = " ".join(str(r.pid) for r in log.readers)
    return (fault if log.bytes >= HUGE_BYTES else warning)(
        f"{log.path.name} has grown to {size(log.bytes)}; the database is held by {who}",
        why="what a reader still sees cannot be overwritten: the log grows until its query ends",
        remedy="end that query, or its program; the log is emptied soon after"
        if pids
        else "look again in a minute; a query may just have ended",
        command=f"kill {pids}" if pids else f"ls -l {quoted(log.path)}",
    )


def writers(context: Context) -> Iterator[Finding]:
    """Who has database or journal open for writing, besides collector and bus."""
    existing = [p for p in context.wal_paths if p.exists()]
    if not existing:
        raise CannotTell("there are no databases yet")
    for database in existing:
        own = {os.getpid(), _own_pid(context, database)}
        in_transaction = {
            lock.pid for lock in file_locks(Path(f"{database}-shm")) if lock.first == _WRITER
        } - own
        others = {pid for pid, writes in users([database]).items() if writes} - own
        for pid in sorted(in_transaction):
            yield fault(
                f"{Process.of(pid)} holds a write transaction on {database.name}",
                why="collector or bus cannot write until it ends; events wait meanwhile",
                remedy="end that transaction, or its program",
                command=f"kill {pid}",
            )
        for pid in sorted(others - in_transaction):
            yield warning(
                f"{Process.of(pid)} has {database.name} open for writing",
                why="a forgotten transaction would hold up everything, and SQLite before 3.51.3"
                " can damage a database that two programs write",
                remedy="open it read-only",
                command=f"sqlite3 -readonly {quoted(database)}",
            )
        if not in_transaction and not others:
            yield ok(f"nobody else has {database.name} open for writing")


def _own_pid(context: Context, database: Path) -> int:
    """The process whose database it is: collector or bus; 0 if it does not run."""
    settings = context.settings
    lock = settings.home / "bus.lock" if database == settings.journal else Path(f"{database}.lock")
    owner = lock_owner(lock)
    return owner.pid if owner else 0
