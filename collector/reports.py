"""What the collector tells the bus about itself while it cannot store."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from event_bus import protocol
from event_bus.errors import BusRefused, BusUnavailable
from event_bus.protocol import Client, FetchRequest
from event_bus.settings import Settings

REPORT_S = 1.0


class Reports:
    """Reports of one durable consumer, one a second at the most. Never waits for the bus."""

    def __init__(self, settings: Settings, consumer: str) -> None:
        self._home = settings.home
        self._consumer = consumer
        self._client = Client(settings)
        self._asked: bytes | None = None
        self._known_seq: int | None = None
        self._due = 0.0

    def send(self, next_seq: int | None, problem: str) -> None:
        """Everything before `next_seq` is stored; if None, as much as the bus knew before."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + REPORT_S
        try:
            if self._asked is not None:
                answer = self._client.receive(self._asked, 0)
                self._asked = None
                if self._known_seq is None:
                    self._meet(answer[0])
        except (BusUnavailable, BusRefused):
            self._asked = None
        if self._known_seq is None:
            self._asked = self._client.send(protocol.STATUS)
        else:
            request = FetchRequest(
                consumer=self._consumer,
                stored_seq=self._known_seq if next_seq is None else next_seq,
                problem=problem[: protocol.MAX_PROBLEM],
            )
            self._asked = self._client.send(protocol.FETCH, msgspec.json.encode(request))

    def _meet(self, answer: bytes) -> None:
        """Another home's bus is told nothing; the caller finds out itself that it is one."""
        status = msgspec.json.decode(answer)
        if Path(status["home"]).resolve() == self._home.resolve():
            consumer = status["consumers"].get(self._consumer)
            self._known_seq = consumer["next_seq"] if consumer else 1

    def close(self) -> None:
        self._client.close()
