"""The bridge in whole processes: imports, exits, forks and environments that are no good."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import System, wait_until

PACKAGE = Path(__file__).resolve().parent.parent / "event_bus"

SEED_TEST = """
from event_bridge import signal_generated
signal_generated({
    'signal_id': 'TEST_001',
    'symbol': 'EURUSD', 
    'direction': 'BUY',
    'confidence': 85.0,
    'pattern_type': 'LIQUIDITY_SWEEP_REVERSAL'
})
print('Test event published')
"""  # noqa: W291 - word for word

SEED_INTEGRATION = """
signal_id, symbol, direction, confidence = 'S1', 'EURUSD', 'BUY', 85.0
pattern_type, fire_id, lot_size, user_id, ticket, volume, price = 'P', 'F1', 0.1, 7, 42, 0.1, 1.0845
from event_bus.event_bridge import signal_generated, fire_command, trade_executed
# Signal generation
signal_generated({
    'signal_id': signal_id,
    'symbol': symbol,
    'direction': direction,
    'confidence': confidence,
    'pattern_type': pattern_type
})

# Fire command
fire_command({
    'fire_id': fire_id,
    'signal_id': signal_id,
    'symbol': symbol,
    'direction': direction,
    'lot_size': lot_size
}, user_id=user_id)

# Trade execution
trade_executed({
    'fire_id': fire_id,
    'ticket': ticket,
    'symbol': symbol,
    'volume': volume,
    'open_price': price
})
"""

EMIT_100 = """
import os, sys
from event_bus import event_bridge as b
for n in range(100):
    b.user_action({'action': 'n', 'n': n, 'process': 'parent'})
"""

EMIT_IN_CHILD = """
def child(name='child', count=100):
    for n in range(count):
        b.user_action({'action': 'n', 'n': n, 'process': name})
