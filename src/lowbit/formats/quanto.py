"""optimum-quanto's weights as `QuantizedModelForCausalLM` saves them (docs/formats/quanto.md). Read and never written.

`weight._data` int8 or E4M3 `[N, K]` under `weight._scale` `[N, 1]`; or, of 2 and 4 bits, `weight._data._data` uint8
`[P, C]`: codes in groups of C, `[R, C]`, of which byte row r holds the groups r, r + P, r + 2P, ... lowest bits first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil, prod
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, Spec, Weight, _renamed
from lowbit.formats._checks import below, finite, row_chunks, stored
from lowbit.formats._linear import SCALE_TYPES, declared, planned
from lowbit.formats._refuse import never
from lowbit.schemes import FLOATS, Block, Scheme, Zero, parse
from lowbit.tensors import QTensor, Shape, scale_shape

_SCALE = ".weight._scale"
_NAMES = {"weight": "weight._data", "weight_scale": "weight._scale"}
_BYTES = {torch.int8: parse("int8-row"), torch.float8_e4m3fn: parse("fp8-e4m3-row")}
_GROUP, _STEP = 128, 32
_refuse = never("quanto's layout is read and not written")


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that hold a weight."""
    scheme, module = planned(weight), weight.module
    groups, size = _groups(weight)
    kind = FLOATS[scheme.scale]
    if scheme.grid.bits == 8:
        codes = torch.int8 if scheme.grid.kind == "int" else torch.float8_e4m3fn
        return {f"{module}.weight._data": Spec(codes, weight.shape), f"{module}{_SCALE}": Spec(kind, (groups, 1))}
    return {
        f"{module}.weight._data._data": Spec(torch.uint8, (ceil(groups * scheme.grid.bits / 8), size)),
        f"{module}.weight._scale": Spec(kind, (groups, 1)),
        f"{module}.weight._shift": Spec(torch.uint8 if scheme.zero == "int" else kind, (groups, 1)),
    }


def _groups(weight: Weight) -> tuple[int, int]:
    """How many groups a weight has, and of how many elements."""
    groups = prod(scale_shape(weight.shape, planned(weight).block))
    return groups, prod(weight.shape) // max(groups, 1)


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight are stored, the scales that activations would have among them."""
    return [*layout(weight), f"{weight.module}.input_scale", f"{weight.module}.output_scale"]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; codes of FP8 weights are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme = planned(weight)
    if scheme.grid.bits == 8:
        return _renamed.unpack(weight, tensors, _NAMES, codes)
    (data, scale, shift) = (stored(tensors, name, s.dtype, s.shape) for name, s in layout(weight).items())
    blocks = scale_shape(weight.shape, scheme.block)
    scales = finite(f"{weight.module}.weight._scale", scale).float().reshape(blocks)
    shifts = finite(f"{weight.module}.weight._shift", shift).reshape(blocks)
    codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
    _unpack_bits(data, scheme.grid.bits, codes.view(_groups(weight)))
    if scheme.zero == "min":
        return QTensor(scheme, weight.shape, codes, scales, minima=shifts.float())
    limit = 2**scheme.grid.bits
    return QTensor(scheme, weight.shape, codes, scales, zeros=below(f"{weight.module}.weight._shift", shifts, limit))


def _unpack_bits(data: UInt8[Tensor, "packed size"], bits: int, out: UInt8[Tensor, "groups size"]) -> None:
    """Codes of groups r, r + P, r + 2P, ... from packed row r of P; what is beyond the last group is padding."""
    for i in range(8 // bits):
        part = out[i * len(data) : (i + 1) * len(data)]
        for rows in row_chunks(*part.shape):
            torch.bitwise_and(data[rows][: len(part[rows])] >> bits * i, 2**bits - 1, out=part[rows])


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint with quanto's names (`config.json` does not declare it).

    Raises:
        FormatError: tensors that break the layout, quantized activations, or packed weights of unknown shape.
    """
    modules = [name.removesuffix(_SCALE) for name in specs if name.endswith(_SCALE)]
    if not modules or declared(config).get("quant_method") not in (None, "quanto"):
        return None
    for module in modules:
        _check_activations(module, specs, read)
    packed = any(f"{module}.weight._data._data" in specs for module in modules)
    shapes = _model_shapes(config, len(specs)) if packed else {}
    weights = [_recognised(module, specs, shapes.get(f"{module}.weight")) for module in modules]
    return {weight.name: weight for weight in weights}


