"""The watchdog ends a process that is stuck, and no other."""

from __future__ import annotations

import signal
import subprocess

import pytest
from conftest import System, wait_until

STUCK = """
import logging, threading
from event_bus.watchdog import Watchdog
logging.basicConfig()
def where_it_hangs():
    threading.Event().wait()
with Watchdog("the loop", tick_s=0.02) as dog:
    dog.alive()
    where_it_hangs()
"""

LIVELY = """
import sys, threading
from event_bus.watchdog import Watchdog
with Watchdog("the loop", tick_s=0.25, max_silent_ticks=4) as dog:
    while True:
        dog.alive()
        print("alive", flush=True)
        threading.Event().wait(0.01)
"""


PAUSED = """
import threading
from event_bus.watchdog import Watchdog
with Watchdog("the loop", tick_s=0.02) as dog:
    with dog.paused():
        threading.Event().wait(1.0)
    print("went on", flush=True)
    threading.Event().wait()
"""

SLOW_DATABASE = """
import logging, threading, time
from collector.keeper import Keeper, Renewed
from collector.reports import Reports
from event_bus import database
from event_bus.event_schema import Registry
from event_bus.settings import Settings
from event_bus.lock import FileLock
from event_bus.watchdog import Watchdog
logging.basicConfig()
settings, connect = Settings.load(), database.connect
settings.make_home()
registry = Registry(settings.schemas)

class SlowConnection:
    # As on a disk that takes longer than the watchdog's patience.
    def __init__(self, db):
        self.db = db
    def execute(self, sql, *values):
        if sql == "COMMIT":
            time.sleep(0.5)
        return self.db.execute(sql, *values)
    def wal_checkpoint(self, **options):
        time.sleep(0.5)
        return self.db.wal_checkpoint(**options)
    def backup(self, name, source, source_name):
        return self.db.backup(name, source.db, source_name)
    def close(self):
        time.sleep(0.5)
        self.db.close()
    def __getattr__(self, name):
        return getattr(self.db, name)

def slow_connect(path, *args, **options):
    db = connect(path, *args, **options)
    # The inspection has a thread of its own and reads.
    return db if database.READ_ONLY in args else SlowConnection(db)

database.connect = slow_connect
with Watchdog("the collector", tick_s=0.05) as dog:
    keeper = Keeper(
        settings.db, registry, FileLock(settings.home / "test.lock", "a test"),
        stop=threading.Event(), watchdog=dog, reports=Reports(settings, "test"),
    )
    keeper.open()
    print("opened", flush=True)
    keeper.do(lambda store: store.learn(registry))
    print("learned", flush=True)
    keeper.do(lambda store: store.shrink_wal())
    print("shrunk", flush=True)
    settings.db.unlink()
    try:
        keeper.do(lambda store: store.check_file())
    except Renewed:
        print("copied", flush=True)
    keeper.close()
    print("closed", flush=True)
    threading.Event().wait()
"""


def test_stuck_process_is_ended_and_every_stack_printed(system: System) -> None:
    done = system.script(STUCK)
    assert done.returncode == 70
    assert "the loop has been stuck for 0.12 s" in done.stderr
    assert "in where_it_hangs" in done.stderr


def test_process_that_was_stopped_for_longer_goes_on(system: System) -> None:
    process = system.popen("-c", LIVELY)
    assert process.stdout is not None
    assert process.stdout.readline() == "alive\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.0)  # eight ticks of a clock
    process.send_signal(signal.SIGCONT)
    seen = 0

    def goes_on() -> bool:
        nonlocal seen
        assert process.stdout is not None
        seen += process.stdout.readline() == "alive\n"
        return seen > 300

    wait_until(goes_on, "signs of life after SIGCONT")
    assert process.poll() is None


def test_process_that_ends_by_itself_is_left_alone(system: System) -> None:
    done = system.script("from event_bus.watchdog import Watchdog\nwith Watchdog('x'): pass")
    assert (done.returncode, done.stderr) == (0, "")


def test_pause_is_not_taken_for_being_stuck_and_ends(system: System) -> None:
    done = system.script(PAUSED)
    assert done.stdout == "went on\n"
    assert (done.returncode, "has been stuck" in done.stderr) == (70, True)


def test_collector_is_not_ended_while_it_waits_for_a_slow_disk_and_is_when_it_is_stuck(
    system: System,
) -> None:
    done = system.script(SLOW_DATABASE)
    assert done.stdout.split() == ["opened", "learned", "shrunk", "copied", "closed"], done.stderr
    assert (done.returncode, "has been stuck" in done.stderr) == (70, True)
