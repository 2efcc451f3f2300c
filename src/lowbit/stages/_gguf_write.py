"""The layout and header of GGUF files from a plan."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import prod

from lowbit.errors import UsageError
from lowbit.formats import Spec, Weight
from lowbit.formats._ggml import type_of
from lowbit.formats._gguf import Arch
from lowbit.formats._mixtures import MIXTURES, choose, order, require_arch
from lowbit.stages._gguf import FLOATS, entry, header_of, padded, read_gguf
from lowbit.stages._gguf_metadata import metadata
from lowbit.stages._gguf_model import weight_file
from lowbit.stages._shard import Shard
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Plan

FILE = "model.gguf"
_MOST_PARTS = 9_999
_FLOAT_NAMES = {dtype: name for name, (_, dtype) in FLOATS.items()}
# A tensor of the file: its type, and the weights that it holds, one after the other.
_Group = tuple[str, list[Weight]]


def gguf_shards(plan: Plan, checkpoint: Checkpoint, limit: int | None) -> list[Shard]:
    """The files of a plan, one where `limit` is None: tensors in llama.cpp's order, each padded to 32 bytes.

    A file ends before the tensor that would take its data beyond `limit` bytes. The first has the metadata; it and the
    others say which part they are, as llama-gguf-split's do.

    Raises:
        UsageError: experts of one layer that do not share a type, or are not all there.
        CheckpointError: no configuration or no tokenizer to write beside the weights.
    """
    if find_spec("gguf") is None:
        raise UsageError("--format gguf needs the package gguf: pip install gguf")
    arch = require_arch(checkpoint.config)
    weights = {each.weight.name: each.weight for each in plan.entries if not each.tied}
    groups = _groups(arch, weights)
    shapes = {name: _shape(arch, name, group) for name, (_, group) in groups.items()}
    values, constants = metadata(
        checkpoint, arch, shapes, _file_type(plan, weights, checkpoint), plan.imatrix.keys() if plan.imatrix else {}
    )
    specs = {name: spec for each in plan.entries if not each.tied for name, spec in plan.layout(each).items()}
    sizes = {name: sum(specs[weight.name].nbytes for weight in group) for name, (_, group) in groups.items()}
    beside = sum(_scale(group[0]) in specs for _, group in groups.values())
    parts = _split(sizes, sum(padded(4 * len(numbers)) for numbers in constants.values()), limit)
    total, shards = len(groups) + len(constants) + beside, []
    for number, names in enumerate(parts):
        told = {} if number else dict(values)
        if len(parts) > 1:
            told |= {"split.no": struct.pack("<IH", 2, number), "split.count": struct.pack("<IH", 2, len(parts)),
                     "split.tensors.count": struct.pack("<Ii", 5, total)}  # fmt: skip
        file = FILE if len(parts) == 1 else f"model-{number + 1:05}-of-{len(parts):05}.gguf"
        members = {name: groups[name] for name in names}
        shards.append(_shard(file, arch, told, {} if number else constants, members, specs))
    return shards


def _split(sizes: Mapping[str, int], first: int, limit: int | None) -> list[list[str]]:
    """The names of the tensors of each file; `first`: bytes that the first has beside them."""
    parts, filled = [list[str]()], first
    for name, size in sizes.items():
        if parts[-1] and limit is not None and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += padded(size)
    if len(parts) > _MOST_PARTS:
        raise UsageError(f"{len(parts):,} files are more than {_MOST_PARTS:,}; allow larger ones with --shard-size")
    return parts


def _shard(
    file: str,
    arch: Arch,
    values: Mapping[str, bytes],
    constants: Mapping[str, Sequence[float]],
    groups: Mapping[str, _Group],
    specs: Mapping[str, Spec],
) -> Shard:
    """One file; its small tensors are bytes of its header."""
    entries, at, places = [], 0, dict[str, tuple[int, Spec]]()
    for name, numbers in constants.items():
        entries.append(entry(name, (len(numbers),), "f32", at))
        at = padded(at + 4 * len(numbers))
    for name, (kind, group) in groups.items():
        entries.append(entry(name, _shape(arch, name, group), kind, at))
        for weight in group:
            places[weight.name] = at, specs[weight.name]
            at += specs[weight.name].nbytes
        at = padded(at)
        if _scale(group[0]) in specs:
            entries.append(entry(f"{name.removesuffix('weight')}scale", (len(group),), "f32", at))
            places |= {_scale(weight): (at + 4 * i, specs[_scale(weight)]) for i, weight in enumerate(group)}
            at = padded(at + 4 * len(group))
    header = header_of(values, entries)
    base = len(header)
    for numbers in constants.values():
        header += struct.pack(f"<{len(numbers)}f", *numbers)
        header += bytes(padded(len(header)) - len(header))
    offsets = {name: (base + at, spec) for name, (at, spec) in places.items()}
    return Shard(file, offsets, header, base + at, lambda path: weight_file(read_gguf(path), arch))


def _shape(arch: Arch, name: str, group: Sequence[Weight]) -> tuple[int, ...]:
    """Of a tensor of the file, which holds these weights."""
    return (len(group), *group[0].shape) if arch.stacks(name) else arch.file_shape(name, group[0])


def _scale(weight: Weight) -> str:
    """What the number that multiplies the scales of a weight is called, if it has one; one tensor for all experts."""
    return f"{weight.module}.scale"


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


def _file_type(plan: Plan, weights: dict[str, Weight], checkpoint: Checkpoint) -> int:
    """`general.file_type`: the mixture that gives these very types, or the one of the type that most weights have."""
    types = {name: _type(weight) for name, weight in weights.items()}
    told, config = list(weights.values()), checkpoint.config
    for mixture, number in [(name, number) for name, (number, base) in MIXTURES.items() if base in types.values()]:
        for important in (False, True):
            found = choose(mixture, told, config, important)
            if {name: kind for name, (kind, _) in found.items()} == types:
                return number
    counts: dict[str, int] = {}
    for name, kind in types.items():
        counts[kind] = counts.get(kind, 0) + prod(weights[name].shape)
    most = max(counts, key=lambda kind: counts[kind])
    return next((number for number, base in MIXTURES.values() if base == most), 1024)
