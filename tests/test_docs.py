"""Every command, query and snippet of the documentation, run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import System

from event_bus.event_schema import Registry
from event_bus.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "scripts/start": "test_scripts.py",
    "scripts/test": ".ci/run",
    "scripts/install": "test_scripts.py",
    "scripts/bench": ".ci/run",
    "scripts/drill": ".ci/run",
    "scripts/fuzz": ".ci/run",
    "pm2 start": "test_pm2.py",
    "pm2 restart": "test_pm2.py",
}
"""Commands that other tests run, by how they begin."""

OTHER_PAGES = {"protocol.md": "test_foreign_client.py"}

FILL = """
import json, sys
from event_bus import event_bridge
from event_bus.event_schema import Registry
with event_bridge.correlation("docs"):
    for known in Registry():
        for example in known.schema["examples"]:
            if known.name in vars(event_bridge):
                assert vars(event_bridge)[known.name](example)
event_bridge.signal_generated({"signal_id": "refused"})
assert event_bridge.flush(10)
"""


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            yield Block(page, text[: match.start()].count("\n") + 1, match[1], match[2])


BLOCKS = [b for b in blocks() if b.page.name not in OTHER_PAGES]


def runnable(language: str) -> Any:
    chosen = [b for b in BLOCKS if b.language == language]
    assert chosen
    return pytest.mark.parametrize("block", chosen, ids=str)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[System]:
    """A user's HOME with bus, collector and an event of each type in it."""
    system = System(tmp_path / ".bitten")
    system.environ["HOME"] = str(tmp_path)
    system.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    system.settings_home = system.home
    system.start_bus()
    system.start_collector()
    filled = system.script(FILL)
    assert filled.returncode == 0, filled.stderr
    system.wait_stored()
    yield system
    system.close()


def test_every_block_has_a_language_that_is_run_or_read() -> None:
    known = ("bash", "python", "sql", "json", "yaml", "text")
    assert not [str(b) for b in BLOCKS if b.language not in known]


@runnable("bash")
def test_command_of_the_documentation_works(block: Block, running: System) -> None:
    for command in block.text.splitlines():
        if not command or command.startswith(("#", *ELSEWHERE)):
            continue
        done = subprocess.run(
            ["bash", "-c", command],
            env=running.environ,
            cwd=running.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{block}: {command}\n{done.stdout}{done.stderr}"
        assert done.stdout, f"{block}: {command} printed nothing"


@runnable("python")
def test_snippet_of_the_documentation_works(block: Block, running: System) -> None:
    done = running.script(block.text, cwd=running.home)
    assert (done.returncode, done.stderr) == (0, ""), f"{block}\n{done.stdout}{done.stderr}"


@runnable("sql")
def test_query_of_the_documentation_works(block: Block, running: System) -> None:
    done = subprocess.run(
        ["sqlite3", "-readonly", running.db, block.text],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout, f"{block} found nothing"


def test_events_page_is_what_the_schemas_say() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "event_bus", "schemas", "show", "--markdown"],
        env={**os.environ, "BITTEN_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ROOT / "docs" / "events.md").read_text() == made.stdout


def test_examples_of_the_schemas_are_valid() -> None:
    for event_type in Registry():
        assert event_type.schema["examples"]
        for example in event_type.schema["examples"]:
            event_type.check(example)


@runnable("json")
def test_json_of_the_documentation_is_json(block: Block) -> None:
    json.loads(block.text)


@runnable("yaml")
def test_config_of_the_documentation_is_taken(block: Block, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(block.text)
    defaults = Settings.load(environ={"BITTEN_HOME": str(tmp_path / "other")})
    assert Settings.load(environ={"BITTEN_HOME": str(tmp_path)}) != defaults


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_tests_named_in_the_documentation_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`(tests/\w+\.py)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    for name in Settings.__dataclass_fields__:
        assert f"BITTEN_{name.upper()}" in page


def test_every_module_is_on_the_map() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    for package in ("event_bus", "collector"):
        for path in (ROOT / package).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in page, f"docs/design.md does not place {package}/{path.name}"
