"""Settings: where a value comes from, what is refused, and that each one is documented."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from event_bus.errors import SettingsError
from event_bus.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def load(home: Path, *, config: str | None = None, environ: Any = None, **flags: Any) -> Settings:
    home.mkdir(exist_ok=True)
    if config is not None:
        (home / "config.yaml").write_text(config)
    return Settings.load(environ={"BITTEN_HOME": str(home), **(environ or {})}, **flags)


def test_flag_beats_environment_beats_config_file_beats_default(tmp_path: Path) -> None:
    name = "journal_max_age_s"
    config = f"{name}: 3"
    environ = {"BITTEN_JOURNAL_MAX_AGE_S": "2"}
    assert load(tmp_path).journal_max_age_s == 7 * 86_400
    assert load(tmp_path, config=config).journal_max_age_s == 3
    assert load(tmp_path, config=config, environ=environ).journal_max_age_s == 2
    assert load(tmp_path, config=config, environ=environ, **{name: 1}).journal_max_age_s == 1


def test_empty_variable_and_missing_flag_count_as_not_set(tmp_path: Path) -> None:
    environ = {"BITTEN_SOURCE": ""}
    assert load(tmp_path, config="source: s", environ=environ, source=None).source == "s"


def test_paths_follow_the_home(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert settings.db == tmp_path / "bitten_events.db"
    assert settings.journal == tmp_path / "journal.db"
    assert load(tmp_path, environ={"BITTEN_DB": "~/x.db"}).db == Path.home() / "x.db"
    assert Settings.load(environ={}).home == Path.home() / ".bitten"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_empty_config_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, config=text) == load(tmp_path)


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"BITTEN_EVENTS_URL": "localhost:5570"}, "expected an address such as tcp://"),
        ({"BITTEN_EVENTS_URL": "tcp://127.0.0.1"}, "expected an address such as tcp://"),
        ({"BITTEN_INGRESS_URL": "tcp://127.0.0.1:99999"}, "expected an address such as tcp://"),
        ({"BITTEN_ENABLED": "perhaps"}, "expected one of 1, 0, true"),
        ({"BITTEN_SPOOL_MAX_BYTES": "1e9"}, "expected a whole number above 0"),
        ({"BITTEN_SPOOL_MAX_BYTES": "0"}, "expected a whole number above 0"),
        ({"BITTEN_SPOOL_MAX_BYTES": "-1"}, "expected a whole number above 0"),
        ({"BITTEN_DB": "~nobody-of-that-name/x.db"}, "there is no user nobody-of-that-name"),
        ({"BITTEN_DB": "a\0b"}, "expected the path of a file"),
        ({"BITTEN_SOURCE": "x" * 256}, "expected a name of up to 255"),
    ],
)
def test_error_names_the_variable_and_what_was_expected(
    tmp_path: Path, environ: dict[str, str], complaint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, environ=environ)
    ((name, value),) = environ.items()
    assert str(caught.value).startswith(f"{name} is {value!r}: {complaint}")


def test_error_names_the_flag_or_the_config_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^--events-url is 'x': expected"):
        load(tmp_path, events_url="x")
    with pytest.raises(
        SettingsError, match=r"^enabled in .*config\.yaml, line 2, is '7': expected"
    ):
        load(tmp_path, config="source: x\nenabled: 7")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("sauce: x", r"config\.yaml, line 1: unknown setting sauce; known are .* db, enabled, "),
        ("home: /x", "unknown setting home"),
        ("- a", r"config\.yaml has no settings; expected are lines such as"),
        ("db: [a]", r"db in .*config\.yaml, line 1, is a list; expected are lines such as"),
        ("source: x\ndb: {a: b}", r"line 2, is a mapping"),
        ("[a]: b", "unknown setting sequence"),
        ("journal_max_age_s: 2026-13-45", r"line 1, is '2026-13-45': expected a whole number"),
        ("journal_max_age_s: 2026-01-02", r"line 1, is '2026-01-02': expected a whole number"),
        ("journal_max_age_s: " + "9" * 5_000, r"is '9{299}…: .* of up to 18 digits$"),
        ("[" * 100_000, r"config\.yaml is nested too deeply"),
        ("a: [", r"config\.yaml, line 1, is not YAML: "),
        ("a: \x01", r"config\.yaml is not YAML: "),
        ("1: 2", "unknown setting 1"),
        ("1: 2\n?\nsauce: x", "line 1: unknown setting 1, , sauce"),
    ],
)
def test_config_file_that_cannot_be_used_is_named(
    tmp_path: Path, config: str, complaint: str
) -> None:
    with pytest.raises(SettingsError, match=complaint) as caught:
        load(tmp_path, config=config)
    assert "\n" not in str(caught.value)


def test_relative_path_in_the_config_file_begins_at_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    home = tmp_path / "home"
    settings = load(home, config="db: data/x.db\nbackup_dir: ~/copies")
    assert settings.db == home / "data" / "x.db"
    assert settings.backup_dir == Path.home() / "copies"
    assert load(home, environ={"BITTEN_DB": "x.db"}).db == Path("/x.db")


def test_config_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"source: \xff")
    with pytest.raises(SettingsError, match=r"cannot read .*config\.yaml"):
        load(tmp_path)


def test_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot create .*file.*BITTEN_HOME"):
        Settings(home=tmp_path / "file" / "home").make_home()


def test_home_is_for_its_owner_only(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    settings.make_home()
    assert {p.stat().st_mode & 0o777 for p in (settings.home, settings.spool)} == {0o700}


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)])
def test_setting_is_documented_with_its_default(name: str) -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "".join(page.read_text() for page in pages if page.exists())
    assert f"BITTEN_{name.upper()}" in text
    table = (ROOT / "docs" / "settings.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
    default = Settings.__dataclass_fields__[name].default
    if default not in (None, "", True):
        assert (f"{default:,}" if isinstance(default, int) else str(default)) in row
