"""NVIDIA ModelOpt's checkpoints: NVFP4 written and read, FP8 read (docs/formats/modelopt.md).

The tensors are those of compressed-tensors, but that global scales multiply: `weight_scale_2`, `input_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats import _ct_tensors as tensors_of
from lowbit.formats._checks import finite
from lowbit.formats._linear import (
    check_matrix,
    check_planned,
    declare,
    declared,
    model_dtype,
    planned,
    skipped_modules,
)
from lowbit.formats._renamed import named
from lowbit.schemes import Scheme, parse
from lowbit.tensors import QTensor

_NVFP4, _FP8 = parse("nvfp4"), parse("fp8-e4m3-tensor")
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
_NAMES = {"weight_packed": "weight", "weight_scale": "weight_scale"}
_PLAIN = {"weight": "weight", "weight_scale": "weight_scale"}


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """NVFP4.

    Raises:
        UnsupportedError: another scheme, rows that 16 does not divide, or the output head.
    """
    check_matrix(weight, "modelopt")
    if scheme != _NVFP4:
        raise UnsupportedError(f"modelopt is written with nvfp4 alone, not {scheme}; use --format compressed-tensors")
    if weight.shape[1] % _NVFP4.block.cols or weight.module.rpartition(".")[2] == "lm_head":
        raise UnsupportedError(
            f"modelopt needs rows that {_NVFP4.block.cols} divides, and leaves the output head as it is; leave "
            f"{weight.name} as it is (--skip)"
        )
    return scheme


def fit_activations(scheme: Scheme, weight: Weight) -> Scheme:
    """NVFP4 with a stored scale, as its weights.

    Raises:
        UnsupportedError: any other scheme.
    """
    if scheme != _NVFP4:
        raise UnsupportedError(f"modelopt rounds the inputs of nvfp4 weights to nvfp4, not to {scheme}")
    return scheme


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    specs = tensors_of.layout(planned(weight), weight.shape, tensors_of.container(planned(weight)))
    found = {_NAMES[name]: spec for name, spec in specs.items() if name in _NAMES}
    found["weight_scale_2"] = Spec(torch.float32, ())
    if weight.activations:
        found["input_scale"] = Spec(torch.float32, ())
    return {f"{weight.module}.{name}": spec for name, spec in found.items()}


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return [f"{weight.module}.{name}" for name in ("weight", "weight_scale", "weight_scale_2", "input_scale")]


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a tensor of another scheme or shape, or inputs whose scale is not known.
    """
    check_planned(weight, q)
    assert isinstance(q.scales, QTensor)
    local = {name: into[f"{weight.module}.{stored}"] for name, stored in _NAMES.items()}
    unit = replace(q, scales=replace(q.scales, scales=torch.ones(1, 1)))
    with named(weight, _NAMES):
        tensors_of.pack(unit, local | {"weight_global_scale": torch.empty(1)})
    into[f"{weight.module}.weight_scale_2"].copy_(q.scales.scale_values().reshape(()))
    if weight.activations:
        if weight.input_scale is None:
            raise FormatError(f"{weight.module}.input_scale needs the scale of its inputs, which calibration finds")
        into[f"{weight.module}.input_scale"].copy_(1 / torch.tensor(weight.input_scale))


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; codes of FP8 weights are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme, names = planned(weight), _PLAIN if planned(weight).nested is None else _NAMES
    full = {name: f"{weight.module}.{stored}" for name, stored in names.items()}
    local = {name: tensors[each] for name, each in full.items() if each in tensors}
    with named(weight, names):
        q = tensors_of.unpack(scheme, weight.shape, local | {"weight_global_scale": torch.ones(1)}, codes)
    if not isinstance(q.scales, QTensor):
        return q
    name = f"{weight.module}.weight_scale_2"
    found = tensors.get(name)
    if found is None or found.dtype != torch.float32 or found.numel() != 1:
        raise FormatError(f"{name} is missing, or is not one float32")
    return replace(q, scales=replace(q.scales, scales=finite(name, found.reshape(1, 1))))


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, and in config.json the same as ModelOpt converts it.

    Raises:
        UnsupportedError: inputs are rounded beside some of the weights only.
    """
    inputs = {weight.activations is not None for weight in weights if weight.scheme}
    if not inputs:
        return {"config.json": declare(source, None)}
    if len(inputs) > 1:
        raise UnsupportedError("modelopt declares activations for all nvfp4 weights or for none; use --set and --skip")
    quantized, size = inputs.pop(), _NVFP4.block.cols
    algorithm = "NVFP4" if quantized else "W4A16_NVFP4"
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": size}
    group = {"weights": numbers, "targets": ["Linear"]} | ({"input_activations": numbers} if quantized else {})
    kept, producer = skipped_modules(weights), {"name": "lowbit"}
    details = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": size, "exclude_modules": kept}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "config_groups": {"group_0": group},
        "ignore": kept,
        "producer": producer,
    }
    return {
        "config.json": declare(source, quantization),
        "hf_quant_config.json": {"producer": producer, "quantization": details},
    }


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that ModelOpt declares, or that declares nothing and holds its tensors.

    Raises:
        FormatError: a kind of ModelOpt that is not read, or tensors that contradict each other.
    """
    quantization = declared(config)
    method = quantization.get("quant_method")
    if method != "modelopt" and (method or not any(name.endswith(".weight_scale_2") for name in specs)):
        return None
    algorithm = quantization.get("quant_algo", "NVFP4")
    if algorithm not in _ALGORITHMS:
        raise FormatError(f"quant_algo {algorithm!r} of ModelOpt is not read, {', '.join(_ALGORITHMS)} are")
    scaled = [name for name in specs if name.endswith(".pre_quant_scale")]
    if scaled:
        raise FormatError(f"{scaled[0]} scales the inputs of a module, for which a weight here has no place")
    modules = [name.removesuffix(".weight_scale") for name in specs if name.endswith(".weight_scale")]
    weights = [_recognised(module, specs, read, model_dtype(config)) for module in modules]
    return {weight.name: weight for weight in weights}


