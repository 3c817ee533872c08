"""The one table of settings: flag, environment, $BITTEN_HOME/config.yaml, default."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from event_bus.errors import SettingsError

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_MAX_SHOWN = 300
_NULL = "tag:yaml.org,2002:null"
_LINES = "expected are lines such as `journal_max_age_s: 86400`"


def _boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ValueError("expected one of 1, 0, true, false, yes, no, on, off")
    return text in _TRUE


def _path(value: Any, start: Path = Path()) -> Path:
    text = str(value)
    if "\0" in text:
        raise ValueError("expected the path of a file")
    try:
        return (start / Path(text).expanduser()).absolute()
    except RuntimeError:
        raise ValueError(f"there is no user {text.partition('/')[0][1:]}") from None


def _url(value: Any) -> str:
    text = str(value)
    port = re.fullmatch(r"tcp://[^/]+:(\d{1,5})", text)
    if not re.fullmatch(r"ipc://.+", text) and (port is None or int(port[1]) > 65_535):
        raise ValueError("expected an address such as tcp://127.0.0.1:5570")
    return text


def _positive(value: Any) -> int:
    text = str(value).replace("_", "")
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) == 0:
        raise ValueError("expected a whole number above 0, of up to 18 digits")
    return int(text)


def _whole(value: Any) -> int:
    text = str(value).replace("_", "")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError("expected a whole number, 0 or above, of up to 18 digits")
    return int(text)


def _source(value: Any) -> str:
    text = str(value)
    if len(text) > 255 or not text.isprintable():
        raise ValueError("expected a name of up to 255 printable characters")
    return text


@dataclass(frozen=True)
class _Line:
    """A value in config.yaml, and where it is."""

    file: Path
    number: int
    value: str


def _setting(default: Any, parse: Callable[[Any], Any], text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Each field is also the variable BITTEN_<FIELD> and the key <field> of config.yaml."""

    home: Path = _setting(  # noqa: RUF009 — makes a dataclass field
        None, _path, "directory of all files; default ~/.bitten"
    )
    events_url: str = _setting("tcp://127.0.0.1:5570", _url, "where the broker publishes")
    ingress_url: str = _setting(
        "tcp://127.0.0.1:5571", _url, "where the broker takes events, fetches and status requests"
    )
    db: Path = _setting(  # noqa: RUF009
        None, _path, "database; default $BITTEN_HOME/bitten_events.db"
    )
    source: str = _setting(
        "", _source, "source of this process's events; default the script's name"
    )
    enabled: bool = _setting(True, _boolean, "0 makes every bridge call do nothing")
    outbox_max_events: int = _setting(100_000, _positive, "events a bridge holds in memory")
    outbox_max_bytes: int = _setting(64 << 20, _positive, "bytes a bridge holds in memory")
    spool_max_bytes: int = _setting(256 << 20, _positive, "bytes a process may spool to disk")
    journal_max_bytes: int = _setting(4 << 30, _positive, "size at which the journal is trimmed")
    journal_max_age_s: int = _setting(
        7 * 86_400, _positive, "age at which events leave the journal"
    )
    backup_dir: Path = _setting(  # noqa: RUF009
        None, _path, "directory of the backups; default $BITTEN_HOME/backup"
    )
    backup_interval_s: int = _setting(
        0, _whole, "seconds from one backup to the next by the collector; 0 makes none"
    )
    backup_keep: int = _setting(2, _positive, "backups kept in backup_dir")

    @classmethod
    def load(cls, *, environ: Mapping[str, str] | None = None, **flags: Any) -> Settings:
        """Settings in force, given the flags that were set (None means not set).

        Raises SettingsError naming the flag, variable or file and what was expected.
        """
        environ = os.environ if environ is None else environ
        home = _pick("home", flags, environ, {}, None, Path()) or _default_home()
        config = _config_file(home / "config.yaml")
        values = {
            f.name: _pick(f.name, flags, environ, config, f.default, home)
            for f in fields(cls)
            if f.name != "home"
        }
        return cls(home=home, **values)

    def __post_init__(self) -> None:
        for name, default in (("db", "bitten_events.db"), ("backup_dir", "backup")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.home / default)

    @property
    def journal(self) -> Path:
        return self.home / "journal.db"

    @property
    def spool(self) -> Path:
        return self.home / "spool"

    @property
    def schemas(self) -> Path:
        return self.home / "schemas"

    @property
    def keys(self) -> Path:
        return self.home / "keys"

    def make_home(self) -> None:
        """Create the home directory, readable by its owner only. Raises SettingsError."""
        try:
            for directory in (self.home, self.spool):
                if not directory.exists():
                    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                    directory.chmod(0o700)  # whatever the umask
        except OSError as e:
            raise SettingsError(
                f"cannot create {e.filename or self.home}: {e.strerror}",
                hint="make it writable or set BITTEN_HOME to a directory that is",
            ) from e
        self.check_home()

    def check_home(self) -> None:
        """Raise SettingsError if nothing can be made in the directory; it has to be there."""
        if not os.access(self.home, os.W_OK | os.X_OK):
            raise SettingsError(
                f"{self.home} is not writable",
                hint="make it writable or set BITTEN_HOME to a directory that is",
            )


