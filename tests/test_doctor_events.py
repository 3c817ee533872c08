"""`bitten doctor` on what was published: silence, refusals, losses, times, and who lags behind."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import pytest
from conftest import System, wait_until
from doctors import findings, only

from collector.doctor import Finding
from collector.store import Store
from event_bus import protocol
from event_bus.envelope import Envelope, decode_lines, encode_lines
from event_bus.event_schema import Registry
from event_bus.protocol import Client
from event_bus.subscriber import Batch

HOUR_S = 3_600.0
DAY_S = 24 * HOUR_S

JOURNAL = "0123456789abcdef"

_ids = itertools.count(1)


def event(source: str, event_type: str = "user_action", **fields: Any) -> Envelope:
    fields = {"timestamp": time.time(), "data": {"action": "x"}, **fields}
    return Envelope(
        event_id=f"0123456789abcdef0123-{next(_ids)}",
        event_type=event_type,
        source=source,
        **fields,
    )


def store(
    system: System, history: Iterable[tuple[float, Envelope]], journal_id: str = JOURNAL
) -> None:
    """Events as the collector would have stored them, each with when it was received."""
    system.settings.make_home()
    made = Store(system.db, Registry())
    batches = []
    for seq, (received_at, one) in enumerate(sorted(history, key=lambda e: e[0]), 1):
        batches.append(Batch(seq, received_at, decode_lines(encode_lines([one]))))
    made.write(batches, journal_id)
    made.close()


def every(gap_s: float, source: str, since: float, until: float) -> list[tuple[float, Envelope]]:
    count = int((until - since) / gap_s)
    return [(since + i * gap_s, event(source)) for i in range(count)]


def bus_reports(since: float, until: float) -> list[tuple[float, Envelope]]:
    health = {"component": "event_bus", "status": "ok"}
    return [
        (at, event("event_bus", "system_health", data=health))
        for at, _ in every(30.0, "", since, until)
    ]


def test_source_that_was_regular_and_has_stopped_is_silent(system: System) -> None:
    now = time.time()
    store(
        system,
        bus_reports(now - 2 * HOUR_S, now)
        + every(10.0, "feed's bot", now - 2 * HOUR_S, now - HOUR_S)
        + every(10.0, "alive", now - 2 * HOUR_S, now),
    )
    finding = only(system, "silent")
    assert finding.level == "warning"
    assert finding.what == "feed's bot has been silent for 60 minutes"
    assert "its events came every 10 seconds" in finding.why
    assert subprocess.run(["bash", "-n", "-c", finding.command], check=False).returncode == 0


@pytest.mark.parametrize("quiet_s", [250.0, 280.0])
def test_silence_below_five_minutes_is_none(system: System, quiet_s: float) -> None:
    now = time.time()
    store(
        system,
        bus_reports(now - HOUR_S, now) + every(1.0, "feed", now - 1_000, now - quiet_s),
    )
    assert findings(system, "silent") == []


def test_source_of_hourly_bursts_is_not_silent_in_between(system: System) -> None:
    now = time.time()
    bursts = [
        one
        for hour in range(1, 7)
        for one in every(0.1, "hourly", now - hour * HOUR_S, now - hour * HOUR_S + 5)
    ]
    store(system, bus_reports(now - 7 * HOUR_S, now) + bursts)
    assert findings(system, "silent") == []


def test_bus_that_was_away_accuses_no_source(system: System) -> None:
    now = time.time()
    store(
        system,
        bus_reports(now - 3 * HOUR_S, now - 2 * HOUR_S)
        + every(10.0, "feed", now - 3 * HOUR_S, now - 2 * HOUR_S)
        + bus_reports(now - 60, now),
    )
    assert findings(system, "silent") == []


@pytest.mark.parametrize(("last_week", "is_silent"), [(False, False), (True, True)])
def test_source_that_was_quiet_last_week_at_this_hour_may_be_quiet(
    system: System, *, last_week: bool, is_silent: bool
) -> None:
    now = time.time()
    then = now - 7 * DAY_S
    history = [*bus_reports(then - 2 * HOUR_S, then - HOUR_S), *bus_reports(now - 3 * HOUR_S, now)]
    history += every(60.0, "feed", now - 3 * HOUR_S, now - HOUR_S)
    if last_week:
        history += every(60.0, "feed", then - HOUR_S, then + HOUR_S)
    store(system, history)
    assert bool(findings(system, "silent")) == is_silent


def test_source_that_was_never_regular_is_not_silent(system: System) -> None:
    now = time.time()
    store(
        system,
        bus_reports(now - 2 * HOUR_S, now) + every(10.0, "shell", now - HOUR_S - 100, now - HOUR_S),
    )
    assert findings(system, "silent") == []


def test_milliseconds_are_a_fault_even_among_many_right_ones(system: System) -> None:
    now = time.time()
    wrong = event("js bot", timestamp=now * 1_000)
    many = [(now - HOUR_S + i / 10, event("feed", timestamp=now - HOUR_S)) for i in range(15_000)]
    store(system, [(now - 2 * HOUR_S, wrong), *many])
    finding = only(system, "timestamps")
    assert finding.level == "fault"
    assert finding.what.startswith("js bot sends timestamps in milliseconds: 1 event of late")
    assert finding.command.endswith("--source 'js bot'")


def test_timestamps_of_1970_are_a_warning(system: System) -> None:
    now = time.time()
    store(system, [(now - 10, event("bot", timestamp=0.0)), (now - 9, event("bot"))])
    assert "before the year 2000: 1 event of late" in only(system, "timestamps").what


def test_source_whose_clock_is_ahead_is_a_warning(system: System) -> None:
    now = time.time()
    ahead = [(now - 60 + i, event("bot", timestamp=now + 2 * HOUR_S + i)) for i in range(10)]
    store(system, [*ahead, (now - 5, event("other"))])
    finding = only(system, "timestamps")
    assert "bot sends timestamps 2 hours in the future: 10 of 10 events" in finding.what


def test_what_was_wrong_before_the_last_day_is_over(system: System) -> None:
    now = time.time()
    refusal = {"reason": "no", "rule": "type", "raw": "", "raw_bytes": 0}
    loss = {"producer": "p", "dropped": 3, "reason": "spool full"}
    at = now - 2 * DAY_S
    store(
        system,
        [
            (at, event("bot", timestamp=at * 1_000)),
            (at, event("bot", "event_rejected", data=refusal)),
            (at, event("bot", "bridge_loss", data=loss)),
            (now, event("bot")),
        ],
    )
    for check in ("timestamps", "refused", "dropped"):
        assert findings(system, check) == []


def test_clock_that_went_back_shows_in_received_at(system: System) -> None:
    system.settings.make_home()
    now = time.time()
    made = Store(system.db, Registry())
    for seq, at in enumerate([now - 100, now - 50, now - 3_650, now - 3_000], 1):
        made.write([Batch(seq, at, decode_lines(encode_lines([event("bot")])))], "journal")
    made.close()
    finding = only(system, "clock-steps")
    assert finding.level == "warning"
    assert finding.what.startswith("the clock went back by 60 minutes, to ")


def test_events_received_in_the_future_mean_that_the_clock_went_back(system: System) -> None:
    store(system, [(time.time() + DAY_S, event("bot"))])
    finding = only(system, "clock-steps")
    assert finding.level == "fault"
    assert "received 24 hours from now" in finding.what


def test_refused_events_are_counted_by_type_and_source_with_the_reason(running: System) -> None:
    for confidence in (150, 160):
        refused = running.bitten(
            *("emit", "signal_generated", "signal_id=1", "symbol=EURUSD", "direction=BUY"),
            *(f"confidence={confidence}", "pattern_type=x"),
        )
        assert refused.returncode == 1
    wait_until(lambda: findings(running, "refused"), "the refusals are stored")
    wait_until(lambda: only(running, "refused").what.startswith("2 "), "both are stored")
    finding = only(running, "refused")
    assert finding.what.startswith("2 signal_generated of ")
    assert "confidence" in finding.why
    shown = subprocess.run(finding.command, shell=True, capture_output=True, text=True, check=True)
    assert "confidence" in shown.stdout


PUBLISHING = """
import time
from event_bus import event_bridge as b
b.emit("user_action", {"action": "x"}, source="bot")
while "may publish nothing" not in b.stats()["last_error"]: time.sleep(0.01)
print(flush=True)
time.sleep(100)
"""


def test_key_that_publishes_and_may_not_is_a_fault_with_the_command_that_lets_it(
    system: System,
) -> None:
    system.bitten("keys", "new")
    system.bitten("keys", "allow", "client", "--subscribe", "*")
    system.start_bus()
    system.start_collector()
    assert findings(system, "keys") == []
    process = system.popen("-c", PUBLISHING)
    assert process.stdout is not None
    process.stdout.readline()
    finding = only(system, "keys")
    assert finding.level == "fault"
    assert finding.what.startswith("the key client may publish nothing, and has tried to")
    command = finding.command.partition(" keys ")[2]
    assert command == "allow client --publish '*' --subscribe '*'"
    assert system.bitten("keys", *shlex.split(command)).returncode == 0
    wait_until(lambda: system.stored() and not findings(system, "keys"), "the events are stored")


def test_events_that_wait_for_a_right_are_told_apart_from_a_bus_out_of_reach(
    system: System,
) -> None:
    system.bitten("keys", "new")
    system.bitten("keys", "allow", "client", "--subscribe", "*")
    system.start_bus()
    system.environ["BITTEN_OUTBOX_MAX_EVENTS"] = "2"
    process = system.popen("-c", PUBLISHING.replace("b.emit", "for _ in range(9): b.emit"))
    assert process.stdout is not None
    process.stdout.readline()
    wait_until(lambda: findings(system, "spool", later_s=3_600), "they are in the spool")
    finding = only(system, "spool", later_s=3_600)
    assert "the key client may publish nothing" in finding.why
    assert finding.command.endswith(" keys allow client --publish '*' --subscribe '*'")


def test_events_refused_for_a_right_are_told_which_key_lacks_it(system: System) -> None:
    system.bitten("keys", "new")
    system.bitten("keys", "allow", "client", "--publish", "market_data", "--subscribe", "*")
    system.start_bus()
    system.start_collector()
    assert system.bitten("emit", "user_action", "action=x").returncode == 1
    wait_until(lambda: system.stored() and findings(system, "refused"), "the refusal is stored")
    finding = only(system, "refused")
    assert "the key client may not publish user_action" in finding.why
    assert "`bitten keys allow" in finding.remedy
    assert finding.command.endswith(" keys list")


def test_bus_whose_status_this_homes_key_may_not_ask_is_not_taken_for_a_hanging_one(
    system: System,
) -> None:
    system.bitten("keys", "new")
    system.start_bus()
    system.bitten("keys", "allow", "client", "--publish", "*")
    wait_until(lambda: "may not ask" in only(system, "bus").what, "the right is gone")
    finding = only(system, "bus")
    assert "kill" not in finding.command
    assert finding.command.endswith(" keys allow client --publish '*' --subscribe '*'")


def test_dropped_events_are_a_fault(system: System) -> None:
    system.environ["BITTEN_SPOOL_MAX_BYTES"] = "1000"
    system.environ["BITTEN_OUTBOX_MAX_EVENTS"] = "5"
    system.environ["BITTEN_SOURCE"] = "bot"
    code = "from event_bus.event_bridge import emit\n"
    code += "for _ in range(1000): emit('user_action', {'action': 'x' * 100})"
    assert system.script(code).returncode == 0
    system.start_bus()
    system.start_collector()
    wait_until(lambda: system.stored() and findings(system, "dropped"), "the loss is announced")
    finding = only(system, "dropped")
    assert finding.level == "fault"
    assert "bot dropped " in finding.what


def test_own_type_without_an_event_is_a_warning_after_a_day(running: System) -> None:
    running.settings.schemas.mkdir(exist_ok=True)
    schema = running.settings.schemas / "margin_call.json"
    schema.write_text('{"type": "object", "properties": {"level": {"type": "number"}}}')
    assert findings(running, "never-seen") == []
    old = time.time() - 3 * DAY_S
    os.utime(schema, (old, old))
    finding = only(running, "never-seen")
    assert "no event of your type margin_call was ever stored" in finding.what
    assert running.bitten("emit", "margin_call", "level=1").returncode == 0
    running.wait_stored()
    assert findings(running, "never-seen") == []


def test_schema_that_cannot_be_used_is_a_fault(system: System) -> None:
    system.settings.make_home()
    system.settings.schemas.mkdir(exist_ok=True)
    (system.settings.schemas / "broken.json").write_text("{")
    finding = only(system, "schemas")
    assert finding.level == "fault"
    assert "broken.json" in finding.what


def test_collector_that_is_not_running_is_a_fault(bus: System) -> None:
    assert "the collector is not running" in only(bus, "collector").what


def test_collector_that_is_stopped_is_a_fault(running: System) -> None:
    collector = running.processes[1]
    collector.send_signal(signal.SIGSTOP)
    finding = only(running, "collector")
    assert finding.what.startswith(f"the collector is stopped: process {collector.pid}")
    assert finding.command == f"kill -CONT {collector.pid}"


def test_collector_that_asks_another_address_is_a_fault(bus: System) -> None:
    here = bus.environ["BITTEN_INGRESS_URL"]
    bus.environ["BITTEN_INGRESS_URL"] = "tcp://127.0.0.1:1"
    collector = bus.start_collector()
    bus.environ["BITTEN_INGRESS_URL"] = here
    wait_until(
        lambda: "has never asked this bus" in only(bus, "collector", later_s=60).what,
        "the collector holds its lock",
    )
    assert f"process {collector.pid} (" in only(bus, "collector", later_s=60).what


def ask_as(system: System, consumer: str, **more: Any) -> None:
    client = Client(system.settings)
    body = b'{"from_seq": 1, "consumer": "%b"' % consumer.encode()
    for key, value in more.items():
        body += b', "%b": "%b"' % (key.encode(), value.encode())
    client.receive(client.send(protocol.FETCH, body + b"}"), 5.0)
    client.close()


def test_consumer_that_does_not_ask_any_more_can_be_let_go(running: System) -> None:
    ask_as(running, "it's gone")

    def gone() -> list[Finding]:
        found = findings(running, "lag", later_s=2 * DAY_S)
        return [f for f in found if f.what.startswith("consumer it's gone is ")]

    (finding,) = gone()
    assert finding.level == "warning"
    assert "has not asked since " in finding.what
    done = subprocess.run(
        finding.command.replace("bitten ", f"{sys.executable} -m event_bus ", 1),
        shell=True,
        env=running.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "is forgotten" in done.stdout, done.stderr
    assert gone() == []


def test_collector_far_behind_is_a_fault(running: System) -> None:
    running.processes[1].send_signal(signal.SIGSTOP)
    assert running.bitten("emit", "user_action", "action=y").returncode == 0
    finding = only(running, "lag", later_s=2 * HOUR_S)
    assert finding.level == "fault"
    assert finding.what.startswith("consumer data_collector is ")
    assert " events behind, 2 hours, and has not asked since " in finding.what


def test_what_the_bus_says_of_itself_is_passed_on(bus: System) -> None:
    ask_as(bus, "mirror", problem="its disk is full")
    wait_until(lambda: findings(bus, "bus-problems"), "the bus has looked at itself")
    finding = only(bus, "bus-problems")
    assert "consumer_problem" in finding.what
    assert "its disk is full" in finding.what


def test_bus_with_few_descriptors_left_is_a_fault(system: System) -> None:
    system.start_bus()
    (process,) = system.processes
    limits = ["prlimit", "--pid", str(process.pid), "--nofile=64:64"]
    subprocess.run(limits, check=True)
    assert only(system, "descriptors").level == "warning"  # few, but not used up
    port = int(system.environ["BITTEN_INGRESS_URL"].rpartition(":")[2])
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(38)]
    try:
        wait_until(
            lambda: only(system, "descriptors").level == "fault", "the connections are accepted"
        )
    finally:
        for connection in connections:
            connection.close()


def test_history_without_a_backup_is_a_warning_after_a_day(stored_for_days: System) -> None:
    system = stored_for_days
    finding = only(system, "backups")
    assert finding.level == "warning"
    assert finding.what == "there is no backup"
    made = system.bitten("backup")
    assert made.returncode == 0, made.stderr
    assert findings(system, "backups") == []
    assert only(system, "backups", later_s=10 * DAY_S).what == "the newest backup is 10 days old"


def test_backup_by_the_clock_that_did_not_come_is_a_warning(stored_for_days: System) -> None:
    system = stored_for_days
    assert system.bitten("backup").returncode == 0
    system.environ["BITTEN_BACKUP_INTERVAL_S"] = "3600"
    assert findings(system, "backups", later_s=HOUR_S) == []
    assert only(system, "backups", later_s=3 * HOUR_S).what == "the newest backup is 3 hours old"


@pytest.fixture
def stored_for_days(system: System) -> System:
    """A home with a journal, and events of the last three days in its database."""
    system.start_bus()
    status = system.status()
    assert status is not None
    store(system, [(time.time() - 3 * DAY_S, event("bot"))], status["journal_id"])
    return system
