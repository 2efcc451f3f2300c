"""FP8 with a scale per row, as Llama 3.1 405B was published (docs/formats/fp8.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight, _renamed
from lowbit.formats._linear import check_matrix, declared, documents, model_dtype, row_block
from lowbit.schemes import FLOATS, Scheme, parse
from lowbit.tensors import QTensor

_ROWS = parse("fp8-e4m3-row")
_BOUND = 1200.0  # transformers' default for the largest input that a scale is made for
_NAMES = {"weight": "weight", "weight_scale": "weight_scale"}


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """FP8 rows with float32 scales.

    Raises:
        UnsupportedError: another scheme, or the output head.
    """
    check_matrix(weight, "fbgemm_fp8", scheme)
    plain = scheme.scale in FLOATS
    if not plain or replace(scheme, block=row_block(scheme.block, weight.shape[1]), scale="f32") != _ROWS:
        raise UnsupportedError(f"fbgemm_fp8 cannot hold {scheme}: it has {_ROWS}; use that")
    if weight.module.rpartition(".")[2] == "lm_head":
        raise UnsupportedError("readers of fbgemm_fp8 leave the output head as it is; leave it as it is (--skip)")
    return _ROWS


def fit_activations(scheme: Scheme, weight: Weight) -> Scheme:
    """Inputs are always rounded by token when a runtime computes in FP8.

    Raises:
        UnsupportedError: any other scheme.
    """
    if scheme != _ROWS:
        raise UnsupportedError(f"fbgemm_fp8 rounds inputs to {_ROWS}, and cannot declare {scheme}")
    return scheme


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return [f"{weight.module}.{name}" for name in _NAMES]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; its codes are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    return _renamed.unpack(weight, tensors, _NAMES, codes)


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `FbgemmFp8Config`."""
    quantization = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": _BOUND,
    }
    return documents(weights, source, quantization)


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares `fbgemm_fp8`.

    Raises:
        FormatError: FP8 tensors without scales, or scales without them.
    """
    if declared(config).get("quant_method") != "fbgemm_fp8":
        return None
    scaled = {name.removesuffix("_scale") for name in specs if name.endswith(".weight_scale")}
    stored = {name for name, spec in specs.items() if spec.dtype == torch.float8_e4m3fn}
    for name in sorted(scaled ^ stored):
        raise FormatError(f"{name} is not stored in FP8 with a weight_scale beside it (fused experts are not read)")
    for name in sorted(stored):
        if len(specs[name].shape) != 2:
            raise FormatError(f"{name} has {len(specs[name].shape)} axes, not 2")
    dtype = model_dtype(config)
    return {name: Weight(name, specs[name].shape, dtype, _ROWS, _ROWS) for name in specs if name in stored}


FORMAT = Format(
    about="FP8 rows with dynamic activations, as fbgemm and Llama 3.1 405B have them",
    default=str(_ROWS),
    fit=fit,
    layout=partial(_renamed.layout, names=_NAMES),
    pack=partial(_renamed.pack, names=_NAMES),
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    fit_activations=fit_activations,
)
