"""`bitten demo`: what a newcomer sees first."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from event_bus.cli.output import print_json, print_table, printable
from event_bus.demo import Demo, Result
from event_bus.demo.market import SPREAD

SHOWN_ROWS = 5
SHOWN_CHARACTERS = 40
LINE_EVERY_S = 1.0


@click.command()
@click.option("--candles", type=click.IntRange(min=2), help="Replay the last N only.", metavar="N")
@click.option("--keep", is_flag=True, help="Leave the database, to query it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")
def demo(candles: int | None, keep: bool, as_json: bool) -> None:
    """See it work: real EURUSD candles through a real bus into SQLite, checked at the end.

    Bus, collector and two publishers run in a temporary directory and on free ports; nothing of
    yours is touched.

    \b
    pip install 'bitten-event-bus[demo]'   the candles
    bitten demo                            5,000 candles, 24,000 events
    bitten demo --keep                     and leave the database
    bitten demo --json | jq .audit

    Exit code 0: everything published is stored, nothing is lost. 1: it is not.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with Demo(candles=candles, keep=keep) as running:
        if as_json:
            running.start()
            result = running.replay(lambda stored, planned: None)
            print_json(_document(result, running, keep=keep))
        else:
            click.echo(f"A bus, a collector and two publishers, all in {running.home}")
            with _progress() as on_progress:
                running.start()
                result = running.replay(on_progress)
            _show(result, running, keep=keep)
    sys.exit(0 if result.complete else 1)


def _document(result: Result, running: Demo, *, keep: bool) -> dict[str, Any]:
    return {
        "complete": result.complete,
        "candles": result.candles,
        "seconds": round(result.seconds, 3),
        "published": result.published,
        "stored": result.stored,
        "other": {f"{kind} of {source}": n for (kind, source), n in result.other.items()},
        "publishers": result.reports,
        "audit": result.audit,
        "queries": [
            {
                "question": query.question,
                "command": query.command(running.settings.db),
                "sql": query.sql,
                "columns": answer.columns,
                "rows": answer.rows,
            }
            for query, answer in result.answers
        ],
        "home": str(running.home) if keep else None,
    }


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows events stored and planned: a live bar in a terminal, elsewhere a line a second."""
    console = Console(highlight=False)
    if not console.is_terminal:
        yield _Lines().show
        return
    columns = (BarColumn(40), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=None)
        began: tuple[float, int] | None = None

        def show(stored: int, planned: int) -> None:
            nonlocal began
            if not planned:
                return
            now = time.monotonic()
            began = began or (now, stored)
            seconds, events = now - began[0], stored - began[1]
            rate = f"{events / seconds:,.0f}/s" if seconds > 0.1 else ""
            progress.update(
                task,
                completed=stored,
                total=max(stored, planned),
                description=f"{stored:,} of {max(stored, planned):,} stored  {rate}",
            )

        yield show


class _Lines:
    """Progress for a pipe."""

    def __init__(self) -> None:
        self._due_s = 0.0
        self._last = -1

    def show(self, stored: int, planned: int) -> None:
        now = time.monotonic()
        if planned and stored != self._last and (now >= self._due_s or stored >= planned):
            click.echo(f"{stored:,} of {max(stored, planned):,} stored")
            self._due_s, self._last = now + LINE_EVERY_S, stored


def _show(result: Result, running: Demo, *, keep: bool) -> None:
    first, last = (
        datetime.datetime.fromtimestamp(t, datetime.UTC).strftime("%Y-%m-%d")
        for t in (result.first, result.last)
    )
    click.echo(
        f"\n{result.candles:,} hourly EURUSD candles ({first} to {last}), moved in time so that\n"
        f"the last one closes now. Ticks: open, high, low, close; ask = bid + {SPREAD:.5f}.\n"
    )
    rows = [(kind, result.sources[kind], f"{n:,}") for kind, n in result.stored.items()]
    rows += [(kind, source, f"{n:,}") for (kind, source), n in result.other.items()]
    print_table(("stored", "published by", "events"), rows)
    db = running.settings.db
    for number, (query, answer) in enumerate(result.answers, 1):
        click.secho(f"\n{number}. {query.question}\n", bold=True)
        click.secho(query.command(db) + "\n", fg="cyan")
        shown = [tuple(map(_cut, row)) for row in answer.rows[:SHOWN_ROWS]]
        print_table(answer.columns, shown)
        more = len(answer.rows) - SHOWN_ROWS
        if more > 0:
            click.echo(f"… {more} more row{'s' if more > 1 else ''}")
    audit = result.audit
    sign = "=" if audit["published"] == audit["stored"] else "≠"
    line = (
        f"\n{audit['published']:,} published {sign} {audit['stored']:,} stored,"
        f" {audit['verdict']} ({result.seconds:.1f} s)"
    )
    click.secho(line, bold=True, fg="green" if result.complete else "red")
    if not result.complete:
        for report in result.reports:
            click.echo(printable(report))
    if keep:
        click.echo(f"Kept: {db}. Remove it with: rm -r {shlex.quote(str(running.home))}")
    else:
        click.echo("The database is removed now; `bitten demo --keep` leaves it for such queries.")


def _cut(value: object) -> str:
    text = printable(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
