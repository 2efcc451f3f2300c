"""torchao's int8, float8 and plain int4 weights in safetensors (docs/formats/torchao.md). Read and never written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, Spec, Weight, _renamed
from lowbit.formats._checks import finite, row_chunks, stored
from lowbit.formats._linear import SCALE_TYPES, declared, model_dtype, planned
from lowbit.formats._refuse import never
from lowbit.schemes import Block, Scheme, parse
from lowbit.tensors import QTensor, scale_shape

_PART = "._weight_"
_NAMES = {"weight": "_weight_qdata", "weight_scale": "_weight_scale", "weight_zero_point": "_weight_zero_point"}
_refuse = never("torchao's layout is read and not written")
_FACTORS = "_weight_act_pre_scale"  # of inputs
_INT4 = parse("int4-g128")
_GRIDS = {torch.int8: parse("int8").grid, torch.float8_e4m3fn: parse("fp8-e4m3").grid}


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that hold a weight."""
    return _renamed.layout(weight, _NAMES)


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return [f"{weight.module}.{name}" for name in (*_NAMES.values(), _FACTORS)]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; codes of FP8 weights are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    return _unpack_int4(weight, tensors, codes) if _is_int4(weight) else _renamed.unpack(weight, tensors, _NAMES, codes)


def _is_int4(weight: Weight) -> bool:
    return planned(weight).grid == _INT4.grid


def _unpack_int4(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None) -> QTensor:
    """`Int4Tensor`: two signed codes a byte, the first in the low half; scales and what is added `[groups, rows]`."""
    scheme, (rows, cols), module = planned(weight), weight.shape, weight.module
    across = (scale_shape(weight.shape, scheme.block)[1], rows)
    packed = stored(tensors, f"{module}.{_NAMES['weight']}", torch.int8, (rows, cols // 2)).view(torch.uint8)
    scale, zero = f"{module}.{_NAMES['weight_scale']}", f"{module}.{_NAMES['weight_zero_point']}"
    dtype = tensors[scale].dtype if scale in tensors else weight.dtype
    scales, added = (finite(n, stored(tensors, n, dtype, across)).float().T.contiguous() for n in (scale, zero))
    codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
    for some in row_chunks(rows, cols):
        codes[some, 0::2] = (packed[some] & 15) ^ 8
        codes[some, 1::2] = (packed[some] >> 4) ^ 8
    minima = 8 * scales - added if scheme.zero == "min" else None
    factors = None
    if scheme.smooth:
        factors = finite(f"{module}.{_FACTORS}", tensors[f"{module}.{_FACTORS}"]).float().reshape(cols)
    return QTensor(scheme, weight.shape, codes, scales, minima=minima, factors=factors)


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
    shift = specs.get(f"{module}._weight_zero_point")
    if shift is not None and shift.dtype in SCALE_TYPES and parts <= {"qdata", "scale", "zero_point", "act_pre_scale"}:
        return _int4(module, specs, read)
    codes, scales = specs.get(f"{module}._weight_qdata"), specs.get(f"{module}._weight_scale")
    if codes is None or codes.dtype not in _GRIDS or scales is None or not parts <= {"qdata", "scale", "zero_point"}:
        kind = codes.dtype if codes else "no codes"
        raise FormatError(
            f"{module}: torchao with {kind} and {', '.join(sorted(parts))} is not read, int8, float8 and plain int4 are"
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


def _int4(module: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> Weight:
    """A weight whose zero points are floats, which are added: symmetric where all are 0."""
    codes, scales = specs.get(f"{module}._weight_qdata"), specs.get(f"{module}._weight_scale")
    if codes is None or scales is None or codes.dtype != torch.int8 or len(codes.shape) != 2 or len(scales.shape) != 2:
        raise FormatError(f"{module}: torchao's int4 has a matrix of bytes and one of scales, and this has not")
    (rows, half), (groups, outputs), kind = codes.shape, scales.shape, scales.dtype
    if kind not in SCALE_TYPES or outputs != rows or groups < 1 or 2 * half % groups:
        raise FormatError(
            f"{module}._weight_scale is {kind} {list(scales.shape)} beside codes of {[rows, 2 * half]}, not a scale "
            "for each group of each row"
        )
    shifted = bool(read(f"{module}._weight_zero_point").any())
    factors = specs.get(f"{module}.{_FACTORS}")
    if factors is not None and (factors.dtype not in SCALE_TYPES or prod(factors.shape) != 2 * half):
        raise FormatError(f"{module}.{_FACTORS} is {factors.dtype} {list(factors.shape)}, not a factor for each input")
    scheme = replace(
        _INT4,
        block=Block(1, 2 * half // groups),
        zero="min" if shifted else "none",
        scale="f32" if shifted else SCALE_TYPES[kind],
        smooth=factors is not None,
    )
    return Weight(f"{module}.weight", (rows, 2 * half), kind, scheme)


def _block(module: str, shape: Sequence[int], scales: Sequence[int]) -> Block:
    """The block of which there are so many down and across: all rows or one, and a part of the columns."""
    across = scales[1]
    if scales[0] not in (1, shape[0]) or across < 1 or shape[1] % across:
        raise FormatError(f"{module}._weight_scale has shape {list(scales)}, which does not divide {list(shape)}")
    cols = 0 if across == 1 else shape[1] // across
    return Block(1 if scales[0] == shape[0] else 0, cols)


FORMAT = Format(
    about="torchao: int8, float8 and plain int4 weights; read only",
    default="int8-row",
    fit=_refuse,
    layout=layout,
    pack=_refuse,
    unpack=unpack,
    config=_refuse,
    recognise=recognise,
    owns=owns,
)
