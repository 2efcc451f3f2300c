"""bitsandbytes: NF4 and FP4, plain and double-quantized, and 8-bit rows (docs/formats/bitsandbytes.md)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil, inf, isfinite, prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import finite, stored
from lowbit.formats._linear import check_matrix, check_planned, declare, declared, divisor, planned, skipped_modules
from lowbit.schemes import DOUBLE, Block, Grid, Scheme, parse
from lowbit.tensors import QTensor, scale_shape, view_shape

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TABLES = {name: parse(name).grid for name in ("nf4", "fp4")}
_ROWS = parse("int8-row-bf16")
_STATE = "quant_state.bitsandbytes__"
_VECTOR = 32  # rows that are a multiple of this go to the AVX-512 kernel, which assumes that blocks end with rows
_NUMBER = 24  # characters of the longest float64 in JSON
_TABLE_TOLERANCE = 1e-6


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme as bitsandbytes stores it: blocks over the flattened weight, or 8-bit rows with bfloat16 scales.

    Raises:
        UnsupportedError: the layout does not hold it.
    """
    check_matrix(weight, "bitsandbytes", scheme)
    if scheme.grid == _ROWS.grid:
        return _fit_rows(scheme, weight)
    if scheme.grid not in _TABLES.values():
        raise UnsupportedError(f"bitsandbytes cannot hold {scheme}: it has nf4, fp4 and int8 rows; use one of them")
    if scheme.nested not in (None, DOUBLE):
        raise UnsupportedError(f"bitsandbytes cannot hold {scheme}: it quantizes scales in one way only; use dq")
    cols = weight.shape[1]
    size = scheme.block.cols or cols
    if scheme.block.rows != 1 or size not in BLOCKS:
        raise UnsupportedError(
            f"bitsandbytes cannot hold {scheme}: its kernels know blocks of {', '.join(map(str, BLOCKS))}; use g64"
        )
    if cols % size and cols % _VECTOR == 0:
        raise UnsupportedError(
            f"bitsandbytes reads blocks of {size} that do not divide a row of {cols} wrongly on CPUs with AVX-512; use "
            f"g{divisor(cols, size, BLOCKS)}"
        )
    return replace(scheme, block=_block(size, cols), scale="f32")


def _block(size: int, cols: int) -> Block:
    """Blocks that end with rows are groups of columns: the same bytes, which methods that go along columns can make."""
    return Block(1, size, flat=cols % size != 0)


def _fit_rows(scheme: Scheme, weight: Weight) -> Scheme:
    """Scales are bfloat16 because 127 times such a value is exact in the float32 that is stored, and divides back."""
    one_per_row = scheme.block.rows == 1 and not scheme.block.flat and scheme.block.cols in (0, weight.shape[1])
    if not one_per_row or scheme.zero != "none" or scheme.nested:
        raise UnsupportedError(
            f"bitsandbytes cannot hold {scheme}: its 8-bit integers are symmetric rows; use int8-row"
        )
    return _ROWS


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    scheme, name = planned(weight), weight.name
    if scheme.grid == _ROWS.grid:
        return {
            name: Spec(torch.int8, weight.shape),
            f"{weight.module}.SCB": Spec(torch.float32, weight.shape[:1]),
            f"{weight.module}.weight_format": Spec(torch.uint8, ()),
        }
    blocks = prod(scale_shape(weight.shape, scheme.block))
    specs = {
        name: Spec(torch.uint8, (ceil(prod(weight.shape) / 2), 1)),
        f"{name}.absmax": Spec(torch.uint8 if scheme.nested else torch.float32, (blocks,)),
        f"{name}.quant_map": Spec(torch.float32, (len(scheme.grid.levels),)),
        f"{name}.{_STATE}{scheme.grid.name}": Spec(torch.uint8, (len(_state(weight, 0.0)),)),
    }
    if scheme.nested:
        nested = scale_shape((1, blocks), scheme.nested.block)[1]
        specs[f"{name}.nested_absmax"] = Spec(torch.float32, (nested,))
        specs[f"{name}.nested_quant_map"] = Spec(torch.float32, (len(scheme.nested.grid.levels),))
    return specs


