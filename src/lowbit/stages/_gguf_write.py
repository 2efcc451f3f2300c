"""The layout and header of a GGUF file from a plan; the bytes of the header are the `gguf` package's."""

from __future__ import annotations

from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowbit.errors import UsageError
from lowbit.formats import Spec, Weight
from lowbit.formats._ggml import type_of
from lowbit.formats._gguf import Arch
from lowbit.formats._mixtures import MIXTURES, choose, order, require_arch
from lowbit.stages._gguf import FLOATS
from lowbit.stages._gguf_metadata import Value, metadata
from lowbit.stages._gguf_model import open_gguf
from lowbit.stages._shard import Shard
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Plan

FILE = "model.gguf"
_ALIGNMENT = 32
_FLOAT_NAMES = {dtype: name for name, (_, dtype) in FLOATS.items()}
# A tensor of the file: its type, and the weights that it holds, one after the other.
_Group = tuple[str, list[Weight]]


def gguf_shard(plan: Plan, checkpoint: Checkpoint) -> Shard:
    """The one file of a plan: tensors in llama.cpp's order, each padded to 32 bytes.

    Raises:
        UsageError: experts of one layer that do not share a type, or are not all there.
        CheckpointError: no configuration or no tokenizer to write beside the weights.
    """
    arch = require_arch(checkpoint.config)
    weights = {entry.weight.name: entry.weight for entry in plan.entries if not entry.tied}
    groups = _groups(arch, weights)
    values, constants = metadata(checkpoint, arch, _file_type(plan, weights, checkpoint))
    specs = {entry.weight.name: plan.layout(entry)[entry.weight.name] for entry in plan.entries if not entry.tied}
    sizes = {name: sum(_nbytes(specs[weight.name]) for weight in group) for name, (_, group) in groups.items()}
    header = _header(arch, values, constants, groups, sizes)
    offsets, at = dict[str, tuple[int, Spec]](), len(header)
    for _, group in groups.values():
        for weight in group:
            offsets[weight.name] = (at, specs[weight.name])
            at += _nbytes(specs[weight.name])
        at = _padded(at)
    return Shard(FILE, offsets, header, at, lambda path: open_gguf(path).file)


def _nbytes(spec: Spec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _type(weight: Weight) -> str:
    name = type_of(weight.scheme) if weight.scheme else _FLOAT_NAMES.get(weight.dtype)
    if name is None:
        raise UsageError(f"{weight.name}: GGUF has no type for {weight.scheme or weight.dtype}")
    return name


def _groups(arch: Arch, weights: dict[str, Weight]) -> dict[str, _Group]:
    """The file's tensors in its order, with the weights that make each: the experts of a layer are one tensor."""
    found: dict[str, dict[int | None, Weight]] = {}
    for weight in weights.values():
        place = arch.place(weight.name)
        assert place is not None  # the plan refuses what has no place
        found.setdefault(place.name, {})[place.expert] = weight
    groups = {}
    for name in sorted(found, key=order):
        members = [found[name][expert] for expert in sorted(found[name], key=lambda expert: expert or 0)]
        kinds = {(_type(weight), weight.shape) for weight in members}
        if len(kinds) > 1 or (
            None not in found[name] and sorted(map(int, filter(None, found[name]))) != list(range(1, len(members)))
        ):
            raise UsageError(f"{members[0].name}: all experts of a layer are one tensor, {name}; give them one scheme")
        groups[name] = next(iter(kinds))[0], members
    return groups


def _header(
    arch: Arch, values: dict[str, Value], constants: dict[str, Any], groups: dict[str, _Group], sizes: dict[str, int]
) -> bytes:
    """The first bytes of the file, up to the first weight; small tensors that llama.cpp wants beside these end it."""
    try:
        import gguf
        import numpy as np
    except ImportError:
        raise UsageError("--format gguf needs the package gguf: pip install gguf") from None

    with TemporaryDirectory() as folder:
        path = Path(folder, FILE)
        writer = gguf.GGUFWriter(path, arch.arch)
        for key, value in values.items():
            _add(writer, key, value)
        for name, array in constants.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        for name, (kind, group) in groups.items():
            shape = (len(group), *group[0].shape) if arch.stacks(name) else group[0].shape
            rows = (*shape[:-1], sizes[name] // max(prod(shape[:-1]), 1))
            raw = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), sizes[name], raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    for part in (b"", *(array.tobytes() for array in constants.values())):
        data += part
        data += bytes(_padded(len(data)) - len(data))
    return data


def _add(writer: Any, key: str, value: Value) -> None:
    """One key; whole numbers as uint32, and lists of them as int32, as llama.cpp reads them."""
    from gguf import GGUFValueType

    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
        writer.add_key_value(key, value, GGUFValueType[kinds[type(value)]])


def _file_type(plan: Plan, weights: dict[str, Weight], checkpoint: Checkpoint) -> int:
    """`general.file_type`: the mixture that gives these very types, or the one of the type that most weights have."""
    types = {name: _type(weight) for name, weight in weights.items()}
    for mixture, number in [(name, number) for name, (number, base) in MIXTURES.items() if base in types.values()]:
        if {
            name: kind for name, (kind, _) in choose(mixture, list(weights.values()), checkpoint.config).items()
        } == types:
            return number
    counts: dict[str, int] = {}
    for name, kind in types.items():
        counts[kind] = counts.get(kind, 0) + prod(weights[name].shape)
    most = max(counts, key=lambda kind: counts[kind])
    return next((number for number, base in MIXTURES.values() if base == most), 1024)
