"""The home directory: whose it is, who may read it, and what was left lying in it."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from collector.doctor.context import Context, quoted
from collector.doctor.finding import CannotTell, Finding, fault, ok, size, span, warning

MAX_ENTRIES = 10_000
MAX_SHOWN = 3
SECRET = "_secret"
"""How the names of secret keys end."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file or directory of the home; `mode` as in `ls`, with its kind."""

    path: Path
    mode: int
    uid: int

    @property
    def is_locked_for_its_owner(self) -> bool:
        needed = stat.S_IRWXU if stat.S_ISDIR(self.mode) else stat.S_IRUSR | stat.S_IWUSR
        return self.mode & needed != needed


def rights(context: Context) -> Iterator[Finding]:
    settings = context.settings
    try:
        home = settings.home.stat()
    except FileNotFoundError as e:
        raise CannotTell(f"there is no {settings.home}") from e
    except PermissionError:
        yield _another_users(settings.home, "its owner")
        return
    if not os.access(settings.home, os.R_OK | os.X_OK):
        yield _another_users(settings.home, _user(home.st_uid))
        return
    entries = [Entry(path=settings.home, mode=home.st_mode, uid=home.st_uid)]
    entries += _walk(settings.home)
    if not settings.db.is_relative_to(settings.home):
        entries += [_entry(p) for p in settings.db.parent.glob(f"{settings.db.name}*")]
    yield from judge_rights(entries, home_uid=home.st_uid, my_uid=os.geteuid())


def _walk(home: Path) -> list[Entry]:
    found: list[Entry] = []
    for directory, _, files in os.walk(home):
        for path in [Path(directory), *(Path(directory, f) for f in files)]:
            try:
                found.append(_entry(path))
            except FileNotFoundError:  # gone meanwhile
                continue
        if len(found) > MAX_ENTRIES:
            break
    return found[1:]


def _entry(path: Path) -> Entry:
    status = path.lstat()
    return Entry(path=path, mode=status.st_mode, uid=status.st_uid)


def _another_users(home: Path, user: str) -> Finding:
    return fault(
        f"{home} cannot be looked into by {_user(os.geteuid())}",
        why=f"it is {user}'s, and meant for that user only",
        remedy="ask as that user",
        command=f"sudo -u {user} bitten doctor" if user != "its owner" else "sudo bitten doctor",
    )


def judge_rights(entries: Sequence[Entry], *, home_uid: int, my_uid: int) -> Iterator[Finding]:
    home, owner = entries[0].path, _user(home_uid)
    # Who may write here is what counts: a link's own bits say nothing.
    entries = [e for e in entries if not stat.S_ISLNK(e.mode)]
    foreign = [e.path for e in entries if e.uid != home_uid]
    if foreign:
        yield fault(
            f"{len(foreign)} {'file' if len(foreign) == 1 else 'files'} in {home} not {owner}'s:"
            f" {_some(foreign)}",
            why=f"made by a command of {_user(_uid_of(entries, foreign[0]))}; what runs as {owner}"
            " may not be able to write them",
            remedy="give them to the owner of the home, and run `bitten` as that user",
            command=f"sudo chown -R {owner}: {quoted(home)}",
        )
    locked = [e.path for e in entries if e.is_locked_for_its_owner and "backup" not in e.path.parts]
    if locked and home_uid != 0:
        yield fault(
            f"{owner} cannot read and write {_some(locked)}",
            why="the rights of its owner were taken away",
            remedy="give them back",
            command=f"chmod -R u+rwX {quoted(home)}",
        )
    secrets = [e.path for e in entries if e.path.name.endswith(SECRET) and e.mode & 0o077]
    if secrets:
        yield fault(
            f"secret keys can be read by others: {_some(secrets)}",
            why="whoever has such a key is let in under its name",
            remedy="close them; if others work on this machine, make new ones",
            command=f"chmod 600 {' '.join(map(quoted, secrets[:MAX_SHOWN]))}",
        )
    # Into a home that is closed nobody gets: an editor's 0644 of config.yaml does no harm there.
    outside = [e for e in entries if not e.path.is_relative_to(home)]
    within_reach = entries if entries[0].mode & 0o077 else outside
    wide = [e.path for e in within_reach if e.mode & 0o077 and e.path not in secrets]
    if wide:
        yield warning(
            f"other users of this machine have rights on {_some(wide)}",
            why="what is in the home is its owner's alone: directories 0700, files 0600",
            remedy="take those rights away, unless you gave them on purpose",
            command=f"chmod -R go= {' '.join(map(quoted, [home, *(e.path for e in outside)]))}",
        )
    if my_uid not in (0, home_uid):
        yield warning(
            f"you are {_user(my_uid)}, the home is {owner}'s",
            why="some of what is wrong may not be seen",
            remedy="ask as that user",
            command=f"sudo -u {owner} bitten doctor",
        )
    if not (foreign or locked or wide or secrets):
        yield ok(f"{home} is {owner}'s alone")


def leftovers(context: Context) -> Iterator[Finding]:
    """Files that were moved aside because they were damaged or replaced."""
    settings = context.settings
    directories = {settings.home, settings.db.parent}
    aside = [
        path
        for directory in directories
        for pattern in ("*.corrupt-*", "*.replaced-*")
        for path in directory.glob(pattern)
    ]
    if not aside:
        yield ok("no damaged files were moved aside")
        return
    sizes = [p.stat().st_size for p in aside]
    newest = max(p.stat().st_mtime for p in aside)
    yield warning(
        f"{len(aside)} damaged or replaced files were moved aside: {_some(sorted(aside))}",
        why=f"{size(sum(sizes))}, last written {span(context.now - newest)} ago; what could be"
        " read of them was copied, the audit says whether anything is missing",
        remedy="see that nothing is lost, keep a copy elsewhere if it is, then remove them",
        command=f"{context.bitten} audit && rm {' '.join(map(quoted, sorted(aside)))}",
    )


def _some(paths: Sequence[Path]) -> str:
    shown = ", ".join(p.name for p in paths[:MAX_SHOWN])
    return shown if len(paths) <= MAX_SHOWN else f"{shown} and {len(paths) - MAX_SHOWN} more"


def _uid_of(entries: Sequence[Entry], path: Path) -> int:
    return next(e.uid for e in entries if e.path == path)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # as in containers
        return str(uid)
