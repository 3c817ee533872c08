"""Values of events by column, and which events the columns cannot give back exactly. Pure."""

from __future__ import annotations

import base64
import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from collector.relations import Relation

Names = Mapping[str | None, int | None]
"""A text to its id in the table `_name`, and None to None."""

Stored = tuple[list[Any], bool]
"""What goes into a column, and whether every value can be made of it again."""


def rows(
    relation: Relation, datas: list[dict[str, Any]], names: Names
) -> tuple[list[list[Any]], list[int]]:
    """Values by column for events of one type, and which of the events need their JSON kept.

    Column by column, because a list comprehension over one column costs a tenth of a loop over
    events (`scripts/bench`).
    """
    columns, exact = _columns(relation, datas, names)
    if exact:
        return columns, []
    misfits = [i for i, data in enumerate(datas) if not _columns(relation, [data], names)[1]]
    return columns, misfits


def _columns(
    relation: Relation, datas: list[dict[str, Any]], names: Names
) -> tuple[list[list[Any]], bool]:
    columns = []
    exact = True
    present = 0
    for c, values in zip(relation.columns, _values(relation, datas), strict=True):
        present += len(values) - values.count(None)
        if c.kind == "decimal":
            stored, fits = _decimal(values, 10.0**c.digits)
        else:
            stored, fits = _STORE[c.kind](values, names)
        exact = exact and fits
        columns.append(stored)
    return columns, exact and present == sum(map(len, datas))


def _values(relation: Relation, datas: list[dict[str, Any]]) -> Iterable[list[Any]]:
    names = [c.name for c in relation.columns]
    if len(names) > 1:
        with contextlib.suppress(KeyError):  # faster, where no field is left out
            return map(list, zip(*map(operator.itemgetter(*names), datas), strict=True))
    return [[data.get(name) for data in datas] for name in names]


def _text(values: list[Any], names: Names) -> Stored:
    different = set(values) if set(map(type, values)) <= {str, type(None)} else None
    if different is None:
        return [_shown(v) for v in values], False
    return values, not any("\0" in v for v in different if v)


def _name(values: list[Any], names: Names) -> Stored:
    values, fits = _text(values, names)
    if not fits:
        values = [None if v is None else _text_of(v) for v in values]
    return [names[v] for v in values], fits


def _number(values: list[Any], names: Names) -> Stored:
    kinds = set(map(type, values))
    if not kinds <= {float, int, type(None)}:
        return [_shown(v) for v in values], False
    floats = values if kinds == {float} else [v for v in values if type(v) is float]
    return values, not floats or _print_exactly(floats)


def _decimal(values: list[Any], scale: float) -> Stored:
    if set(map(type, values)) == {float} and min(values) > 0 and max(values) * scale < _MAX_SCALED:
        scaled = list(map(round, [v * scale for v in values]))
        if [n / scale for n in scaled] == values:  # division rounds as reading a decimal does
            return scaled, True
    stored = [_one_decimal(v, scale) for v in values]
    return [value for value, _ in stored], all(fits for _, fits in stored)


def _one_decimal(value: Any, scale: float) -> tuple[Any, bool]:
    if type(value) is float:
        if abs(value) * scale < _MAX_SCALED and not _is_minus_zero(value):
            scaled = round(value * scale)
            if scaled / scale == value:
                return scaled, True
        return value, not value.is_integer() and _print_exactly([value])
    if type(value) is int:
        return float(value), abs(value) < _MAX_SCALED
    return (value, True) if value is None else (_text_of(value), False)


def _integer(values: list[Any], names: Names) -> Stored:
    fits = set(map(type, values)) <= {int, type(None)}
    return (values if fits else [_shown(v) for v in values]), fits


def _boolean(values: list[Any], names: Names) -> Stored:
    fits = set(map(type, values)) <= {bool, type(None)}
    return (values if fits else [_shown(v) for v in values]), fits


def _scalar(values: list[Any], names: Names) -> Stored:
    _, texts = _text([v for v in values if type(v) is str], names)
    _, numbers = _number([v for v in values if type(v) is not str], names)
    return [_shown(v) for v in values], texts and numbers


def _as_json(values: list[Any], names: Names) -> Stored:
    return [None if v is None else _json(v) for v in values], True


def _bytes(values: list[Any], names: Names) -> Stored:
    return [None if v is None else _decoded(v) for v in values], values.count(None) == len(values)


_MAX_SCALED = 1e15
"""SQLite prints 15 significant digits."""

_STORE: dict[str, Callable[[list[Any], Names], Stored]] = {
    "text": _text,
    "name": _name,
    "bytes": _bytes,
    "number": _number,
    "integer": _integer,
    "scalar": _scalar,
    "boolean": _boolean,
    "json": _as_json,
}


def _print_exactly(floats: list[float]) -> bool:
    """True if SQLite's 15 significant digits give every float back.

    A float that equals a whole number of 1e-8 below 1e15 of them has at most 15 digits. Prices
    pass that test, and it costs a third of printing them. Minus zero never comes back.
    """
    if (
        min(floats) > 0
        and max(floats) < 1e7
        and [n / 1e8 for n in map(round, [v * 1e8 for v in floats])] == floats
    ):
        return True
    return all(float(f"{v:.15g}") == v and not _is_minus_zero(v) for v in floats)


def _is_minus_zero(value: float) -> bool:
    return value == 0 and str(value) != "0.0"


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _shown(value: Any) -> Any:
    """What a column shows of a value that is not of its kind."""
    return value if value is None or isinstance(value, str | int | float) else _json(value)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _decoded(value: Any) -> str | bytes:
    """Bytes of a base64 text: as text where they are UTF-8 without NUL."""
    if not isinstance(value, str):
        return _json(value)
    try:
        raw = base64.b64decode(value, validate=True)
    except ValueError:
        return value
    try:
        return raw if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return raw
