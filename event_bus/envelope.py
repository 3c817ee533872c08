"""The envelope: what every event looks like on the wire and in the journal. Pure functions.

A batch is newline-delimited JSON (https://jsonlines.org): one envelope a line, each line ended
by a newline. The canonical form of a line is what `encode` makes: fields in the order of
`Envelope`, no white space, numbers in their shortest form that reads back the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from types import GenericAlias
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from event_bus.errors import RejectedEvent

MAX_EVENT_BYTES = 1 << 20
MAX_DEPTH = 64
_MAX_INTEGER = (1 << 63) - 1
_MIN_INTEGER = -(1 << 63)

Name = Annotated[str, Meta(min_length=1, max_length=255)]


class Envelope(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One event as its producer made it. `timestamp` is Unix seconds, when it happened."""

    event_id: Name
    event_type: Name
    timestamp: float
    source: Name | UnsetType = UNSET
    user_id: Name | UnsetType = UNSET
    correlation_id: Name | UnsetType = UNSET
    causation_id: Name | UnsetType = UNSET
    data: dict[str, Any]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Envelope)

encode = _encoder.encode
"""The canonical line of an envelope, without its newline."""

encode_lines = _encoder.encode_lines
"""The canonical batch of a list of envelopes."""

decode = _decoder.decode
"""The envelope of a canonical line. Only for bytes that were admitted before."""

decode_lines = _decoder.decode_lines
"""The envelopes of a canonical batch. Only for bytes that were admitted before."""

decode_readable_lines = msgspec.json.Decoder(Envelope | None).decode_lines
"""The same of a batch with `null` for events that one may not read."""

PRODUCER = re.compile(r"[0-9a-f]{20}")
"""What `new_producer` makes."""

NATIVE_ID = re.compile(rf"({PRODUCER.pattern})-([1-9][0-9]{{0,17}})")
"""An id that `new_producer` documents: its producer and its n."""

NATIVE_LINE = re.compile(rb'^\{"event_id":"%b"' % NATIVE_ID.pattern.encode(), re.MULTILINE)
"""The beginning of a canonical line with such an id."""


def _objects_of(scalar: Any) -> Any:
    """The type of an object of scalars, and of lists and objects of them, four levels deep."""
    value = scalar
    for _ in range(3):
        value = scalar | GenericAlias(list, (value,)) | GenericAlias(dict, (str, value))
    return GenericAlias(dict, (str, value))


_SCALAR: Any = Annotated[int, Meta(ge=_MIN_INTEGER, le=_MAX_INTEGER)] | str | float | bool
# An Envelope that is decoded only if no integer of it is past 64 bits and it is not deep.
_Shallow = msgspec.defstruct(
    "_Shallow",
    [("data", _objects_of(_SCALAR | None))],
    bases=(Envelope,),
    kw_only=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
)
_decode_shallow_lines: Callable[[bytes], list[Any]] = msgspec.json.Decoder(_Shallow).decode_lines
_decode_plain = msgspec.json.Decoder(_objects_of(_SCALAR)).decode


def new_producer() -> str:
    """A token for one process's events: 12 hex digits of Unix milliseconds, 8 random ones.

    Tokens sort by the time they were made. An event's id is `<token>-<n>`, n counting from 1.
    """
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(4).hex()}"


def decode_canonical(batch: bytes) -> list[Envelope] | None:
    """The envelopes of a batch, or None if any line of it is not canonical.

    None is no verdict: such a batch goes line by line through `read`. What comes back needs no
    further check of the envelope: a line equal to its own re-encoding has no repeated key, no
    NaN and no unknown field. Integers and depth are bounded by the type that is decoded, a subclass
    of Envelope, or looked at value by value in a batch with an event that this type does not allow.
    """
    try:
        try:
            events: list[Envelope] = _decode_shallow_lines(batch)
        except msgspec.ValidationError:
            events = decode_lines(batch)
            for event in events:
                check_value(event.data, "data", 1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, RejectedEvent):
        return None
    if encode_lines(events) != batch or (
        len(batch) > MAX_EVENT_BYTES and max(map(len, batch.split(b"\n"))) > MAX_EVENT_BYTES
    ):
        return None
    return events


