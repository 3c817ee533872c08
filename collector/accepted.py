"""Losses that the owner knows of: `bitten audit --accept` notes them; only others are news."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

FILE = "audit-accepted.json"


class Accepted(msgspec.Struct, frozen=True):
    """Events lost, and losses of which nobody knows how many events they were."""

    lost: int = 0
    unknown: int = 0

    def within(self, found: Accepted) -> Accepted:
        """No more than there is: a new database begins without losses."""
        return Accepted(min(self.lost, found.lost), min(self.unknown, found.unknown))


def load(home: Path) -> Accepted:
    """Nothing if the file is not there or cannot be read: then every loss counts again."""
    try:
        return msgspec.json.decode((home / FILE).read_bytes(), type=Accepted)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Accepted()


def save(home: Path, accepted: Accepted) -> None:
    """Raises OSError."""
    new = home / f"{FILE}.new"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(accepted))
    new.replace(home / FILE)


def reconcile(home: Path, found: Accepted, *, accept: bool) -> Accepted:
    """What of the losses found is accepted; with `accept` all of it. Raises OSError then."""
    before = load(home)
    now = found if accept else before.within(found)
    if accept:
        save(home, now)
    elif now != before:
        with contextlib.suppress(OSError):  # a home that only others may write
            save(home, now)
    return now
