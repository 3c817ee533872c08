"""Ports that others can reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from collector.doctor.context import Context
from collector.doctor.finding import Finding, fault, ok
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
