"""A tiny Llama on disk, some of its matrices quantized at random: what readers are given to open."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.formats import Format, Spec, Weight
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.reference.qtensors import random_qtensor

Make = Callable[[Weight, int], QTensor]


def tiny_llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        dtype=str(dtype).removeprefix("torch."),
        architectures=["LlamaForCausalLM"],
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(dtype)


def at_random(weight: Weight, seed: int) -> QTensor:
    assert weight.scheme is not None
    return random_qtensor(weight.scheme, weight.shape, seed)


def stored(form: Format, weight: Weight, q: QTensor) -> dict[str, Tensor]:
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in form.layout(weight).items()}
    form.pack(weight, q, into)
    return into


def write(
    form: Format, path: Path, schemes: Mapping[str, str], dtype: torch.dtype, make: Make = at_random
) -> dict[str, QTensor]:
    """Write a tiny Llama; a matrix whose name contains a key of `schemes` (the first counts) is stored in that scheme.

    Returns what was meant, by name of the weight.
    """
    model, tensors, weights, meant = tiny_llama(dtype), {}, [], {}
    for seed, (name, value) in enumerate(model.state_dict().items()):
        weight = Weight(name, tuple(value.shape), dtype)
        chosen = next((scheme for key, scheme in schemes.items() if key in name), None)
        if chosen is None or value.dim() != 2:
            tensors[name] = value.clone()
        else:
            weight = replace(weight, scheme=form.fit(parse(chosen), weight))
            meant[name] = make(weight, seed)
            tensors |= stored(form, weight, meant[name])
        weights.append(weight)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for file, document in form.config(weights, json.loads(model.config.to_json_string(use_diff=False))).items():
        (path / file).write_text(json.dumps(document))
    return meant


def read(form: Format, path: Path) -> dict[str, tuple[Weight, QTensor]]:
    """Quantized weights of a checkpoint that somebody wrote, by name."""
    tensors = load_file(path / "model.safetensors")
    found = recognised(form, json.loads((path / "config.json").read_text()), tensors)
    assert found is not None
    return {name: (weight, unpacked(form, weight, tensors)) for name, weight in found.items()}


def recognised(form: Format, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Weight] | None:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return form.recognise(config, specs, tensors.__getitem__)


def unpacked(form: Format, weight: Weight, tensors: Mapping[str, Tensor]) -> QTensor:
    return form.unpack(weight, {name: tensors[name] for name in form.owns(weight) if name in tensors}, None)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
