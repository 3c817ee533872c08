"""Whole messages to a real broker on both of its ports: it answers or ignores, and lives on.

A case is messages of frames; the broker goes on from case to case, as it does in life.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import words
import zmq

from event_bus.broker import Broker
from event_bus.settings import Settings

NEXT_FRAME = b"\xff\xfe"
NEXT_MESSAGE = b"\xff\xff"
TO_EVENTS = b"\xff\xfd"
"""Begins a message for the events port. No UTF-8 has these bytes."""

VERBS = {b"ack", b"batches", b"status", b"forgotten", b"error"}
COUNTS = ("accepted", "duplicates", "rejected", "conflicts")
LAST = b"the last request of the case, a good event"
MAX_MESSAGES = 30
"""In a case, for the broker drops answers that are not read: libzmq notes what was read by half of
MAX_UNREAD_REPLIES, so that no more than the other half is sure to have room."""

MAX_TURNS = 1_000


def seeds() -> list[bytes]:
    def message(*frames: bytes) -> bytes:
        return NEXT_FRAME.join(frames)

    fetches = [
        {"from_seq": 1},
        {"from_seq": 1, "consumer": "c", "stored_seq": 0, "problem": "p"},
        {"from_time": 0.5, "max_bytes": 10},
        {"wait_ms": 1},
        {},
    ]
    run = b"".join(words.small_line(f"{words.TOKEN}-{n}") for n in range(1, 4))
    published = [message(b"publish", b"1", line, b'{"pid":1}') for line in [*words.lines(), run]]
    asked = [message(b"fetch", b"2", json.dumps(f).encode()) for f in fetches]
    others = [
        message(b"status", b"3"),
        message(b"", b"status", b"4"),
        message(b"forget", b"5", b"c"),
        TO_EVENTS + b"\1bitten.",
        TO_EVENTS + b"\0bitten.",
    ]
    return [*published, *asked, *others, NEXT_MESSAGE.join([published[0], *asked, *others])]


class Target:
    def __init__(self, home: Path) -> None:
        context = zmq.Context.instance()
        environ = {
            "BITTEN_HOME": str(home),
            "BITTEN_INGRESS_URL": f"ipc://{home}/in",
            "BITTEN_EVENTS_URL": f"ipc://{home}/out",
            "BITTEN_JOURNAL_MAX_BYTES": str(1 << 18),
        }
        self._broker = Broker(Settings.load(environ=environ))
        self._client = context.socket(zmq.DEALER)
        self._client.connect(self._broker.ingress_url)
        self._events = context.socket(zmq.XSUB)
        self._events.connect(self._broker.events_url)
        self._poller = zmq.Poller()
        self._poller.register(self._client, zmq.POLLIN)
        self._poller.register(self._broker._ingress, zmq.POLLIN)
        self._poller.register(self._broker._events, zmq.POLLIN)
        self._cases = 0

    def __call__(self, data: bytes) -> None:
        acked = dict.fromkeys(COUNTS, 0)
        before = msgspec.structs.asdict(self._broker.intake.totals)
        for message in data.split(NEXT_MESSAGE)[:MAX_MESSAGES]:
            if message.startswith(TO_EVENTS):
                self._events.send(message[len(TO_EVENTS) :])
            else:
                self._client.send_multipart(message.split(NEXT_FRAME))
        self._cases += 1
        last = words.small_line(f"good/{self._cases}")
        self._client.send_multipart([b"publish", LAST, last])
        while True:
            verb, request_id, *body = self._answer()
            if verb == b"":  # as a REQ socket would see it
                verb, request_id, *body = request_id, *body
            assert verb in VERBS, verb
            reply = msgspec.json.decode(body[0])
            if verb == b"ack":
                for name in COUNTS:
                    acked[name] += reply[name]
            if request_id == LAST and verb == b"ack":
                assert reply["accepted"] == 1, "a good event after the bad ones is not taken"
                break
        after = msgspec.structs.asdict(self._broker.intake.totals)
        for name in COUNTS:
            assert after[name] == before[name] + acked[name], f"{name} do not add up"
        while self._events.poll(0):
            topic, frame = self._events.recv_multipart()
            assert topic.startswith(b"bitten.")
            msgspec.json.decode(frame)

    def _answer(self) -> list[bytes]:
        for _ in range(MAX_TURNS):
            ready = dict(self._poller.poll(5_000))
            assert ready, "no answer"
            if self._client in ready:
                return self._client.recv_multipart()
            self._broker._turn()
        raise AssertionError("no answer")
