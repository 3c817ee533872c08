"""What a fuzzer should know before it starts: events as they are sent, and the tokens of JSON."""

from __future__ import annotations

import json
from typing import Any

import schemas

TOKEN = "0123456789abcdef0123"

TOKENS = [
    *(b"{", b"}", b"[", b"]", b":", b",", b"\n", b'"', b"\\", b"null", b"true", b"false"),
    *(b"NaN", b"Infinity", b"-Infinity", b"-0.0", b"1e999", b"-1", b"0", b"1.5", b"1e15"),
    *(b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"1" + b"0" * 40),
    *(b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0"),
    *(b"'; DROP TABLE _event;--", b"\x1b[2J", b"<script>", b"[[[[[[[[", b'{"":{"":{"":'),
    *(f'"{name}":'.encode() for name in ("event_id", "event_type", "timestamp", "source", "data")),
    *(f'"{name}":'.encode() for name in ("user_id", "correlation_id", "causation_id")),
    *(b"market_data", b"user_action", b"heartbeat", b"event_rejected", f"{TOKEN}-1".encode()),
    *(b"publish", b"fetch", b"status", b"forget", b"ack", b"batches", b"error"),
    *(f'"{name}":'.encode() for name in ("from_seq", "from_time", "wait_ms", "max_bytes")),
    *(f'"{name}":'.encode() for name in ("consumer", "stored_seq", "problem", "first_seq")),
    *(b'"type":', b'"object"', b'"properties":', b'"required":', b'"x-bitten":', b'"$ref":'),
    *(
        b'"indexes":',
        b'"intern":',
        b'"decimals":',
        b'"inline":',
        b'"table":',
        b'"key":',
        b'"pattern":',
        b'"allOf":',
        b'"enum":',
    ),
]


def as_dictionary() -> str:
    """The tokens in libFuzzer's form (https://llvm.org/docs/LibFuzzer.html#dictionaries)."""
    return "".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in t)}"\n' for t in TOKENS)


def schema_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(schemas.DIRECTORY.glob("*.json"))]


def events() -> list[dict[str, Any]]:
    """One event of each example of each schema, ids counting up."""
    found: list[dict[str, Any]] = []
    for text in schema_files():
        schema = json.loads(text)
        for example in schema["examples"]:
            found.append(
                {
                    "event_id": f"{TOKEN}-{len(found) + 1}",
                    "event_type": schema["title"],
                    "timestamp": 1763699458.125,
                    "source": "s",
                    "data": example,
                }
            )
    return found


def lines() -> list[bytes]:
    """The events as canonical lines, and in other spellings."""
    return [line(e) for e in events()] + [json.dumps(e).encode() + b"\n" for e in events()]


def line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def small_line(event_id: str, **more: Any) -> bytes:
    event = {"event_id": event_id, "event_type": "user_action", "timestamp": 1.5}
    return line({**event, "data": {"action": "a", **more}})
