"""HQQ: unsigned integers with float zero points, as the `hqq` package saves them (docs/formats/hqq.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, final

import torch
from jaxtyping import UInt8
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import below, exact, finite, row_chunks, stored
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    declared,
    planned,
    row_block,
    skipped_modules,
)
from lowbit.schemes import FLOATS, Block, Scheme, parse
from lowbit.tensors import QTensor, scale_shape, view_shape


@final
@dataclass(frozen=True)
class _Packing:
    """`count` codes in an element of `dtype`, the first in the highest bits, each from its own run of groups."""

    name: str
    bits: int
    count: int
    dtype: torch.dtype


_BYTES = _Packing("8bit_u8", 8, 1, torch.uint8)
_PACKINGS = {
    8: _BYTES,
    6: _BYTES,
    5: _BYTES,
    4: _Packing("4bit_u8", 4, 2, torch.uint8),
    3: _Packing("3bit_32", 3, 10, torch.int32),
    2: _Packing("2bit_u8", 2, 4, torch.uint8),
    1: _Packing("1bit_u8", 1, 8, torch.uint8),
}
_PADDED = {3}  # bits whose last run of groups may be shorter than the others
_WRITTEN = (1, 2, 3, 4, 8)
_DECIDING = ("nbits", "group_size", "shape", "axis", "packing")


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme as HQQ stores it: float zero points, scales and zero points of the weight's own dtype.

    Raises:
        UnsupportedError: the layout does not hold it.
    """
    check_matrix(weight, "hqq", scheme)
    if scheme.grid.kind != "int" or scheme.grid.bits not in _WRITTEN or scheme.nested:
        raise UnsupportedError(
            f"hqq cannot hold {scheme}: it packs integers of 1, 2, 3, 4 and 8 bits with plain scales; use one of them "
            "(it would store 5 and 6 bits in 8)"
        )
    if scheme.zero == "min":
        raise UnsupportedError("hqq has no minima; use fzero")
    block = _group_block(scheme, weight)
    groups, run = prod(weight.shape) // _group_size(block, weight), _PACKINGS[scheme.grid.bits].count
    if groups % run and scheme.grid.bits not in _PADDED:
        raise UnsupportedError(
            f"hqq cannot hold {scheme}: it packs {run} groups together, and this has {groups}; use smaller groups"
        )
    return replace(scheme, block=block, zero="float", scale=SCALE_TYPES[weight.dtype])


def _group_block(scheme: Scheme, weight: Weight) -> Block:
    """Groups run over the flattened weight; they are called row or gN where they end with the rows."""
    cols = weight.shape[1]
    block = row_block(scheme.block, cols)
    if block.rows == 1 and block.cols and cols % block.cols:
        block = replace(block, flat=True)
    if block.rows != 1 or prod(weight.shape) % _group_size(block, weight):
        raise UnsupportedError(
            f"hqq cannot hold {scheme}: its groups must divide the {prod(weight.shape)} elements evenly; use g64"
        )
    return block


def _group_size(block: Block, weight: Weight) -> int:
    return max(block.cols or weight.shape[1], 1)


