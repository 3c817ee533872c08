"""`bitten doctor` on the home, its databases and spool: each trouble made for real, then seen."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import System, wait_until
from doctors import findings, only

from collector.doctor import examination, files
from event_bus.traces import END

NOBODY = 65_534


@pytest.fixture
def stopped(running: System) -> System:
    """A home with something in it, and nothing running."""
    for process in running.processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    return running


def python(system: System, code: str) -> subprocess.Popen[str]:
    """A process that runs `code` in the home, says so, and stays."""
    process = system.popen("-c", f"{code}\nprint(flush=True)\nimport time\ntime.sleep(100)")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "\n", line + process.stdout.read()
    return process


def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")


def everything(home: Path) -> dict[str, tuple[int, int, int, int]]:
    return {
        str(p): (s.st_mtime_ns, s.st_size, s.st_mode, s.st_uid)
        for p in [home, *home.rglob("*")]
        for s in [p.stat()]
    }


def test_doctor_changes_nothing(stopped: System) -> None:
    before = everything(stopped.home)
    done = stopped.bitten("doctor", "--all")
    assert "the database is readable, up to seq " in done.stdout
    assert "the journal is readable" in done.stdout
    assert everything(stopped.home) == before


def test_home_that_others_may_read_is_a_warning(stopped: System) -> None:
    stopped.home.chmod(0o755)
    stopped.db.chmod(0o644)
    finding = only(stopped, "rights")
    assert finding.level == "warning"
    assert "home, bitten_events.db" in finding.what
    subprocess.run(finding.command, shell=True, check=True)
    assert findings(stopped, "rights") == []


def test_open_file_in_a_closed_home_is_no_trouble(stopped: System) -> None:
    config = stopped.home / "config.yaml"
    config.write_text("source: bot\n")
    config.chmod(0o644)
    assert findings(stopped, "rights") == []
    stopped.home.chmod(0o711)
    assert only(stopped, "rights").what.endswith("home, config.yaml")


def test_open_database_outside_a_closed_home_is_a_warning(stopped: System) -> None:
    elsewhere = stopped.home.with_name("elsewhere.db")
    stopped.db.rename(elsewhere)
    elsewhere.chmod(0o644)
    stopped.environ["BITTEN_DB"] = str(elsewhere)
    finding = only(stopped, "rights")
    assert "elsewhere.db" in finding.what
    subprocess.run(finding.command, shell=True, check=True)
    assert findings(stopped, "rights") == []


def test_file_of_another_user_is_a_fault(stopped: System) -> None:
    as_root()
    os.chown(stopped.settings.journal, NOBODY, NOBODY)
    finding = only(stopped, "rights")
    assert finding.level == "fault"
    assert "1 file in" in finding.what
    assert "journal.db" in finding.what
    assert finding.command.startswith("sudo chown -R ")


def test_file_that_its_owner_may_not_write_is_a_fault(stopped: System) -> None:
    as_root()
    for path in [stopped.home, *stopped.home.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    stopped.db.chmod(0o400)
    finding = only(stopped, "rights")
    assert finding.level == "fault"
    assert "cannot read and write bitten_events.db" in finding.what


def test_secret_key_that_others_may_read_is_a_fault(stopped: System) -> None:
    keys = stopped.home / "keys"
    keys.mkdir(0o700, exist_ok=True)
    secret = keys / "bus.key_secret"
    secret.touch(0o600)
    assert findings(stopped, "rights") == []
    secret.chmod(0o640)
    finding = only(stopped, "rights")
    assert finding.level == "fault"
    assert finding.command == f"chmod 600 {shlex.quote(str(secret))}"


AS_NOBODY = """
import os, sys
from pathlib import Path
from conftest import System
from doctors import findings
import collector.doctor.cli
from event_bus.cli.main import main
from event_bus.settings import Settings