"""


def wait_delivered(system: System) -> list[tuple[Any, ...]]:
    """Wait until nothing is left in the spool and all is stored; (event_type, data) in order."""
    spool = system.settings.spool
    wait_until(lambda: not list(spool.glob("*")), "the spool is empty")
    system.start_collector()
    system.wait_stored()
    return system.sql(
        "SELECT event_type, data FROM events WHERE source <> 'event_bus' ORDER BY seq"
    )


def numbers_by_process(rows: list[tuple[Any, ...]]) -> dict[str, list[int]]:
    result: dict[str, list[int]] = {}
    for event_type, text in rows:
        assert event_type == "user_action", text
        data = msgspec.json.decode(text)
        result.setdefault(data["process"], []).append(data["n"])
    return result


def test_seed_example_from_inside_the_folder(bus: System) -> None:
    done = bus.script(SEED_TEST, cwd=PACKAGE)
    assert done.stdout == "Test event published\n", done.stderr
    assert not done.stderr
    assert [t for t, _ in wait_delivered(bus)] == ["signal_generated"]


def test_seed_integration_examples_from_any_directory(bus: System, tmp_path: Path) -> None:
    done = bus.script(SEED_INTEGRATION, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = wait_delivered(bus)
    assert [t for t, _ in rows] == ["signal_generated", "fire_command", "trade_executed"]
    assert bus.sql("SELECT user_id FROM events WHERE event_type = 'fire_command'") == [("7",)]


def test_both_module_names_share_one_bridge(system: System) -> None:
    done = system.script(
        "import event_bridge, event_bus.event_bridge as e\n"
        "event_bridge.disable(); print(e.user_action({'action': 'a'}), e.stats()['enabled'])\n"
        "event_bridge.enable(); e.user_action({'action': 'a'})\n"
        "print(event_bridge.stats()['emitted'])",
        cwd=PACKAGE,
    )
    assert done.stdout.split() == ["None", "False", "1"], done.stderr


def test_short_script_is_delivered_before_it_ends(bus: System) -> None:
    bus.script(EMIT_100)
    status = bus.status()
    assert status is not None
    assert status["accepted"] >= 100
    assert not list(bus.settings.spool.glob("*"))


def test_refused_event_ends_in_rejected_events_with_reason_and_raw(bus: System) -> None:
    done = bus.script(
        "from event_bus import event_bridge as b\n"
        "print(b.market_data({'symbol': 'EURUSD', 'bid': float('nan'), 'ask': 1}, source='feed'))\n"
        "print(b.emit('no_such_type', {'x': object()}))\n"
    )
    assert done.stdout.split() == ["None", "None"]
    assert len(re.findall("refused", done.stderr)) == 2
    wait_delivered(bus)
    rows = bus.sql("SELECT reason, rule, source, event_type, raw FROM rejected_events ORDER BY seq")
    (reason, rule, source, event_type, raw), second = rows
    assert ("data.bid" in reason, rule, source, event_type) == (
        True,
        "finite",
        "feed",
        "market_data",
    )
    assert '"bid": NaN' in (raw.decode() if isinstance(raw, bytes) else raw)
    assert second[1] == "event_type"


EXITS = {
    "return": "",
    "exception": "raise ValueError('x')",
    "sys.exit": "sys.exit(3)",
    "exit in a thread": "import threading\nthreading.Thread(target=sys.exit).start()",
    "daemon threads": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
}


@pytest.mark.parametrize("bus_is", ["up", "away"])
@pytest.mark.parametrize("way", EXITS)
def test_nothing_is_lost_however_a_process_exits(system: System, way: str, bus_is: str) -> None:
    if bus_is == "up":
        system.start_bus()
    begin = time.monotonic()
    done = system.script(EMIT_100 + EXITS[way])
    assert time.monotonic() - begin < 2, done
    assert ("Error" in done.stderr) == (way == "exception"), done.stderr
    if bus_is == "away":
        system.start_bus()
    assert numbers_by_process(wait_delivered(system)) == {"parent": list(range(100))}


@pytest.mark.parametrize("bus_is", ["up", "away"])
def test_events_of_exit_handlers_before_and_after_the_bridges_own_arrive(
    system: System, bus_is: str
) -> None:
    if bus_is == "up":
        system.start_bus()
    before_the_import = "import atexit\natexit.register(lambda: child('runs last', 3))\n"
    after_it = "atexit.register(lambda: child('runs first', 3))\n"
    done = system.script(before_the_import + EMIT_100 + EMIT_IN_CHILD + after_it)
    assert (done.returncode, done.stderr) == (0, "")
    if bus_is == "away":
        system.start_bus()
    assert numbers_by_process(wait_delivered(system)) == {
        "parent": list(range(100)),
        "runs first": [0, 1, 2],
        "runs last": [0, 1, 2],
    }


def test_process_exits_in_time_while_the_broker_hangs(bus: System) -> None:
    bus.processes[0].send_signal(19)  # SIGSTOP
    begin = time.monotonic()
    done = bus.script(EMIT_100)
    assert time.monotonic() - begin < 2, done
    assert len(list(bus.settings.spool.glob("*"))) == 1
    bus.processes[0].send_signal(18)  # SIGCONT
    assert numbers_by_process(wait_delivered(bus)) == {"parent": list(range(100))}


def test_what_a_full_spool_cannot_take_at_exit_is_announced(system: System) -> None:
    done = system.script(EMIT_100, env={"BITTEN_SPOOL_MAX_BYTES": "1000"})
    assert "100 events are lost" in done.stderr
    system.start_bus()
    ((event_type, data),) = wait_delivered(system)
    assert (event_type, msgspec.json.decode(data)["dropped"]) == ("bridge_loss", 100)


FORKS = {
    "at once": (
        "pid = os.fork()\nif pid == 0:\n    child()\n    sys.exit()\n"
        "child('after')\nos.waitpid(pid, 0)\n"
    ),
    "after a flush": (
        "b.flush(1)\npid = os.fork()\nif pid == 0:\n    child()\n    sys.exit()\n"
        "child('after')\nos.waitpid(pid, 0)\n"
    ),
    "twice": (
        "pid = os.fork()\nif pid == 0:\n    child('first')\n    grandchild = os.fork()\n"
        "    if grandchild == 0:\n        child()\n        sys.exit()\n"
        "    os.waitpid(grandchild, 0)\n    sys.exit()\nchild('after')\nos.waitpid(pid, 0)\n"
    ),
}


@pytest.mark.parametrize("bus_is", ["up", "away"])
@pytest.mark.parametrize("fork", FORKS)
def test_forked_child_and_parent_both_emit_and_lose_nothing(
    system: System, fork: str, bus_is: str
) -> None:
    if bus_is == "up":
        system.start_bus()
    done = system.script(EMIT_100 + EMIT_IN_CHILD + FORKS[fork], timeout=15)
    assert (done.returncode, done.stderr) == (0, "")
    if bus_is == "away":
        system.start_bus()
    seen = numbers_by_process(wait_delivered(system))
    assert {"parent", "child", "after"} <= set(seen)
    assert all(n == list(range(100)) for n in seen.values()), seen


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("bus_is", ["up", "away"])
def test_multiprocessing_children_lose_nothing(
    system: System, tmp_path: Path, method: str, bus_is: str
) -> None:
    if bus_is == "up":
        system.start_bus()
    script = tmp_path / "workers.py"
    script.write_text(
        "import multiprocessing as m\nfrom event_bus import event_bridge as b\n"
        + EMIT_IN_CHILD
        + "if __name__ == '__main__':\n"
        "    child('parent')\n"
        f"    context = m.get_context('{method}')\n"
        "    children = [context.Process(target=child, args=(f'c{n}',)) for n in range(2)]\n"
        "    [c.start() for c in children]; [c.join() for c in children]\n"
        "    print([c.exitcode for c in children])\n"
    )
    done = system.run(str(script))
    assert done.stdout == "[0, 0]\n", done
    if bus_is == "away":
        system.start_bus()
    seen = numbers_by_process(wait_delivered(system))
    assert seen == {name: list(range(100)) for name in ("parent", "c0", "c1")}


def test_fork_during_events_of_other_threads_never_blocks_the_child(bus: System) -> None:
    done = bus.script(
        EMIT_100 + EMIT_IN_CHILD + "import threading\n"
        "stop = threading.Event()\n"
        "def noise():\n"
        "    while not stop.is_set(): child('noise', 10)\n"
        "threads = [threading.Thread(target=noise) for _ in range(4)]\n"
        "[t.start() for t in threads]\n"
        "codes = []\n"
        "for n in range(10):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        child(f'c{n}', 5)\n"
        "        os._exit(0 if b.flush(5) else 1)\n"
        "    codes.append(os.waitpid(pid, 0)[1])\n"
        "stop.set(); [t.join() for t in threads]\n"
        "print(codes)\n",
        timeout=60,
    )
    assert done.stdout == f"{[0] * 10}\n", done


def test_signal_handler_may_emit_in_the_middle_of_an_emit(bus: System) -> None:
    done = bus.script(
        "import signal\n" + EMIT_100 + "signal.signal(signal.SIGALRM, lambda *_: b.system_health("
        "{'component': 'handler', 'status': 'ok'}))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)\n"
        "for n in range(20_000): b.user_action({'action': 'a'})\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "print(b.flush(10), b.stats()['emitted'] > 20_100)\n",
        timeout=20,
    )
    assert done.stdout == "True True\n", done


BAD_ENVIRONMENTS: dict[str, dict[str, str]] = {
    "number": {"BITTEN_OUTBOX_MAX_EVENTS": "abc"},
    "url": {"BITTEN_EVENTS_URL": "nonsense"},
    "boolean": {"BITTEN_ENABLED": "perhaps"},
    "source too long": {"BITTEN_SOURCE": "x" * 1_000},
    "source not UTF-8": {"BITTEN_SOURCE": "\udcff"},
}


@pytest.mark.parametrize("kind", BAD_ENVIRONMENTS)
def test_unusable_setting_is_left_out_and_the_others_hold(bus: System, kind: str) -> None:
    done = bus.script(
        "from event_bus import event_bridge as b\n"
        "print(bool(b.user_action({'action': 'a'})), b.flush(5))",
        env=BAD_ENVIRONMENTS[kind],
    )
    assert done.stdout == "True True\n", done
    (name,) = BAD_ENVIRONMENTS[kind]
    assert name in done.stderr


@pytest.mark.parametrize("content", [b"outbox_max_events: [", b"\xff\xfe", b"nonsense: 1", b"- 1"])
def test_unusable_config_file_does_not_fail_an_import(bus: System, content: bytes) -> None:
    (bus.home / "config.yaml").write_bytes(content)
    done = bus.script(
        "from event_bus import event_bridge as b\n"
        "print(bool(b.user_action({'action': 'a'})), b.flush(5))"
    )
    assert done.stdout == "True True\n", done


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null", "/dev/null/x"])
def test_home_that_cannot_exist_does_not_fail_a_call(bus: System, home: str) -> None:
    done = bus.script(
        "from event_bus import event_bridge as b\n"
        "print(bool(b.user_action({'action': 'a'})), b.flush(5))",
        env={"BITTEN_HOME": home},
    )
    assert done.stdout == "True True\n", done


def test_own_schema_that_breaks_the_registry_leaves_the_spool_where_the_bus_looks(
    system: System,
) -> None:
    (system.home / "schemas").mkdir(parents=True)
    deep = '{"type":"object","properties":' + '{"a":' * 100_000 + "1" + "}" * 100_001
    (system.home / "schemas" / "deep.json").write_text(deep)
    done = system.script("from event_bus import event_bridge as b\nb.user_action({'action': 'a'})")
    assert "goes on without it" in done.stderr
    assert len(list(system.settings.spool.glob("*.ndjson"))) == 1


def test_user_without_a_home_directory_can_emit(bus: System) -> None:
    environ = {k: v for k, v in bus.environ.items() if k not in ("HOME", "BITTEN_HOME")}
    code = (
        "import os; os.setreuid(54321, -1)\n"  # pathlib asks for the real user's home
        "from event_bus import event_bridge as b\n"
        "print(bool(b.user_action({'action': 'a'})), b.flush(5), flush=True); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=20
    )
    if "PermissionError" in done.stderr:
        pytest.skip("only root can become somebody without a home")
    assert done.stdout == "True True\n", done


def test_disabled_by_the_environment_does_nothing(system: System) -> None:
    done = system.script(
        "from event_bus import event_bridge as b\n"
        "print(b.user_action({'action': 'a'}), b.stats()['emitted'])\n"
        "b.enable(); print(bool(b.user_action({'action': 'a'})))",
        env={"BITTEN_ENABLED": "0"},
    )
    assert done.stdout.split() == ["None", "0", "True"], done


def test_source_is_the_scripts_name_or_pm2s(system: System, tmp_path: Path) -> None:
    show = "from event_bus import event_bridge as b; print(b.stats()['source'])"
    script = tmp_path / "signal_engine.py"
    script.write_text(show)
    assert system.run(str(script)).stdout == "signal_engine\n"
    assert system.script(show).stdout == "python\n"
    assert system.script(show, env={"pm_id": "1", "name": "feed"}).stdout == "feed\n"
    assert system.script(show, env={"BITTEN_SOURCE": "given"}).stdout == "given\n"


FEW_DESCRIPTORS = """
import os, resource, sys, time
from event_bus import event_bridge as b
free, when = int(sys.argv[1]), sys.argv[2]
def emit(numbers):
    for n in numbers: assert b.user_action({'action': 'n', 'n': n, 'process': 'parent'})
