"""Fine-grained FP8, as DeepSeek publishes it, and FP8 with a scale per tensor, as vLLM has it (docs/formats/fp8.md).

`weight` is E4M3 `[N, K]`; `weight_scale_inv`, float32, one for every 128 x 128 block, multiplies it (its name
notwithstanding).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight, _renamed
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    declared,
    documents,
    model_dtype,
    planned,
)
from lowbit.schemes import FLOATS, Block, Scheme, parse
from lowbit.tensors import QTensor, scale_shape

E4M3 = torch.float8_e4m3fn
_WRITTEN = parse("fp8-e4m3-128x128")
_INPUTS = parse("fp8-e4m3-g128")
_SIDE = 128
_NAMES = {"weight": "weight", "weight_scale": "weight_scale_inv"}
_SCALES = ("weight_scale_inv", "weight_scale")
_INPUT_SCALES = ("input_scale", "activation_scale")
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """FP8 in blocks of 128 x 128 with float32 scales.

    Raises:
        UnsupportedError: another scheme, or sides that such blocks do not divide.
    """
    check_matrix(weight, "fp8", scheme)
    if scheme.scale not in FLOATS or replace(scheme, scale="f32") != _WRITTEN:
        raise UnsupportedError(f"fp8 cannot hold {scheme}: it has {_WRITTEN}; use that")
    if any(side % _SIDE for side in weight.shape) or weight.module.rpartition(".")[2] == "lm_head":
        raise UnsupportedError(
            f"fp8 cannot hold {weight.name} {list(weight.shape)}: its readers work out the size of blocks from the "
            f"number of scales, which is right for multiples of {_SIDE} alone, and leave the output head as it is; "
            "leave it as it is (--skip)"
        )
    return _WRITTEN


def fit_activations(scheme: Scheme, weight: Weight) -> Scheme:
    """Inputs are always rounded in groups of 128 when a runtime computes in FP8.

    Raises:
        UnsupportedError: any other scheme.
    """
    if scheme != _INPUTS:
        raise UnsupportedError(f"fp8 rounds inputs to {_INPUTS}, and cannot declare {scheme}; leave --activations out")
    return scheme


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    return _renamed.layout(weight, _NAMES)


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return [f"{weight.module}.{name}" for name in ("weight", *_SCALES, *_INPUT_SCALES)]


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight."""
    _renamed.pack(weight, q, into, _NAMES)


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; its codes are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    stored = next((name for name in _SCALES if f"{weight.module}.{name}" in tensors), _SCALES[0])
    full = f"{weight.module}.{stored}"
    found = tensors.get(full)
    if found is not None and found.dtype in _EXPONENTS:
        tensors = {**tensors, full: _renamed.powers(found)}
    return _renamed.unpack(weight, tensors, _NAMES | {"weight_scale": stored}, codes)


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `FineGrainedFP8Config`."""
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_SIDE, _SIDE],
    }
    return documents(weights, source, quantization)


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares `fp8`.

    Raises:
        FormatError: a declaration that contradicts the stored tensors, or a kind of FP8 that is not read.
    """
    quantization = declared(config)
    if quantization.get("quant_method") != "fp8":
        return None
    endings = tuple(f".{name}" for name in _SCALES)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in specs if name.endswith(endings))
    check_scaled(specs, modules)
    dtype = model_dtype(config)
    weights = [_recognised(module, quantization, specs, read, dtype) for module in modules]
    return {weight.name: weight for weight in weights}


def check_scaled(specs: Mapping[str, Spec], modules: Mapping[str, Any]) -> None:
    """Every FP8 tensor must be the `weight` of one of these modules.

    Raises:
        FormatError: another is stored in FP8.
    """
    for name, spec in specs.items():
        if spec.dtype == E4M3 and not (name.endswith(".weight") and name.removesuffix(".weight") in modules):
            raise FormatError(
                f"{name} is stored in FP8 without a scale that belongs to it (fused experts are not read)"
            )


def _recognised(
    module: str,
    quantization: Mapping[str, Any],
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> Weight:
    name = f"{module}.weight"
    scale = next(full for each in _SCALES if (full := f"{module}.{each}") in specs)
    if name not in specs or specs[name].dtype != E4M3 or len(specs[name].shape) != 2:
        found = specs.get(name)
        raise FormatError(f"{name} is {f'{found.dtype} {list(found.shape)}' if found else 'missing'}, no FP8 matrix")
    kind = specs[scale].dtype
    if kind not in SCALE_TYPES and kind not in _EXPONENTS:
        raise FormatError(f"{scale} is {kind}, not a float tensor")
    block = _block(quantization.get("weight_block_size"), specs[name].shape, scale, specs[scale])
    scheme = replace(_WRITTEN, block=block, scale=SCALE_TYPES.get(kind, "f32"))
    weight = Weight(name, specs[name].shape, dtype, scheme)
    return _with_inputs(weight, quantization.get("activation_scheme", "dynamic"), specs, read)


def _block(sides: Any, shape: Sequence[int], name: str, scales: Spec) -> Block:
    """Rows and columns that share a scale; without `weight_block_size` it is one for all, or one a row."""
    if sides is None:
        plain = {1: Block(0, 0), shape[0]: Block(1, 0)}.get(prod(scales.shape))
        if plain is None:
            raise FormatError(f"{name} has shape {list(scales.shape)}, and no weight_block_size says what it scales")
        return plain
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise FormatError(f"weight_block_size of quantization_config is {sides!r}, not two sides")
    block = Block(*sides)
    if tuple(scales.shape) != scale_shape(tuple(shape), block):
        raise FormatError(
            f"{name} has shape {list(scales.shape)}, which blocks of {block} on {list(shape)} do not fill"
        )
    return block


def _with_inputs(weight: Weight, kind: Any, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> Weight:
    """The weight with what a runtime does to its inputs: rounds them in groups, by token, or by a stored scale."""
    if kind == "static":
        full = next((f for each in _INPUT_SCALES if (f := f"{weight.module}.{each}") in specs), None)
        value = read(full).float() if full and prod(specs[full].shape) == 1 else None
        if value is None or not 0 < value.item() < inf:
            raise FormatError(f"{full or weight.module + '.input_scale'} is missing or not one positive number")
        return replace(weight, activations=parse("fp8-e4m3-tensor"), input_scale=value.item())
    if kind != "dynamic":
        raise FormatError(f"activation_scheme {kind!r} of quant_method fp8 is not read, dynamic and static are")
    block = planned(weight).block
    return replace(weight, activations=replace(_INPUTS, block=Block(1, block.cols)))


FORMAT = Format(
    about="FP8 in blocks of 128 x 128 with dynamic activations, as DeepSeek publishes it",
    default=str(_WRITTEN),
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    fit_activations=fit_activations,
)
