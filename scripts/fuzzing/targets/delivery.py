"""A bridge's reading of answers to publish: whatever comes, no event is lost or out of order."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import msgspec
import zmq

from event_bus.bridge import Bridge
from event_bus.delivery import Delivery, _Flight
from event_bus.settings import Settings

NEXT_FRAME = b"\xff\xfe"
NEXT_ANSWER = b"\xff\xff"
BATCHES = 3
EVENTS = 2


def seeds() -> list[bytes]:
    receipt = {"accepted": 2, "duplicates": 0, "rejected": 0, "conflicts": 0, "refusals": []}
    refused = {**receipt, "accepted": 1, "rejected": 1, "refusals": [{"line": 0, "reason": "r"}]}
    error = {"code": "storage_full", "message": "m", "first_seq": None}
    ack, nack = msgspec.json.encode(receipt), msgspec.json.encode(refused)

    def answer(*frames: bytes) -> bytes:
        return NEXT_FRAME.join(frames)

    acks = [answer(b"ack", b"%d" % n, ack) for n in range(1, BATCHES + 1)]
    return [
        *acks,
        NEXT_ANSWER.join(acks),
        NEXT_ANSWER.join([acks[0], answer(b"ack", b"2", nack)]),
        NEXT_ANSWER.join([acks[0], answer(b"error", b"2", msgspec.json.encode(error))]),
        answer(b"error", b"1", b"{}"),
        answer(b"batches"),
    ]


class Answers:
    """A socket that has received these messages."""

    def __init__(self, answers: list[bytes]) -> None:
        self._left = deque(answers)

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self._left:
            raise zmq.Again
        return self._left.popleft().split(NEXT_FRAME)


class Target:
    def __init__(self, home: Path) -> None:
        environ = {"BITTEN_HOME": str(home), "BITTEN_INGRESS_URL": f"ipc://{home}/in"}
        self._bridge = Bridge(Settings.load(environ=environ))

    def __call__(self, data: bytes) -> None:
        bridge = self._bridge
        bridge._reset()
        delivery = Delivery(bridge)
        sent = [b"%d" % n for n in range(BATCHES * EVENTS)]
        for number in range(BATCHES):
            lines = sent[number * EVENTS : (number + 1) * EVENTS]
            delivery._flights.append(_Flight(b"%d" % (number + 1), lines, EVENTS, 4))
        answers = data.split(NEXT_ANSWER)
        delivery._socket = Answers(answers)  # type: ignore[assignment]
        for _ in answers:
            try:
                delivery._receive()
            except Exception as e:  # noqa: BLE001 - as `run` does
                delivery._fail(f"{type(e).__name__}: {e}")
        flying = [line for f in delivery._flights for line in f.lines or []]
        waiting = flying + list(bridge.outbox.lines)
        assert waiting == sent[bridge.acked :], "an event is lost or out of order"
        acks = sum(answer.startswith(b"ack" + NEXT_FRAME) for answer in answers)
        assert bridge.acked <= acks * EVENTS, "taken for acknowledged without an ack"
