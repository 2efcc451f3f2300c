"""A file of the output before anything is in it: its header, and where each tensor will be."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch

from lowbit import __version__
from lowbit.errors import UsageError
from lowbit.formats import Spec
from lowbit.stages._safetensors import read_safetensors
from lowbit.stages._weightfile import WeightFile
from lowbit.tensors import Shape

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip


@final
@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        file: its name.
        offsets: name of each tensor, as a checkpoint has it, to its first byte in the file and what it is.
        header: the first bytes of the file.
        nbytes: of the whole file.
        read: finds the tensors of such a file, under the same names.
        tensors: shape of each tensor of a safetensors file, by its name there: one may hold several of `offsets`.
    """

    file: str
    offsets: Mapping[str, tuple[int, Spec]]
    header: bytes
    nbytes: int
    read: Callable[[Path], WeightFile] = read_safetensors
    tensors: Mapping[str, Shape] = field(default_factory=dict)


def safetensors_shard(
    file: str,
    specs: Mapping[str, Spec],
    stacks: Callable[[str], tuple[str, int] | None] = lambda name: None,
    read: Callable[[Path], WeightFile] = read_safetensors,
) -> Shard:
    """Order by item size (largest first, so that all are aligned), then name, as the safetensors package does.

    `stacks`: of tensors that are stored as one, as `Format.stacks` says; `read` finds them again.

    Raises:
        UsageError: tensors of one that are not alike, or not all there.
    """
    groups = _stacked(specs, stacks)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "lowbit": __version__}}
    offsets, end = {}, 0
    for name in sorted(groups, key=lambda name: (-specs[groups[name][0]].dtype.itemsize, name)):
        spec, before = specs[groups[name][0]], end
        for member in groups[name]:
            offsets[member] = (end, spec)
            end += spec.nbytes
        shape = spec.shape if groups[name] == [name] else (len(groups[name]), *spec.shape)
        entries[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(shape), "data_offsets": [before, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = {name: (len(header) + at, spec) for name, (at, spec) in offsets.items()}
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items() if "shape" in entry}
    return Shard(file, placed, header, len(header) + end, read, shapes)


def _stacked(specs: Mapping[str, Spec], stacks: Callable[[str], tuple[str, int] | None]) -> dict[str, list[str]]:
    """Tensors of the file, and what is in each."""
    found: dict[str, dict[int, str]] = {}
    for name in specs:
        whole, number = stacks(name) or (name, 0)
        found.setdefault(whole, {})[number] = name
    for whole, members in found.items():
        if len({specs[name] for name in members.values()}) > 1 or sorted(members) != list(range(len(members))):
            raise UsageError(
                f"{members[min(members)]}: all experts of a layer are one tensor, {whole}; give them one scheme"
            )
    return {whole: [members[number] for number in sorted(members)] for whole, members in found.items()}
