"""Space: how long it lasts at the present rate, and whether the file system suits SQLite."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from collector.doctor.context import Context, quoted, row
from collector.doctor.finding import CannotTell, Finding, fault, ok, size, warning
from collector.doctor.history import DAY_S

FAULT_DAYS = 2.0
WARNING_DAYS = 14.0
FAULT_FREE_BYTES = 256 << 20
"""As much as one process may spool while the bus is away."""

WARNING_FREE_BYTES = 1 << 30
FEW_INODES = 1_000
MIN_SPAN_S = 600.0

REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
VOLATILE = {"tmpfs", "ramfs"}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Bytes a day: `endless` for what is kept for ever, `bounded` for what may still grow by
    `bound_bytes` in all."""

    endless: float = 0.0
    bounded: float = 0.0
    bound_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A file system with files of ours. `growth` is None while the history is too short."""

    path: Path
    free_bytes: int
    inodes: int
    free_inodes: int
    read_only: bool
    growth: Growth | None


def days_left(free_bytes: float, growth: Growth) -> float:
    """Days until the space is used up, infinite if it never is."""
    if growth.bounded > 0:
        until_bound = growth.bound_bytes / growth.bounded
        days = free_bytes / (growth.endless + growth.bounded)
        if days <= until_bound:
            return days
    left = free_bytes - growth.bound_bytes
    return left / growth.endless if growth.endless > 0 else math.inf


def space(context: Context) -> Iterator[Finding]:
    settings = context.settings
    if not settings.home.exists():
        raise CannotTell(f"there is no {settings.home}")
    journal: Growth | None = None
    database: Growth | None = None
    with contextlib.suppress(CannotTell):
        journal, database = _growth(context)
    places = {settings.home: journal, settings.db.parent: database}
    if _device(settings.home) == _device(settings.db.parent):
        both = None
        if journal is not None and database is not None:
            both = Growth(
                endless=database.endless, bounded=journal.bounded, bound_bytes=journal.bound_bytes
            )
        places = {settings.home: both}
    for path, growth in places.items():
        disk = os.statvfs(path)
        yield from judge_volume(
            Volume(
                path=path,
                free_bytes=disk.f_bavail * disk.f_frsize,
                inodes=disk.f_files,
                free_inodes=disk.f_favail,
                read_only=bool(disk.f_flag & os.ST_RDONLY),
                growth=growth,
            )
        )


def _device(path: Path) -> int | None:
    return path.stat().st_dev if path.exists() else None


def _growth(context: Context) -> tuple[Growth, Growth | None]:
    """Of journal and database, from the events of the last day and the bytes of one event."""
    settings = context.settings
    with context.reading(settings.journal) as db:
        first = row(db, "SELECT first_seq, received_at FROM batch ORDER BY first_seq LIMIT 1")
        last = row(
            db,
            "SELECT first_seq + count - 1, received_at FROM batch ORDER BY first_seq DESC LIMIT 1",
        )
        day = row(
            db,
            "SELECT first_seq FROM batch WHERE received_at >= ? ORDER BY received_at LIMIT 1",
            context.now - DAY_S,
        )
    if first is None or day is None:
        raise CannotTell("no event came in the last day")
    lasted_s = min(DAY_S, context.now - first[1])
    if lasted_s < MIN_SPAN_S:
        raise CannotTell("the history is too short")
    events_a_day = (last[0] + 1 - day[0]) * DAY_S / lasted_s
    journal_bytes = settings.journal.stat().st_size
    bounded = events_a_day * journal_bytes / (last[0] + 1 - first[0])
    limit = min(settings.journal_max_bytes, bounded * settings.journal_max_age_s / DAY_S)
    journal = Growth(bounded=bounded, bound_bytes=max(0.0, limit - journal_bytes))
    if not settings.db.exists():
        return journal, None
    return journal, Growth(endless=events_a_day * settings.db.stat().st_size / last[0])


def judge_volume(volume: Volume) -> Iterator[Finding]:
    path = volume.path
    see = f"df -h {quoted(path)}; du -xh -d 1 {quoted(path)}"
    if volume.read_only:
        yield fault(
            f"{path} is mounted read-only",
            why="nothing can be written there; a disk with errors is often remounted so",
            remedy="look for disk errors, then mount it for writing",
            command=f"dmesg | grep -i -e ext4 -e xfs -e i/o; mount -o remount,rw {quoted(path)}",
        )
    if volume.inodes and volume.free_inodes < FEW_INODES:
        yield fault(
            f"{path} has {volume.free_inodes} inodes left",
            why="no file can be made without one, a spool file neither",
            remedy="remove small files that nobody needs; see where they are",
            command=f"du --inodes -x -d 2 {quoted(path)} | sort -n | tail",
        )
    free = volume.free_bytes
    days = math.inf if volume.growth is None else days_left(free, volume.growth)
    said = f"{size(free)} are free at {path}"
    if math.isfinite(days):
        said += f", enough for {days:.1f} days at the present rate"
    elif volume.growth is None:
        said += "; how fast they are used is not known yet"
    if days >= WARNING_DAYS and free >= WARNING_FREE_BYTES:
        yield ok(said)
        return
    urgent = days < FAULT_DAYS or free < FAULT_FREE_BYTES
    growth = volume.growth or Growth()
    yield (fault if urgent else warning)(
        said,
        why=f"database and journal grow by {size(growth.endless + growth.bounded)} a day; with a"
        " full disk the bus refuses events, which then wait with their processes"
        if volume.growth
        else "with a full disk the bus refuses events, which then wait with their processes",
        remedy="free some space, move the database (BITTEN_DB), or keep a shorter journal"
        " (BITTEN_JOURNAL_MAX_AGE_S)",
        command=see,
    )


def file_system(context: Context) -> Iterator[Finding]:
    mounts = Path("/proc/self/mountinfo").read_text()
    for path in {context.settings.home, context.settings.db.parent}:
        yield judge_file_system(path, *mounted(path.resolve(), mounts))


def mounted(path: Path, mountinfo: str) -> tuple[str, str]:
    """Type and mount point of the file system that a path is on, from /proc/self/mountinfo."""
    best = ("", "")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")  # spaces are \040
        # The last one of equals lies on top.
        if path.is_relative_to(point) and len(point) >= len(best[1]):
            best = (right.split()[0], point)
    return best


def judge_file_system(path: Path, kind: str, point: str) -> Finding:
    if kind in REMOTE or kind.startswith("fuse") or kind == "vboxsf":
        return fault(
            f"{path} is on {kind} (mounted at {point})",
            why="SQLite's write-ahead log needs locks and shared memory that work; on this kind of"
            " file system a database can be corrupted",
            remedy="move the home to a local disk: stop bus and collector, copy, set BITTEN_HOME",
            command=f"findmnt -T {quoted(path)}; findmnt -t ext4,xfs,btrfs,zfs",
        )
    if kind in VOLATILE:
        return warning(
            f"{path} is on {kind} (mounted at {point})",
            why="it is in memory: everything is gone when the machine restarts",
            remedy="set BITTEN_HOME to a directory on a disk",
            command="findmnt -t ext4,xfs,btrfs,zfs",
        )
    return ok(f"{path} is on {kind or 'an unknown file system'}")
