"""Reads a damaged journal without SQLite: page by page, keeping what proves itself.

The format is https://www.sqlite.org/fileformat2.html. Every page that looks like a leaf of a table
or an index is read for itself, so nothing depends on the header, the schema or the pages above.
A batch proves itself by its CRC-32; the small tables have none, and are only asked for what cannot
be had otherwise.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from event_bus.envelope import PRODUCER
from event_bus.journal_format import PAGE_BYTES, Batch, LostRange, Producer, is_intact

MAX_PAYLOAD_BYTES = 64 << 20
MAX_SEQ = 1 << 48
"""No bus gets so far: what claims to be further is damage."""

MAX_GROUP_EVENTS = 25_000
"""More than one commit can hold; what is claimed further from the last event is not believed."""

_META_PAGE = 2
"""Where the first table that is made has its root, for ever; other rows look like those of meta."""

_TABLE_LEAF, _INDEX_LEAF, _INDEX_INNER = 0x0D, 0x0A, 0x02
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_INT_BYTES = (0, 1, 2, 3, 4, 6, 8)

_Broken = (IndexError, ValueError, struct.error)
"""What parsing anything that is not what it looks like ends in."""


class Pages:
    """Pages of a database file and of its WAL's commits, as far as they can be read."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        self._wal = _open(Path(f"{path}-wal"))
        self._in_wal = dict(self._committed_frames()) if self._wal >= 0 else {}
        size = os.fstat(self._file).st_size if self._file >= 0 else 0
        self.count = max([-(-size // PAGE_BYTES), *self._in_wal])

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in (self._file, self._wal):
            if fd >= 0:
                os.close(fd)

    def versions(self, number: int) -> Iterator[bytes]:
        """The page as the WAL has it and as the file has it; either may be the good one."""
        if number in self._in_wal:
            yield _read(self._wal, self._in_wal[number])
        if number > 0:
            yield _read(self._file, (number - 1) * PAGE_BYTES)

    def _committed_frames(self) -> Iterator[tuple[int, int]]:
        """(page number, offset) up to the last commit; not those of earlier rounds of the WAL."""
        pending: list[tuple[int, int]] = []
        salts = None
        frame_bytes = _FRAME_HEADER_BYTES + PAGE_BYTES
        for offset in range(_WAL_HEADER_BYTES, os.fstat(self._wal).st_size, frame_bytes):
            header = os.pread(self._wal, _FRAME_HEADER_BYTES, offset)
            if len(header) < _FRAME_HEADER_BYTES:
                break
            number, commit = struct.unpack_from(">II", header)
            salts = salts or header[8:16]
            if header[8:16] == salts and 0 < number < 1 << 31:
                pending.append((number, offset + _FRAME_HEADER_BYTES))
                if commit:
                    yield from pending
                    pending.clear()


class Carved(msgspec.Struct):
    """What a damaged journal still says. `batches` has the place of each intact one (page, cell,
    number of events) by its first seq, `claims` the number of events of those that are known to
    have been there, 0 if it is not known."""

    meta: dict[str, Any]
    batches: dict[int, tuple[int, int, int]]
    claims: dict[int, int]
    producers: dict[str, Producer]
    consumers: dict[str, tuple[int, float]]
    losses: dict[int, LostRange]

    def end(self, *, is_exact: bool = False) -> int:
        """The last seq that the journal is known to have had; 0 if nothing is known. With
        `is_exact`, as far as batches say themselves how long they were."""
        last = max((first + place[2] - 1 for first, place in self.batches.items()), default=0)
        for first, count in sorted(self.claims.items()):
            count = count or int(not is_exact)
            if last < first <= last + MAX_GROUP_EVENTS and count:
                last = first + count - 1
        return last


def carve(pages: Pages) -> Carved:
    """Everything that can be read from these pages."""
    carved = Carved({}, {}, {}, {}, {}, {})
    for number in range(1, pages.count + 1):
        for page in pages.versions(number):
            for cell, rowid, record in _records(pages, number, page):
                if rowid is not None:
                    _take_row(carved, rowid, record, (number, cell))
                elif number == _META_PAGE and len(record) == 2 and isinstance(record[0], str):
                    carved.meta.setdefault(*record)
                else:
                    _take_index_row(carved, record)
    return carved


def read_batch(pages: Pages, first_seq: int, place: tuple[int, int, int]) -> Batch:
    """The batch that `carve` found there, read once more."""
    number, cell, _ = place
    for page in pages.versions(number):
        for at, rowid, record in _records(pages, number, page, only_cell=cell):
            if at == cell and rowid == first_seq and _is_batch(rowid, record):
                return Batch(first_seq, record[1], float(record[2]), record[4])
    raise ValueError(f"batch {first_seq} cannot be read any more")


def _take_row(carved: Carved, rowid: int, record: list[Any], place: tuple[int, int]) -> None:
    if len(record) == 5 and isinstance(record[1], int) and isinstance(record[4], bytes):
        if _is_batch(rowid, record):
            carved.batches[rowid] = (*place, record[1])
        else:
            count = record[1] if 0 < record[1] <= MAX_GROUP_EVENTS else 0
            carved.claims[rowid] = max(count, carved.claims.get(rowid, 0))
    elif len(record) == 6 and isinstance(record[1], str) and PRODUCER.fullmatch(record[1]):
        _, token, last_n, forgotten_n, last_seen, report = record
        known = carved.producers.get(token)
        if (
            all(isinstance(n, int) and 0 <= n < 10**18 for n in (last_n, forgotten_n))
            and isinstance(last_seen, int | float)
            and isinstance(report, str | None)
            and (known is None or known.last_n < last_n)
        ):
            carved.producers[token] = Producer(
                0, token, last_n, forgotten_n, float(last_seen), report
            )
    elif len(record) == 6 and isinstance(record[3], str) and isinstance(record[4], str):
        _take_loss(carved, rowid, record)


def _take_loss(carved: Carved, first_seq: int, record: list[Any]) -> None:
    _, last_seq, found_at, reason, file, told = record
    if (
        0 < first_seq < MAX_SEQ
        and (last_seq is None or (isinstance(last_seq, int) and first_seq <= last_seq < MAX_SEQ))
        and isinstance(found_at, int | float)
    ):
        old = carved.losses.get(first_seq)
        told = bool(told) or (old is not None and old.told)
        carved.losses[first_seq] = LostRange(
            first_seq, last_seq, float(found_at), reason, file, told
        )


def _take_index_row(carved: Carved, record: list[Any]) -> None:
    if len(record) == 2 and isinstance(record[0], float) and isinstance(record[1], int):
        carved.claims.setdefault(record[1], 0)  # batch_received_at
    elif (
        len(record) == 3
        and isinstance(record[0], str)
        and isinstance(record[1], int)
        and isinstance(record[2], int | float)
        and 0 < len(record[0]) <= 64
    ):
        name, next_seq, last_seen = record
        if name not in carved.consumers or carved.consumers[name][1] < last_seen:
            carved.consumers[name] = (next_seq, float(last_seen))


def _is_batch(rowid: int, record: list[Any]) -> bool:
    if len(record) != 5 or record[0] is not None:
        return False
    _, count, received_at, crc, body = record
    return (
        isinstance(count, int)
        and isinstance(received_at, int | float)
        and isinstance(body, bytes)
        and 0 < rowid < 1 << 62
        and 0 < count < 1 << 62
        and is_intact(rowid, count, float(received_at), crc, body)
    )


def _records(
    pages: Pages, number: int, page: bytes, *, only_cell: int | None = None
) -> Iterator[tuple[int, int | None, list[Any]]]:
    """(cell, rowid or None, values) of each cell of a page that can be parsed."""
    at = 100 if number == 1 else 0
    if len(page) < PAGE_BYTES or page[at] not in (_TABLE_LEAF, _INDEX_LEAF, _INDEX_INNER):
        return
    kind = page[at]
    pointers = at + (12 if kind == _INDEX_INNER else 8)
    cells = min(struct.unpack_from(">H", page, at + 3)[0], (PAGE_BYTES - pointers) // 2)
    for cell in range(cells) if only_cell is None else (only_cell,):
        try:
            (offset,) = struct.unpack_from(">H", page, pointers + 2 * cell)
            if kind == _INDEX_INNER:
                offset += 4
            size, offset = _varint(page, offset)
            rowid = None
            if kind == _TABLE_LEAF:
                rowid, offset = _varint(page, offset)
            payload = _payload(pages, page, offset, size, is_table=rowid is not None)
            yield cell, rowid, _values(payload)
        except _Broken:
            continue  # this cell is damaged; the next may not be


def _payload(pages: Pages, page: bytes, offset: int, size: int, *, is_table: bool) -> bytes:
    if size > MAX_PAYLOAD_BYTES:
        raise ValueError(size)
    most = PAGE_BYTES - 35 if is_table else (PAGE_BYTES - 12) * 64 // 255 - 23
    if size <= most:
        return page[offset : offset + size]
    least = (PAGE_BYTES - 12) * 32 // 255 - 23
    local = least + (size - least) % (PAGE_BYTES - 4)
    if local > most:
        local = least
    parts = [page[offset : offset + local]]
    (following,) = struct.unpack_from(">I", page, offset + local)
    left = size - local
    while left > 0:
        overflow = next(pages.versions(following), b"")
        (following,) = struct.unpack_from(">I", overflow)
        parts.append(overflow[4 : 4 + left])
        left -= PAGE_BYTES - 4
    return b"".join(parts)


def _values(payload: bytes) -> list[Any]:
    """The values of a record. Raises one of _Broken."""
    header_bytes, at = _varint(payload, 0)
    body = header_bytes
    values: list[Any] = []
    while at < header_bytes:
        serial, at = _varint(payload, at)
        if serial == 0:
            values.append(None)
        elif serial <= 6:
            size = _INT_BYTES[serial]
            values.append(int.from_bytes(payload[body : body + size], "big", signed=True))
            body += size
        elif serial == 7:
            values.append(struct.unpack_from(">d", payload, body)[0])
            body += 8
        elif serial in (8, 9):
            values.append(serial - 8)
        elif serial >= 12:
            size = (serial - 12) // 2
            raw = payload[body : body + size]
            if len(raw) < size:
                raise ValueError("cut short")
            values.append(raw.decode() if serial % 2 else raw)
            body += size
        else:
            raise ValueError(serial)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, offset behind it); signed, as rowids are."""
    value = 0
    for i in range(8):
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    value = value << 8 | data[at + 8]
    return (value - (1 << 64) if value >= 1 << 63 else value), at + 9


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def _read(fd: int, offset: int) -> bytes:
    """A page, or what of it can be read: a bad sector is damage like any other."""
    try:
        return os.pread(fd, PAGE_BYTES, offset)
    except OSError:
        return b""
