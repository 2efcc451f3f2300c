"""NVIDIA ModelOpt's checkpoints: NVFP4, INT4 (its AWQ) and FP8 (docs/formats/modelopt.md).

The tensors are those of compressed-tensors, but that global scales multiply (`weight_scale_2`, `input_scale`) and that
4-bit integers are packed two rows to a byte. Inputs may have factors, `pre_quant_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats import _ct_tensors as tensors_of
from lowbit.formats._checks import exact, finite, row_chunks, stored
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    declared,
    model_dtype,
    planned,
    skipped_modules,
)
from lowbit.formats._renamed import named
from lowbit.schemes import FLOATS, Block, Scheme, parse
from lowbit.tensors import QTensor, scale_shape

_NVFP4, _INT4 = parse("nvfp4"), parse("int4-g128-f32")
_FP8, _ROWS, _BLOCKS = (parse(f"fp8-e4m3-{block}") for block in ("tensor", "row", "128x128"))
GROUPS = (64, 128)  # of the kernels of TensorRT-LLM
# ModelOpt's names, of which those of blocks are in lower case in its files.
_ALGORITHMS = (
    "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A16_AWQ", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL",
    "MIXED_PRECISION",
)  # fmt: skip
_NAMES = {"weight_packed": "weight", "weight_scale": "weight_scale"}
_PLAIN = {"weight": "weight", "weight_scale": "weight_scale"}
_FACTORS = "pre_quant_scale"
_OWNED = ("weight", "weight_scale", "weight_scale_2", "input_scale", _FACTORS)


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """NVFP4, integers of 4 bits or FP8 with float32 scales; the first two with factors of inputs or without.

    Raises:
        UnsupportedError: another scheme, sides that it does not divide, or the output head.
    """
    check_matrix(weight, "modelopt", scheme, smooth=True)
    fitted = replace(scheme, scale="f32" if scheme.scale in FLOATS else scheme.scale)
    reason = _misfit(replace(fitted, smooth=False), weight)
    if _is_fp8(scheme) and scheme.smooth:
        reason = "its FP8 has no factors of inputs"
    if reason:
        raise UnsupportedError(f"modelopt cannot hold {scheme}: {reason}")
    return fitted


def _misfit(scheme: Scheme, weight: Weight) -> str | None:
    (rows, cols), size = weight.shape, scheme.block.cols
    if _is_int4(scheme):
        if size not in GROUPS or cols % size or rows % 2:
            sizes = " or ".join(map(str, GROUPS))
            return (
                f"its integers are in groups of {sizes} that divide rows, an even number of these, and this is "
                f"{list(weight.shape)}"
            )
    elif scheme not in (_NVFP4, _FP8, _ROWS, _BLOCKS):
        return f"it has nvfp4, int4-g128, {_FP8}, {_ROWS} and {_BLOCKS}; use one of them"
    elif scheme == _NVFP4 and cols % size:
        return f"NVFP4 needs rows that {size} divides; leave it as it is (--skip)"
    elif scheme == _BLOCKS and (rows % size or cols % size):
        return f"its blocks need multiples of {size}; leave it as it is (--skip)"
    if weight.module.rpartition(".")[2] == "lm_head":
        return "its readers leave the output head as it is; leave it as it is (--skip)"
    return None


def _is_int4(scheme: Scheme) -> bool:
    return replace(scheme, block=_INT4.block, smooth=False) == _INT4 and scheme.block == Block(1, scheme.block.cols)


def _is_fp8(scheme: Scheme) -> bool:
    return scheme.grid == _FP8.grid


def fit_activations(scheme: Scheme, weight: Weight) -> Scheme:
    """What runtimes do beside the weights: NVFP4 and FP8 with a stored scale, or FP8 by token beside FP8 rows.

    Raises:
        UnsupportedError: any other scheme.
    """
    own = planned(weight)
    usual = {_NVFP4: _NVFP4, _FP8: _FP8, _ROWS: _ROWS}.get(replace(own, smooth=False))
    if usual is None:
        raise UnsupportedError(f"modelopt stores {own} weights alone; leave --activations out")
    if scheme != usual:
        raise UnsupportedError(f"modelopt rounds the inputs of {own} weights to {usual}, not to {scheme}")
    return scheme


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills.

    Raises:
        UnsupportedError: FP8 under one scale, and inputs without.
    """
    _check_declared(weight)
    scheme, (rows, cols) = planned(weight), weight.shape
    found = {"weight": Spec(torch.float8_e4m3fn if _is_fp8(scheme) else torch.uint8, (rows, cols))}
    found["weight_scale"] = Spec(torch.float32, _scales(scheme, weight.shape))
    if scheme.nested:
        found["weight"] = Spec(torch.uint8, (rows, cols // 2))
        found["weight_scale"] = Spec(torch.float8_e4m3fn, scale_shape(weight.shape, scheme.block))
        found["weight_scale_2"] = Spec(torch.float32, ())
    elif not _is_fp8(scheme):
        found["weight"] = Spec(torch.uint8, (rows // 2, cols))
    if scheme.smooth:
        found[_FACTORS] = Spec(weight.dtype, (cols,))
    if weight.activations in (_NVFP4, _FP8):
        found["input_scale"] = Spec(torch.float32, ())
    return {f"{weight.module}.{name}": spec for name, spec in found.items()}


def _scales(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in which ModelOpt stores the scales of integers and FP8: those of blocks keep the axes within a block."""
    down, across = scale_shape(shape, scheme.block)
    return {_FP8: (), _ROWS: (down,), _BLOCKS: (down, 1, across, 1)}.get(scheme, (down, across))


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return [f"{weight.module}.{name}" for name in _OWNED]


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a tensor of another scheme or shape, a factor that its type has not, or inputs whose scale is not
            known.
    """
    check_planned(weight, q)
    local = {name: into[full] for name in _OWNED if (full := f"{weight.module}.{name}") in into}
    if isinstance(q.scales, QTensor):
        unit = replace(q, scales=replace(q.scales, scales=torch.ones(1, 1)))
        parts = {name: local[stored] for name, stored in _NAMES.items()}
        with named(weight, _NAMES):
            tensors_of.pack(unit, parts | {"weight_global_scale": torch.empty(1)})
        local["weight_scale_2"].copy_(q.scales.scale_values().reshape(()))
    else:
        scales = local["weight_scale"]
        scales.copy_(exact(f"{weight.module}.weight_scale", q.scales, scales.dtype).reshape(scales.shape))
        _pack_codes(q.codes, _is_fp8(q.scheme), local["weight"])
    if q.factors is not None:
        local[_FACTORS].copy_(exact(f"{weight.module}.{_FACTORS}", q.factors, weight.dtype))
    if "input_scale" in local:
        if weight.input_scale is None:
            raise FormatError(f"{weight.module}.input_scale needs the scale of its inputs, which calibration finds")
        multiplier = torch.tensor(weight.input_scale)
        local["input_scale"].copy_(1 / multiplier if q.scheme.nested else multiplier)


def _pack_codes(codes: UInt8[Tensor, "rows cols"], whole: bool, out: Tensor) -> None:
    """FP8 as it is; integers in two's complement, rows 2n and 2n + 1 in the low and high half of row n."""
    if codes.is_meta:
        return
    if whole:
        out.view(torch.uint8).copy_(codes)
        return
    signed = codes.view(-1, 2, codes.shape[1])
    for rows in row_chunks(*out.shape):
        out[rows] = (signed[rows, 0] ^ 8) | (signed[rows, 1] ^ 8) << 4


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; codes of FP8 weights are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme = planned(weight)
    bare = replace(weight, scheme=replace(scheme, smooth=False))
    q = _unpack_int4(bare, tensors, codes) if _is_int4(scheme) else _unpack_floats(bare, tensors, codes)
    if not scheme.smooth:
        return q
    name = f"{weight.module}.{_FACTORS}"
    factors = stored(tensors, name, weight.dtype, (weight.shape[1],))
    return replace(q, scheme=scheme, factors=finite(name, factors).float())


def _unpack_floats(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None) -> QTensor:
    scheme, names = planned(weight), _NAMES if planned(weight).nested else _PLAIN
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


def _unpack_int4(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None) -> QTensor:
    """Weights in integers; `codes` as in `unpack`."""
    scheme, (rows, cols) = planned(weight), weight.shape
    name = f"{weight.module}.weight_scale"
    words = stored(tensors, f"{weight.module}.weight", torch.uint8, (rows // 2, cols))
    scales = stored(tensors, name, FLOATS[scheme.scale], scale_shape(weight.shape, scheme.block))
    codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
    pairs = codes.view(-1, 2, cols)
    for some in () if codes.is_meta else row_chunks(*words.shape):
        pairs[some, 0] = (words[some] & 15) ^ 8
        pairs[some, 1] = (words[some] >> 4) ^ 8
    return QTensor(scheme, weight.shape, codes, finite(name, scales).float().contiguous())


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, and in config.json the same as ModelOpt converts it.

    Raises:
        UnsupportedError: FP8 under one scale, and inputs without.
    """
    smooth = any(weight.scheme.smooth for weight in weights if weight.scheme)
    chosen = {weight.module: _details(weight, smooth) for weight in weights if weight.scheme}
    if not chosen:
        return {"config.json": declare(source, None)}
    kinds = [dict(kind) for kind in dict.fromkeys(tuple(each.items()) for each in chosen.values())]
    mixed = len(kinds) > 1
    details = {"quant_algo": "MIXED_PRECISION"} if mixed else kinds[0]
    kept, producer = skipped_modules(weights), {"name": "lowbit"}
    layers: dict[str, Any] = {"quantized_layers": chosen} if mixed else {}
    members = {f"group_{i}": [name for name in chosen if chosen[name] == kind] for i, kind in enumerate(kinds)}
    groups = {
        name: {**_group(kind), "targets": sorted(members[name]) if mixed else ["Linear"]}
        for kind, name in zip(kinds, members, strict=True)
        if mixed or details["quant_algo"] in _GROUPED
    }
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": details["quant_algo"],
        **({"config_groups": groups} if groups else {}),
        **layers,
        "ignore": kept,
        "producer": producer,
    }
    told = {**details, "kv_cache_quant_algo": None, **layers, "exclude_modules": kept}
    return {
        "config.json": declare(source, quantization),
        "hf_quant_config.json": {"producer": producer, "quantization": told},
    }


# Those of which ModelOpt says more in config.json than the name, where all weights are of one kind.
_GROUPED = ("NVFP4", "W4A16_NVFP4", "FP8")


def _check_declared(weight: Weight) -> None:
    if weight.scheme == _FP8 and not weight.activations:
        raise UnsupportedError(
            f"{weight.name}: modelopt's {_FP8} rounds inputs by a stored scale; use --activations {_FP8}, or --format "
            "compressed-tensors"
        )


def _details(weight: Weight, smooth: bool) -> dict[str, Any]:
    """What ModelOpt says of one weight; `smooth`: some weights of the model have factors."""
    scheme = planned(weight)
    _check_declared(weight)
    eight = {_FP8: "FP8", _ROWS: "FP8_PER_CHANNEL_PER_TOKEN", _BLOCKS: "fp8_pb_wo"}.get(scheme)
    if eight:
        return {"quant_algo": eight}
    four = "NVFP4" if weight.activations else "W4A16_NVFP4"
    algorithm = "W4A16_AWQ" if _is_int4(scheme) else "NVFP4_AWQ" if smooth else four
    awq = {"has_zero_point": False, "pre_quant_scale": True} if algorithm.endswith("AWQ") else {}
    return {"quant_algo": algorithm, "group_size": scheme.block.cols, **awq}


def _group(details: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an algorithm in the words of compressed-tensors, as ModelOpt says them."""
    algorithm, size = details["quant_algo"], details.get("group_size")
    numbers = {"dynamic": False, "num_bits": 4 if size else 8, "type": "float"} | ({"group_size": size} if size else {})
    if algorithm == "fp8_pb_wo":  # unknown to ModelOpt here
        return {"quant_algo": algorithm}
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return {"input_activations": numbers, "weights": {**numbers, "strategy": "channel"}}
    if algorithm == "NVFP4_AWQ":
        return {"input_activations": {**numbers, "num_bits": 8}, "weights": numbers}
    if algorithm == "W4A16_AWQ":
        return {"weights": {**numbers, "type": "int"}}
    return {"weights": numbers} | ({} if algorithm.startswith("W4A16") else {"input_activations": numbers})


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
    if str(algorithm).upper() not in _ALGORITHMS:
        raise FormatError(f"quant_algo {algorithm!r} of ModelOpt is not read, {', '.join(_ALGORITHMS)} are")
    modules = [name.removesuffix(".weight_scale") for name in specs if name.endswith(".weight_scale")]
    weights = [_recognised(module, specs, read, model_dtype(config)) for module in modules]
    found = {weight.name: weight for weight in weights}
    stray = [name for name in specs if name.endswith(f".{_FACTORS}") and _of(name) not in found]
    if stray:
        raise FormatError(f"{stray[0]} scales the inputs of {_of(stray[0])}, which is not quantized")
    return found


def _of(name: str) -> str:
    """The weight that stored factors are of."""
    return name.removesuffix(_FACTORS) + "weight"


def _recognised(module: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor], dtype: torch.dtype) -> Weight:
    name, scale = f"{module}.weight", specs[f"{module}.weight_scale"]
    found, factors = specs.get(name), specs.get(f"{module}.{_FACTORS}")
    if found is None or len(found.shape) != 2:
        raise FormatError(f"{name} is {list(found.shape) if found else 'missing'}, not a matrix")
    rows, cols = found.shape
    kinds = (found.dtype, scale.dtype)
    if kinds == (torch.uint8, torch.float8_e4m3fn):
        weight = Weight(name, (rows, 2 * cols), dtype, _NVFP4)
        if weight.shape[1] % _NVFP4.block.cols:
            raise FormatError(f"{name} has rows of {weight.shape[1]} values, which {_NVFP4.block.cols} does not divide")
    elif found.dtype == torch.uint8 and scale.dtype in SCALE_TYPES:
        weight = _integers(Weight(name, (2 * rows, cols), dtype), scale, specs)
    elif kinds == (torch.float8_e4m3fn, torch.float32):
        weight = Weight(name, (rows, cols), dtype, _eight_bits(name, (rows, cols), scale.shape))
    else:
        raise FormatError(
            f"{name} is {found.dtype} under scales of {scale.dtype} {list(scale.shape)}, neither NVFP4, INT4 nor FP8"
        )
    if factors:
        if factors.dtype not in SCALE_TYPES or planned(weight).grid == _FP8.grid:
            raise FormatError(f"{module}.{_FACTORS} is {factors.dtype}, or of FP8: such factors are not read")
        weight = replace(weight, dtype=factors.dtype, scheme=replace(planned(weight), smooth=True))
    return _with_inputs(weight, specs, read)


def _integers(weight: Weight, scale: Spec, specs: Mapping[str, Spec]) -> Weight:
    (rows, cols), name = weight.shape, f"{weight.module}.weight_scale"
    if f"{name}_2" in specs:
        raise FormatError(f"{name}_2: integers that are rounded to FP8 once more (W4A8_AWQ) are not read")
    if len(scale.shape) != 2 or scale.shape[0] != rows or not 0 < scale.shape[1] <= cols or cols % scale.shape[1]:
        raise FormatError(f"{name} is {list(scale.shape)}, no groups of {list(weight.shape)}")
    block = Block(1, cols // scale.shape[1])
    return replace(weight, scheme=replace(_INT4, block=block, scale=SCALE_TYPES[scale.dtype]))


def _eight_bits(name: str, shape: tuple[int, int], scales: tuple[int, ...]) -> Scheme:
    """One scale for all, one a row, or one for 128 x 128, whose shape may have axes of 1 between."""
    blocks = scale_shape(shape, _BLOCKS.block)
    if len(scales) < 3 and prod(scales) == 1:
        return _FP8
    if scales in ((shape[0],), (shape[0], 1)):
        return _ROWS
    if scales in (blocks, _scales(_BLOCKS, shape)):
        return _BLOCKS
    raise FormatError(f"{name}_scale is {list(scales)}: neither one scale, one a row, nor one for 128 x 128 of {shape}")


def _with_inputs(weight: Weight, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> Weight:
    """The weight with what a runtime does to its inputs; where their scale is not stored, nothing (rows: by token)."""
    full, scheme = f"{weight.module}.input_scale", planned(weight)
    if full not in specs or scheme not in (_NVFP4, replace(_NVFP4, smooth=True), _FP8):
        return replace(weight, activations=_ROWS if scheme == _ROWS else None)
    value = read(full).float() if prod(specs[full].shape) == 1 else None
    if value is None or not 0 < value.item() < inf:
        raise FormatError(f"{full} is not one positive number")
    multiplier = 1 / value if scheme.nested else value
    return replace(weight, activations=_NVFP4 if scheme.nested else _FP8, input_scale=multiplier.item())


def hollow(scheme: Scheme) -> bool:
    """Whether it can be checked without the codes: integers, of which every pattern is one."""
    return _is_int4(scheme)


FORMAT = Format(
    about="NVIDIA ModelOpt: NVFP4, INT4 and FP8, as TensorRT-LLM, vLLM and SGLang load it",
    default="nvfp4",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    fit_activations=fit_activations,
    hollow=hollow,
)