def is_plain(payload: bytes) -> bool:
    """True if an event's encoded data are canonical, without a null, which may be a NaN in
    disguise. False is no verdict."""
    try:
        return encode(_decode_plain(payload)) == payload
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def read(line: bytes) -> Envelope:
    """The envelope of a line in any JSON spelling, checked against every limit of the protocol.

    Raises RejectedEvent naming path, value and rule.
    """
    if len(line) > MAX_EVENT_BYTES:
        raise _too_long(len(line))
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        raise RejectedEvent(
            f"not UTF-8: {e.reason} at byte {e.start}",
            rule="utf8",
            value=repr(line[e.start : e.end]),
        ) from e
    try:
        document = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError as e:
        raise _too_deep() from e
    except json.JSONDecodeError as e:
        raise RejectedEvent(
            f"not JSON: {e.msg} at character {e.pos}", rule="json", value=text[e.pos : e.pos + 20]
        ) from e
    check_value(document, "")
    if not isinstance(document, dict):
        raise RejectedEvent("an event is a JSON object", rule="type", value=text[:80])
    try:
        event = msgspec.convert(document, Envelope)
    except msgspec.ValidationError as e:
        raise _not_an_envelope(document, str(e)) from e
    size = len(encode(event))
    if size > MAX_EVENT_BYTES:  # 1e15 is written out as 1000000000000000.0
        raise _too_long(size)
    return event


def check_value(value: Any, path: str, depth: int = 0) -> None:
    """Raise RejectedEvent if a JSON value breaks a limit that JSON Schema has no word for."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise RejectedEvent(
                    f"{path or 'event'} holds a lone surrogate",
                    rule="utf8",
                    path=path,
                    value=ascii(value[:40]),
                ) from e
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RejectedEvent(
                f"{path or 'event'} is {value}: not a JSON number",
                rule="finite",
                path=path,
                value=str(value),
            )
    elif isinstance(value, int):
        if not _MIN_INTEGER <= value <= _MAX_INTEGER:
            raise RejectedEvent(
                f"{path or 'event'} is beyond 64 bits",
                rule="int64",
                path=path,
                value=hex(value)[:40],
            )
    elif isinstance(value, dict | list):
        if depth >= MAX_DEPTH:
            raise _too_deep(path[:80])
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            check_value(key, path, depth)
            check_value(item, f"{path}.{key}" if path else str(key), depth + 1)


def _too_long(size: int) -> RejectedEvent:
    return RejectedEvent(
        f"event of {size} bytes is over the limit of {MAX_EVENT_BYTES}",
        rule="maxBytes",
        value=str(size),
    )


def _not_an_envelope(document: dict[str, Any], problem: str) -> RejectedEvent:
    """What msgspec found, as a rejection that names the field and its value."""
    message, _, path = problem.partition(" - at `$")
    path = path.strip(".`")
    named = re.search(r"`(\w+)`$", message)  # a field too many, or one that is missing
    if not path and named:
        path = named[1]
    value = json.dumps(document[path])[:80] if path in document else ""
    shown = f"{path} is {value}: {message}" if value else message
    return RejectedEvent(f"envelope: {shown}", rule="envelope", path=path, value=value)


def _too_deep(path: str = "") -> RejectedEvent:
    return RejectedEvent(f"nested deeper than {MAX_DEPTH} levels", rule="maxDepth", path=path)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        shown = ascii(key[:80])  # it may hold a lone surrogate
        raise RejectedEvent(
            f"key {shown} is there twice", rule="uniqueKeys", path=shown.strip("'\"")
        )
    return result


def _constant(name: str) -> Any:
    raise RejectedEvent(f"{name} is not a JSON number", rule="finite", value=name)


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise RejectedEvent(
            f"an integer of {len(digits)} digits is beyond 64 bits", rule="int64", value=digits[:24]
        )
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RejectedEvent(
            f"{digits[:24]} is beyond a 64-bit float", rule="float64", value=digits[:24]
        )
    return value
