"""What a publisher knows of its own events, in a file that outlives its SIGKILL.

The file is mapped, shared: what is written to memory is in the page cache at once, whatever
becomes of the process. It says what the bus promised (`acked`) without asking the bus.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

TOKEN_BYTES = 20
FIELDS = (
    "attempted",  # bridge calls begun
    "returned",  # calls that gave an id back
    "acked",  # every event of the process numbered up to here is acknowledged
    "waiting",
    "dropped",
    "refused",
    "raised",  # calls that raised into the caller
    "slow",  # calls over the limit by the clock
    "blocked",  # calls over the limit without the time that the process waited for a CPU
    "slowest_us",
    "slowest_blocked_us",
    "finished",  # 1: the process flushed and ended by itself
    "flushed",  # 1: and all was acknowledged by then
)
_STRUCT = struct.Struct(f"{TOKEN_BYTES}s4x{len(FIELDS)}q")
_OFFSET = {name: TOKEN_BYTES + 4 + 8 * i for i, name in enumerate(FIELDS)}
_LONG = struct.Struct("q")


class RecordWriter:
    """The publisher's side: `record["acked"] = 17` is there for good."""

    def __init__(self, path: Path) -> None:
        new = path.with_suffix(".new")  # whoever sees the file sees all of it
        new.write_bytes(bytes(_STRUCT.size))
        new.replace(path)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _STRUCT.size)

    def name(self, token: str) -> None:
        self._map[:TOKEN_BYTES] = token.encode()

    def __setitem__(self, field: str, value: int) -> None:
        _LONG.pack_into(self._map, _OFFSET[field], value)

    def __getitem__(self, field: str) -> int:
        return int(_LONG.unpack_from(self._map, _OFFSET[field])[0])


class Record(dict[str, int]):
    """The checker's side: the fields by name, and the producer's token ("" before its first id)."""

    def __init__(self, path: Path) -> None:
        token, *values = _STRUCT.unpack(path.read_bytes())
        super().__init__(zip(FIELDS, values, strict=True))
        self.path = path
        self.token: str = token.rstrip(b"\0").decode()
