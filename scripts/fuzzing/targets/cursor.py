"""A subscriber's reading of answers to fetch: in order without gap or repeat, or an error."""

from __future__ import annotations

from pathlib import Path

import msgspec
import words

from event_bus.errors import BusRefused
from event_bus.subscriber import Cursor

NEXT_FRAME = b"\xff\xfe"
NEXT_ANSWER = b"\xff\xff"


def seeds() -> list[bytes]:
    def answer(from_seq: int, *batches: tuple[int, int]) -> bytes:
        head = {
            "from_seq": from_seq,
            "batches": [[first, count, 1.5] for first, count in batches],
            "first_seq": 1,
            "last_seq": 9,
            "journal_id": "j",
            "epoch": 1,
        }
        bodies = [
            b"".join(words.small_line(f"{words.TOKEN}-{first + i}") for i in range(count))
            for first, count in batches
        ]
        return NEXT_FRAME.join([msgspec.json.encode(head), *bodies])

    return [
        answer(1),
        answer(1, (1, 2)),
        answer(2, (1, 2), (3, 1)),
        NEXT_ANSWER.join([answer(1, (1, 2)), answer(3, (3, 2), (5, 1)), answer(6, (5, 2))]),
    ]


class Target:
    def __init__(self, home: Path) -> None:
        pass

    def __call__(self, data: bytes) -> None:
        cursor = Cursor(next_seq=1, consumer="c")
        for answer in data.split(NEXT_ANSWER):
            expected = cursor.next_seq
            try:
                batches = cursor.take(answer.split(NEXT_FRAME))
            except BusRefused:
                assert cursor.next_seq == expected, "an answer that was refused moved the cursor"
                continue
            for batch in batches:
                assert batch.first_seq == expected, "a gap or a repeat"
                expected += len(batch.events)
            assert cursor.next_seq == expected
            msgspec.json.decode(cursor.request())
