"""`bitten doctor` on the bus, and how checks are run: each trouble made for real, then seen."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import System, wait_until
from doctors import MACHINE, findings, only

from collector.doctor import versions
from collector.doctor.context import Context
from collector.doctor.examination import CHECKS, run
from collector.doctor.finding import Finding, ok
from event_bus.journal_format import APPLICATION_ID
from event_bus.settings import Settings

ROOT = Path(__file__).parent.parent


def test_healthy_system_is_well(running: System) -> None:
    assert [f for f in findings(running) if f.check not in MACHINE] == []
    done = running.bitten("doctor", "--all", "--json")
    levels = {f["check"]: f["level"] for f in json.loads(done.stdout)}
    assert set(levels) == set(CHECKS)
    assert levels["bus"] == "ok"


def test_home_that_does_not_exist_is_told_how_to_begin(system: System) -> None:
    done = system.bitten("doctor")
    assert done.returncode == 1
    assert f"fault    bus: there is nothing in {system.home} yet" in done.stdout
    assert "$    bitten up" in done.stdout
    assert not system.home.exists()


@pytest.fixture
def ended(running: System) -> System:
    """A home whose bus and collector ran, were audited and backed up, and ended."""
    for command in ("audit", "backup"):
        assert running.bitten(command).returncode == 0
    for process in running.processes:
        process.terminate()
        process.wait(20)
    return running


def remove(system: System, *kept: str) -> None:
    """Everything from a home but what is kept."""
    for path in system.home.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("kept", "what", "command"),
    [
        (("backup", "audit.json", "spool"), "journal and database are gone from", "bitten restore"),
        (("backup",), "journal and database are gone from", "bitten restore"),
        (("audit.json",), "tells of events up to", "ls -la "),
        (("bitten_events.db", "backup"), "the journal is gone: there is no", "bitten up"),
        ((), "there is nothing in", "bitten up"),
    ],
)
def test_home_whose_files_are_gone_is_told_what_to_do(
    ended: System, kept: tuple[str, ...], what: str, command: str
) -> None:
    remove(ended, *kept)
    done = ended.bitten("doctor")
    assert done.returncode == 1
    assert "this check failed" not in done.stdout
    assert f"$    {command}" in done.stdout
    finding = only(ended, "bus")
    assert (finding.level, what in finding.what) == ("fault", True)
    told = json.loads(ended.bitten("doctor", "--json").stdout)
    (as_json,) = (f for f in told if f["check"] == "bus")
    assert as_json["what"] == finding.what


def test_home_that_is_misspelled_is_told_which_ones_there_are(ended: System) -> None:
    wrong = ended.home.with_name("hoem")
    done = ended.bitten("--home", str(wrong), "doctor")
    assert f"there is nothing in {wrong} yet: there is no such directory" in done.stdout
    assert f"a journal is in {ended.home}" in done.stdout
    assert f"$    bitten --home {ended.home} doctor" in done.stdout
    wrong.write_text("a file")
    done = ended.bitten("--home", str(wrong), "doctor")
    assert (done.returncode, f"settings: {wrong} is not a directory" in done.stdout) == (1, True)


def test_settings_that_cannot_be_used_are_what_it_finds(system: System) -> None:
    system.settings.make_home()
    (system.home / "config.yaml").write_text("journal: big")
    done = system.bitten("doctor", "--json")
    assert done.returncode == 1
    (finding,) = json.loads(done.stdout)
    assert (finding["check"], finding["level"]) == ("settings", "fault")
    assert "unknown setting journal" in finding["what"]
    assert "journal_max_bytes" in finding["remedy"]
    assert finding["command"].endswith("cat ${BITTEN_HOME:-~/.bitten}/config.yaml")
    assert system.bitten("stats").returncode == 2
    done = system.bitten("--home", str(system.home), "doctor", env={"BITTEN_HOME": "/nowhere"})
    assert f"cat {system.home}/config.yaml" in done.stdout


def test_flags_are_in_the_command_to_copy(system: System) -> None:
    home = system.home.with_name("another home")
    done = system.bitten("--home", str(home), "doctor")
    assert f"$    bitten --home '{home}' up" in done.stdout


def test_bus_that_was_killed_is_missed(system: System) -> None:
    system.start_bus().kill()
    wait_until(lambda: only(system, "bus").what == "the bus is not running", "it is missed")


def test_bus_that_is_stopped_is_named_with_the_signal_that_continues_it(bus: System) -> None:
    (process,) = bus.processes
    process.send_signal(signal.SIGSTOP)
    finding = only(bus, "bus")
    assert finding.what.startswith(f"the bus is stopped: process {process.pid}")
    assert finding.command == f"kill -CONT {process.pid}"


def test_bus_that_listens_elsewhere_does_not_answer_here(bus: System) -> None:
    bus.environ["BITTEN_INGRESS_URL"] = "tcp://127.0.0.1:1"
    (process,) = bus.processes
    finding = only(bus, "bus")
    assert f"process {process.pid}" in finding.what
    assert "does not answer at tcp://127.0.0.1:1" in finding.what


@pytest.mark.parametrize(
    ("setting", "check"), [("BITTEN_INGRESS_URL", "bus"), ("BITTEN_EVENTS_URL", "ports")]
)
def test_port_that_is_taken_is_named_with_its_owner(
    setting: str, check: str, system: System
) -> None:
    port = int(system.environ[setting].rpartition(":")[2])
    taker = system.popen(
        "-c",
        "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1])));"
        " print(flush=True); time.sleep(60)",
        str(port),
    )
    assert taker.stdout is not None
    taker.stdout.readline()
    finding = only(system, check)
    assert f"taken by process {taker.pid} (python" in finding.what
    assert str(port) in finding.command


def test_bus_of_another_home_is_told_apart(bus: System) -> None:
    bus.environ["BITTEN_HOME"] = str(bus.home.with_name("other"))
    finding = only(bus, "bus")
    assert finding.command == f"bitten --home {bus.home} status"
    assert findings(bus, "journal") == []


def test_status_of_another_homes_bus_is_not_ok(bus: System) -> None:
    bus.environ["BITTEN_HOME"] = str(bus.home.with_name("other"))
    done = bus.bitten("status")
    assert done.returncode == 1
    assert f"another home's: it keeps its files in {bus.home}" in done.stdout
    assert json.loads(bus.bitten("status", "--json").stdout)["state"] == "another_home"


def test_key_that_cannot_be_used_is_no_reason_to_end_the_bus(bus: System) -> None:
    bus.bitten("keys", "new")
    finding = only(bus, "bus")  # the bus was started before
    assert "does not let this home's key in" in finding.what
    assert "kill" not in finding.command + finding.remedy
    secret = bus.settings.keys / "client.key_secret"
    secret.write_text("junk")
    finding = only(bus, "bus")
    assert f"cannot use the key {secret}" in finding.what
    assert "kill" not in finding.command + finding.remedy


def test_key_of_another_home_is_no_reason_to_end_the_bus(system: System, tmp_path: Path) -> None:
    other = System(tmp_path / "other")
    for home in (system, other):
        home.bitten("keys", "new")
    process = system.popen("-m", "event_bus", "bus")
    wait_until(system.status, "the bus answers")
    for name in ("bus.key", "client.key", "client.key_secret"):
        shutil.copy(other.settings.keys / name, system.settings.keys / name)
    finding = only(system, "bus")
    assert "does not let this home's key in" in finding.what
    assert "kill" not in finding.command + finding.remedy
    assert process.poll() is None


@pytest.mark.parametrize(
    ("trouble", "command"),
    [
        ("no allow-list", " keys new"),
        ("bad allow-list", " keys list"),
        ("bad key", " keys list"),
        ("exposed", " keys new"),
        ("another program's journal", "/journal.db*"),
        ("newer journal", "/journal.db*"),
    ],
)
def test_start_that_refuses_and_doctor_give_the_same_reason(
    system: System, trouble: str, command: str
) -> None:
    allowed = system.settings.keys / "allowed.yaml"
    if trouble == "exposed":
        for name in ("BITTEN_INGRESS_URL", "BITTEN_EVENTS_URL"):
            system.environ[name] = system.environ[name].replace("127.0.0.1", "0.0.0.0")
    elif trouble.endswith("journal"):
        system.settings.make_home()
        with contextlib.closing(sqlite3.connect(system.settings.journal)) as db:
            if trouble.startswith("newer"):
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                db.execute("PRAGMA user_version=99")
            db.execute("CREATE TABLE t (x)")
    else:
        system.bitten("keys", "new")
        if trouble == "no allow-list":
            allowed.unlink()
        elif trouble == "bad allow-list":
            allowed.write_text("client: [")
        else:
            (system.settings.keys / "bus.key_secret").write_text("junk")
    refused = system.bitten("bus")
    assert (refused.returncode, refused.stderr.count("\n")) == (4, 1)
    assert system.settings.journal.exists() == trouble.endswith("journal")
    finding = only(system, "bus")
    assert finding.level == "fault"
    assert finding.what.startswith("the bus cannot start: ")
    reason = finding.what.removeprefix("the bus cannot start: ")
    assert refused.stderr.startswith(f"bitten: {reason}; ")
    assert finding.remedy.startswith(refused.stderr.strip().removeprefix(f"bitten: {reason}; "))
    assert finding.command.endswith(command)
    assert "moves the file aside" not in str(findings(system, "journal"))


def test_home_that_is_to_reach_another_machine_is_told_which_keys_it_lacks(system: System) -> None:
    for name, port in (("BITTEN_INGRESS_URL", 5571), ("BITTEN_EVENTS_URL", 5570)):
        system.environ[name] = f"tcp://192.0.2.1:{port}"
    assert "client.key_secret" in only(system, "bus").remedy


def test_bus_that_takes_connections_and_does_not_answer_is_to_be_ended(system: System) -> None:
    hanging = system.popen(
        "-c",
        "import time, zmq; from event_bus.lock import FileLock;"
        " from event_bus.settings import Settings; s = Settings.load(); s.make_home();"
        " lock = FileLock(s.home / 'bus.lock', 'x'); socket = zmq.Context().socket(zmq.ROUTER);"
        " socket.bind(s.ingress_url); print(flush=True); time.sleep(60)",
    )
    assert hanging.stdout is not None
    hanging.stdout.readline()
    finding = only(system, "bus")
    assert "it hangs" in finding.why
    assert finding.command == f"kill {hanging.pid}"


def test_home_of_a_second_machine_is_judged_as_a_clients(system: System) -> None:
    system.bitten("keys", "new")
    (system.settings.keys / "bus.key_secret").unlink()
    system.environ["BITTEN_INGRESS_URL"] = "tcp://192.0.2.1:5571"
    system.environ["BITTEN_EVENTS_URL"] = "tcp://192.0.2.1:5570"
    assert system.bitten("emit", "user_action", "action=x").returncode == 3
    found = {f.check: f for f in findings(system) if f.check not in MACHINE}
    assert set(found) == {"bus", "spool"}
    assert "the bus of another machine, at tcp://192.0.2.1:5571" in found["bus"].what
    assert not any("bitten up" in f.remedy + f.command for f in found.values())


def test_problem_of_the_bus_comes_with_the_command_of_its_remedy(system: System) -> None:
    system.bitten("keys", "new")
    system.start_bus()
    (system.settings.keys / "allowed.yaml").write_text("client: [")
    wait_until(lambda: findings(system, "bus-problems"), "the bus says so")
    finding = only(system, "bus-problems")
    assert "mend that line" in finding.what
    assert finding.command.endswith(" keys list")
    (system.settings.keys / "allowed.yaml").unlink()
    wait_until(
        lambda: "there is no allow-list" in only(system, "bus-problems").what, "the bus says so"
    )
    finding = only(system, "bus-problems")
    assert "that line" not in finding.what + finding.remedy
    assert "`bitten keys new`" in finding.what


def test_subscribers_that_listen_elsewhere_are_told_where_events_are(bus: System) -> None:
    right = bus.environ["BITTEN_EVENTS_URL"]
    bus.environ["BITTEN_EVENTS_URL"] = "tcp://127.0.0.1:1"
    assert only(bus, "ports").command == f"export BITTEN_EVENTS_URL={right}"


def test_bus_older_than_what_is_installed_is_to_be_restarted(system: System) -> None:
    system.popen(
        "-c",
        "from event_bus import version; version.__version__ = '0.0.9';"
        "from event_bus.broker import Broker; from event_bus.settings import Settings;"
        "Broker(Settings.load()).run()",
    )
    wait_until(system.status, "the bus answers")
    assert "0.0.9" in only(system, "bus").what


def context(tmp_path: Path, limit_s: float = 5.0) -> Context:
    settings = Settings.load(environ={"BITTEN_HOME": str(tmp_path)})
    return Context(
        settings=settings,
        bitten="bitten",
        now=time.time(),
        status=None,
        deadline=time.monotonic() + limit_s,
    )


def test_check_that_raises_is_a_finding_and_ends_nothing(tmp_path: Path) -> None:
    def broken(context: Context) -> Iterator[Finding]:
        yield ok("so far")
        raise ZeroDivisionError("by zero")

    def fine(context: Context) -> Iterator[Finding]:
        yield ok("fine")

    found = {f.check: f for f in run({"broken": broken, "fine": fine}, context(tmp_path))}
    assert found["broken"].level == "warning"
    assert "ZeroDivisionError: by zero" in found["broken"].what
    assert found["fine"].what == "fine"


def test_check_that_hangs_is_a_finding_and_holds_up_nothing(tmp_path: Path) -> None:
    receiving, sending = socket.socketpair()

    def hanging(context: Context) -> Iterator[Finding]:
        receiving.recv(1)
        yield ok("late")

    with receiving, sending:
        (finding,) = run({"hanging": hanging}, context(tmp_path, limit_s=0.2))
        sending.send(b"x")
    assert (finding.check, finding.level) == ("hanging", "warning")
    assert "not done in time" in finding.what


def test_faults_come_first(tmp_path: Path) -> None:
    def mixed(context: Context) -> Iterator[Finding]:
        for level in ("ok", "warning", "skipped", "fault"):
            yield Finding(level=level, what=level)

    assert [f.level for f in run({"mixed": mixed}, context(tmp_path))] == [
        "fault",
        "warning",
        "skipped",
        "ok",
    ]


def test_text_of_findings_cannot_harm_a_terminal(system: System) -> None:
    system.environ["BITTEN_HOME"] = str(system.home.with_name("evil\x1b[2Jhome"))
    done = system.bitten("doctor")
    assert "\x1b" not in done.stdout
    assert "evil\\x1b[2Jhome" in done.stdout


def test_every_check_is_documented() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.M) == ["settings", *CHECKS]


def test_sqlite_library_that_corrupts_is_a_fault() -> None:
    assert versions.judge_library((3, 51, 2)).level == "fault"
    assert versions.judge_library((3, 51, 3)).level == "ok"


def test_sqlite_program_too_old_for_the_views_is_a_warning(system: System, tmp_path: Path) -> None:
    old = tmp_path / "sqlite3"
    old.write_text("#!/bin/sh\necho 3.27.2 2019-02-25\n")
    old.chmod(0o755)
    system.environ["PATH"] = f"{tmp_path}:{system.environ['PATH']}"
    done = system.bitten("doctor")
    assert f"sqlite: {old} is 3.27.2: too old for the views" in done.stdout


def test_libraries_with_known_faults_are_named() -> None:
    assert versions.judge_libzmq((4, 3, 5)).level == "ok"
    assert versions.judge_libzmq((4, 3, 4)).level == "warning"
    assert versions.judge_libzmq((4, 3, 2)).level == "fault"
    assert versions.judge_pyzmq((26, 4, 0)).level == "warning"
    assert versions.judge_pyzmq((27, 0, 0)).level == "ok"


def test_python_past_its_end_is_a_warning() -> None:
    assert versions.judge_python((3, 11, 7), 1_825_027_199).level == "ok"
    assert versions.judge_python((3, 11, 7), 1_825_027_200).level == "warning"
    assert versions.judge_python((3, 99, 0), 9e9).level == "ok"