def _meta(weight: Weight) -> dict[str, Tensor]:
    """What `HQQLinear` stores of itself beside codes, scales and zero points; every entry a tensor."""
    scheme = planned(weight)
    packing = _PACKINGS[scheme.grid.bits]
    flags = {"channel_wise": 1, "optimize": 1, "round_zero": 0, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0}
    flags |= {"offload_meta": 0, "stores_quant_config": 1, "encoded_state_dict": 1}
    numbers = {"nbits": scheme.grid.bits, "group_size": _group_size(scheme.block, weight), "axis": 1}
    dtypes = {"unpack_view_dtype": packing.dtype, "compute_dtype": FLOATS[scheme.scale]}
    texts = {"packing": packing.name} | {name: str(dtype) for name, dtype in dtypes.items()}
    return {
        "shape": torch.tensor(weight.shape),
        **{name: torch.tensor(flag, dtype=torch.uint8) for name, flag in flags.items()},
        **{name: torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()},
        **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
    }


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    scheme = planned(weight)
    packing, size = _PACKINGS[scheme.grid.bits], _group_size(scheme.block, weight)
    groups = prod(weight.shape) // size
    specs = {
        "W_q": Spec(packing.dtype, (ceil(groups / packing.count), size)),
        "scale": Spec(FLOATS[scheme.scale], (groups, 1)),
        "zero": Spec(FLOATS[scheme.scale], (groups, 1)),
        **{name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in _meta(weight).items()},
    }
    return {f"{weight.module}.{name}": spec for name, spec in specs.items()}


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a scale or zero point that the weight's dtype does not have.
    """
    check_planned(weight, q)
    assert isinstance(q.scales, Tensor) and q.zeros is not None
    for name, values in (("scale", q.scales), ("zero", q.zeros)):
        target = into[f"{weight.module}.{name}"]
        target.copy_(exact(f"{weight.module}.{name}", values, target.dtype).reshape(-1, 1))
    for name, tensor in _meta(weight).items():
        into[f"{weight.module}.{name}"].copy_(tensor)
    target = into[f"{weight.module}.W_q"]
    _pack_codes(q.codes.reshape(-1, target.shape[1]), _PACKINGS[q.scheme.grid.bits], target)


def _runs(packed: Tensor, groups: int, packing: _Packing) -> Iterator[tuple[slice, list[slice]]]:
    """Pieces of the packed rows, and for each the groups that its codes come from, one slice per code of an element."""
    for rows in row_chunks(*packed.shape):
        starts = [i * packed.shape[0] + rows.start for i in range(packing.count)]
        yield rows, [slice(min(at, groups), min(at + rows.stop - rows.start, groups)) for at in starts]


def _pack_codes(codes: UInt8[Tensor, "groups size"], packing: _Packing, out: Tensor) -> None:
    for rows, parts in _runs(out, codes.shape[0], packing):
        target = out[rows].zero_()
        for part in parts:
            if packing.count > 1:
                target <<= packing.bits
            target[: part.stop - part.start] |= codes[part]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme, specs = planned(weight), layout(weight)
    _check_meta(weight, tensors)
    parts = {name: f"{weight.module}.{name}" for name in ("W_q", "scale", "zero")}
    packed, packing = tensors.get(parts["W_q"]), _PACKINGS[scheme.grid.bits]
    if packed is not None and packed.is_floating_point() and packed.dim() == 2:
        packed = packed.contiguous().view(packing.dtype)  # `view_as_float`
    spec = specs[parts["W_q"]]
    packed = stored({parts["W_q"]: packed} if packed is not None else {}, parts["W_q"], spec.dtype, spec.shape)
    scale, zero = (
        finite(parts[name], stored(tensors, parts[name], specs[parts[name]].dtype, specs[parts[name]].shape))
        for name in ("scale", "zero")
    )
    codes = _unpack_codes(packed, packing, _groups(codes, (scale.shape[0], packed.shape[1])))
    if scheme.grid.bits < packing.bits:
        below(parts["W_q"], codes, 2**scheme.grid.bits)
    codes = codes.view(view_shape(weight.shape, scheme.block))
    blocks = scale_shape(weight.shape, scheme.block)
    return QTensor(scheme, weight.shape, codes, scale.float().reshape(blocks), zero.float().reshape(blocks))


def _check_meta(weight: Weight, tensors: Mapping[str, Tensor]) -> None:
    """What decides how bytes are read must be what was recognised."""
    expected = _meta(weight)
    for name in _DECIDING:
        found = tensors.get(f"{weight.module}.{name}")
        if found is None or not torch.equal(found.to(expected[name].dtype), expected[name]):
            what = "missing" if found is None else found.tolist()
            raise FormatError(f"{weight.module}.{name} is {what}, {expected[name].tolist()} belongs to {weight.scheme}")


def _groups(codes: Tensor | None, shape: tuple[int, int]) -> UInt8[Tensor, "groups size"]:
    return torch.empty(shape, dtype=torch.uint8) if codes is None else codes.view(shape)


def _unpack_codes(
    packed: Tensor, packing: _Packing, codes: UInt8[Tensor, "groups size"]
) -> UInt8[Tensor, "groups size"]:
    for rows, parts in _runs(packed, codes.shape[0], packing):
        for i, part in enumerate(parts):
            source = packed[rows][: part.stop - part.start]
            shift = packing.bits * (packing.count - 1 - i)
            codes[part].copy_(source >> shift if shift else source)
            if packing.count > 1:
                codes[part] &= 2**packing.bits - 1
    return codes


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `HqqConfig`; parameters by kind of layer where kinds differ."""
    chosen = [weight for weight in weights if weight.scheme]
    if not chosen:
        return {"config.json": declare(source, None)}
    kinds: dict[str, Counter[tuple[int, int]]] = {}
    for weight in chosen:
        scheme = planned(weight)
        size = _group_size(scheme.block, weight)
        kinds.setdefault(_tag(weight.module), Counter())[scheme.grid.bits, size] += 1
    common = {tag: counter.most_common(1)[0][0] for tag, counter in kinds.items()}
    same = len(set(common.values())) == 1
    quantization = {
        "quant_method": "hqq",
        "quant_config": _parameters(*next(iter(common.values())))
        if same
        else {tag: _parameters(*parameters) for tag, parameters in common.items()},
        "skip_modules": skipped_modules(weights),
    }
    return {"config.json": declare(source, quantization)}


