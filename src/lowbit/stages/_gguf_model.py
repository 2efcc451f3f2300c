"""A GGUF file as a checkpoint of transformers: names, slices, and what each tensor must undergo."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import Spec, Weight
from lowbit.formats._ggml import BLOCKS
from lowbit.formats._gguf import Arch, arch_named, from_file, is_other, parts
from lowbit.stages._gguf import FLOATS, Gguf, Stored, read_gguf
from lowbit.stages._gguf_config import FREQUENCIES, LONG, SHORT, config_of
from lowbit.stages._weightfile import Slot, WeightFile, show

# Tensors that llama.cpp has and transformers computes from the configuration.
COMPUTED = (FREQUENCIES, LONG, SHORT)
# Beside a tensor in NVFP4: what multiplies its scales, and what kernels for its inputs need.
_SCALE, _INPUTS = "scale", "input_scale"
_MOST_PARTS = 10_000


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@final
@dataclass(frozen=True, eq=False)
class GgufModel:
    """A model with the names of transformers, where `arch/gguf.toml` knows its architecture, or else with its own.

    Attributes:
        files: where the tensors are, by these names; each expert of a stack is a tensor.
        weights: the tensors as weights; those in blocks have a scheme.
        config: what of `config.json` the header tells.
        edits: float tensors that are stored in another way than transformers has them, to what puts them right.
    """

    files: tuple[WeightFile, ...]
    weights: Mapping[str, Weight]
    config: Mapping[str, Any]
    edits: Mapping[str, Callable[[Tensor], Tensor]]


def open_gguf(path: Path) -> GgufModel:
    """Check a GGUF file, and the other parts where it is the first of several, and give its tensors the names of
    transformers; reads headers only.

    Raises:
        CheckpointError: it is damaged, a part is missing or is no part of this model, or it has a tensor or a shape
            that its architecture has not.
    """
    headers = _parts(path)
    header = headers[0]
    names = {name for each in headers for name in each.tensors}
    arch = arch_named(str(header.value("general.architecture")), names, header.value)
    facts = config_of(header, arch) if arch else {}
    beside = _beside(headers)
    files = tuple(weight_file(each, arch, beside) for each in headers)
    weights = dict[str, Weight]()
    for file, each in zip(files, headers, strict=True):
        for name, stored in _named(each, arch, beside).items():
            if name in weights:
                raise CheckpointError(f"{file.path}: tensor {show(stored)} holds {name}, which another one holds too")
            weights[name] = _weight(each, arch, facts, name, stored)
    edits = {
        name: partial(from_file, weight)
        for name, weight in weights.items()
        if weight.scheme is None and is_other(weight)
    }
    return GgufModel(files, weights, facts, edits)


@final
@dataclass(frozen=True, eq=False)
class Beside:
    """Tensors that have others beside them, as those in NVFP4 have, in all parts of a model.

    Attributes:
        owners: their names, with the part that they are in.
        unscaled: those of them whose scales nothing multiplies.
    """

    owners: Mapping[str, Gguf]
    unscaled: frozenset[str]

    def owner(self, name: str, part: str) -> str | None:
        """The tensor that one with this name belongs to as such a part."""
        owner = f"{name.removesuffix(part)}weight" if name.endswith(f".{part}") else ""
        return owner if owner in self.owners else None


def _beside(parts: Sequence[Gguf]) -> Beside:
    owners = {name: part for part in parts for name, tensor in part.tensors.items() if tensor.type == "nvfp4"}
    unscaled = (name for name in owners if not any(_scale_of(name) in part.tensors for part in parts))
    return Beside(owners, frozenset(unscaled))


def weight_file(header: Gguf, arch: Arch | None, beside: Beside | None = None) -> WeightFile:
    """One file, alone or of a model in several, with the names of transformers; raises like `open_gguf`."""
    slots, beside = dict[str, Slot](), beside or _beside([header])
    for stored, tensor in _tensors(header, arch, beside):
        for name, slot in _slots(header, arch, stored, tensor).items():
            if name in slots:
                raise CheckpointError(f"{header.path}: tensor {show(stored)} holds {name}, which another one holds too")
            slots[name] = slot
    slots |= _scales(header, arch, beside)
    unscaled = (name for name in header.tensors if name in beside.unscaled)
    members = (member for name in unscaled for member in _slots(header, arch, name, header.tensors[name]))
    ones = {_scale_of(member): torch.ones(1) for member in members}
    slots |= {name: Slot(Spec(torch.float32, (1,)), 0, 0) for name in ones}
    skipped = [name for name in header.tensors if (arch and name in COMPUTED) or beside.owner(name, _INPUTS)]
    return WeightFile(header.path, header.size, slots, skipped=skipped, values=ones)


def _tensors(header: Gguf, arch: Arch | None, beside: Beside) -> list[tuple[str, Stored]]:
    """The tensors that are weights of transformers."""
    rest = {name: tensor for name, tensor in header.tensors.items() if arch is None or name not in COMPUTED}
    parts = {name for name in rest for part in (_SCALE, _INPUTS) if beside.owner(name, part)}
    return [(name, tensor) for name, tensor in rest.items() if name not in parts]


def _scales(header: Gguf, arch: Arch | None, beside: Beside) -> dict[str, Slot]:
    """What multiplies the scales of NVFP4, one number for each weight of a stack, under the name that it has here."""
    found = {}
    for name, tensor in header.tensors.items():
        owner = beside.owner(name, _SCALE)
        if owner is None:
            continue
        part = beside.owners[owner]
        members = list(_slots(part, arch, owner, part.tensors[owner]))
        if tensor.type != "f32" or tensor.shape != (len(members),):
            raise CheckpointError(
                f"{header.path}: tensor {show(name)} is {tensor.type} {show(list(tensor.shape))}, not one float32 for "
                f"each of {len(members)} weights"
            )
        for index, member in enumerate(members):
            found[_scale_of(member)] = Slot(Spec(torch.float32, (1,)), tensor.start + 4 * index, 1)
    return found


def _scale_of(member: str) -> str:
    """What multiplies the scales of a weight in NVFP4 is called so; where no part of the model has it, it is 1."""
    return f"{member.removesuffix('weight')}{_SCALE}"


def _named(header: Gguf, arch: Arch | None, beside: Beside) -> dict[str, str]:
    """Name in transformers to name in the file."""
    tensors = _tensors(header, arch, beside)
    return {name: stored for stored, tensor in tensors for name in _slots(header, arch, stored, tensor)}


def _parts(path: Path) -> list[Gguf]:
    """The headers of a model: of one file, or of all that it is split over, of which `path` is the first."""
    header = read_gguf(path)
    count, number = (_number(header, key, default) for key, default in (("split.count", 1), ("split.no", 0)))
    if count <= 1:
        return [header]
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split model and not named as these are; give it back its name, "
            f"which ends in -{number + 1:05}-of-{count:05}.gguf"
        )
    names = [f"{match[1]}-{part:05}-of-{count:05}.gguf" for part in range(1, min(count, _MOST_PARTS) + 1)]
    if number or int(match[2]) != 1:
        raise CheckpointError(f"{path} is not the first of {count} parts of a split model; name {names[0]}")
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing or count > _MOST_PARTS:
        raise CheckpointError(f"{path}: {len(missing)} of {count} parts are missing: {show(missing)}")
    return [header, *_others(header, [path.parent / name for name in names[1:]], count)]


def _others(header: Gguf, paths: Sequence[Path], count: int) -> list[Gguf]:
    """The headers of the second part and those after it."""
    found = [read_gguf(path) for path in paths]
    for place, each in enumerate(found, 1):
        told = _number(each, "split.no", 0), _number(each, "split.count", 1)
        if told != (place, count):
            raise CheckpointError(f"{each.path} says that it is part {told[0] + 1} of {told[1]}, not what it is named")
    total, wanted = sum(len(each.tensors) for each in (header, *found)), _number(header, "split.tensors.count", 0)
    if total != wanted:
        raise CheckpointError(f"{header.path} should have {wanted} tensors with the other parts, there are {total}")
    return found


def _number(header: Gguf, key: str, default: int) -> int:
    value = header.value(key, default)
    if not isinstance(value, int):
        raise CheckpointError(f"{header.path}: {key} is {show(value)}, no number")
    return value


def _slots(header: Gguf, arch: Arch | None, stored: str, tensor: Stored) -> dict[str, Slot]:
    """Name and place of each tensor of transformers that a tensor of the file holds."""
    where = f"{header.path}: tensor {show(stored)}"
    if arch is None:
        return {stored: _slot(tensor, tensor.shape, 0)}
    name = arch.name(stored)
    if name is None:
        raise CheckpointError(f"{where}: transformers has no tensor for it in a model of the architecture {arch.arch}")
    shape = arch.own_shape(stored, tensor.shape)
    if shape is None:
        what = "a stack of experts" if arch.stacks(stored) else "what it stands for"
        raise CheckpointError(f"{where} has shape {show(list(tensor.shape))}, {what} has another number of axes")
    members = range(tensor.shape[0]) if arch.stacks(stored) else range(1)
    return {str(arch.name(stored, expert)): _slot(tensor, shape, expert) for expert in members}


def _slot(tensor: Stored, shape: tuple[int, ...], index: int) -> Slot:
    """A part of a tensor, the `index`-th of this shape."""
    if tensor.type in FLOATS:
        spec = Spec(FLOATS[tensor.type][1], shape)
    else:
        spec = Spec(torch.uint8, (*shape[:-1], tensor.row_bytes))
    size = prod(spec.shape)
    return Slot(spec, tensor.start + index * size * spec.dtype.itemsize, size)


def _weight(header: Gguf, arch: Arch | None, facts: Mapping[str, Any], name: str, stored: str) -> Weight:
    tensor = header.tensors[stored]
    shape = (arch.own_shape(stored, tensor.shape) if arch else None) or tensor.shape
    if tensor.type in FLOATS:
        weight = Weight(name, shape, FLOATS[tensor.type][1])
    else:
        weight = Weight(name, shape, torch.float32, BLOCKS[tensor.type].scheme)
    try:
        weight = arch.arranged(weight, facts) if arch else weight
    except UnsupportedError:
        raise CheckpointError(f"{header.path}: the header does not tell one number of heads for all layers") from None
    length, count = parts(weight)
    if (not shape and is_other(weight)) or length % count:
        raise CheckpointError(
            f"{header.path}: {name}: {count} heads or parts of them do not divide {show(list(shape))}"
        )
    return weight