def _pick(
    name: str,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    config: Mapping[str, _Line],
    default: Any,
    home: Path,
) -> Any:
    variable = f"BITTEN_{name.upper()}"
    parse = Settings.__dataclass_fields__[name].metadata["parse"]
    if flags.get(name) is not None:
        where, value = f"--{name.replace('_', '-')}", flags[name]
    elif environ.get(variable):
        where, value = variable, environ[variable]
    elif name in config:
        line = config[name]
        where, value = f"{name} in {line.file}, line {line.number},", line.value
        if parse is _path:  # the daemons of a home are started from anywhere
            parse = functools.partial(_path, start=home)
    else:
        return default
    try:
        return parse(value)
    except ValueError as e:
        raise SettingsError(f"{where} is {_shown(value)}: {e}") from e


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _default_home() -> Path:
    try:
        return Path.home() / ".bitten"
    except RuntimeError as e:  # a user without an entry in passwd, as in containers
        raise SettingsError("there is no home directory", hint="set BITTEN_HOME") from e


def _config_file(path: Path) -> dict[str, _Line]:
    """The lines that have a value."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except PermissionError as e:
        raise SettingsError(
            f"cannot read {path}: {e.strerror}", hint="use `bitten` as the user whose home it is"
        ) from e
    except NotADirectoryError as e:
        raise SettingsError(
            f"{path.parent} is not a directory", hint="set BITTEN_HOME or --home to one"
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(f"cannot read {path}: {e}") from e
    import yaml  # only homes with a config.yaml pay for it

    # Values stay text: YAML's own dates and octal numbers are nothing that a setting knows.
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError as e:
        raise SettingsError(f"{path} is nested too deeply") from e
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}," if e.problem_mark else ""
        raise SettingsError(f"{path}{line} is not YAML: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if root is None or root.tag == _NULL:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path} has no settings", hint=_LINES)
    known = {f.name for f in fields(Settings)} - {"home"}
    unknown = [
        k for k, _ in root.value if not isinstance(k, yaml.ScalarNode) or k.value not in known
    ]
    if unknown:
        names = ", ".join(k.value if isinstance(k, yaml.ScalarNode) else k.id for k in unknown)
        raise SettingsError(
            f"{path}, line {unknown[0].start_mark.line + 1}: unknown setting {names}",
            hint=f"known are {', '.join(sorted(known))}",
        )
    config = {}
    for key, node in root.value:
        number = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            kind = "list" if isinstance(node, yaml.SequenceNode) else "mapping"
            raise SettingsError(f"{key.value} in {path}, line {number}, is a {kind}", hint=_LINES)
        if node.tag != _NULL:
            config[key.value] = _Line(path, number, node.value)
    return config
