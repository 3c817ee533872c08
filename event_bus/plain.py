"""Plain JSON values from whatever a caller hands over. Pure functions."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from typing import Any

import msgspec

from event_bus import envelope
from event_bus.errors import RejectedEvent
from event_bus.event_schema import EventType

MAX_NAME = 255
_MAX_SHOWN = 1_000
"""Characters kept of a message that may quote the event: an account of it must fit in an event."""

_CARRIER = b'{"event_id":"-","event_type":"-","timestamp":0,"data":%b}'


def plain_data(event_type: EventType, data: Any) -> dict[str, Any]:
    """`data` as the broker will read it, checked against its schema. Raises RejectedEvent.

    Objects with an evident plain form (numpy scalars, decimals, dates, enums, dataclasses) take
    it, and None in an optional field that allows no null means that it is absent.
    """
    envelope.check_value(data, "data", 1)  # says where, which the encoder does not
    try:
        text = json.dumps(data, default=_builtin, ensure_ascii=False).encode()
    except RecursionError as e:
        raise RejectedEvent("data is nested too deep", rule="maxDepth", path="data") from e
    plain = envelope.read(_CARRIER % text).data
    required = event_type.schema.get("required", ())
    for name, schema in event_type.properties.items():
        if plain.get(name, 0) is None and name not in required and not _allows_null(schema):
            del plain[name]
    event_type.check(plain)
    return plain


def plain_name(value: Any, field: str) -> str:
    """An id or a source as text of 1 to 255 characters. Raises RejectedEvent."""
    if type(value) is str and 0 < len(value) <= MAX_NAME:
        return value
    if isinstance(value, float) and not value.is_integer():  # NaN is how pandas says "absent"
        raise RejectedEvent(f"{field} is {value}", rule="type", path=field, value=str(value))
    text = str(int(value)) if isinstance(value, float) else str(value)
    if not 0 < len(text) <= MAX_NAME:
        raise RejectedEvent(
            f"{field} has {len(text)} characters, 1 to {MAX_NAME} are allowed",
            rule="maxLength",
            path=field,
            value=text[:40],
        )
    return text


def plain_timestamp(value: Any) -> float:
    """Unix seconds. Raises RejectedEvent."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise RejectedEvent(
            "timestamp is no number of Unix seconds",
            rule="type",
            path="timestamp",
            value=as_text(value)[:80],
        )
    return seconds


def as_rejection(error: Exception) -> RejectedEvent:
    """What was raised while an event was made, as a rejection whose texts fit in an event."""
    rule, path, value = "encoding", "data", ""
    message = f"{type(error).__name__}: {as_text(error)}"
    if isinstance(error, RejectedEvent):
        rule, path, value, message = error.rule, error.path, error.value, str(error)
    return RejectedEvent(
        printable(message), rule=rule, path=printable(path), value=printable(value)
    )


def as_sent(event: dict[str, Any]) -> bytes:
    """What a caller sent, as near to JSON as it comes. Never fails."""
    try:
        return json.dumps(event, default=as_text).encode()
    except Exception:  # noqa: BLE001 - a caller's object may raise anything
        return as_text(event).encode("utf-8", "backslashreplace")


def as_text(value: Any) -> str:
    """`str` of an exception, `repr` of the rest; the type's name if that raises."""
    try:
        return str(value) if isinstance(value, Exception | decimal.Decimal) else repr(value)
    except Exception:  # noqa: BLE001 - a caller's object may raise anything
        return f"<{type(value).__name__}>"


def printable(text: str) -> str:
    """Text that is valid UTF-8, shortened to what an account of an event has room for."""
    return text[:_MAX_SHOWN].encode("utf-8", "backslashreplace").decode()


def _allows_null(schema: Any) -> bool:
    return not isinstance(schema, dict) or "null" in schema.get("type", "null")


def _builtin(value: Any) -> Any:
    """The plain value of an object that json knows nothing of. Raises TypeError."""
    if isinstance(value, decimal.Decimal):
        number = float(value)
        whole = math.isfinite(number) and abs(number) < 2.0**63 and value == int(value)
        return int(value) if whole else number
    return msgspec.to_builtins(value, builtin_types=(decimal.Decimal,), enc_hook=_foreign)


def _foreign(value: Any) -> Any:
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        return item()
    if isinstance(value, datetime.date | datetime.time):  # a subclass, such as pandas' Timestamp
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