def _state(weight: Weight, offset: float) -> bytes:
    """The JSON that tells a reader what the tensors mean; padded, since its length must not depend on `offset`."""
    scheme = planned(weight)
    state: dict[str, Any] = {
        "quant_type": scheme.grid.name,
        "blocksize": scheme.block.cols,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if scheme.nested is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": scheme.nested.block.cols, "nested_dtype": "float32", "nested_offset": 0.0}
    longest = len(json.dumps(state)) + _NUMBER
    return json.dumps(state | {"nested_offset": offset}).ljust(longest).encode()


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a scale of 8-bit rows that is not the 127th part of any float32.
    """
    check_planned(weight, q)
    name = weight.name
    if q.scheme.grid == _ROWS.grid:
        torch.bitwise_xor(q.codes, 0x80, out=into[name].view(torch.uint8))
        into[f"{weight.module}.SCB"].copy_(_row_maxima(weight, q.scale_values().reshape(-1)))
        into[f"{weight.module}.weight_format"].zero_()
        return
    native.pack_nibbles_high_first(q.codes.reshape(-1), out=into[name].reshape(-1))
    offset = _pack_scales(q, name, into)
    into[f"{name}.quant_map"].copy_(torch.tensor(q.scheme.grid.levels))
    state = _state(weight, offset)
    into[f"{name}.{_STATE}{q.scheme.grid.name}"].copy_(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _pack_scales(q: QTensor, name: str, into: Mapping[str, Tensor]) -> float:
    """Fill the scales; returns the offset of double-quantized ones."""
    scales, absmax = q.scales, into[f"{name}.absmax"]
    if not isinstance(scales, QTensor):
        absmax.copy_(scales.reshape(-1))
        return 0.0
    absmax.copy_(scales.codes.reshape(-1))
    into[f"{name}.nested_absmax"].copy_(scales.scale_values().reshape(-1))
    into[f"{name}.nested_quant_map"].copy_(torch.tensor(scales.scheme.grid.levels))
    return 0.0 if scales.offset is None else scales.offset.item()


def _row_maxima(weight: Weight, scales: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """What a code of 127 stands for: float32 values whose 127th part, in float32, is the scale.

    Raises:
        FormatError: one scale in 128 is no such part; those of `fit` (bfloat16) all are.
    """
    guess = scales * 127
    for near in (guess, guess.nextafter(torch.tensor(0.0)), guess.nextafter(torch.tensor(inf))):
        guess = torch.where(near / 127 == scales, near, guess)
    wrong = guess / 127 != scales
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise FormatError(
            f"{weight.module}.SCB: the scale {scales[row].item():.9g} of row {row} is not the 127th part of any "
            "float32; scales of 16 bits are"
        )
    return guess


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    if planned(weight).grid == _ROWS.grid:
        return _unpack_rows(weight, tensors, codes)
    scheme, name = planned(weight), weight.name
    state = _read_state(weight, tensors)
    count = prod(weight.shape)
    packed = tensors.get(name, torch.empty(0))  # as any dtype (`bnb_4bit_quant_storage`)
    _check_size(name, packed.nbytes, count)
    flat = None if codes is None else codes.view(-1)
    codes = native.unpack_nibbles_high_first(packed.contiguous().reshape(-1).view(torch.uint8), count, out=flat)
    table = _part(weight, tensors, "quant_map")
    if not torch.allclose(table, torch.tensor(scheme.grid.levels), rtol=0, atol=_TABLE_TOLERANCE):
        raise FormatError(f"{name}.quant_map is not {scheme.grid.name}'s table, which readers use whatever it says")
    scales = _unpack_scales(weight, tensors, state)
    return QTensor(scheme, weight.shape, codes.view(view_shape(weight.shape, scheme.block)), scales)


def _part(weight: Weight, tensors: Mapping[str, Tensor], part: str) -> Tensor:
    """One stored tensor of a 4-bit weight, checked against the layout."""
    spec = layout(weight)[f"{weight.name}.{part}"]
    return stored(tensors, f"{weight.name}.{part}", spec.dtype, spec.shape)


def _unpack_scales(weight: Weight, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor | QTensor:
    nested, blocks = planned(weight).nested, scale_shape(weight.shape, planned(weight).block)
    absmax = _part(weight, tensors, "absmax")
    if nested is None:
        return finite(f"{weight.name}.absmax", absmax).view(blocks)
    scales = finite(f"{weight.name}.nested_absmax", _part(weight, tensors, "nested_absmax")).reshape(1, -1)
    table = _part(weight, tensors, "nested_quant_map")
    if tuple(table.tolist()) != nested.grid.levels:
        raise FormatError(f"{weight.name}.nested_quant_map is not the table that was recognised")
    offset = torch.tensor(float(state["nested_offset"]))
    return QTensor(nested, blocks, absmax.view(1, -1), scales, offset=offset)


def _unpack_rows(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None) -> QTensor:
    specs, maxima, order = layout(weight), f"{weight.module}.SCB", f"{weight.module}.weight_format"
    if order in tensors and stored(tensors, order, torch.uint8, ()) != 0:
        raise FormatError(f"{order} is {int(tensors[order])}, an order for one kind of GPU; only 0, rows, is read")
    rows = stored(tensors, weight.name, torch.int8, weight.shape).view(torch.uint8)
    codes = torch.bitwise_xor(rows, 0x80, out=torch.empty_like(rows) if codes is None else codes)
    scales = finite(maxima, stored(tensors, maxima, torch.float32, specs[maxima].shape)) / 127
    return QTensor(planned(weight), weight.shape, codes, scales.reshape(-1, 1))


def _read_state(weight: Weight, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The weight's JSON, which must say what was recognised."""
    scheme = planned(weight)
    name = f"{weight.name}.{_STATE}{scheme.grid.name}"
    if name not in tensors:
        raise FormatError(f"{name} is missing")
    state = _parse_state(name, tensors[name])
    if (state["blocksize"], tuple(state["shape"])) != (scheme.block.cols, weight.shape):
        raise FormatError(f"{name} says blocks of {state['blocksize']} on {state['shape']}, {scheme} was recognised")
    return state


def _parse_state(name: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON object of a quant_state tensor, with the fields that matter present and sound."""
    try:
        state = json.loads(bytes(tensor.to(torch.uint8).tolist()))
        shape, sizes = state["shape"], [state["blocksize"], state.get("nested_blocksize", 1)]
        sound = all(type(each) is int for each in [*shape, *sizes])
        sound = sound and len(shape) == 2 and min(shape) >= 0 and min(sizes) > 0
        sound = sound and state["dtype"] in ("float32", "float16", "bfloat16")
        sound = sound and isfinite(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{name} is no quantization state: {type(error).__name__}: {error}") from None
    if not sound:
        raise FormatError(f"{name} holds a quantization state that makes no sense: {json.dumps(state)}")
    return dict(state)


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `BitsAndBytesConfig`.

    Raises:
        UnsupportedError: 8-bit and 4-bit weights in one checkpoint.
    """
    chosen = [planned(weight) for weight in weights if weight.scheme]
    if not chosen:
        return {"config.json": declare(source, None)}
    tables = [scheme for scheme in chosen if scheme.grid != _ROWS.grid]
    if tables and len(tables) < len(chosen):
        raise UnsupportedError(
            "bitsandbytes checkpoints are loaded in 4 or in 8 bits as a whole; use either nf4 and fp4, or int8"
        )
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bool(tables),
        "load_in_8bit": not tables,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped_modules(weights),
        "llm_int8_threshold": 6.0,
    }
    return {"config.json": declare(source, quantization | (_table_options(weights, tables) if tables else {}))}


def _table_options(weights: Sequence[Weight], tables: Sequence[Scheme]) -> dict[str, Any]:
    """What is true of most weights; each weight's own state overrides it when it is loaded."""
    grid, nested = Counter((scheme.grid.name, scheme.nested is not None) for scheme in tables).most_common(1)[0][0]
    dtype = Counter(weight.dtype for weight in weights if weight.scheme).most_common(1)[0][0]
    return {
        "bnb_4bit_quant_type": grid,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares bitsandbytes.

    Raises:
        FormatError: a quantization state that cannot be read.
    """
    quantization = declared(config)
    if quantization.get("quant_method") != "bitsandbytes" and not (
        quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    ):
        return None
    states = [name for name in specs if name.endswith(tuple(_STATE + table for table in _TABLES))]
    rows = [name.removesuffix(".SCB") for name in specs if name.endswith(".SCB")]
    found = [_recognised(name, specs, read) for name in states] + [_recognised_rows(each, specs, read) for each in rows]
    return {weight.name: weight for weight in found}


def _recognised(state_name: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> Weight:
    name, _, table = state_name.rpartition(f".{_STATE}")
    state = _parse_state(state_name, read(state_name))
    nested = None
    if f"{name}.nested_absmax" in specs:
        if f"{name}.nested_quant_map" not in specs or "nested_blocksize" not in state or "nested_offset" not in state:
            raise FormatError(f"{name}: the map, block size or offset of its double-quantized scales is missing")
        nested = _nested(f"{name}.nested_quant_map", read, state["nested_blocksize"])
    block = _block(state["blocksize"], state["shape"][1])
    scheme = Scheme(_TABLES[table], block, scale="f32", nested=nested)
    stored = specs.get(name, Spec(torch.uint8, (0,)))
    _check_size(name, stored.nbytes, prod(state["shape"]))
    return Weight(name, tuple(state["shape"]), getattr(torch, state["dtype"]), scheme)


def _check_size(name: str, found: int, count: int) -> None:
    """The bytes must be as many as a state's shape needs, before room is made for it."""
    if found != ceil(count / 2):
        raise FormatError(f"{name} has {found} bytes, {count} codes of 4 bits need {ceil(count / 2)}")


def _nested(name: str, read: Callable[[str], Tensor], size: int) -> Scheme:
    """Double quantization with the file's own map and blocks; `DOUBLE` where they are the usual ones."""
    table = read(name)
    if tuple(table.shape) != (2**DOUBLE.grid.bits,):
        raise FormatError(f"{name} is {list(table.shape)}, not the {2**DOUBLE.grid.bits} values of a code of 8 bits")
    levels = tuple(finite(name, table.float()).tolist())
    grid = DOUBLE.grid if levels == DOUBLE.grid.levels else Grid("dynamic8-of-file", "levels", 8, levels)
    return replace(DOUBLE, grid=grid, block=Block(1, size, flat=True))


def _recognised_rows(module: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> Weight:
    name = f"{module}.weight"
    if name not in specs or len(specs[name].shape) != 2:
        raise FormatError(f"{name} is {list(specs[name].shape) if name in specs else 'missing'}, not a matrix")
    scales = read(f"{module}.SCB").float() / 127
    short = torch.equal(scales.bfloat16().float(), scales)
    return Weight(name, specs[name].shape, torch.float16, _ROWS if short else replace(_ROWS, scale="f32"))


FORMAT = Format(
    about="bitsandbytes in transformers: NF4 and FP4, plain and double-quantized, and int8 rows",
    default="nf4-g64",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    swaps=True,
)
