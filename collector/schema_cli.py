"""`bitten schemas`: list, show and check event types."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from collector.reader import Reader
from collector.relations import Relation
from event_bus.cli.escape import printable, printable_lines
from event_bus.cli.output import print_json, print_table
from event_bus.errors import DatabaseMissing, RejectedEvent, SchemaError
from event_bus.event_schema import EventType, Registry, check_schema, read_schema
from event_bus.settings import Settings

RECENT = 1_000
"""Stored events of a type that a changed schema must still accept."""

_INTRODUCTION = """\
# Event types

Made from the schemas by `bitten schemas show --markdown`; run it for a page with your own types.

Every event is an envelope around its `data`, the fields below. A field that a schema does not list
is kept as well. In Python, `None` in an optional field means that it is absent.

## A type of your own

One file is all it takes, here `$BITTEN_HOME/schemas/news_item.json`:

```json
{
  "type": "object",
  "description": "A headline came in.",
  "properties": {
    "headline": {"type": "string", "minLength": 1},
    "currency": {"type": "string"},
    "impact": {"type": "integer", "minimum": 1, "maximum": 3}
  },
  "required": ["headline"],
  "x-bitten": {"table": "news", "indexes": ["currency"], "intern": ["currency"], "key": "currency"}
}
```

It is JSON Schema 2020-12. `x-bitten` is optional, and so is each of its entries:

| entry | meaning |
| --- | --- |
| `table` | name of the relation in the database; default the type's name |
| `indexes` | fields whose column gets an index |
| `intern` | text fields whose values repeat; each value is stored once |
| `decimals` | number fields and the digits after the point they mostly have, such as \
`{"bid": 5}`; these are stored in half the space, others as they are; not with an index |
| `inline` | `true`: stored in the table of all events and not beside it; for the type that most \
events are of; its columns cost every event a byte each |
| `key` | field whose value is appended to the topic: `bitten.news_item.EUR` |
| `live_only` | `true`: published, never stored; for the bus's own heartbeat |

What `table`, `decimals` and `inline` say when the collector first sees a type holds from then on.