system = System(Path(sys.argv[1]))
findings(system)  # imports what only root may read, perhaps
os.setuid(65534)
if "--home" in sys.argv:
    sys.argv[1:] = ["--home", sys.argv[1], "doctor"]
    main()
for f in findings(system):
    print(f.level, f.check, f.what)
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Not in pytest's directory, into which only root may go."""
    as_root()
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_home_of_another_user_is_told_and_harms_no_check(open_directory: Path) -> None:
    system = System(open_directory / "home")
    system.settings.make_home()
    system.home.chmod(0o711)
    done = system.script(AS_NOBODY, str(system.home), cwd=Path(__file__).parent)
    assert f"fault rights {system.home} cannot be looked into by nobody" in done.stdout
    assert "this check failed" not in done.stdout


def test_home_closed_to_this_user_is_told(open_directory: Path) -> None:
    system = System(open_directory / "home")
    system.settings.make_home()
    done = system.script(AS_NOBODY, str(system.home), "--home", cwd=Path(__file__).parent)
    assert "fault    settings: cannot read " in done.stdout, done.stderr
    assert "do:  use `bitten` as the user whose home it is" in done.stdout


START_AS_NOBODY = """
import os, sys
from pathlib import Path
from conftest import System
from doctors import only
from event_bus.broker import Broker
from event_bus.errors import BittenError

system = System(Path(sys.argv[1]))
only(system, "bus")  # imports what only root may read, perhaps
os.setuid(65534)
if not os.fork():  # or this process would hold the lock
    try:
        Broker(system.settings)
    except BittenError as e:
        print(f"{e.args[0]}\\n{e.hint}", flush=True)
    os._exit(0)
os.wait()
found = only(system, "bus")
print(f"{found.what.removeprefix('the bus cannot start: ')}\\n{found.remedy}\\n{found.command}")
"""


