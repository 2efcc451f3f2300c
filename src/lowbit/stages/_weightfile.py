"""One file of weights: where each tensor lies in it, and how to look at a tensor without loading it.

Every reader (`_safetensors`, `_torchfile`) ends in a `WeightFile`; nothing here trusts what a file says about itself.
"""

from __future__ import annotations

import json
import mmap
import os
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.formats import Spec

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

# Without the second flag Linux refuses a private mapping larger than the machine's memory, although it takes none. The
# module names it from Python 3.13 on; 0x4000 is its value for Linux on x86, ARM and RISC-V.
_PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# The safetensors library refuses longer headers; the same bound keeps config, index and pickle from filling the memory.
TEXT_LIMIT = 100_000_000

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


def show(value: object) -> str:
    """`repr` of something a file holds, on one line, bounded in length and depth, so that it can stand in a message."""
    return _SHORT.repr(value)


def one_line(error: BaseException) -> str:
    """The text of another library's error on one line, at most 240 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else "?" for letter in words)
    return text if len(text) <= 240 else text[:237] + "..."


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place: dtype, shape, first byte in the file, elements from first to last, strides where not dense."""

    spec: Spec
    start: int
    extent: int
    stride: tuple[int, ...] | None = None

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.start + self.extent * self.spec.dtype.itemsize


@final
@dataclass(frozen=True, eq=False)
class WeightFile:
    """A file whose layout was checked.

    Attributes:
        path: the file.
        size: its bytes when it was checked.
        slots: name to place, in file order.
        tied: name to the earlier name that has the same bytes.
        skipped: names of entries that are no tensors.
        values: tensors that are no run of bytes in the file, and are in memory.
    """

    path: Path
    size: int
    slots: Mapping[str, Slot]
    tied: Mapping[str, str] = field(default_factory=dict)
    skipped: Sequence[str] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def alone(self, name: str, new: str) -> WeightFile:
        """The file with one of its tensors, under another name."""
        values = {new: self.values[name]} if name in self.values else {}
        return WeightFile(self.path, self.size, {new: self.slots[name]}, values=values)

    def tensor(self, name: str) -> Tensor:
        """A view of one stored tensor: pages come from the file when they are read and count as no anonymous memory.

        The mapping is private and covers this tensor only: what is written to the tensor never reaches the file, nor
        another view of it, but it does take memory.

        Raises:
            CheckpointError: the file went away or changed its size since it was opened.
        """
        if name in self.values:
            return self.values[name]
        slot, dtype = self.slots[name], self.slots[name].spec.dtype
        if not slot.extent:
            return torch.empty(slot.spec.shape, dtype=dtype)
        begin = slot.start - slot.start % mmap.ALLOCATIONGRANULARITY
        try:
            file = os.open(self.path, os.O_RDONLY)  # a quarter of the time of `Path.open`
            try:
                if os.fstat(file).st_size != self.size:
                    raise CheckpointError(
                        f"{self.path} changed its size since it was opened; let its download end first"
                    )
                pages = mmap.mmap(file, slot.stop - begin, flags=_PRIVATE, offset=begin)
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {show(name)} cannot be mapped: {one_line(error)}") from None
        flat = torch.frombuffer(pages, dtype=dtype, count=slot.extent, offset=slot.start - begin)
        return flat.reshape(slot.spec.shape) if slot.stride is None else flat.as_strided(slot.spec.shape, slot.stride)


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading; a pipe or a device, which could block for ever, is refused.

    Raises:
        CheckpointError: no such file, no permission, not a regular file, or what Git leaves in place of a large one.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is {'a directory' if path.is_dir() else 'a pipe or device'}, not a file")
        file = path.open("rb")
        if file.peek(8)[:8] == b"version ":
            file.close()
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")
        return file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        CheckpointError: not readable, larger than 100 MB, not UTF-8, not JSON, a key twice, or not an object.
    """
    with open_regular(path) as file:
        data = file.read(TEXT_LIMIT + 1)
    if len(data) > TEXT_LIMIT:
        raise CheckpointError(f"{path} is larger than {TEXT_LIMIT:,} bytes; that is no configuration or index")
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Bytes as a JSON object; `where` begins the message of an error.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, a key twice in one object, or not an object.
    """

    # Half of a surrogate pair, which only an escape can smuggle in, is no text: it could not be printed or stored.
    escapes = b"\\ud" in data or b"\\uD" in data

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise CheckpointError(f"{where}: key {show(next(key for key in keys if keys.count(key) > 1))} occurs twice")
        for pair in pairs if escapes else ():
            "".join(part for part in pair if isinstance(part, str)).encode()
        return found

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds {show(value)} where a JSON object should be")
    return value
