"""Event types: one JSON Schema file each, and everything that is derived from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

import schemas
from event_bus.errors import RejectedEvent, SchemaError

TOPIC_PREFIX = "bitten."
_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class Storage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `x-bitten` object of a schema: how events of the type are published and stored.

    `table` names the relation (default: the type's name), `indexes` the columns that get an
    index, `intern` the text columns whose values repeat and are stored once, `key` the field
    appended to the topic, `live_only` a type that is published and never stored.
    """

    table: str = ""
    indexes: tuple[str, ...] = ()
    intern: tuple[str, ...] = ()
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
        self.properties: dict[str, dict[str, Any]] = schema.get("properties", {})

    @cached_property
    def _validator(self) -> Any:
        import jsonschema_rs  # 12 ms: not part of importing the bridge

        return jsonschema_rs.validator_for(self.schema)

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
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise RejectedEvent(
            f"{path} of {self.name}: {error.message} (rule {rule})", rule=rule, path=path, value=shown
        )

    def topic(self, data: dict[str, Any]) -> str:
        """The topic of an event with this data: bitten.<type>, or bitten.<type>.<key>."""
        key = self.storage.key
        if key is None or key not in data:
            return TOPIC_PREFIX + self.name
        return f"{TOPIC_PREFIX}{self.name}.{data[key]}"


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
            hint="name the file with lower-case letters, digits and underscores, such as my_event.json",
        )
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise SchemaError(f"{path}: a schema is an object with \"type\": \"object\"")
    return EventType(path.stem, schema, path)


class Registry:
    """The event types known here: the built-in ones and those of `$BITTEN_HOME/schemas/`.

    A file that cannot be used is left out and named in `problems`; the other types work.
    """

    def __init__(self, own: Path | None = None) -> None:
        self.types: dict[str, EventType] = {}
        self.problems: list[SchemaError] = []
        self._own = own
        self._own_mtime_ns = 0
        self._load(schemas.DIRECTORY)
        self.refresh()

    def __iter__(self) -> Iterator[EventType]:
        return iter(self.types.values())

    def refresh(self) -> bool:
        """Take in files added to the own directory since the last look; True if there were any."""
        if self._own is None:
            return False
        try:
            mtime_ns = self._own.stat().st_mtime_ns
        except OSError:
            return False
        if mtime_ns == self._own_mtime_ns:
            return False
        self._own_mtime_ns = mtime_ns
        before = len(self.types)
        self._load(self._own)
        return len(self.types) > before

    def verify(self) -> None:
        """Leave out own types that `check_schema` refuses, naming them in `problems`."""
        for event_type in list(self):
            if event_type.path.parent == self._own:
                try:
                    check_schema(event_type)
                except SchemaError as e:
                    self.problems.append(e)
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

    def _load(self, directory: Path) -> None:
        for path in sorted(directory.glob("*.json")):
            known = self.types.get(path.stem)
            if known is not None and known.path == path:
                continue
            try:
                if known is not None:
                    raise SchemaError(
                        f"{path}: event type {path.stem} is built in", hint="choose another name"
                    )
                self.types[path.stem] = read_schema(path)
            except SchemaError as e:
                if str(e) not in map(str, self.problems):
                    self.problems.append(e)


def check_schema(event_type: EventType) -> None:
    """Check a schema against JSON Schema 2020-12 and what storage needs. Raises SchemaError."""
    import jsonschema  # 110 ms: only for those who write schemas

    try:
        jsonschema.Draft202012Validator.check_schema(event_type.schema)
    except jsonschema.SchemaError as e:
        place = ".".join(map(str, e.absolute_path)) or "the schema"
        raise SchemaError(f"{event_type.path}: {place}: {e.message}") from e
    columns = event_type.properties
    for column in columns:
        if not _COLUMN_NAME.fullmatch(column) or column.lower() in {"seq", "created_at", "received_at"}:
            raise SchemaError(
                f"{event_type.path}: property {column!r} cannot be a column",
                hint="use letters, digits and underscores, and none of seq, created_at, received_at",
            )
    if not _COLUMN_NAME.fullmatch(event_type.table):
        raise SchemaError(f"{event_type.path}: x-bitten.table: {event_type.table!r} is no table name")
    storage = event_type.storage
    for place, names in {
        "indexes": storage.indexes,
        "intern": storage.intern,
        "key": (storage.key,) if storage.key else (),
    }.items():
        for name in names:
            if name not in columns:
                raise SchemaError(
                    f"{event_type.path}: x-bitten.{place}: {name!r} is none of its properties"
                )
    for index, example in enumerate(event_type.schema.get("examples", ())):
        try:
            event_type.check(example)
        except RejectedEvent as e:
            raise SchemaError(f"{event_type.path}: examples[{index}]: {e}") from e
