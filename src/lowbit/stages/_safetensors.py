"""Safetensors headers, checked entry by entry before anything is mapped.

Layout (safetensors' README, "Format"): 8 bytes little-endian length of the header, the header (JSON: name to dtype,
shape and `data_offsets`), then the data. The library checks the same facts, but its messages name no tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.formats import Spec
from lowbit.stages._weightfile import DTYPES, TEXT_LIMIT, Slot, WeightFile, open_regular, parse_json, show

_KEYS = {"dtype", "shape", "data_offsets"}
_LARGEST = 2**63 - 1
_RANK = 64  # what torch and numpy hold at most


def read_safetensors(path: Path) -> WeightFile:
    """Check a safetensors file and list its tensors in the order of their bytes; reads the header only.

    Raises:
        CheckpointError: not readable, truncated, or a header that contradicts itself or the file.
    """
    header, size = _header(path)
    base = 8 + len(header)
    entries = parse_json(header, f"{path}: the header")
    _check_metadata(path, entries.pop("__metadata__", None))
    slots = {name: _slot(path, name, entry, base) for name, entry in entries.items()}
    slots = dict(sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_layout(path, slots, base, size)
    return WeightFile(path, size, slots)


def _header(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10:
            raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file; it is empty or truncated")
        if length > size - 8:
            raise CheckpointError(f"{path}: the header claims {length:,} bytes, but only {size - 8:,} follow")
        if length > TEXT_LIMIT:
            raise CheckpointError(f"{path}: the header claims {length:,} bytes, more than the {TEXT_LIMIT:,} allowed")
        header = file.read(length)
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path} is no safetensors file: its header begins with {header[:8]!r}, not with '{{'")
    return header, size


def _check_metadata(path: Path, metadata: object) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise CheckpointError(f"{path}: __metadata__ of the header is {show(metadata)}, not a table of texts")


def _slot(path: Path, name: str, entry: object, base: int) -> Slot:
    """One entry of the header as a place in the file."""
    try:
        if not name.isprintable():
            raise CheckpointError("the name holds control characters")
        if not isinstance(entry, dict) or entry.keys() != _KEYS:
            raise CheckpointError(f"its entry is {show(entry)}, not a table of dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise CheckpointError(f"dtype {show(entry['dtype'])} is none of {', '.join(DTYPES)}")
        spec = Spec(DTYPES[entry["dtype"]], _counts(entry, "shape"))
        return Slot(spec, base + _begin(spec, _counts(entry, "data_offsets")), prod(spec.shape))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: tensor {show(name)}: {error}") from None


def _counts(entry: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A list of whole numbers from 0 to 2**63 - 1, cut off beyond the rank a tensor can have: products stay small."""
    value = entry[key]
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= _LARGEST for item in value):
        raise CheckpointError(f"{key} is {show(value)}, not a list of whole numbers from 0 to 2**63 - 1")
    return tuple(value[: _RANK + 1])


def _begin(spec: Spec, offsets: tuple[int, ...]) -> int:
    """Where the tensor begins in the data, once its shape is possible and its offsets agree with it."""
    size, itemsize = prod(spec.shape), spec.dtype.itemsize
    if len(spec.shape) > _RANK or prod(max(side, 1) for side in spec.shape) * itemsize > _LARGEST:
        raise CheckpointError(f"shape {show(list(spec.shape))} is larger than any tensor can be")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"data_offsets {show(list(offsets))} are not a begin and an end")
    begin, end = offsets
    if end - begin != size * itemsize:
        raise CheckpointError(
            f"{spec.dtype} of shape {show(list(spec.shape))} takes {size * itemsize:,} bytes, "
            f"its data_offsets {show(list(offsets))} span {end - begin:,}"
        )
    return begin


def _check_layout(path: Path, slots: Mapping[str, Slot], base: int, size: int) -> None:
    """Tensors, sorted by their place, must fill the data without overlap or hole."""
    at, before = base, None
    for name, slot in slots.items():
        start, stop = slot.start, slot.stop
        if start != at:
            fault = (
                f"{'overlaps' if start < at else 'leaves a hole after'} {_after(before)}, which ends at {at - base:,}"
            )
            raise CheckpointError(f"{path}: tensor {show(name)} begins at data byte {start - base:,} and {fault}")
        if stop > size:
            raise CheckpointError(
                f"{path}: tensor {show(name)} ends at data byte {stop - base:,}, but the file has {size - base:,}; "
                "it is truncated"
            )
        at, before = stop, name
    if at != size:
        raise CheckpointError(f"{path}: {size - at:,} more data bytes follow {_after(before)} and belong to no tensor")


def _after(name: str | None) -> str:
    return "the header" if name is None else f"tensor {show(name)}"
