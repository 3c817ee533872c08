"""Event types: one JSON Schema file each, and everything that is derived from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

import schemas
from event_bus.errors import RejectedEvent, SchemaError

TOPIC_PREFIX = "bitten."
MAX_KEY_CHARACTERS = 255
MAX_DECIMALS = 8
REJECTION = "event_rejected"
BRIDGE_LOSS = "bridge_loss"
JOURNAL_LOSS = "journal_loss"
ACCOUNTS = (REJECTION, BRIDGE_LOSS)
"""What a bridge says of itself."""

OWN_TYPES = (*ACCOUNTS, JOURNAL_LOSS)
"""Stored, and made by bus and bridges alone: no caller emits them."""

_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_OWN_COLUMNS = {"seq", "created_at", "received_at"}


class Storage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `x-bitten` object of a schema: how events of the type are published and stored.

    `table` names the relation (default: the type's name), `indexes` the columns that get an
    index, `intern` the text columns whose values repeat and are stored once, `decimals` how many
    digits after the point the numbers of a column have: such are stored in half the space, others
    as they are. `inline` is for the type that most events are of: its columns are in the table of
    all events. `key` is the field appended to the topic, `live_only` a type that is published and
    never stored.
    """

    table: str = ""
    indexes: tuple[str, ...] = ()
    intern: tuple[str, ...] = ()
    decimals: dict[str, Annotated[int, Meta(ge=1, le=MAX_DECIMALS)]] = {}
    inline: bool = False
    key: str | None = None
    live_only: bool = False


class EventType:
    """One event type, made from a schema file by `read_schema`."""

    def __init__(self, name: str, schema: dict[str, Any], path: Path) -> None:
        self.name = name
        self.schema = schema
        self.path = path
        try:
            self.storage = msgspec.convert(schema.get("x-bitten", {}), Storage)
        except msgspec.ValidationError as e:
            raise SchemaError(f"{path}: x-bitten: {e}") from e
        self.table = self.storage.table or name
        # A property may be given as true or false: allowed or not, nothing more.
        self.properties: dict[str, dict[str, Any]] = {
            name: sub if isinstance(sub, dict) else {}
            for name, sub in schema.get("properties", {}).items()
        }

    @cached_property
    def _validator(self) -> Any:
        import jsonschema_rs  # 12 ms: not part of importing the bridge

        return jsonschema_rs.validator_for(self.schema, retriever=_no_retrieval)

    @cached_property
    def is_valid(self) -> Any:
        """`is_valid(data) -> bool`, the hot path; says nothing of limits that `envelope` checks."""
        return self._validator.is_valid

    def check(self, data: dict[str, Any]) -> None:
        """Raise RejectedEvent with path, value and rule if data breaks the schema."""
        error = next(iter(self._validator.iter_errors(data)), None)
        if error is None:
            return
        path = ".".join(["data", *map(str, error.instance_path)])
        rule = str(error.schema_path[-1]) if error.schema_path else "schema"
        value = msgspec.json.encode(error.instance).decode()
        message = _shortened(error.message, 300)  # it quotes the value, however long
        raise RejectedEvent(
            f"{path} of {self.name}: {message} (rule {rule})",
            rule=rule,
            path=_shortened(path, 255),
            value=_shortened(value, 80),
        )

    def topic(self, data: dict[str, Any]) -> str:
        """bitten.<type>; with a key that is an integer or a short string, bitten.<type>.<key>."""
        topic = TOPIC_PREFIX + self.name
        key = None if self.storage.key is None else data.get(self.storage.key)
        if (isinstance(key, str) and 0 < len(key) <= MAX_KEY_CHARACTERS) or type(key) is int:
            return f"{topic}.{key}"
        return topic


def read_schema(path: Path) -> EventType:
    """The event type of a schema file; the type is the file's name without `.json`.

    Raises SchemaError naming file, place and what was expected.
    """
    try:
        schema = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as e:
        raise SchemaError(f"cannot read {path}: {e}") from e
    if not _TYPE_NAME.fullmatch(path.stem):
        raise SchemaError(
            f"{path}: {path.stem!r} cannot be an event type",
            hint="name it with lower-case letters, digits and underscores, such as my_event.json",
        )
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise SchemaError(f'{path}: a schema is an object with "type": "object"')
    if not isinstance(schema.get("properties", {}), dict):
        raise SchemaError(f"{path}: properties is an object with a schema for each field")
    return EventType(path.stem, schema, path)