`bitten schemas check` says whether it is good and whether a change of it fits what is stored. A
running bus takes a new file in at its first event: `bitten emit news_item headline=CPI`, or
`emit("news_item", {"headline": "CPI"})` from `event_bus.event_bridge` (a process that ran already
when the file came refuses the first such event, kept in `rejected_events`, and knows the type from
then on). Add fields freely; for new rules on old fields make a new type.
"""


@click.group()
def schemas() -> None:
    """Event types: list, show, check.

    A new type is one file, $BITTEN_HOME/schemas/my_event.json; docs/events.md says how.
    """


@schemas.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def list_types(settings: Settings, as_json: bool) -> None:
    """All known event types."""
    registry = Registry(settings.schemas)
    rows = [
        {
            "event_type": t.name,
            "table": None if t.storage.live_only else t.table,
            "required": t.schema.get("required", []),
            "description": t.schema.get("description", ""),
            "file": str(t.path),
        }
        for t in sorted(registry, key=lambda t: t.name)
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("type", "table", "required fields"),
            [
                (r["event_type"], r["table"] or "(live only)", ", ".join(r["required"]))
                for r in rows
            ],
        )
    for problem in registry.problems:
        click.echo(f"bitten: left out: {printable(problem)}", err=True)
    sys.exit(1 if registry.problems else 0)


@schemas.command("show")
@click.argument("event_type", metavar="[TYPE]", required=False)
@click.option("--markdown", is_flag=True, help="As a documentation page.")
@click.pass_obj
def show(settings: Settings, event_type: str | None, markdown: bool) -> None:
    """The schema of one type, or a page on all of them with --markdown."""
    registry = Registry(settings.schemas)
    if event_type is not None and event_type not in registry.types:
        raise SchemaError(
            f"there is no event type {printable(event_type)}",
            hint="`bitten schemas list` shows them",
        )
    if markdown:
        names = [event_type] if event_type else sorted(registry.types)
        pages = [_page(registry.types[name]) for name in names]
        page = "\n".join(pages if event_type else [_INTRODUCTION, *pages])
        click.echo(printable_lines(page), nl=False)
    elif event_type is None:
        raise click.UsageError("name a type, or use --markdown for a page on all")
    else:
        schema = registry.types[event_type].schema
        click.echo(printable_lines(json.dumps(schema, indent=2, ensure_ascii=False)))


@schemas.command("check")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def check(settings: Settings, files: tuple[Path, ...], as_json: bool) -> None:
    """Check schema files before the bus uses them (default: all of $BITTEN_HOME/schemas).

    Refuses what is no JSON Schema, what storage could not hold, and a change that would break
    events already stored. Exit code 2 if anything is refused.
    """
    paths = files or tuple(sorted(settings.schemas.glob("*.json")))
    found: dict[str, str | None] = {}
    for path in paths:
        try:
            event_type = read_schema(path)
            check_schema(event_type)
            _check_against_stored(settings, event_type)
        except SchemaError as e:
            found[str(path)] = str(e)
        else:
            found[str(path)] = None
    if as_json:
        print_json([{"file": file, "problem": problem} for file, problem in found.items()])
    else:
        for file, problem in found.items():
            click.echo(
                f"bitten: {printable(problem)}" if problem else f"{printable(file)}: good",
                err=bool(problem),
            )
        if not found:
            click.echo(f"no own event types in {settings.schemas}; the built-in ones are good")
    sys.exit(2 if any(found.values()) else 0)


def _check_against_stored(settings: Settings, event_type: EventType) -> None:
    """Raise SchemaError if stored events would no longer fit their columns or their schema."""
    try:
        reader = Reader(settings.db)
    except DatabaseMissing:
        return
    with reader:
        stored = reader.rows(
            "SELECT definition FROM _relation JOIN _name ON id = type WHERE name = ?",
            event_type.name,
        )
        for row in stored:
            old = msgspec.json.decode(row["definition"], type=Relation)
            for conflict in Relation.of(event_type).conflicts(old):
                raise SchemaError(
                    f"{event_type.path}: {conflict}", hint="give the changed type a new name"
                )
        for event in reader.query(event_type=event_type.name, limit=RECENT):
            try:
                event_type.check(event["data"])
            except RejectedEvent as e:
                raise SchemaError(
                    f"{event_type.path}: the stored event {event['seq']} breaks it: {e}",
                    hint="new rules need a new type; allow what was allowed",
                ) from e


def _page(event_type: EventType) -> str:
    """One type's section of docs/events.md."""
    required = event_type.schema.get("required", [])
    storage = event_type.storage
    where = f"Stored in `{event_type.table}`."
    if storage.live_only:
        where = "Published live only, never stored."
    topic = f"`bitten.{event_type.name}{f'.<{storage.key}>' if storage.key else ''}`"
    lines = [
        f"## {event_type.name}",
        "",
        f"{event_type.schema.get('description', '')} Topic {topic}. {where}",
        "",
        "| field | type | | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for name, schema in event_type.properties.items():
        need = "required" if name in required else ""
        meaning = schema.get("description", "")
        lines.append(f"| `{name}` | {_type_in_words(schema)} | {need} | {meaning} |")
    for example in event_type.schema.get("examples", []):
        lines += ["", "```json", json.dumps(example), "```"]
    return "\n".join([*lines, ""])


def _type_in_words(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kinds = schema.get("type", "any")
    words = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    low, high, above = (schema.get(k) for k in ("minimum", "maximum", "exclusiveMinimum"))
    if low is not None and high is not None:
        return f"{words}, {low} to {high}"
    if low is not None:
        return f"{words}, at least {low}"
    return f"{words}, above {above}" if above is not None else words
