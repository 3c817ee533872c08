"""The allow-list: which keys may connect, and what each may publish and read.

`keys/allowed.yaml` is a mapping by name:

    laptop:
      public_key: "…40 characters…"
      publish: [market_data, "signal_*"]
      subscribe: ["*"]

Patterns have `*`, `?` and `[…]`. Those of `publish` are compared with event types; those of
`subscribe` with event types, and with topics without their `bitten.`, such as `price.EURUSD`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from event_bus import envelope
from event_bus.errors import KeysError
from event_bus.event_schema import ACCOUNTS, TOPIC_PREFIX, Registry
from event_bus.keys import KEY_CHARACTERS, check_name, is_public_key

FILE = "allowed.yaml"
MAX_BYTES = 1 << 20
ALWAYS_READABLE = "heartbeat"
_MAX_KNOWN = 10_000
_PATTERN = re.compile(r"[^\x00-\x20\x7f]{1,255}")
_FIELDS = ("public_key", "publish", "subscribe")


@dataclass(frozen=True)
class Rights:
    """What one key may do. Equal if name, key and patterns are."""

    name: str
    public_key: str
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    _known: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    @property
    def publishes_all(self) -> bool:
        return "*" in self.publish

    @property
    def reads_all(self) -> bool:
        return "*" in self.subscribe

    def may_publish(self, event_type: str) -> bool:
        return any(fnmatchcase(event_type, p) for p in self.publish) or (
            bool(self.publish) and event_type in ACCOUNTS
        )

    def may_read(self, topic: str) -> bool:
        """`topic` is `<type>` or `<type>.<key>`."""
        known = self._known.get(topic)
        if known is None:
            event_type = topic.partition(".")[0]
            known = event_type == ALWAYS_READABLE or any(
                fnmatchcase(topic, p) or fnmatchcase(event_type, p) for p in self.subscribe
            )
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[topic] = known
        return known


UNLIMITED = Rights("", "", publish=("*",), subscribe=("*",))
"""Of everybody on a bus without keys."""


def readable_part(body: bytes, rights: Rights, registry: Registry) -> bytes:
    """A canonical batch with `null` in the place of each event that a key may not read."""
    lines = body.split(b"\n")[:-1]
    for index, line in enumerate(lines):
        event = envelope.decode(line)
        known = registry.types.get(event.event_type)
        topic = known.topic(event.data).removeprefix(TOPIC_PREFIX) if known else event.event_type
        if not rights.may_read(topic):
            lines[index] = b"null"
    return b"\n".join(lines) + b"\n"


def read(path: Path) -> dict[str, Rights]:
    """The rights by name. Raises KeysError naming file, line and what was expected."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise KeysError(f"{path}: longer than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise KeysError(
            f"there is no allow-list {path}",
            hint="`bitten keys new` begins one with the key of this home's own processes, `bitten"
            " keys allow NAME …` adds each other",
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise KeysError(f"cannot read {path}: {e}", hint="check its owner and rights") from e
    try:
        return parse(text, str(path))
    except KeysError as e:
        e.hint = "mend that line"
        raise


def parse(text: str, where: str) -> dict[str, Rights]:
    """The rights by name; `where` is the file for messages. Raises KeysError."""
    try:
        document = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise KeysError(f"{where}, line {line}: not YAML: {e.problem}") from e
    except (yaml.YAMLError, RecursionError) as e:
        raise KeysError(f"{where}: not YAML: {' '.join(str(e).split())}") from e
    allowed: dict[str, Rights] = {}
    by_key: dict[str, str] = {}
    for name_node, node in _pairs(document, where, "a mapping of names to rights"):
        name = _text(name_node, where, "a name")
        try:
            check_name(name)
        except KeysError as e:
            raise _problem(name_node, where, str(e)) from e
        if name in allowed:
            raise _problem(name_node, where, f"{name} stands here twice")
        rights = _rights(name, node, where)
        other = by_key.setdefault(rights.public_key, name)
        if other != name:
            raise _problem(node, where, f"{name} has the key of {other}")
        allowed[name] = rights
    return allowed


def _rights(name: str, node: yaml.Node, where: str) -> Rights:
    public_key = ""
    patterns: dict[str, tuple[str, ...]] = {}
    for field_node, value in _pairs(node, where, f"{name}'s {', '.join(_FIELDS)}"):
        key = _text(field_node, where, "a field")
        if key not in _FIELDS or key in patterns or (key == "public_key" and public_key):
            raise _problem(field_node, where, f"expected each of {', '.join(_FIELDS)} once")
        if key == "public_key":
            public_key = _text(value, where, "a public key")
            if not is_public_key(public_key):
                raise _problem(
                    value, where, f"expected a public key of {KEY_CHARACTERS} characters in quotes"
                )
        else:
            patterns[key] = _patterns(value, where)
            if key == "publish" and any("." in p for p in patterns[key]):
                raise _problem(value, where, "publish has event types, and those have no dots")
    if not public_key:
        raise _problem(node, where, f"{name} has no public_key")
    return Rights(name, public_key, patterns.get("publish", ()), patterns.get("subscribe", ()))


def _patterns(node: yaml.Node, where: str) -> tuple[str, ...]:
    expected = 'expected a list of patterns such as [market_data, "signal_*"]'
    if not isinstance(node, yaml.SequenceNode):
        raise _problem(node, where, expected)
    found = tuple(_text(item, where, "a pattern") for item in node.value)
    for item, pattern in zip(node.value, found, strict=True):
        if not _PATTERN.fullmatch(pattern):
            raise _problem(item, where, expected)
    return tuple(p.removeprefix(TOPIC_PREFIX) for p in found)


def _pairs(node: yaml.Node | None, where: str, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise _problem(node, where, f"expected {what}")
    return list(node.value)


def _text(node: yaml.Node, where: str, what: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _problem(node, where, f"expected {what}")
    return str(node.value)


def _problem(node: yaml.Node, where: str, what: str) -> KeysError:
    return KeysError(f"{where}, line {node.start_mark.line + 1}: {what}")


def write(path: Path, allowed: Mapping[str, Rights]) -> None:
    """Replace the file as a whole, for its owner alone.

    Raises KeysError, also if `read` would not take it.
    """
    document = {
        name: {
            "public_key": rights.public_key,
            "publish": list(rights.publish),
            "subscribe": list(rights.subscribe),
        }
        for name, rights in allowed.items()
    }
    text = yaml.safe_dump(document, sort_keys=False) if document else ""
    parse(text, str(path))
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, 0o600)
            file.write("# Who may connect, and do what. Written anew by `bitten keys`.\n" + text)
            file.flush()
            os.fsync(fd)
        new.replace(path)
    except OSError as e:
        raise KeysError(f"cannot write {path}: {e.strerror}") from e


class AllowList:
    """The file as it is now; while it is broken, as it was last. Raises KeysError when made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        self._stamp = self._stamp_now()
        self._take(read(path))

    def _take(self, allowed: Mapping[str, Rights]) -> None:
        self._by_key = {rights.public_key: rights for rights in allowed.values()}

    def __getitem__(self, public_key: str) -> Rights | None:
        return self._by_key.get(public_key)

    def refresh(self) -> None:
        """Read the file again if it was changed."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read(self.path))
        except KeysError as e:
            self.problem = str(e)
        else:
            self.problem = ""

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
