"""Small quantized checkpoints of random codes, in any format, written without the line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit import plugins
from lowbit.formats import Format, Weight
from lowbit.schemes import Scheme, parse
from lowbit.tensors import QTensor
from tests.reference.qtensors import random_qtensor

SHAPE = (64, 128)
NAMES = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down")]
Change = Callable[[QTensor], QTensor]


def scattered(q: QTensor) -> QTensor:
    """Columns in groups of an order of their own, as GPTQ's act-order leaves them."""
    order = torch.randperm(q.codes.shape[1], generator=torch.Generator().manual_seed(0))
    return replace(q, group_index=(order % q.scales.shape[1]).int())


def write_checkpoint(
    path: Path,
    form_name: str,
    schemes: Mapping[str, str | Scheme],
    dtype: torch.dtype = torch.float16,
    change: Change = lambda q: q,
    config: Mapping[str, Any] | None = None,
    inputs: tuple[Scheme, float | None] | None = None,
    shape: tuple[int, int] = SHAPE,
) -> dict[str, QTensor]:
    """A checkpoint of two weights that are kept and those of `schemes`; returns what was stored, by name.

    Args:
        schemes: name of a weight to its scheme, which the format may fit.
        change: done to each random tensor.
        inputs: scheme and stored scale of their activations.
    """
    form: Format = plugins.load("formats", form_name)
    tensors: dict[str, Tensor] = {"model.norm.weight": torch.ones(8), "model.embed_tokens.weight": torch.ones(6, 8)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    weights, meant = [Weight(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items()], {}
    for seed, (name, scheme) in enumerate(schemes.items()):
        bare = Weight(name, shape, dtype)
        fitted = form.fit(parse(scheme), bare) if isinstance(scheme, str) else scheme
        weight = replace(bare, scheme=fitted)
        if inputs:
            weight = replace(weight, activations=form.fit_activations(inputs[0], weight), input_scale=inputs[1])
        meant[name] = change(random_qtensor(fitted, shape, seed))
        into = {part: torch.empty(spec.shape, dtype=spec.dtype) for part, spec in form.layout(weight).items()}
        form.pack(weight, meant[name], into)
        tensors |= into
        weights.append(weight)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    base = {"model_type": "llama", "torch_dtype": str(dtype).removeprefix("torch."), **(config or {})}
    for file, document in form.config(weights, base).items():
        (path / file).write_text(json.dumps(document))
    return meant
