"""Ports that others can reach, and keys that may not do what they try."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from collector.doctor.context import Context
from collector.doctor.finding import CannotTell, Finding, fault, ok
from event_bus import allow_list, keys
from event_bus.allow_list import FILE, Rights
from event_bus.errors import KeysError
from event_bus.keys import has_bus_key, is_loopback


def exposure(context: Context) -> Iterator[Finding]:
    settings = context.settings
    if context.is_client:
        yield ok("this home listens nowhere: its bus is on another machine")
        return
    urls = {settings.ingress_url, settings.events_url}
    if context.status is not None:
        urls |= {context.status["ingress_url"], context.status["events_url"]}
    yield judge_exposure(
        sorted(url for url in urls if not is_loopback(url)),
        keys=settings.keys,
        bitten=context.bitten,
    )


def judge_exposure(open_urls: list[str], *, keys: Path, bitten: str) -> Finding:
    if not open_urls:
        return ok("the ports are reachable from this machine only")
    if has_bus_key(keys):
        return ok(f"{', '.join(open_urls)} can be reached by others, with a key")
    return fault(
        f"{', '.join(open_urls)} can be reached by others, without a key",
        why="whoever reaches the port could publish orders and read everything; a bus with keys"
        " does not start like this",
        remedy="listen on 127.0.0.1, or make keys and allow those who may connect",
        command=f"{bitten} keys new",
    )


def publishers(context: Context) -> Iterator[Finding]:
    """Keys that publish and may not: nobody stores their events, and nobody else says so."""
    refused = context.bus().get("publish_forbidden")  # not of a bus before 0.1.0
    if not refused or not context.is_own_bus:
        raise CannotTell("no key was refused, or the bus is elsewhere")
    try:
        allowed = allow_list.read(context.settings.keys / FILE)
    except KeysError as e:  # the bus's own problems say so
        raise CannotTell(str(e.args[0])) from e
    for name, requests in refused.items():
        rights = allowed.get(name)
        if rights is not None and not rights.publish:
            yield fault(
                f"the key {name} may publish nothing, and has tried to ({requests} requests)",
                why="its events wait with their processes, as far as their bounds allow",
                remedy="let it publish, all (`*`) or the types that it needs; or end what publishes"
                " with it",
                command=let(context, replace(rights, publish=("*",))),
            )


def own_rights(context: Context) -> Rights | None:
    """What this home's bus lets this home's own key do, as far as that can be read."""
    directory = context.settings.keys
    try:
        own = keys.read_public(directory, keys.CLIENT)
        allowed = allow_list.read(directory / FILE) if has_bus_key(directory) else {}
    except KeysError:
        return None
    return next((r for r in allowed.values() if r.public_key == own), None)


def let(context: Context, rights: Rights) -> str:
    """The command that gives a key these rights."""
    patterns = [("publish", p) for p in rights.publish]
    patterns += [("subscribe", p) for p in rights.subscribe]
    flags = " ".join(f"--{kind} {shlex.quote(pattern)}" for kind, pattern in patterns)
    return f"{context.bitten} keys allow {rights.name} {flags}"
