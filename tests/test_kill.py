"""SIGKILL in the middle of 50,000 events: all stored once, in order, seq without holes."""

from __future__ import annotations

import json
import subprocess

import pytest
from conftest import System, wait_until

EVENTS = 50_000
PUBLISHERS = 2

PUBLISH = """
import sys, time
from event_bus import event_bridge
name, count = sys.argv[1], int(sys.argv[2])
for i in range(count):
    sent = event_bridge.market_data(
        {"symbol": name, "bid": 1 + i / 100_000, "ask": 2.0, "volume": i}, source=name)
    assert sent is not None
    while event_bridge.stats()["waiting"] > 5_000:
        event_bridge.flush(0.05)
assert event_bridge.flush(60), event_bridge.stats()
"""


@pytest.mark.parametrize("victims", [("bus",), ("collect",), ("bus", "collect")])
def test_sigkill_under_load_loses_repeats_and_reorders_nothing(
    system: System, victims: tuple[str, ...]
) -> None:
    daemons = {"bus": system.start_bus(), "collect": system.start_collector()}
    each = EVENTS // PUBLISHERS
    publishers = [system.popen("-c", PUBLISH, f"P{i}", str(each)) for i in range(PUBLISHERS)]
    for share in (4, 2):  # killed twice: after about a quarter and about a half
        wait_until(lambda share=share: system.stored() > EVENTS // share // 2, "some are stored")
        for name in victims:
            daemons[name].kill()
            daemons[name].wait()
        daemons |= {name: _start(system, name) for name in victims}
    for publisher in publishers:
        output, _ = publisher.communicate(timeout=90)
        assert publisher.returncode == 0, output
    system.wait_stored()
    for i in range(PUBLISHERS):
        numbers = system.sql(
            "SELECT volume FROM market_data WHERE symbol = ? ORDER BY seq", f"P{i}"
        )
        assert [n for (n,) in numbers] == list(range(each))
    count, first, last = system.sql("SELECT count(*), min(seq), max(seq) FROM events")[0]
    assert (first, last) == (1, count)
    audit = system.bitten("audit", "--json")
    ledger = json.loads(audit.stdout)
    assert audit.returncode == 0
    assert (ledger["verdict"], ledger["holes"], ledger["waiting"]) == ("0 lost", 0, 0)


def _start(system: System, name: str) -> subprocess.Popen[str]:
    return system.start_bus() if name == "bus" else system.start_collector()
