"""The machine: memory, file descriptors, and whether its clock is kept right."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from collector.doctor.context import Context
from collector.doctor.finding import CannotTell, Finding, fault, ok, size, warning
from collector.doctor.processes import Process, lock_owner

LITTLE_MEMORY = 0.05
HARDLY_ANY_MEMORY = 0.02
MANY_DESCRIPTORS = 0.8
FEW_DESCRIPTORS = 256

_STA_UNSYNC = 0x40
_TIMEX_STATUS_AT = 5 * ctypes.sizeof(ctypes.c_long)
"""struct timex of adjtimex(2): modes, offset, freq, maxerror, esterror, each in a long's room."""


def memory(context: Context) -> Iterator[Finding]:
    found = psutil.virtual_memory()
    yield judge_memory(found.available, found.total)


def judge_memory(available_bytes: int, total_bytes: int) -> Finding:
    said = f"{size(available_bytes)} of {size(total_bytes)} memory are available"
    share = available_bytes / total_bytes
    if share >= LITTLE_MEMORY:
        return ok(said)
    return (fault if share < HARDLY_ANY_MEMORY else warning)(
        said,
        why="when there is none left, the kernel kills a process, perhaps the bus",
        remedy="end what uses most, or give the machine more",
        command="ps -eo pid,user,rss,args --sort -rss | head",
    )


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """Of the bus: open files and connections, and how many it may have."""

    process: Process
    open: int
    limit: int


def descriptors(context: Context) -> Iterator[Finding]:
    owner = lock_owner(context.settings.home / "bus.lock")
    if owner is None or not owner.pid:
        raise CannotTell("the bus does not run")
    try:
        bus = psutil.Process(owner.pid)
        limit, _ = bus.rlimit(psutil.RLIMIT_NOFILE)
        yield judge_descriptors(Descriptors(process=owner, open=bus.num_fds(), limit=limit))
    except psutil.Error as e:
        raise CannotTell(f"the bus is another user's: {e}") from e


def judge_descriptors(facts: Descriptors) -> Finding:
    said = f"the bus has {facts.open} of {facts.limit} file descriptors open"
    if facts.open < MANY_DESCRIPTORS * facts.limit and facts.limit >= FEW_DESCRIPTORS:
        return ok(said)
    return (fault if facts.open >= MANY_DESCRIPTORS * facts.limit else warning)(
        said,
        why="each connection takes one; without a free one nobody new can connect",
        remedy="raise the limit (`ulimit -n` where it is started); see who is connected",
        command=f"prlimit --nofile --pid {facts.process.pid};"
        f" ls -l /proc/{facts.process.pid}/fd | wc -l",
    )


def clock(context: Context) -> Iterator[Finding]:
    """Is the clock disciplined by NTP? The kernel knows, whatever program does it."""
    timex = (ctypes.c_char * 1024)()
    if ctypes.CDLL(None).adjtimex(timex) < 0:  # modes 0: only asks
        raise CannotTell("the kernel does not say how its clock is kept")
    status = ctypes.c_int.from_buffer(timex, _TIMEX_STATUS_AT).value
    yield judge_clock(is_synchronised=not status & _STA_UNSYNC)


def judge_clock(*, is_synchronised: bool) -> Finding:
    if is_synchronised:
        return ok("the clock is kept right by NTP")
    return warning(
        "the clock of this machine is not synchronised",
        why="the kernel says that no time service corrects it; timestamps drift by seconds a day",
        remedy="switch a time service on (inside a container: on its host)",
        command="timedatectl set-ntp true; timedatectl",
    )