def wait(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, b.stats()
        time.sleep(0.01)
if when == 'later':
    emit(range(10))
    assert b.flush(5)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True: taken.append(os.dup(2))
except OSError: pass
for _ in range(free): os.close(taken.pop())
if when == 'later':
    print('ready', flush=True)
    os.read(0, 1)  # until the bus is killed
    emit(range(10, 20))
else:
    emit(range(20))
wait(lambda: b.stats()['last_error'])
emit(range(20, 30))
if when != 'never': [os.close(fd) for fd in taken]
if when == 'later': print('go on', flush=True)
if when != 'never': assert b.flush(10), b.stats()
if when == 'never': print(b.stats()['acked'])
"""


@pytest.mark.parametrize("free", [0, 1, 3, 6, 9, 12])
def test_events_wait_while_few_file_descriptors_are_free(bus: System, free: int) -> None:
    done = bus.script(FEW_DESCRIPTORS, str(free), "at first")
    assert done.returncode == 0, done
    assert numbers_by_process(wait_delivered(bus)) == {"parent": list(range(30))}


def test_process_that_never_has_enough_file_descriptors_ends_with_its_events_on_disk(
    bus: System,
) -> None:
    done = bus.script(FEW_DESCRIPTORS, "12", "never")
    assert (done.returncode, done.stdout) == (0, "0\n"), done
    assert numbers_by_process(wait_delivered(bus)) == {"parent": list(range(30))}


@pytest.mark.parametrize("free", [0, 2, 4])
def test_connection_lost_while_no_file_descriptor_is_free_comes_back(
    bus: System, free: int
) -> None:
    script = bus.popen("-c", FEW_DESCRIPTORS, str(free), "later", stdin=subprocess.PIPE)
    assert script.stdin is not None
    assert script.stdout is not None
    assert script.stdout.readline() == "ready\n"
    bus.processes[0].kill()
    bus.processes[0].wait()
    script.stdin.write("x")
    script.stdin.close()
    lines = iter(script.stdout.readline, "")
    assert "go on\n" in lines
    bus.start_bus()
    assert script.wait(15) == 0, script.stdout.read()
    assert numbers_by_process(wait_delivered(bus)) == {"parent": list(range(30))}
