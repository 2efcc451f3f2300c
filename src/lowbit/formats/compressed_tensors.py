"""compressed-tensors: the layouts that vLLM, llm-compressor and `transformers` share.

They are described in docs/formats/compressed-tensors.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil, inf, prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Codes, CodeWords, Format, Spec, Weight
from lowbit.formats import _ct_tensors as tensors_of
from lowbit.formats._checks import exact
from lowbit.formats._ct_config import (
    EMBEDDING,
    Declared,
    anywhere,
    declared,
    quantization_config,
    read_activations,
    read_scheme,
)
from lowbit.formats._ct_tensors import DTYPES
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    divisor,
    model_dtype,
    planned,
    row_block,
)
from lowbit.schemes import Block, ScaleType, Scheme
from lowbit.tensors import QTensor

_WEIGHT_PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale",
    "weight_g_idx",
)  # fmt: skip
_ACTIVATION_PARTS = (
    "input_scale", "input_zero_point", "input_global_scale", "input_g_idx", "output_scale", "output_zero_point",
)  # fmt: skip
# Activations that go with weights, as in the presets of the package.
_PARTNERS = {
    "int": ("int", "fp8-e4m3"),
    "fp8-e4m3": ("fp8-e4m3",),
    "nvfp4": ("nvfp4",),
    "mxfp4": ("mxfp4", "mxfp8"),
    "mxfp8": ("mxfp8",),
}


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme as compressed-tensors stores it: scales in the model's dtype, blocks in the plainest words.

    Raises:
        UnsupportedError: no layout holds it, or the reader refuses it; the text names what works.
    """
    check_matrix(weight, "compressed-tensors", scheme)
    _check_grid(scheme)
    if scheme.nested or scheme.scale == "e8m0":
        _check_groups(scheme, weight, f"use int4 or fp8-e4m3, or leave {weight.name} as it is (--skip)")
        return scheme
    scheme = replace(scheme, block=_plain_block(scheme.block, weight.shape[1]), scale=_scale_type(weight.dtype))
    _check_groups(scheme, weight)
    return scheme


def _check_grid(scheme: Scheme) -> None:
    if scheme.grid.kind == "vectors":
        raise UnsupportedError(f"compressed-tensors cannot hold {scheme}: it has no codebooks")
    if scheme.grid.kind == "levels":
        raise UnsupportedError(f"compressed-tensors has no table of levels, {scheme} needs one")
    if scheme.grid.name == "fp8-e5m2":
        raise UnsupportedError("compressed-tensors has one 8-bit float, E4M3; use fp8-e4m3")
    if scheme.zero == "min":
        raise UnsupportedError("compressed-tensors has no minima; use asym")
    if scheme.zero == "float":
        raise UnsupportedError("zero points of compressed-tensors are integers; use asym")
    if scheme.grid.kind == "int" and scheme.nested:
        raise UnsupportedError("compressed-tensors quantizes scales only in nvfp4; leave out dq")


def _plain_block(block: Block, cols: int) -> Block:
    plain = row_block(block, cols)
    if plain.flat:
        raise UnsupportedError(
            f"compressed-tensors has no blocks that run on over rows, flat{block.cols} on rows of {cols} would; "
            f"use g{block.cols}"
        )
    return plain


def _scale_type(dtype: torch.dtype) -> ScaleType:
    """compressed-tensors makes scales of the weight's dtype, and `transformers` casts what it loads to that."""
    return SCALE_TYPES.get(dtype, "f32")


def _check_groups(scheme: Scheme, weight: Weight, advice: str = "") -> None:
    """Raise `UnsupportedError`, with other groups for an advice where none is given."""
    size, cols = scheme.block.cols, weight.shape[1]
    if scheme.block.rows == 1 and size and cols % size:
        raise UnsupportedError(
            f"groups of {size} leave a shorter last one in rows of {cols}, which compressed-tensors' reader refuses; "
            f"{advice or _other_groups(scheme, weight)}"
        )


def _other_groups(scheme: Scheme, weight: Weight) -> str:
    """Advice: the largest group that divides the row, if it is worth its scales, or one scale per row."""
    size = divisor(weight.shape[1], scheme.block.cols, range(16, scheme.block.cols))
    blocks = [Block(1, size), Block(1, 0)] if size else [Block(1, 0)]
    return f"use {' or '.join(str(replace(scheme, block=block)) for block in blocks)}"


