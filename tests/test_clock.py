"""A clock that is put forward or back, and events whose own clocks are wrong."""

from __future__ import annotations

import time

from conftest import wait_until
from test_broker import Running, Start, line, start  # noqa: F401 — a fixture

from event_bus import envelope
from event_bus.envelope import Envelope

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S


def pass_seconds(bus: Running, seconds: int) -> None:
    """So many heartbeats."""
    for _ in range(seconds):
        before = bus.client.status()["uptime_s"]
        bus.later(1.0)
        wait_until(lambda before=before: bus.client.status()["uptime_s"] > before, "a turn")


def test_clock_put_back_an_hour_changes_no_order_and_is_a_problem_until_it_catches_up(
    start: Start,  # noqa: F811
) -> None:
    bus = start()
    bus.publish(line("1"))
    bus.fetch(from_seq=1, consumer="reader")
    bus.set_clock(-3_600.0)
    pass_seconds(bus, 2)
    bus.publish(line("2"))
    status = bus.client.status()
    assert status["state"] == "clock_back"
    assert len(status["problems"]) == 1
    reply, events = bus.fetch(from_seq=1)
    named = [e["event_id"] for e in events if e["event_id"] in "12"]
    assert named == ["1", "2"]
    received = [head.received_at for head in reply.batches]
    assert received[-1] < received[0] - 3_000  # what the clock said
    assert [head.first_seq for head in reply.batches] == sorted(
        head.first_seq for head in reply.batches
    )
    bus.set_clock(3_600.0)
    pass_seconds(bus, 1)
    wait_until(lambda: bus.client.status()["state"] == "ok", "it has caught up")


def test_clock_that_jumps_forward_trims_nothing_early_and_stalls_nobody(
    start: Start,  # noqa: F811
) -> None:
    bus = start(journal_max_age_s=int(WEEK_S))
    bus.publish(line("1"))
    bus.fetch(from_seq=3, consumer="reader")
    for _ in range(2):
        bus.set_clock(8 * DAY_S)
        pass_seconds(bus, 11)
        bus.fetch(from_seq=3, consumer="reader")
        assert bus.client.status()["problems"] == []
    bus.set_clock(-16 * DAY_S)
    pass_seconds(bus, 6)
    assert bus.client.status()["first_seq"] == 1
    bus.later(WEEK_S + 10)  # a week that has passed is another matter
    wait_until(lambda: bus.client.status()["first_seq"] > 1, "trimmed by age")


def test_events_of_any_time_are_kept_and_retention_goes_by_when_they_came(
    start: Start,  # noqa: F811
) -> None:
    bus = start(journal_max_age_s=60)
    stamps = [0.0, 253_402_300_799.0, -1e12, time.time()]
    lines = [
        envelope.encode_lines(
            [
                Envelope(
                    event_id=f"t{i}", event_type="user_action", timestamp=t, data={"action": "a"}
                )
            ]
        )
        for i, t in enumerate(stamps)
    ]
    assert bus.publish(*lines)["accepted"] == 4
    bus.later(30.0)
    pass_seconds(bus, 6)
    _, events = bus.fetch(from_seq=1)
    assert [e["timestamp"] for e in events if e["event_id"][0] == "t"] == stamps
    bus.later(61.0)
    wait_until(lambda: bus.client.status()["first_seq"] > 5, "all of them are trimmed by age")
