"""Libraries with known faults, and a Python that is no longer mended."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import apsw
import zmq

from collector.doctor.context import Context
from collector.doctor.finding import Finding, fault, moment, ok, warning

Version = tuple[int, ...]

SQLITE_FIXED = (3, 51, 3)
"""Before it, two connections that write and checkpoint at the same time can corrupt the file."""

SQLITE_READS = (3, 31, 0)
LIBZMQ_FIXED = (4, 3, 5)
LIBZMQ_DANGEROUS = (4, 3, 3)
PYZMQ_WANTED = (27, 0, 0)

PYTHON_ENDS: dict[Version, int] = {
    (3, 11): 1_825_027_200,
    (3, 12): 1_856_649_600,
    (3, 13): 1_888_185_600,
    (3, 14): 1_919_721_600,
}
"""Unix seconds of 1 November after each version's last security release."""


def sqlite(context: Context) -> Iterator[Finding]:
    yield judge_library(_version(apsw.sqlite_lib_version()))
    program = shutil.which("sqlite3")
    if program is not None:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False, timeout=2
        )
        yield judge_program(_version(said.stdout), program)


def judge_library(version: Version) -> Finding:
    if version >= SQLITE_FIXED:
        return ok(f"SQLite {_text(version)}")
    return fault(
        f"SQLite {_text(version)} can corrupt a database",
        why=f"before {_text(SQLITE_FIXED)}, two connections that write and checkpoint at the same"
        " moment can damage a database in WAL mode",
        remedy="install an apsw that brings a newer one, then restart bus and collector",
        command="pip install --upgrade 'apsw>=3.51.3.0'",
    )


def judge_program(version: Version, program: str) -> Finding:
    if version >= SQLITE_READS:
        return ok(f"{program} is {_text(version)}: reads every view")
    return warning(
        f"{program} is {_text(version)}: too old for the views",
        why=f"the views need SQLite {_text(SQLITE_READS)}; the collector has its own library",
        remedy="install a newer sqlite3, or ask with `bitten query`",
        command="sudo apt-get install --only-upgrade sqlite3",
    )


def zeromq(context: Context) -> Iterator[Finding]:
    yield judge_libzmq(tuple(zmq.zmq_version_info()))
    yield judge_pyzmq(_version(zmq.pyzmq_version()))


def judge_libzmq(version: Version) -> Finding:
    if version >= LIBZMQ_FIXED:
        return ok(f"libzmq {_text(version)}")
    dangerous = version < LIBZMQ_DANGEROUS
    return (fault if dangerous else warning)(
        f"libzmq {_text(version)} has known faults",
        why="before 4.3.3 whoever reaches a port can block or crash the bus (CVE-2020-15166,"
        " CVE-2021-20236)"
        if dangerous
        else f"{_text(LIBZMQ_FIXED)} mends faults of it",
        remedy="install a pyzmq wheel, which brings its own libzmq, then restart the bus",
        command="pip install --upgrade --force-reinstall --only-binary pyzmq 'pyzmq>=27'",
    )


def judge_pyzmq(version: Version) -> Finding:
    if version >= PYZMQ_WANTED:
        return ok(f"pyzmq {_text(version)}")
    return warning(
        f"pyzmq {_text(version)} is older than what this program is tested with",
        why="it is written and tested for pyzmq 27",
        remedy="upgrade it, then restart the bus",
        command="pip install --upgrade 'pyzmq>=27'",
    )


def python(context: Context) -> Iterator[Finding]:
    yield judge_python(tuple(sys.version_info[:3]), context.now)


def judge_python(version: Version, now: float) -> Finding:
    ends = PYTHON_ENDS.get(version[:2])
    if ends is None or now < ends:
        return ok(f"Python {_text(version)}")
    return warning(
        f"Python {_text(version)} gets no more security fixes",
        why=f"its maintenance ended by {moment(ends)[:10]}",
        remedy="install a newer Python and make the environment again",
        command="python3 -m venv --clear .venv && scripts/install",
    )


def _version(text: str) -> Version:
    """The first dotted number in a text; (0,) if there is none."""
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def _text(version: Version) -> str:
    return ".".join(map(str, version))