def fit_activations(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme of a weight's inputs as compressed-tensors declares it.

    Raises:
        UnsupportedError: readers have no such activations, or none with weights like this one.
    """
    own = planned(weight)
    if EMBEDDING.fullmatch(weight.module):
        raise UnsupportedError(f"{weight.name} reads token numbers, there is nothing to quantize in them")
    partners = _PARTNERS.get(_kind(own), ())
    if _kind(scheme) not in partners:
        raise UnsupportedError(
            f"compressed-tensors' readers run weights in {own} with activations in {' or '.join(partners) or 'no grid'}"
            f", not {scheme}"
        )
    if scheme.nested or scheme.scale == "e8m0":
        return scheme
    block = _plain_block(scheme.block, weight.shape[1])
    if block.rows > 1 or scheme.zero == "float" or (block.rows == 0 and scheme.zero != "none"):
        raise UnsupportedError(
            f"{scheme}: activations have a scale per token (int8-row), per group of a token (fp8-e4m3-g128), or one "
            "that is stored (int8-tensor, symmetric)"
        )
    scheme = replace(scheme, block=block, scale="f32" if block.rows else _scale_type(weight.dtype))
    _check_groups(scheme, weight)
    return scheme


def _kind(scheme: Scheme) -> str:
    """Name of the grid, or of the family that fixes more than that."""
    if scheme.grid.kind == "int":
        return "int"
    return str(scheme) if scheme.nested or scheme.scale == "e8m0" else scheme.grid.name


def layout(weight: Weight) -> dict[str, Spec]:
    """Full names, dtypes and shapes of the tensors that `pack` fills."""
    scheme = planned(weight)
    specs = tensors_of.layout(scheme, weight.shape, tensors_of.container(scheme, weight.activations))
    return {f"{weight.module}.{name}": spec for name, spec in (specs | _input_specs(weight)).items()}


def _input_specs(weight: Weight) -> dict[str, Spec]:
    """The stored scale of a weight's inputs, where they have one."""
    scheme = weight.activations
    if scheme and scheme.nested:
        return {"input_global_scale": Spec(torch.float32, (1,))}
    return {"input_scale": Spec(DTYPES[scheme.scale], (1,))} if scheme and scheme.block.rows == 0 else {}


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a value that the layout cannot hold, or a tensor of another scheme or shape than the weight's.
    """
    check_planned(weight, q)
    with _named(weight):
        tensors_of.pack(q, _local(weight, into))
    for name, spec in _input_specs(weight).items():
        if weight.input_scale is None:
            raise FormatError(f"{weight.module}.{name} needs the scale of its inputs, which calibration finds")
        scale = exact(f"{weight.module}.{name}", torch.tensor([weight.input_scale]), spec.dtype)
        into[f"{weight.module}.{name}"].copy_(scale)


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; codes of FP8 weights are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    with _named(weight):
        return tensors_of.unpack(planned(weight), weight.shape, _local(weight, tensors), codes)


def _pack_rows(weight: Weight, words: Tensor, start: int, into: Mapping[str, Tensor]) -> None:
    tensors_of.pack_rows(planned(weight), weight.shape[1], words, start, _local(weight, into))


def _unpack_rows(weight: Weight, tensors: Mapping[str, Tensor], start: int, words: Tensor) -> None:
    tensors_of.unpack_rows(planned(weight), weight.shape[1], _local(weight, tensors), start, words)


def _lines(weight: Weight, tensors: Mapping[str, Tensor], start: int, stop: int) -> Tensor | None:
    packed = tensors.get(f"{weight.module}.weight_packed")
    return None if packed is None else packed[start:stop]


def _local(weight: Weight, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{weight.module}."
    return {name: tensors[start + name] for name in _WEIGHT_PARTS if start + name in tensors}


@contextmanager
def _named(weight: Weight) -> Iterator[None]:
    """Complete the name of the tensor that an error begins with, or put the module's before it."""
    try:
        yield
    except FormatError as error:
        joint = "." if str(error).startswith("weight") else ": "
        raise FormatError(f"{weight.module}{joint}{error}") from None


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The source's config.json with the `quantization_config` of these weights in place of any it had."""
    found = quantization_config(weights)
    if found and isinstance(source.get("text_config"), Mapping):
        found = anywhere(found)
    return {"config.json": declare(source, found)}


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint whose config.json declares compressed-tensors.

    Raises:
        FormatError: the declaration is malformed, is not read, or contradicts the stored tensors.
    """
    found = declared(config)
    if found is None:
        return None
    names = (name.rpartition(".") for name in specs)
    modules = dict.fromkeys(module for module, _, part in names if part in ("weight_scale", "weight_packed"))
    weights = (_recognised(module, found, specs, read, model_dtype(config)) for module in modules)
    return {weight.name: weight for weight in weights}


def _recognised(
    module: str, found: Declared, specs: Mapping[str, Spec], read: Callable[[str], Tensor], dtype: torch.dtype
) -> Weight:
    scale = specs.get(f"{module}.weight_scale")
    if scale is None:
        raise FormatError(f"{module}.weight_scale is missing")
    scheme = read_scheme(found.group(module), scale.dtype, f"{module}.weight_global_scale" in specs)
    shape = _shape(module, scheme, specs, read)
    weight = Weight(f"{module}.weight", shape, scale.dtype if scale.dtype in SCALE_TYPES else dtype, scheme)
    stored = specs.get(f"{module}.input_scale")
    weight = replace(weight, activations=read_activations(found.group(module), stored.dtype if stored else None))
    return replace(weight, input_scale=_input_scale(weight, specs, read))


def _input_scale(weight: Weight, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> float | None:
    """The stored scale of a weight's inputs; None where they have none."""
    zero = f"{weight.module}.input_zero_point"
    for name, spec in _input_specs(weight).items():
        full = f"{weight.module}.{name}"
        found = specs.get(full)
        if found is None or (found.dtype, prod(found.shape)) != (spec.dtype, 1):
            raise FormatError(f"{full} is missing, or is not one number of {spec.dtype}")
        if zero in specs and read(zero).float().any():
            raise FormatError(f"{zero} is not 0: asymmetric activations with a stored scale are not read")
        value = read(full).float().item()
        if not 0 < value < inf:
            raise FormatError(f"{full} holds {value}; it must be positive and finite")
        return value
    return None


def _shape(module: str, scheme: Scheme, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> tuple[int, int]:
    """Rows and columns of a weight: as its codes have them, or as `weight_shape` says where words hide their number."""
    name = f"{module}.weight" if f"{module}.weight" in specs else f"{module}.weight_packed"
    if name not in specs or len(specs[name].shape) != 2:
        raise FormatError(f"{name} is {list(specs[name].shape) if name in specs else 'missing'}, not a matrix")
    rows, cols = specs[name].shape
    if name.endswith("weight_packed"):
        cols = 2 * cols if scheme.grid.kind != "int" else _packed_cols(module, scheme, (rows, cols), specs, read)
    if scheme.grid.kind != "int" and scheme.scale in ("e8m0", "e4m3") and cols % scheme.block.cols:
        raise FormatError(f"{name} has rows of {cols} values, {scheme} needs a multiple of {scheme.block.cols}")
    return rows, cols


def _packed_cols(
    module: str, scheme: Scheme, packed: tuple[int, int], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> int:
    name = f"{module}.weight_shape"
    if name not in specs or specs[name].shape != (2,) or specs[name].dtype not in (torch.int64, torch.int32):
        raise FormatError(f"{name} is missing, or no pair of integers")
    rows, cols = (int(size) for size in read(name))
    if rows != packed[0] or cols < 1 or ceil(cols * scheme.grid.bits / 32) != packed[1]:
        raise FormatError(
            f"{name} says {[rows, cols]}, which {scheme.grid.bits}-bit codes in words {list(packed)} cannot be"
        )
    return cols


def owns(weight: Weight) -> list[str]:
    """Every name under which a tensor of this weight's module may be stored, those of its activations included."""
    return [f"{weight.module}.{name}" for name in _WEIGHT_PARTS + _ACTIVATION_PARTS]


FORMAT = Format(
    about="vLLM, llm-compressor and transformers: integers of 1 to 8 bits, FP8, NVFP4, MXFP4, MXFP8",
    default="int4-g128",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    fit_activations=fit_activations,
    hollow=tensors_of.hollow,
    codes=Codes(CodeWords(_unpack_rows, _pack_rows, _lines)),
)
