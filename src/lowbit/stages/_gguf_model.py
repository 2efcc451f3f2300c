"""A GGUF file as a checkpoint of transformers: names, slices, and what each tensor must undergo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.formats import Spec, Weight
from lowbit.formats._ggml import BLOCKS
from lowbit.formats._gguf import Arch, arch_named, from_file
from lowbit.stages._gguf import FLOATS, Gguf, Stored, read_gguf
from lowbit.stages._weightfile import Slot, WeightFile, show

# Tensors that llama.cpp has and transformers computes from the configuration.
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@final
@dataclass(frozen=True, eq=False)
class GgufModel:
    """A file with the names of transformers, where `arch/gguf.toml` knows its architecture, or else with its own.

    Attributes:
        file: where the tensors are, by these names; each expert of a stack is a tensor.
        weights: the tensors as weights; those in blocks have a scheme.
        config: what of `config.json` the header tells.
        edits: float tensors that are stored in another way than transformers has them, to what puts them right.
    """

    file: WeightFile
    weights: Mapping[str, Weight]
    config: Mapping[str, Any]
    edits: Mapping[str, Callable[[Tensor], Tensor]]


def open_gguf(path: Path) -> GgufModel:
    """Check a GGUF file and give its tensors the names of transformers; reads the header only.

    Raises:
        CheckpointError: it is damaged, or has a tensor or a shape that its architecture has not.
    """
    header = read_gguf(path)
    arch = arch_named(str(header.value("general.architecture")))
    facts = config_of(header, arch) if arch else {}
    slots, weights = dict[str, Slot](), dict[str, Weight]()
    for stored, tensor in header.tensors.items():
        if arch and stored in _COMPUTED:
            continue
        for name, slot in _slots(header, arch, stored, tensor).items():
            if name in slots:
                raise CheckpointError(f"{path}: tensor {show(stored)} holds {name}, which another one holds too")
            slots[name], weights[name] = slot, _weight(header, arch, facts, name, tensor)
    edits = {
        name: partial(from_file, weight)
        for name, weight in weights.items()
        if weight.scheme is None and (weight.interleaved or weight.plus)
    }
    skipped = [name for name in header.tensors if arch and name in _COMPUTED]
    return GgufModel(WeightFile(path, header.size, slots, skipped=skipped), weights, facts, edits)


def config_of(header: Gguf, arch: Arch) -> dict[str, Any]:
    """`config.json`, as far as the keys of the table go."""
    told = {key: header.value(f"{arch.arch}.{key}") for key in arch.keys}
    facts = {arch.keys[key][0]: value for key, value in told.items() if value is not None}
    facts["model_type"] = arch.sparse_type if told.get("expert_count") else arch.model_types[0]
    facts["tie_word_embeddings"] = "output.weight" not in header.tensors
    embedding = header.tensors.get("token_embd.weight")
    return facts | ({"vocab_size": embedding.shape[0]} if embedding and embedding.shape else {})


def _slots(header: Gguf, arch: Arch | None, stored: str, tensor: Stored) -> dict[str, Slot]:
    """Name and place of each tensor of transformers that a tensor of the file holds."""
    where = f"{header.path}: tensor {show(stored)}"
    if arch is None:
        return {stored: _slot(tensor, tensor.shape, 0)}
    name = arch.name(stored)
    if name is None:
        raise CheckpointError(f"{where}: transformers has no tensor for it in a model of the architecture {arch.arch}")
    if not arch.stacks(stored):
        return {name: _slot(tensor, tensor.shape, 0)}
    if len(tensor.shape) != 3:
        raise CheckpointError(f"{where} has shape {show(list(tensor.shape))}, a stack of experts has three axes")
    return {
        str(arch.name(stored, expert)): _slot(tensor, tensor.shape[1:], expert) for expert in range(tensor.shape[0])
    }


def _slot(tensor: Stored, shape: tuple[int, ...], index: int) -> Slot:
    """A part of a tensor, the `index`-th of this shape."""
    if tensor.type in FLOATS:
        spec = Spec(FLOATS[tensor.type][1], shape)
    else:
        spec = Spec(torch.uint8, (*shape[:-1], tensor.row_bytes))
    size = prod(spec.shape)
    return Slot(spec, tensor.start + index * size * spec.dtype.itemsize, size)


def _weight(header: Gguf, arch: Arch | None, facts: Mapping[str, Any], name: str, tensor: Stored) -> Weight:
    shape = tensor.shape[1:] if arch and len(tensor.shape) == 3 else tensor.shape
    if tensor.type in FLOATS:
        weight = Weight(name, shape, FLOATS[tensor.type][1])
    else:
        weight = Weight(name, shape, torch.float32, BLOCKS[tensor.type].scheme)
    try:
        heads, plus = arch.layout(weight, facts) if arch else (0, 0.0)
    except (KeyError, TypeError):
        raise CheckpointError(f"{header.path}: the header does not tell one number of heads for all layers") from None
    if heads and (not shape or shape[0] % (2 * heads)):
        raise CheckpointError(f"{header.path}: {name}: {heads} heads do not divide the rows of {show(list(shape))}")
    return Weight(name, shape, weight.dtype, weight.scheme, interleaved=heads, plus=plus)
