"""Spool files: events that wait on disk, whose they are, and for how long."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from collector.doctor.context import Context, quoted
from collector.doctor.finding import Finding, fault, ok, size, span, warning
from collector.doctor.processes import Process, lock_owner
from collector.doctor.security import let, own_rights
from event_bus.words import events

STALE_S = 60.0
FULL = 0.8
COUNTED_BYTES = 64 << 20
"""How much of a file is read to count its events."""

_FIRST_LINE_BYTES = 1 << 21


@dataclass(frozen=True, kw_only=True)
class SpoolFile:
    """`owner` is the living process that delivers it, None if that is gone. `waiting_s` is how
    long its first event waits; `events` is at least that many."""

    path: Path
    bytes: int
    events: int
    source: str
    owner: Process | None
    waiting_s: float


def stale(context: Context) -> Iterator[Finding]:
    status = context.status
    up_s = None
    if context.refused:
        up_s = math.inf
    elif status is not None:
        is_here = not context.is_client
        up_s = context.now - Process.of(status["pid"]).started_at if is_here else status["uptime_s"]
    found = False
    for path in sorted(context.settings.spool.glob("*.ndjson")):
        try:
            file = _look(path, context.now)
        except FileNotFoundError:  # delivered meanwhile
            continue
        found = True
        yield judge_spool(file, up_s, context)
    if not found:
        yield ok("no events wait on disk")


def _look(path: Path, now: float) -> SpoolFile:
    status = path.stat()
    with path.open("rb") as file:
        first = file.readline(_FIRST_LINE_BYTES)
        events = first.count(b"\n")
        left = COUNTED_BYTES
        while left > 0 and (chunk := file.read(1 << 20)):
            events += chunk.count(b"\n")
            left -= len(chunk)
    try:
        event = msgspec.json.decode(first)
        source, happened = str(event.get("source", "unknown")), float(event["timestamp"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
        source, happened = "unknown", status.st_mtime
    return SpoolFile(
        path=path,
        bytes=status.st_size,
        events=events,
        source=source,
        owner=lock_owner(path),
        waiting_s=max(0.0, now - min(happened, status.st_mtime)),
    )


def judge_spool(file: SpoolFile, up_s: float | None, context: Context) -> Finding:
    """`up_s` is how long the bus has been there, None if it is away."""
    limit = context.settings.spool_max_bytes
    start, command = "start the bus", f"{context.bitten} up"
    if context.is_client:
        start = "see whether the bus can be reached; it is on another machine"
        command = f"{context.bitten} status"
    verb = "waits" if file.events == 1 else "wait"
    waits = f"{events(file.events)} of {file.source} {verb} on disk for {span(file.waiting_s)}"
    if file.owner is not None and file.bytes > FULL * limit:
        return fault(
            f"{waits}: {size(file.bytes)} of {size(limit)}",
            why=f"{file.owner} drops events when its spool is full",
            remedy=f"{start}, or allow more (BITTEN_SPOOL_MAX_BYTES) where the process is started",
            command=command,
        )
    if up_s is None:
        gone = "" if file.owner else "; their process is gone"
        return warning(
            waits + gone,
            why="the bus is away"
            + ("" if context.is_client else "; it takes them in when it is there"),
            remedy=start,
            command=command,
        )
    if min(file.waiting_s, up_s) < STALE_S:
        return ok(waits)
    rights = own_rights(context)
    if file.owner is not None and rights is not None and not rights.publish:
        return fault(
            f"{waits}, though the bus is there",
            why=f"the key {rights.name} may publish nothing: the bus refuses what {file.owner}"
            " sends",
            remedy="let it publish, all (`*`) or the types that it needs",
            command=let(context, replace(rights, publish=("*",))),
        )
    if file.owner is None and context.is_client:
        return warning(
            f"{waits}; their process is gone",
            why="a bus looks into its own home only, and this bus is on another machine",
            remedy="copy the file into the directory spool of the bus's home, for its user; once"
            " it is gone from there, remove it here",
            command=f"ls -l {quoted(file.path)}",
        )
    if file.owner is None:
        return fault(
            f"{waits}; their process is gone, and the bus does not take them in",
            why="it cannot read the file, or cannot write the journal; its log says which",
            remedy="check owner and rights of the file, then start the bus again",
            command=f"ls -l {quoted(file.path)}; lsattr {quoted(file.path)};"
            f" {context.bitten} status",
        )
    return warning(
        f"{waits}, though the bus is there",
        why=f"{file.owner} does not reach it: another BITTEN_INGRESS_URL, or it is stopped",
        remedy="compare its settings with the bus's address",
        command=f"tr '\\0' '\\n' < /proc/{file.owner.pid}/environ | grep BITTEN_;"
        f" {context.bitten} status",
    )