def _tag(module: str) -> str:
    """hqq's name for a kind of layer: `model.layers.3.mlp.up_proj` is `mlp.up_proj`."""
    return ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _parameters(bits: int, size: int) -> dict[str, Any]:
    weight = {
        "nbits": bits,
        "channel_wise": True,
        "group_size": size,
        "optimize": True,
        "round_zero": False,
        "axis": 1,
        "view_as_float": False,
    }
    return {"weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares HQQ, or declares nothing and holds its tensors.

    Raises:
        FormatError: a kind of HQQ that is not read, or tensors that contradict each other.
    """
    method = declared(config).get("quant_method")
    if method != "hqq" and (method or not any(name.endswith(".W_q") for name in specs)):
        return None
    modules = dict.fromkeys(name.rpartition(".")[0] for name in specs if name.endswith((".W_q", ".nbits")))
    weights = [_recognised(module, specs, read) for module in modules]
    return {weight.name: weight for weight in weights}


def _recognised(module: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> Weight:
    absent = [name for name in (*_DECIDING, "W_q", "scale", "zero") if f"{module}.{name}" not in specs]
    if absent:
        raise FormatError(f"{module}.{absent[0]} is missing; hqq is read with plain scales and tensors for metadata")
    bits, size, axis = (_number(f"{module}.{name}", read) for name in ("nbits", "group_size", "axis"))
    sides = read(f"{module}.shape").flatten()
    if sides.is_floating_point():
        raise FormatError(f"{module}.shape is {sides.tolist()}, no whole numbers")
    shape = tuple(map(int, sides))
    dtype = specs[f"{module}.scale"].dtype
    if bits not in _PACKINGS or axis != 1 or dtype not in SCALE_TYPES or len(shape) != 2 or size < 1 or min(shape) < 0:
        raise FormatError(
            f"{module}: hqq with {bits} bits, groups of {size} along axis {axis}, shape {list(shape)} and {dtype} "
            "scales is not read (axis 1 is)"
        )
    if prod(shape) % size:
        raise FormatError(f"{module}: groups of {size} do not divide a weight of {list(shape)}")
    block = row_block(Block(1, size, flat=True), shape[1])
    scheme = replace(parse(f"int{int(bits)}"), block=block, zero="float", scale=SCALE_TYPES[dtype])
    groups, count = prod(shape) // size, _PACKINGS[bits].count
    _check_bytes(f"{module}.W_q", specs, ceil(groups / count) * size * _PACKINGS[bits].dtype.itemsize)
    _check_bytes(f"{module}.scale", specs, groups * dtype.itemsize)
    return Weight(f"{module}.weight", shape, dtype, scheme)


def _check_bytes(name: str, specs: Mapping[str, Spec], wanted: int) -> None:
    """Sizes are what the tensors have, of whatever dtype, before room is made for what `shape` says."""
    found = specs[name].nbytes
    if found != wanted:
        raise FormatError(f"{name} has {found:,} bytes; shape, group_size and nbits beside it need {wanted:,}")


def _number(name: str, read: Callable[[str], Tensor]) -> int:
    tensor = read(name)
    if tensor.numel() != 1 or not float(tensor).is_integer():
        raise FormatError(f"{name} is {tensor.tolist()}, not a whole number")
    return int(tensor.item())


FORMAT = Format(
    about="hqq: unsigned integers of 1, 2, 3, 4 and 8 bits with float zero points",
    default="int4-g64",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
)
