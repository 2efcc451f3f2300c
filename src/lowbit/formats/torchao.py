"""torchao's int8 and float8 weights in safetensors (docs/formats/torchao.md). Read and never written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, Spec, Weight, _renamed
from lowbit.formats._linear import SCALE_TYPES, declared, model_dtype
from lowbit.formats._refuse import never
from lowbit.schemes import Block, Scheme, parse
from lowbit.tensors import QTensor

_PART = "._weight_"
_NAMES = {"weight": "_weight_qdata", "weight_scale": "_weight_scale", "weight_zero_point": "_weight_zero_point"}
_refuse = never("torchao's layout is read and not written; use --format compressed-tensors")
_GRIDS = {torch.int8: parse("int8").grid, torch.float8_e4m3fn: parse("fp8-e4m3").grid}


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that hold a weight."""
    return _renamed.layout(weight, _NAMES)


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return [f"{weight.module}.{name}" for name in _NAMES.values()]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; codes of FP8 weights are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    return _renamed.unpack(weight, tensors, _NAMES, codes)


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares torchao.

    Raises:
        FormatError: a tensor of torchao that is neither int8 nor float8, or parts that do not go together.
    """
    if declared(config).get("quant_method") != "torchao":
        return None
    modules = dict.fromkeys(name.partition(_PART)[0] for name in specs if _PART in name)
    weights = [_recognised(module, specs, read, model_dtype(config)) for module in modules]
    return {weight.name: weight for weight in weights}


def _recognised(module: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor], dtype: torch.dtype) -> Weight:
    parts = {name.partition(_PART)[2] for name in specs if name.startswith(f"{module}{_PART}")}
    codes, scales = specs.get(f"{module}._weight_qdata"), specs.get(f"{module}._weight_scale")
    if codes is None or codes.dtype not in _GRIDS or scales is None or not parts <= {"qdata", "scale", "zero_point"}:
        kind = codes.dtype if codes else "no codes"
        raise FormatError(
            f"{module}: torchao with {kind} and {', '.join(sorted(parts))} is not read, int8 and float8 are"
        )
    if len(codes.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in SCALE_TYPES:
        raise FormatError(
            f"{module}._weight_scale is {scales.dtype} {list(scales.shape)} beside codes {list(codes.shape)}, not a "
            "float matrix beside a matrix"
        )
    block = _block(module, codes.shape, scales.shape)
    zero = f"{module}._weight_zero_point"
    asymmetric = codes.dtype == torch.int8 and zero in specs and bool(read(zero).any())
    scheme = Scheme(_GRIDS[codes.dtype], block, "int" if asymmetric else "none", SCALE_TYPES[scales.dtype])
    return Weight(f"{module}.weight", codes.shape, dtype, scheme)


def _block(module: str, shape: Sequence[int], scales: Sequence[int]) -> Block:
    """The block of which there are so many down and across: all rows or one, and a part of the columns."""
    across = scales[1]
    if scales[0] not in (1, shape[0]) or across < 1 or shape[1] % across:
        raise FormatError(f"{module}._weight_scale has shape {list(scales)}, which does not divide {list(shape)}")
    cols = 0 if across == 1 else shape[1] // across
    return Block(1 if scales[0] == shape[0] else 0, cols)


FORMAT = Format(
    about="torchao: int8 and float8 weights; read only",
    default="int8-row",
    fit=_refuse,
    layout=layout,
    pack=_refuse,
    unpack=unpack,
    config=_refuse,
    recognise=recognise,
    owns=owns,
)
