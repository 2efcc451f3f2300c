"""MLX's layouts: affine, a scale and a bias per group, `W = scale * q + bias`, and small floats (docs/formats/mlx.md).

The latter are those of compressed-tensors under other names and types: MXFP4, MXFP8, and NVFP4 without a global scale.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Codes, CodeWords, Format, Spec, Weight
from lowbit.formats import _ct_tensors as tensors_of
from lowbit.formats._checks import exact, fill, finite, stored
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    declared,
    divisor,
    model_dtype,
    planned,
    row_block,
)
from lowbit.formats._renamed import named
from lowbit.formats._switch import stacked
from lowbit.schemes import FLOATS, Block, Scheme, parse
from lowbit.tensors import QTensor, scale_shape

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MODES = {name: parse(name) for name in ("mxfp4", "mxfp8", "nvfp4")}  # beside `affine`
_NVFP4 = MODES["nvfp4"]
_WORD = 32
_NAMES = {"weight_packed": "weight", "weight": "weight", "weight_scale": "scales"}  # of `_ct_tensors` here


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme as MLX stores it: what a group adds is a float, scales and biases have the weight's own dtype.

    Raises:
        UnsupportedError: the layout does not hold it.
    """
    check_matrix(weight, "mlx", scheme)
    if scheme in MODES.values():
        return _fit_small(scheme, weight)
    if scheme.grid.kind != "int" or scheme.grid.bits not in BITS or scheme.nested:
        raise UnsupportedError(
            f"mlx cannot hold {scheme}: it has integers of {', '.join(map(str, BITS))} bits with plain scales, mxfp4 "
            "and mxfp8; use int4-g64-min"
        )
    cols = weight.shape[1]
    block = row_block(scheme.block, cols)
    block = Block(1, cols) if block == Block(1, 0) else block
    if block.rows != 1 or block.flat or block.cols not in GROUPS or cols % block.cols:
        other = divisor(cols, block.cols or cols, GROUPS)
        raise UnsupportedError(
            f"mlx cannot hold {scheme}: its groups are of {', '.join(map(str, GROUPS))} along the row and divide it; "
            f"{f'use g{other}' if other else f'nothing does with {cols}, leave {weight.name} as it is (--skip)'}"
        )
    return replace(scheme, block=block, zero="min", scale=SCALE_TYPES[weight.dtype])