class Registry:
    """The event types known here: the built-in ones and those of `$BITTEN_HOME/schemas/`.

    A file that cannot be used is left out and named in `problems`; the other types work. A type
    keeps the schema it was first read with.
    """

    def __init__(self, own: Path | None = None) -> None:
        self.types: dict[str, EventType] = {}
        self._own = own
        self._problems: dict[Path, SchemaError] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        for path in schemas.DIRECTORY.glob("*.json"):
            self._load(path)
        self.refresh()

    def __iter__(self) -> Iterator[EventType]:
        return iter(self.types.values())

    @property
    def problems(self) -> list[SchemaError]:
        return list(self._problems.values())

    def refresh(self) -> bool:
        """Take in own files that are new or mended since the last look; True if any came in."""
        if self._own is None:
            return False
        before = len(self.types)
        for path in sorted(self._own.glob("*.json")):
            try:
                stat = path.stat()
            except OSError:  # removed in between
                continue
            # By file, not by directory: a file may be seen before its writer is done with it.
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._seen.get(path) != stamp:
                self._seen[path] = stamp
                self._load(path)
        return len(self.types) > before

    def verify(self) -> None:
        """Leave out own types that `check_schema` refuses, naming them in `problems`."""
        tables: dict[str, EventType] = {}
        for event_type in list(self):
            other = tables.setdefault(event_type.table.lower(), event_type)
            try:
                if event_type.path.parent == self._own:
                    check_schema(event_type)
                if other is not event_type:
                    raise SchemaError(
                        f"{event_type.path}: table {event_type.table} is that of {other.name}",
                        hint="set x-bitten.table to another name",
                    )
            except SchemaError as e:
                self._problems[event_type.path] = e
                del self.types[event_type.name]

    def get(self, name: str) -> EventType:
        """The event type of that name. Raises RejectedEvent."""
        try:
            return self.types[name]
        except KeyError:
            raise RejectedEvent(
                f"event type {name[:64]!r} is unknown (bitten schemas list shows the known ones)",
                rule="event_type",
                path="event_type",
                value=name[:64],
            ) from None

    def _load(self, path: Path) -> None:
        self._problems.pop(path, None)
        known = self.types.get(path.stem)
        if known is not None and known.path == path:
            return
        try:
            if known is not None:
                raise SchemaError(
                    f"{path}: event type {path.stem} is built in", hint="choose another name"
                )
            self.types[path.stem] = read_schema(path)
        except SchemaError as e:
            self._problems[path] = e


def check_schema(event_type: EventType) -> None:
    """Check a schema against JSON Schema 2020-12 and what storage needs. Raises SchemaError."""
    import jsonschema  # 110 ms: only for those who write schemas

    try:
        jsonschema.Draft202012Validator.check_schema(event_type.schema)
    except jsonschema.SchemaError as e:
        place = ".".join(map(str, e.absolute_path)) or "the schema"
        raise SchemaError(f"{event_type.path}: {place}: {e.message}") from e
    try:
        event_type.is_valid({})
    except ValueError as e:
        raise SchemaError(f"{event_type.path}: {str(e).splitlines()[0]}") from e
    columns = event_type.properties
    lower = [c.lower() for c in columns]
    for column in columns:
        name = column.lower()
        if not _COLUMN_NAME.fullmatch(column) or name in _OWN_COLUMNS or lower.count(name) > 1:
            raise SchemaError(
                f"{event_type.path}: property {column!r} cannot be a column",
                hint="use letters, digits and underscores, upper case or lower, and none of "
                + ", ".join(sorted(_OWN_COLUMNS)),
            )
    table = event_type.table.lower()
    if not _COLUMN_NAME.fullmatch(table) or table == "events" or table.startswith(("_", "sqlite")):
        raise SchemaError(
            f"{event_type.path}: x-bitten.table: {event_type.table!r} cannot be a table of its own",
            hint="set it to letters, digits and underscores, and no name the database uses",
        )
    storage = event_type.storage
    for place, names in {
        "indexes": storage.indexes,
        "intern": storage.intern,
        "decimals": tuple(storage.decimals),
        "key": (storage.key,) if storage.key else (),
    }.items():
        for name in names:
            if name not in columns:
                raise SchemaError(
                    f"{event_type.path}: x-bitten.{place}: {name!r} is none of its properties"
                )
    for name in storage.decimals:
        if name in storage.indexes:
            raise SchemaError(
                f"{event_type.path}: x-bitten.decimals: {name!r} is in indexes as well",
                hint="leave it out of one of them: an index would not find its numbers",
            )
    for index, example in enumerate(event_type.schema.get("examples", ())):
        try:
            event_type.check(example)
        except RejectedEvent as e:
            raise SchemaError(f"{event_type.path}: examples[{index}]: {e}") from e


def _no_retrieval(uri: str) -> Any:
    raise ValueError(f"{uri}: a schema may refer to its own parts only")


def _shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."