@pytest.mark.parametrize(
    ("name", "mode"), [(".", 0o500), ("journal.db", 0o400), ("journal.db-wal", 0o200)]
)
def test_start_that_its_rights_forbid_and_doctor_give_the_same_reason(
    open_directory: Path, name: str, mode: int
) -> None:
    system = System(open_directory / "home")
    system.start_bus().kill()
    system.close()
    for path in [system.home, *system.home.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    (system.home / name).chmod(mode)
    done = system.script(START_AS_NOBODY, str(system.home), cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    *refused, reason, remedy, command = done.stdout.splitlines()
    assert refused == [reason, remedy]
    assert str(system.home) in reason
    assert command.startswith("ls -l")


def test_files_moved_aside_are_a_warning(stopped: System) -> None:
    (stopped.home / "journal.db.corrupt-20260101T000000Z").touch(0o600)
    (stopped.home / "bitten_events.db.replaced-20260101T000000Z").touch(0o600)
    finding = only(stopped, "leftovers")
    assert finding.what.startswith("2 damaged or replaced files")


def reader(system: System, path: Path, sql: str, mode: str = "ro") -> subprocess.Popen[str]:
    """A process in the middle of a statement."""
    return python(
        system,
        f"import sqlite3; d = sqlite3.connect('file:{path}?mode={mode}', uri=True,"
        f" isolation_level=None); c = d.execute('BEGIN'); c = d.execute({sql!r}); c.fetchone()",
    )


def grow(path: Path, megabytes: int) -> sqlite3.Connection:
    """Write so much into the log of a database."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA wal_autocheckpoint=0")
    db.execute("CREATE TABLE _filler (bytes)")
    for _ in range(megabytes):
        db.execute("INSERT INTO _filler VALUES (zeroblob(1000000))")
    return db


def test_large_log_names_the_reader_who_holds_it(stopped: System) -> None:
    path = stopped.db
    holder = reader(stopped, path, "SELECT * FROM _name")
    db = grow(path, 140)
    try:
        finding = only(stopped, "wal")
    finally:
        db.close()
    assert "bitten_events.db-wal has grown to 14" in finding.what
    assert f"held by process {holder.pid} (" in finding.what
    assert finding.command == f"kill {holder.pid}"


def test_reader_alone_is_no_trouble(running: System) -> None:
    reader(running, running.db, "SELECT * FROM _name")
    assert findings(running, "wal") == []
    assert findings(running, "writers") == []


def test_write_transaction_of_another_program_is_a_fault(running: System) -> None:
    holder = reader(running, running.db, "INSERT INTO _meta VALUES ('x', 1) RETURNING 1", "rw")
    finding = only(running, "writers")
    assert finding.level == "fault"
    assert f"process {holder.pid} (" in finding.what
    assert "holds a write transaction on bitten_events.db" in finding.what


def test_program_with_the_database_open_for_writing_is_a_warning(running: System) -> None:
    holder = reader(running, running.db, "SELECT * FROM _name", "rw")
    finding = only(running, "writers")
    assert finding.level == "warning"
    assert f"process {holder.pid} (" in finding.what
    assert "has bitten_events.db open for writing" in finding.what


def test_database_that_is_no_database_is_a_fault(stopped: System) -> None:
    stopped.db.write_bytes(b"not SQLite" * 1_000)
    assert "cannot read" in only(stopped, "database").what


def test_database_with_a_bad_page_is_a_fault(stopped: System) -> None:
    with stopped.db.open("r+b") as file:
        file.seek(4_096)
        file.write(b"\xff" * (stopped.db.stat().st_size - 4_096))
    assert "malformed" in only(stopped, "database").what


def test_database_of_no_bytes_is_a_fault(stopped: System) -> None:
    stopped.db.write_bytes(b"")
    finding = only(stopped, "database")
    assert finding.what == f"{stopped.db} has 0 bytes"
    assert finding.command.endswith(" collect")


def test_other_file_in_the_databases_place_is_not_taken_for_a_damaged_one(stopped: System) -> None:
    stopped.db.write_text("# Read me\n" * 1000)
    finding = only(stopped, "database")
    assert finding.why == "it is another file, or its beginning was destroyed"
    assert "if the name is wrong, give the right one" in finding.remedy


def test_file_that_cannot_be_opened_is_not_explained_as_damage(stopped: System) -> None:
    stopped.settings.journal.unlink()
    stopped.settings.journal.mkdir()
    finding = only(stopped, "journal")
    assert "damage" not in finding.why + finding.remedy
    assert "owner and rights" in finding.remedy


def test_journal_that_was_removed_is_put_back_by_the_bus(running: System) -> None:
    for process in running.processes:
        process.send_signal(signal.SIGSTOP)  # or it does so while we look
    running.settings.journal.unlink()
    audit = running.bitten("audit")
    assert audit.returncode == 4
    assert "it puts the file back by itself" in audit.stderr
    answer = {"home": str(running.home), "pid": running.processes[0].pid}
    context = dataclasses.replace(examination.prepare(running.settings), status=answer)
    (finding,) = files.journal(context)
    assert finding.why == "the bus puts it back by itself, within seconds"
    assert finding.command.startswith("sleep 10; bitten ")


def test_database_that_was_removed_is_put_back_by_the_collector(running: System) -> None:
    collector = running.processes[1]
    collector.send_signal(signal.SIGSTOP)  # or it does so while we look
    running.db.unlink()
    finding = only(running, "database")
    assert finding.why.startswith("the collector puts it back by itself, within seconds")
    assert finding.command.startswith("sleep 10; bitten ")
    collector.send_signal(signal.SIGCONT)
    wait_until(lambda: findings(running, "bus-problems"), "it is told")
    told = only(running, "bus-problems")
    assert "nothing is lost: what it held is there again" in told.what
    assert told.level == "warning"
    assert findings(running, "database") == []


def test_journal_that_was_put_back_is_as_grave_as_a_database(running: System) -> None:
    running.settings.journal.unlink()
    wait_until(lambda: findings(running, "bus-problems"), "it is told")
    assert only(running, "bus-problems").level == "warning"


def test_database_of_another_program_is_a_fault(stopped: System) -> None:
    stopped.db.unlink()
    sqlite3.connect(stopped.db).execute("CREATE TABLE t (x)")
    finding = only(stopped, "database")
    assert "database of another program" in finding.what
    assert "move it aside" in finding.remedy


def test_database_that_was_removed_is_a_fault(stopped: System) -> None:
    stopped.db.unlink()
    assert only(stopped, "database").what == f"there is no database at {stopped.db}"


def test_log_that_was_left_without_its_database_is_a_fault(running: System) -> None:
    for process in running.processes:
        process.kill()
        process.wait()
    running.db.unlink()
    assert "its -wal is still there" in only(running, "database").what


def test_database_of_another_journal_is_a_fault(stopped: System) -> None:
    stopped.settings.journal.unlink()
    stopped.start_bus()
    finding = only(stopped, "database")
    assert "was filled from journal" in finding.what


def killed(running: System) -> System:
    for process in running.processes:
        process.kill()
        process.wait()
    return running


@pytest.mark.parametrize("is_empty", [False, True])
def test_journal_whose_wal_is_gone_is_told_before_the_start(
    running: System, *, is_empty: bool
) -> None:
    system = killed(running)
    wal = Path(f"{system.settings.journal}-wal")
    kept = system.home / "kept"
    wal.rename(kept)
    if is_empty:
        wal.touch(0o600)
    finding = only(system, "journal")
    assert finding.level == "fault"
    assert "-wal is gone" in finding.what
    assert f"put {wal} back" in finding.remedy
    assert findings(system, "database") == []
    assert "bitten up" not in only(system, "bus").command
    kept.replace(wal)
    assert findings(system, "journal") == []
    assert only(system, "bus").command.endswith(" up")


def test_start_without_the_wal_does_what_was_said(running: System) -> None:
    system = killed(running)
    Path(f"{system.settings.journal}-wal").unlink()
    last = int(json.loads((system.home / END).read_text())["journal"]["last_seq"])
    assert f"after seq {last}," in only(system, "journal").remedy
    system.start_bus()
    assert system.bitten("emit", "user_action", "action=x").returncode == 0
    system.start_collector()
    system.wait_stored()
    (loss,) = (f for f in findings(system, "bus-problems") if f"events 1 to {last}:" in f.what)
    assert "journal_damaged" in loss.what


def test_database_whose_wal_is_gone_is_told_and_filled_from_the_journal(running: System) -> None:
    system = killed(running)
    for suffix in ("-wal", "-shm"):
        Path(f"{system.db}{suffix}").unlink()
    assert system.db.stat().st_size == 4_096
    finding = only(system, "database")
    assert finding.level == "fault"
    assert "its -wal is gone" in finding.why
    assert finding.command.endswith(" collect")
    for command in ("stats", "backup"):
        refused = system.bitten(command)
        assert (refused.returncode, "its -wal is gone" in refused.stderr) == (4, True)
    system.start_bus()
    system.start_collector()
    system.wait_stored()
    assert findings(system, "database") == []
    assert system.sql("SELECT min(seq) FROM events") == [(1,)]


def test_database_ahead_of_the_journal_is_a_fault(stopped: System) -> None:
    copy = stopped.home / "copy"
    shutil.copy(stopped.settings.journal, copy)
    stopped.start_bus()
    stopped.start_collector()
    for _ in range(3):
        assert stopped.bitten("emit", "user_action", "action=x").returncode == 0
    stopped.wait_stored()
    for process in stopped.processes[-2:]:
        process.kill()
        process.wait()
    for path in stopped.home.glob("journal.db*"):
        path.unlink()
    copy.replace(stopped.settings.journal)
    assert "or it is an older copy" in only(stopped, "journal").what
    (stopped.home / END).unlink()
    assert "the database is ahead of the journal" in only(stopped, "database").what


def test_journal_that_is_no_database_is_a_fault(stopped: System) -> None:
    stopped.settings.journal.write_bytes(b"not SQLite" * 1_000)
    assert "cannot read" in only(stopped, "journal").what


def test_journal_whose_last_batch_is_damaged_is_a_fault(stopped: System) -> None:
    db = sqlite3.connect(stopped.settings.journal)
    db.execute("UPDATE batch SET body = zeroblob(3) WHERE first_seq = 1")
    db.commit()
    db.close()
    assert "damaged (CRC-32)" in only(stopped, "journal").what


def emitting(system: System, count: int = 3) -> subprocess.Popen[str]:
    """A living process whose events, some 200 bytes each, wait in its spool."""
    return python(
        system,
        "from event_bus import event_bridge as b\n"
        "data = {'action': 'x' * 90}\n"
        f"[b.emit('user_action', data, source='bot') for _ in range({count})]\n"
        "import os, glob, time\n"
        "home = os.environ['BITTEN_HOME']\n"
        "while not glob.glob(home + '/spool/*.ndjson'): time.sleep(0.01)",
    )


def test_spool_of_a_dead_process_waits_for_the_bus(system: System) -> None:
    code = "from event_bus.event_bridge import emit; emit('user_action', {'action': 'x'})"
    system.environ["BITTEN_SOURCE"] = "bot"
    assert system.script(code).returncode == 0
    finding = only(system, "spool", later_s=3 * 86_400)
    assert finding.level == "warning"
    assert finding.what == "1 event of bot waits on disk for 3 days; their process is gone"


def test_spool_of_a_process_that_asks_another_address_is_a_warning(bus: System) -> None:
    here = bus.environ["BITTEN_INGRESS_URL"]
    bus.environ["BITTEN_INGRESS_URL"] = "tcp://127.0.0.1:1"
    process = emitting(bus)
    bus.environ["BITTEN_INGRESS_URL"] = here
    assert findings(bus, "spool") == []
    finding = only(bus, "spool", later_s=3_600)
    assert finding.level == "warning"
    assert "3 events of bot wait on disk for 60 minutes, though the bus is there" in finding.what
    assert f"process {process.pid} (" in finding.why
    shown = subprocess.run(finding.command, shell=True, capture_output=True, text=True, check=False)
    assert "BITTEN_INGRESS_URL=tcp://127.0.0.1:1\n" in shown.stdout


def test_spool_that_is_nearly_full_is_a_fault(system: System) -> None:
    system.environ["BITTEN_SPOOL_MAX_BYTES"] = "1000"
    emitting(system, 4)
    wait_until(lambda: only(system, "spool").level == "fault", "the spool is nearly full")
    finding = only(system, "spool")
    assert "drops events when its spool is full" in finding.why


def test_spool_that_the_bus_cannot_take_in_is_a_fault(system: System) -> None:
    code = "from event_bus.event_bridge import emit; emit('user_action', {'action': 'x'})"
    assert system.script(code).returncode == 0
    (spooled,) = system.settings.spool.glob("*.ndjson")
    if subprocess.run(["chattr", "+i", str(spooled)], check=False).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        system.start_bus()
        finding = only(system, "spool", later_s=3_600)
    finally:
        subprocess.run(["chattr", "-i", str(spooled)], check=True)
    assert finding.level == "fault"
    assert "the bus does not take them in" in finding.what


def test_spool_on_a_disk_that_does_not_answer_holds_up_nothing(system: System) -> None:
    system.settings.make_home()
    os.mkfifo(system.settings.spool / "0123456789abcdef0123-1.ndjson")
    done = system.bitten("doctor", timeout=20)
    assert "spool: this check was not done in time" in done.stdout
    assert "bus: there is nothing in" in done.stdout


def test_delivered_spool_is_silent(running: System) -> None:
    wait_until(lambda: not list(running.settings.spool.glob("*")), "nothing is spooled")
    assert findings(running, "spool") == []
