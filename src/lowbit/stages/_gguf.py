"""GGUF headers, checked entry by entry before anything is mapped.

Layout (ggml's docs/gguf.md, version 3, little-endian): `GGUF`, version, number of tensors, number of keys; keys with
typed values; tensors with shape (innermost axis first), type and offset; from the next multiple of the alignment on
the data, tensors in the order of the list, each padded to the alignment. Values are found when the file is opened and
read when somebody asks: a vocabulary of 150,000 tokens costs a walk over its lengths.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, final

import torch

from lowbit.errors import CheckpointError
from lowbit.formats._ggml import BLOCKS
from lowbit.stages._weightfile import TEXT_LIMIT, open_regular, show

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LARGEST = 2**63 - 1
_LONGEST_NAME = 63  # bytes; ggml keeps names in 64, with a zero at the end
_RANK = 4
_ALIGNMENT = 32
_SMALL = 2**20  # bytes of a tensor that is read as numbers

Value = bool | int | float | str | list[str] | list[int] | list[float] | list[bool]

FLOATS: Mapping[str, tuple[int, torch.dtype]] = {
    "f32": (0, torch.float32), "f16": (1, torch.float16), "bf16": (30, torch.bfloat16), "f64": (28, torch.float64),
    "i8": (24, torch.int8), "i16": (25, torch.int16), "i32": (26, torch.int32), "i64": (27, torch.int64),
}  # fmt: skip
_PLAIN = dict(FLOATS.values())
_BLOCKS = {kind.id: kind for kind in BLOCKS.values()}
# Types of ggml that are known and not read.
_OTHERS = {9: "Q8_1", 15: "Q8_K", 41: "Q1_0", 42: "Q2_0"}


@final
@dataclass(frozen=True, slots=True)
class Field:
    """Where a value is: its type, of an array that of its items, how many there are, first byte and the one after."""

    kind: int
    item: int
    count: int
    start: int
    stop: int


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: its shape (outermost axis first), its type in lower case, first byte, bytes of a row."""

    shape: tuple[int, ...]
    type: str
    start: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return prod(self.shape[:-1]) * self.row_bytes