def _recognised(module: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor], dtype: torch.dtype) -> Weight:
    name, scale = f"{module}.weight", specs[f"{module}.weight_scale"]
    found = specs.get(name)
    if found is None or len(found.shape) != 2:
        raise FormatError(f"{name} is {list(found.shape) if found else 'missing'}, not a matrix")
    rows, cols = found.shape
    if (found.dtype, scale.dtype) == (torch.uint8, torch.float8_e4m3fn):
        weight = Weight(name, (rows, 2 * cols), dtype, _NVFP4)
        if weight.shape[1] % _NVFP4.block.cols:
            raise FormatError(f"{name} has rows of {weight.shape[1]} values, which {_NVFP4.block.cols} does not divide")
    elif (found.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32) and prod(scale.shape) in (1, rows):
        by_row = prod(scale.shape) == rows != 1
        weight = Weight(name, (rows, cols), dtype, parse("fp8-e4m3-row") if by_row else _FP8)
    else:
        raise FormatError(
            f"{name} is {found.dtype} under scales of {scale.dtype} {list(scale.shape)}, neither NVFP4 nor FP8"
        )
    return _with_inputs(weight, specs, read)


def _with_inputs(weight: Weight, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> Weight:
    """The weight with what a runtime does to its inputs; where their scale is not stored, nothing (rows: by token)."""
    full, scheme = f"{weight.module}.input_scale", planned(weight)
    if full not in specs:
        return replace(weight, activations=scheme if scheme.block.rows and not scheme.nested else None)
    value = read(full).float() if prod(specs[full].shape) == 1 else None
    if value is None or not 0 < value.item() < inf:
        raise FormatError(f"{full} is not one positive number")
    multiplier = 1 / value if scheme.nested else value
    return replace(weight, activations=_NVFP4 if scheme.nested else _FP8, input_scale=multiplier.item())


FORMAT = Format(
    about="NVIDIA ModelOpt: NVFP4, with or without activations, as TensorRT-LLM, vLLM and SGLang load it",
    default="nvfp4",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    fit_activations=fit_activations,
)
