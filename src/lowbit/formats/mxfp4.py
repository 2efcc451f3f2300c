"""gpt-oss: the experts' matrices in MXFP4, three axes each (docs/formats/mxfp4.md). Read and never written.

A parameter `X` that the model holds as `[experts, inputs, outputs]` is stored as its transpose: `X_blocks` uint8
`[experts, outputs, inputs/32, 16]`, two codes a byte, the first in the low nibble, and `X_scales` uint8, E8M0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats import _ct_tensors as tensors_of
from lowbit.formats._checks import stored
from lowbit.formats._linear import declared, model_dtype, planned
from lowbit.formats._refuse import never
from lowbit.schemes import parse
from lowbit.tensors import QTensor

_MXFP4 = parse("mxfp4")
_BYTES = 16
_refuse = never("mxfp4, gpt-oss's layout, is read and not written")


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors of a weight `[experts, outputs, inputs]`, or of one expert."""
    *outer, cols = weight.shape
    blocks = (*outer, cols // _MXFP4.block.cols)
    return {
        f"{weight.name}_blocks": Spec(torch.uint8, (*blocks, _BYTES)),
        f"{weight.name}_scales": Spec(torch.uint8, blocks),
    }


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight are stored."""
    return list(layout(weight))


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    (blocks, scales), (*outer, cols) = layout(weight), weight.shape
    rows = prod(outer)
    parts = [stored(tensors, name, spec.dtype, spec.shape) for name, spec in layout(weight).items()]
    local = {
        "weight_packed": parts[0].reshape(rows, cols // 2),
        "weight_scale": parts[1].reshape(rows, -1),
    }
    try:
        q = tensors_of.unpack(planned(weight), (rows, cols), local, codes)
    except FormatError as error:
        text = str(error).replace("weight_packed", blocks).replace("weight_scale", scales)
        raise FormatError(text) from None
    return replace(q, shape=weight.shape)


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The experts' weights of a checkpoint that declares `mxfp4`.

    Raises:
        FormatError: blocks of another shape, or without their scales.
    """
    if declared(config).get("quant_method") != "mxfp4":
        return None
    weights, dtype = {}, model_dtype(config)
    for name, spec in specs.items():
        whole = name.removesuffix("_blocks")
        if whole == name:
            continue
        if len(spec.shape) != 4 or spec.shape[-1] != _BYTES or f"{whole}_scales" not in specs:
            raise FormatError(f"{name} is {list(spec.shape)}, not blocks of {_BYTES} bytes with {whole}_scales beside")
        experts, rows, across, _ = spec.shape
        shape = (experts, rows, across * _MXFP4.block.cols)
        weights[whole] = Weight(whole, shape, dtype, _MXFP4, swapped=True)
    return weights


FORMAT = Format(
    about="gpt-oss: experts in MXFP4; read only",
    default=str(_MXFP4),
    fit=_refuse,
    layout=layout,
    pack=_refuse,
    unpack=unpack,
    config=_refuse,
    recognise=recognise,
    owns=owns,
)
