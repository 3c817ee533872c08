"""Text that cannot harm a terminal."""

from __future__ import annotations

import re
from typing import Any

import msgspec

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(value: Any) -> str:
    """A value as text on one line: control and direction characters shown as escapes."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    elif isinstance(value, dict | list):
        value = msgspec.json.encode(value).decode()
    text = "" if value is None else str(value)
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """Text of several lines, each `printable`; JSON stays the same JSON."""
    return "\n".join(
        _CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", line) for line in text.split("\n")
    )