@final
@dataclass(frozen=True, eq=False)
class Gguf:
    """A file whose layout was checked.

    Attributes:
        path: the file.
        size: its bytes when it was checked.
        fields: key to the place of its value.
        tensors: in file order, which is that of their bytes.
    """

    path: Path
    size: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, Stored]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key: a number, a truth value, a text, or a list of them; `default` where there is none.

        Raises:
            CheckpointError: a text is not UTF-8, or the file changed its size since it was opened.
        """
        field = self.fields.get(key)
        if field is None:
            return default
        data = self._read(field.start, field.stop)
        try:
            values = _texts(data, field.count) if field.item == _TEXT else _numbers(data, field)
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: the value of {show(key)} is not UTF-8") from None
        return values if field.kind == _ARRAY else values[0]

    def raw(self, key: str) -> bytes:
        """The value of a key that is there as it is stored: its type, then its bytes; raises like `value`."""
        field = self.fields[key]
        head = struct.pack("<IIQ", _ARRAY, field.item, field.count) if field.kind == _ARRAY else None
        return (head or struct.pack("<I", field.kind)) + self._read(field.start, field.stop)

    def floats(self, name: str) -> Sequence[float]:
        """The values of a small tensor of float32.

        Raises:
            CheckpointError: it is of another type, large, or not finite; or the file changed its size.
        """
        tensor = self.tensors[name]
        if tensor.type != "f32" or tensor.nbytes > _SMALL:
            raise CheckpointError(f"{self.path}: {show(name)} is no vector of float32 of at most {_SMALL:,} bytes")
        values = struct.unpack(f"<{tensor.nbytes // 4}f", self._read(tensor.start, tensor.start + tensor.nbytes))
        if not all(map(isfinite, values)):
            raise CheckpointError(f"{self.path}: {show(name)} has values that are not finite")
        return values

    def _read(self, start: int, stop: int) -> bytes:
        with open_regular(self.path) as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise CheckpointError(f"{self.path} changed its size since it was opened; let its download end first")
            file.seek(start)
            return file.read(stop - start)


def read_gguf(path: Path) -> Gguf:
    """Check a GGUF file and list its keys and tensors; reads the header only.

    Raises:
        CheckpointError: not readable, truncated, of another version, or a header that contradicts
            itself or the file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise CheckpointError(f"{path} has {size} bytes, too few for a GGUF file; it is empty or truncated")
        pages = mmap.mmap(file.fileno(), min(size, TEXT_LIMIT), access=mmap.ACCESS_READ)
        with pages, memoryview(pages) as data:  # a view is read at twice the speed of the mapping itself
            cursor = _Cursor(path, data)
            tensors, keys = _counts(cursor)
            fields = _fields(cursor, keys)
            alignment = _alignment(path, data, fields)
            entries = _entries(cursor, tensors)
            end = cursor.at
    return Gguf(path, size, fields, _placed(path, entries, -(-end // alignment) * alignment, alignment, size))


@final
class _Cursor:
    """A position in the header; what does not fit into it is refused in the words of `where`."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at, self.where = path, data, 0, "the header"

    def fail(self, fact: str) -> CheckpointError:
        """What is wrong at this place."""
        return CheckpointError(f"{self.path}: {self.where}: {fact}")

    def skip(self, count: int) -> int:
        """Step over bytes; returns where they begin."""
        begin = self.at
        if count > len(self.data) - begin:
            more = f"{len(self.data) - begin:,} are left of the {len(self.data):,} that a header may be in"
            raise self.fail(f"{count:,} bytes should follow, {more}; the file is damaged or truncated")
        self.at += count
        return begin

    def number(self, code: str) -> Any:
        """The next number, of a type of the `struct` module."""
        (value,) = struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))
        return value

    def text(self, most: int) -> str:
        """The next text, at most so many bytes."""
        length = self.number("Q")
        if length > most:
            raise self.fail(f"a name of {length:,} bytes, more than the {most:,} allowed")
        begin = self.skip(length)
        try:
            name = bytes(self.data[begin : self.at]).decode()
        except UnicodeDecodeError:
            raise self.fail("a name that is not UTF-8") from None
        if not name or not name.isprintable():
            raise self.fail(f"the name {show(name)} is empty or holds control characters")
        return name

    def texts(self, count: int) -> None:
        """Step over so many texts. This loop is the time that a vocabulary takes, so it checks once, at its end."""
        at, data, length = self.at, self.data, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length(data, at)[0]
        except struct.error:
            at = len(data) + 1
        if at > len(data):
            raise self.fail(f"{count:,} texts run beyond the end; the file is damaged or truncated")
        self.at = at


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of keys."""
    magic = bytes(cursor.data[cursor.skip(4) : 4])
    if magic != b"GGUF":
        raise CheckpointError(f"{cursor.path} is no GGUF file: it begins with {magic!r}")
    version = cursor.number("I")
    if version not in (2, 3):
        big = " (a big-endian file)" if version and not version & 0xFFFF else ""
        raise CheckpointError(f"{cursor.path} is GGUF version {version}{big}; 2 and 3, little-endian, are read")
    return cursor.number("Q"), cursor.number("Q")


def _fields(cursor: _Cursor, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for number in range(count):
        cursor.where = f"key {number} of {count:,}"
        key = cursor.text(2**16 - 1)
        cursor.where = f"key {show(key)}"
        if key in fields:
            raise cursor.fail("occurs twice")
        fields[key] = _field(cursor)
    return fields


def _field(cursor: _Cursor) -> Field:
    """Step over one value."""
    kind = item = cursor.number("I")
    count = 1
    if kind == _ARRAY:
        item, count = cursor.number("I"), cursor.number("Q")
    start = cursor.at
    if item == _TEXT:
        cursor.texts(count)
    elif item in _SCALARS:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[item]))
    else:
        raise cursor.fail(f"a value of type {item}{' in an array' if kind == _ARRAY else ''}, which GGUF has not")
    return Field(kind, item, count, start, cursor.at)


def _alignment(path: Path, data: memoryview, fields: Mapping[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return _ALIGNMENT
    value = _numbers(bytes(data[field.start : field.stop]), field)[0] if field.kind == 4 else None
    if not value or value % 8 or value & (value - 1):
        raise CheckpointError(f"{path}: general.alignment is {show(value)}, not a power of two from 8 on as uint32")
    return int(value)


def _entries(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Name to shape, type and offset of every tensor, in the order of the list."""
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for number in range(count):
        cursor.where = f"tensor {number} of {count:,}"
        name = cursor.text(_LONGEST_NAME)
        cursor.where = f"tensor {show(name)}"
        if name in entries:
            raise cursor.fail("occurs twice")
        rank = cursor.number("I")
        if rank > _RANK:
            raise cursor.fail(f"{rank:,} axes, more than the {_RANK} that there can be")
        shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
        if prod(max(side, 1) for side in shape) > _LARGEST // 8:
            raise cursor.fail(f"shape {show(list(shape))} is larger than any tensor can be")
        entries[name] = shape, cursor.number("I"), cursor.number("Q")
    return entries


def _placed(
    path: Path, entries: Mapping[str, tuple[tuple[int, ...], int, int]], base: int, alignment: int, size: int
) -> dict[str, Stored]:
    """The tensors, which must fill the data in their order, each from the next multiple of the alignment on."""
    found, at, stop = dict[str, Stored](), base, base
    for name, (shape, number, offset) in entries.items():
        where = f"{path}: tensor {show(name)}"
        kind, row_bytes = _row(where, shape, number)
        if base + offset != at:
            fault = "overlaps the one before" if base + offset < at else "leaves a hole"
            raise CheckpointError(f"{where} begins at data byte {offset:,} and {fault}; {at - base:,} is its place")
        found[name] = Stored(shape, kind, at, row_bytes)
        stop = at + found[name].nbytes
        if stop > size:
            raise CheckpointError(
                f"{where} ends at data byte {stop - base:,}, but the file has {max(size - base, 0):,}; it is truncated"
            )
        at = -(-stop // alignment) * alignment
    if size > at:
        raise CheckpointError(f"{path}: {size - at:,} more bytes follow the data and belong to no tensor")
    return found


def _row(where: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
    """Name of a type, and the bytes of a row under it."""
    cols = shape[-1] if shape else 1
    if number in _PLAIN:
        return next(name for name, (each, _) in FLOATS.items() if each == number), cols * _PLAIN[number].itemsize
    kind = _BLOCKS.get(number)
    if kind is None:
        what = f"{_OTHERS[number]}, which is not read" if number in _OTHERS else f"unknown type {number}"
        raise CheckpointError(f"{where} is stored as {what}; {', '.join([*FLOATS, *BLOCKS])} are")
    if len(shape) < 1 or cols % kind.weights:
        raise CheckpointError(f"{where}: {kind.name} takes rows of a multiple of {kind.weights}, not {show(cols)}")
    return kind.name, cols // kind.weights * kind.bytes


def encoded(value: Value) -> bytes:
    """A value as a file has it: its type, then its bytes. Whole numbers are uint32, those of lists int32."""
    if isinstance(value, list):
        item = {str: _TEXT, float: 6, bool: 7}.get(type(value[0]) if value else str, 5)
        head = struct.pack("<IIQ", _ARRAY, item, len(value))
        if item == _TEXT:
            return head + b"".join(text(str(each)) for each in value)
        return head + struct.pack(f"<{len(value)}{_SCALARS[item]}", *value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + text(value)
    kind = 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6
    return struct.pack("<I" + _SCALARS[kind], kind, value)


def text(value: str) -> bytes:
    """A text as a file has it."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(name: str, shape: Sequence[int], type: str, offset: int) -> bytes:
    """The entry of a tensor, of shape outermost axis first, `offset` bytes into the data."""
    number = FLOATS[type][0] if type in FLOATS else BLOCKS[type].id
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)


def header_of(values: Mapping[str, bytes], entries: Sequence[bytes]) -> bytes:
    """The first bytes of a file, up to its data: keys with encoded values, then tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(values))
    head += b"".join(text(key) + value for key, value in values.items()) + b"".join(entries)
    return head + bytes(-len(head) % _ALIGNMENT)


def padded(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _numbers(data: bytes, field: Field) -> list[Any]:
    return list(struct.unpack(f"<{field.count}{_SCALARS[field.item]}", data))


def _texts(data: bytes, count: int) -> list[str]:
    values, at = [], 0
    for _ in range(count):
        stop = at + 8 + int.from_bytes(data[at : at + 8], "little")
        values.append(data[at + 8 : stop].decode())
        at = stop
    return values
