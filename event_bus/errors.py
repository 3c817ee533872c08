"""Every error this project raises on purpose.

BittenError
├── SettingsError      a flag, variable or config.yaml entry that cannot be used
├── MissingExtra       an optional package is not installed; names the extra
├── SchemaError        a schema file that cannot be used
├── KeysError          a key or the allow-list cannot be used
├── RejectedEvent      an event that the contract refuses; carries the rejection
├── BusUnavailable     the broker did not answer in time
├── BusRefused         the broker answered a request with an error
│   └── TrimmedRange   the events asked for are gone from the journal: too old, or damaged
├── StartError         a daemon cannot start: port, lock or directory is not to be had
├── JournalError       journal.db cannot be opened
│   ├── JournalFull    there is no space left for it; worth trying again
│   └── JournalFailed  it could be opened, and not be read or written: a restart may help
│       └── JournalDamaged  it is not what was written; the next start recovers what there is
├── DatabaseError      bitten_events.db is foreign, of another version or unusable
│   ├── DatabaseMissing      nobody has made it yet
│   ├── DatabaseUnavailable  locked, or its disk is full; worth trying again
│   ├── DatabaseCorrupt      damaged; the collector moves it aside and fills a new one
│   └── DatabaseReplaced     its file was removed or replaced while it was open
└── BackupError        a backup cannot be made, found or restored, or is not whole

A message says what, where and why; `hint` says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class BittenError(Exception):
    """Root of the tree. `hint` is one sentence, without a full stop, on what to do.

    `exit_code` is the command line's: 1 a negative answer, 2 wrong use, 3 the bus does not answer,
    4 a file, port or lock is not to be had, 5 the journal failed while the bus ran, or has no room:
    a supervisor is to start it again.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; {self.hint}" if self.hint else message


class SettingsError(BittenError):
    exit_code = 2


class MissingExtra(BittenError):
    exit_code = 2


class SchemaError(BittenError):
    exit_code = 2


class KeysError(BittenError):
    exit_code = 4


class RejectedEvent(BittenError):
    """`path`, `value` and `rule` name what the event broke; empty where nothing fits."""

    def __init__(self, message: str, *, rule: str, path: str = "", value: str = "") -> None:
        super().__init__(message)
        self.rule = rule
        self.path = path
        self.value = value


class BusUnavailable(BittenError):
    exit_code = 3


class BusRefused(BittenError):
    """`code` is one of the error codes of docs/protocol.md."""

    def __init__(self, message: str, *, code: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class TrimmedRange(BusRefused):
    """The first seq from the one asked for on that can be had is `first_seq`."""

    def __init__(self, message: str, *, first_seq: int, code: str = "trimmed") -> None:
        super().__init__(message, code=code)
        self.first_seq = first_seq


class StartError(BittenError):
    exit_code = 4


class JournalError(BittenError):
    exit_code = 4


class JournalFull(JournalError):
    exit_code = 5


class JournalFailed(JournalError):
    exit_code = 5


class JournalDamaged(JournalFailed):
    pass


class DatabaseError(BittenError):
    exit_code = 4


class DatabaseMissing(DatabaseError):
    pass


class DatabaseUnavailable(DatabaseError):
    pass


class DatabaseCorrupt(DatabaseError):
    pass


class DatabaseReplaced(DatabaseError):
    pass


class BackupError(BittenError):
    exit_code = 4
