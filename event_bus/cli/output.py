"""How the commands print: tables, JSON lines, CSV, and text that cannot harm a terminal."""

from __future__ import annotations

import csv
import datetime
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from event_bus.cli.escape import printable, printable_lines

__all__ = ["When", "clock", "print_csv", "print_json", "print_table", "printable"]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def clock(timestamp: float, *, date: bool = True) -> str:
    """Unix seconds as local time; as they are if no calendar has them."""
    try:
        moment = datetime.datetime.fromtimestamp(timestamp)
    except (OverflowError, ValueError, OSError):
        return str(timestamp)
    text = moment.isoformat(sep=" ", timespec="milliseconds")
    return text if date else text.partition(" ")[2]


def print_json(value: Any) -> None:
    """One JSON document on one line."""
    click.echo(printable_lines(msgspec.json.encode(value, enc_hook=str).decode()))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> None:
    """A table as wide as the terminal; long cells are cut there, and whole in a pipe."""
    rows = [[printable(cell) for cell in row] for row in rows]
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if not sys.stdout.isatty():
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            click.echo("  ".join(cells).rstrip())
        return
    table = Table(title=title or None, box=None, pad_edge=False, header_style="bold")
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(
            name, justify="right" if right else "left", overflow="ellipsis", no_wrap=True
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """As it is stored, for another program; on a terminal `printable`."""
    cell = printable if sys.stdout.isatty() else _csv_cell
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(cell, columns))
    for row in rows:
        writer.writerow([cell(row[c]) for c in columns])


class When(click.ParamType[float]):
    """A moment: a span before now (90s, 15m, 1h, 7d), ISO 8601 local time, or Unix seconds."""

    name = "WHEN"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        now = datetime.datetime.now().timestamp()
        span = _DURATION.fullmatch(value)
        if span:
            return now - float(span[1]) * _UNIT_S[span[2]]
        try:
            return float(value)
        except ValueError:
            pass
        try:
            return datetime.datetime.fromisoformat(value).timestamp()
        except ValueError:
            self.fail(
                f"{value!r} is no moment: use 90s, 15m, 1h, 7d, 2026-01-31, '2026-01-31 14:00'"
                " or Unix seconds",
                param,
                ctx,
            )


def _csv_cell(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, dict | list) else value


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d,.]+%?", text) is not None or text == ""
