"""The list of checks, and how they are run: side by side, each for itself, within a few seconds."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from collector.doctor import (
    backups,
    bus,
    consumers,
    disk,
    files,
    home,
    machine,
    pm2,
    security,
    sources,
    spool,
    times,
    types,
    versions,
    wal,
)
from collector.doctor.context import Check, Context
from collector.doctor.finding import LEVELS, CannotTell, Finding, Level
from event_bus.errors import BittenError, BusRefused, KeysError
from event_bus.protocol import Client
from event_bus.settings import Settings

LIMIT_S = 4.0
STATUS_TIMEOUT_S = 1.0

CHECKS: dict[str, Check] = {
    "bus": bus.answers,
    "ports": bus.events_port,
    "bus-problems": bus.problems,
    "collector": consumers.collector,
    "lag": consumers.lag,
    "database": files.database,
    "journal": files.journal,
    "wal": wal.logs,
    "writers": wal.writers,
    "spool": spool.stale,
    "dropped": types.dropped,
    "refused": types.refused,
    "schemas": types.schema_files,
    "never-seen": types.never_seen,
    "silent": sources.silent,
    "disk": disk.space,
    "file-system": disk.file_system,
    "rights": home.rights,
    "leftovers": home.leftovers,
    "backups": backups.newest,
    "exposure": security.exposure,
    "keys": security.publishers,
    "timestamps": times.timestamps,
    "clock-steps": times.steps,
    "clock": machine.clock,
    "memory": machine.memory,
    "descriptors": machine.descriptors,
    "pm2": pm2.apps,
    "sqlite": versions.sqlite,
    "zeromq": versions.zeromq,
    "python": versions.python,
}


def examine(settings: Settings) -> list[Finding]:
    """All findings about this home and this machine, faults first."""
    return run(CHECKS, prepare(settings))


def prepare(settings: Settings, *, clock: Callable[[], float] = time.time) -> Context:
    """What checks are given; asks the bus how it is. `clock` gives Unix seconds."""
    status, key_problem, refused = _status(settings)
    return Context(
        settings=settings,
        bitten=_command(settings),
        now=clock(),
        status=status,
        key_problem=key_problem,
        refused=refused,
        deadline=time.monotonic() + LIMIT_S,
    )


def run(checks: Mapping[str, Check], context: Context) -> list[Finding]:
    """What the checks find. One that raises, or is not done in time, is a finding of its own."""
    done: dict[str, list[Finding]] = {}

    def look(name: str, check: Check) -> None:
        try:
            found = list(check(context))
        except CannotTell as e:
            found = [_of_check("skipped", str(e))]
        except Exception as e:  # noqa: BLE001 - one broken check must not hide the others
            found = [_of_check("warning", f"this check failed: {type(e).__name__}: {e}")]
        done[name] = [replace(f, check=name) for f in found]

    # Daemons: one that hangs in a dead file system must not keep us from ending.
    threads = [
        threading.Thread(target=look, args=item, daemon=True, name=f"check {item[0]}")
        for item in checks.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, context.deadline - time.monotonic()))
    late = _of_check("warning", "this check was not done in time")
    findings = [f for name in checks for f in done.get(name, [replace(late, check=name)])]
    return sorted(findings, key=lambda f: LEVELS.index(f.level))


def _of_check(level: Level, what: str) -> Finding:
    if level == "skipped":
        return Finding(level=level, what=what)
    return Finding(
        level=level,
        what=what,
        why="something it looks at does not answer, or looks as nobody expected",
        remedy="look again; if it stays, the disk or this check is at fault",
        command="bitten doctor --all",
    )


def _status(settings: Settings) -> tuple[dict[str, Any] | None, str, str]:
    """What the bus says, why this home's key cannot be used to ask it, and why it refuses that."""
    try:
        client = Client(settings)
    except KeysError as e:
        return None, str(e.args[0]), ""
    try:
        return client.status(STATUS_TIMEOUT_S), "", ""
    except BusRefused as e:
        return None, "", str(e.args[0])
    except BittenError:
        return None, "", ""
    finally:
        client.close()


def _command(settings: Settings) -> str:
    """`bitten`, with what it takes to mean these settings in the user's shell."""
    plain = Settings.load()
    flags = [
        f"--{name.replace('_', '-')} {shlex.quote(str(getattr(settings, name)))}"
        for name in ("home", "db", "events_url", "ingress_url")
        if getattr(settings, name) != getattr(plain, name)
    ]
    if settings.home != plain.home and settings.db == settings.home / "bitten_events.db":
        flags = [f for f in flags if not f.startswith("--db ")]
    return " ".join(["bitten", *flags])