def _fit_small(scheme: Scheme, weight: Weight) -> Scheme:
    cols, size = weight.shape[1], scheme.block.cols
    if scheme == _NVFP4:
        raise UnsupportedError("mlx's nvfp4 has no scale of the whole tensor and is only read; use mxfp4")
    if cols % size:
        raise UnsupportedError(
            f"mlx cannot hold {scheme}: its groups of {size} do not divide rows of {cols}; leave {weight.name} as it is"
            " (--skip)"
        )
    return scheme


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    scheme, (rows, cols) = planned(weight), weight.shape
    if scheme in MODES.values():
        return {
            f"{weight.module}.weight": Spec(torch.uint32, (rows, cols * scheme.grid.bits // _WORD)),
            f"{weight.module}.scales": Spec(torch.uint8, scale_shape(weight.shape, scheme.block)),
        }
    group = Spec(FLOATS[scheme.scale], scale_shape(weight.shape, scheme.block))
    return {
        f"{weight.module}.weight": Spec(torch.uint32, (rows, cols * scheme.grid.bits // _WORD)),
        f"{weight.module}.scales": group,
        f"{weight.module}.biases": group,
    }


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight; a bias is what its group subtracts, with the other sign.

    Raises:
        FormatError: a scale or bias that the weight's dtype does not have.
    """
    check_planned(weight, q)
    if q.scheme in MODES.values():
        with named(weight, _NAMES):
            tensors_of.pack(q, _local(weight, into))
        return
    assert isinstance(q.scales, Tensor) and isinstance(q.minima, Tensor)
    for name, values in (("scales", q.scales), ("biases", -q.minima)):
        target = into[f"{weight.module}.{name}"]
        target.copy_(exact(f"{weight.module}.{name}", values, target.dtype))
    if not q.codes.is_meta:
        native.pack_bits(q.codes, q.scheme.grid.bits, out=into[f"{weight.module}.weight"].view(torch.int32))


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme = planned(weight)
    parts = {name: stored(tensors, name, s.dtype, s.shape) for name, s in layout(weight).items()}
    if scheme in MODES.values():
        with named(weight, _NAMES):
            return tensors_of.unpack(scheme, weight.shape, _local(weight, parts), codes)
    words, scales, biases = parts.values()
    scales, biases = finite(f"{weight.module}.scales", scales), finite(f"{weight.module}.biases", biases)
    if codes is None or not codes.is_meta:
        codes = native.unpack_bits(words.contiguous().view(torch.int32), scheme.grid.bits, weight.shape[1], out=codes)
    return QTensor(scheme, weight.shape, codes, scales.float(), minima=-biases.float())


def _local(weight: Weight, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Small floats under the names, and in the types, of `_ct_tensors`."""
    scheme = planned(weight)
    words, scales = (tensors[f"{weight.module}.{name}"] for name in ("weight", "scales"))
    if scheme.grid.bits == 8:
        return {"weight": words.view(torch.float8_e4m3fn), "weight_scale": scales}
    found = {"weight_packed": words.view(torch.uint8), "weight_scale": scales.view(tensors_of.DTYPES[scheme.scale])}
    return found | ({"weight_global_scale": torch.ones(1)} if scheme.nested else {})


def hollow(scheme: Scheme) -> bool:
    """Whether the layout can be checked without the codes: every pattern of bits is one."""
    return tensors_of.hollow(scheme)


def _lines(weight: Weight, tensors: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    return tensors[f"{weight.module}.weight"][start:stop].view(torch.int32)


def _pack_rows(weight: Weight, words: Tensor, start: int, into: Mapping[str, Tensor]) -> None:
    fill(_lines(weight, into, start, start + len(words)), words)


def _unpack_rows(weight: Weight, tensors: Mapping[str, Tensor], start: int, words: Tensor) -> None:
    words.copy_(_lines(weight, tensors, start, start + len(words)))


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json as mlx-lm writes it; what is quantized is known by its scales, what differs is named."""
    plain = _looked_for(declare(source, None))
    kind = str(source.get("model_type"))
    chosen = {_declared_as(weight.module, kind): _parameters(planned(weight)) for weight in weights if weight.scheme}
    if not chosen:
        return {"config.json": plain}
    common = dict(Counter(tuple(each.items()) for each in chosen.values()).most_common(1)[0][0])
    other = {module: _own(each) for module, each in chosen.items() if each != common}
    quantization = {**common, **other}
    return {"config.json": {**plain, "quantization": quantization, "quantization_config": quantization}}


def _looked_for(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and the one of a text model in it, with what mlx-lm looks for; null is nothing said."""
    found = {**config, **_rope(config)}
    said = {key: value for key, value in found.items() if value is not None}
    found = _respelled({**found, **_renamed(found), **said})
    text = found.get("text_config")
    return found | ({"text_config": _looked_for(text)} if isinstance(text, Mapping) else {})


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm looks for where transformers 5 has `rope_parameters`: without it classes take a base of their own."""
    told = config.get("rope_parameters")
    if not isinstance(told, Mapping) or "rope_theta" not in told or "rope_theta" in config:
        return {}
    beside = {key: told[key] for key in ("rope_theta", "partial_rotary_factor") if key in told}
    scaling = {key: value for key, value in told.items() if key not in beside}
    return beside | ({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {})


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm looks for under other names than those under which transformers 5 saves it."""
    found: dict[str, Any] = {}
    for row in _rows("renamed", config):
        value: Any = config if row["path"] else row.get("value")
        for key in row["path"]:
            value = value.get(key) if isinstance(value, Mapping) else None
        value = value // config[row["over"]] if "over" in row else value
        found |= {row["key"]: value} if value is not None or row.get("null") else {}
    return found


def _respelled(config: dict[str, Any]) -> dict[str, Any]:
    """The same with mlx-lm's words in lists of words."""
    for row in _rows("respelled", config):
        told = config.get(row["key"])
        if isinstance(told, list):
            config = {**config, row["key"]: [row["words"].get(word, word) for word in map(str, told)]}
    return config


def _rows(table: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table of `arch/mlx.toml` that are for a type of model."""
    rows = tomllib.loads(files("lowbit").joinpath("arch/mlx.toml").read_text())[table]
    return [row for row in rows if config.get("model_type") in row["model_types"]]


def _declared_as(module: str, model_type: str) -> str:
    """The name under which `quantization` has a module: experts of a layer are one."""
    found = stacked(f"{module}.weight", model_type)
    return found[0].removesuffix(".weight") if found else module


def _parameters(scheme: Scheme) -> dict[str, Any]:
    mode = next((name for name, known in MODES.items() if known == scheme), "affine")
    return {"group_size": scheme.block.cols, "bits": scheme.grid.bits, "mode": mode}


def _own(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one module, which go to its constructor: before MLX 0.28 that knows no mode."""
    return {key: value for key, value in parameters.items() if value != "affine"}


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares bits and groups, as MLX does, and no method.

    Raises:
        FormatError: a declaration that contradicts the stored tensors, or a mode that is not read.
    """
    quantization = config.get("quantization") or declared(config)
    if declared(config).get("quant_method") or not isinstance(quantization, Mapping) or "bits" not in quantization:
        return None
    modules = [name.removesuffix(".scales") for name in specs if name.endswith(".scales")]
    if not any(specs[name].dtype == torch.uint32 for name in specs) and not modules:
        return None
    kind = str(config.get("model_type"))
    said = {name: quantization.get(name) or quantization.get(_declared_as(name, kind)) for name in modules}
    own = {name: each if isinstance(each, Mapping) else quantization for name, each in said.items()}
    weights = [_recognised(name, own[name], specs, model_dtype(config)) for name in modules]
    return {weight.name: weight for weight in weights}


def _recognised(module: str, said: Mapping[str, Any], specs: Mapping[str, Spec], dtype: torch.dtype) -> Weight:
    small, bits, group = _meant(module, said)
    words, scales = specs.get(f"{module}.weight"), specs[f"{module}.scales"]
    if words is None or len(words.shape) != 2 or words.dtype != torch.uint32:
        raise FormatError(
            f"{module}.weight is {f'{words.dtype} {list(words.shape)}' if words else 'missing'}, no matrix of words"
        )
    cols, left = divmod(words.shape[1] * _WORD, bits)
    if left or cols % group or scales.dtype not in ([torch.uint8] if small else SCALE_TYPES):
        raise FormatError(
            f"{module}.weight has {words.shape[1]} words a row, which {bits}-bit codes in groups of {group} under "
            f"scales of {scales.dtype} do not fill"
        )
    if small:
        return Weight(f"{module}.weight", (words.shape[0], cols), dtype, small)
    scheme = parse(f"int{bits}-g{group}-min-{SCALE_TYPES[scales.dtype]}")
    return Weight(f"{module}.weight", (words.shape[0], cols), scales.dtype, scheme)


def _meant(module: str, said: Mapping[str, Any]) -> tuple[Scheme | None, int, int]:
    """The small floats of a module, if it has such; bits; columns of a group.

    What is said of a module by its name is all that it has: what is missing there, or null, is MLX's default.
    """
    mode = said.get("mode") or "affine"
    small = MODES.get(mode) if isinstance(mode, str) else None
    usual = (small.grid.bits, small.block.cols) if small else (4, 64)
    told = (said.get("bits"), said.get("group_size"))
    bits, group = (default if value is None else value for value, default in zip(told, usual, strict=True))
    fits = (bits, group) == usual if small else mode == "affine" and bits in BITS and group in GROUPS
    if not fits:
        raise FormatError(f"{module}: mlx with {bits!r} bits, group_size {group!r} and mode {mode!r} is not read")
    return small, int(bits), int(group)


FORMAT = Format(
    about="MLX: integers of 1 to 6 and 8 bits with a scale and a bias per group, MXFP4 and MXFP8",
    default="int4-g64-min",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    hollow=hollow,
    codes=Codes(CodeWords(_unpack_rows, _pack_rows, _lines)),
    stacks=stacked,
    shares=True,
)