def _check_activations(module: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> None:
    for name in (f"{module}.input_scale", f"{module}.output_scale"):
        if name in specs and (specs[name].shape != () or read(name).item() != 1):
            raise FormatError(f"{name} is not 1: inputs and outputs rounded by quanto are not read, weights alone are")


def _recognised(module: str, specs: Mapping[str, Spec], shape: Shape | None) -> Weight:
    name, scale, data = f"{module}.weight", specs[f"{module}{_SCALE}"], specs.get(f"{module}.weight._data")
    if scale.dtype not in SCALE_TYPES:
        raise FormatError(f"{module}{_SCALE} is {scale.dtype}, not a float tensor")
    if f"{name}._data._data" in specs:
        return Weight(name, *_packed(name, specs, shape))
    if data is None or data.dtype not in _BYTES or len(data.shape) != 2:
        found = f"{data.dtype} {list(data.shape)}" if data else "missing"
        raise FormatError(f"{name}._data is {found}, not a matrix of int8 or E4M3")
    return Weight(name, data.shape, scale.dtype, replace(_BYTES[data.dtype], scale=SCALE_TYPES[scale.dtype]))


def _packed(name: str, specs: Mapping[str, Spec], shape: Shape | None) -> tuple[Shape, torch.dtype, Scheme]:
    """Shape, dtype and scheme of a weight of 2 or 4 bits: how many, its packed rows tell."""
    data, scale, shift = (specs.get(f"{name}.{part}") for part in ("_data._data", "_scale", "_shift"))
    assert data and scale
    if shape is None or len(shape) != 2 or not prod(shape):
        raise FormatError(f"{name}._data._data does not tell its shape, and config.json describes no model that has it")
    groups, size = prod(shape) // _group(shape[1]), _group(shape[1])
    heights = {(ceil(groups * bits / 8), size): bits for bits in (2, 4)}
    if data.shape not in heights or shift is None:
        raise FormatError(
            f"{name}._data._data is {list(data.shape)} {'' if shift else 'without _shift'}, where {list(shape)} in "
            f"groups of {size} needs one of {[list(each) for each in heights]}"
        )
    block = Block(1, 0) if size == shape[1] else Block(1, size)
    zero: Zero = "min" if shift.dtype.is_floating_point else "int"
    kind = parse(f"int{heights[data.shape]}")
    return shape, scale.dtype, replace(kind, block=block, zero=zero, scale=SCALE_TYPES[scale.dtype])


def _group(cols: int) -> int:
    """Size of the groups that quanto gives rows of this length (`QModuleMixin`): the row where none divides it."""
    sizes = range(_GROUP, 0, -_STEP) if cols > _GROUP else ()
    return next((size for size in sizes if cols % size == 0), cols)


def _model_shapes(config: Mapping[str, Any], stored: int) -> dict[str, Shape]:
    """Shapes of the weights of the model that config.json describes, which packed ones do not tell; none is made.

    Raises:
        FormatError: it describes none, or one with more layers than there are tensors.
    """
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > stored:
        raise FormatError(f"num_hidden_layers of config.json is {layers!r}, and {stored} tensors are stored")
    try:
        with warnings.catch_warnings(action="ignore"), torch.device("meta"):  # what a class imports may be deprecated
            from transformers import AutoConfig, AutoModelForCausalLM

            described = AutoConfig.for_model(**config)
            model = AutoModelForCausalLM.from_config(described)  # type: ignore[no-untyped-call]
    except Exception as error:  # what a config.json can break in a model's class has no common base
        raise FormatError(f"config.json describes no causal language model: {type(error).__name__}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


FORMAT = Format(
    about="optimum-quanto: integers of 2, 4 and 8 bits and FP8; read only",
    default="int8-row",
    fit=_refuse,
    layout=layout,
    pack=_refuse,
    unpack=unpack,
    config=_refuse,
    recognise=recognise,
    owns=owns,
)
