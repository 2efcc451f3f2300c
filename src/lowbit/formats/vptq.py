"""VPTQ's codebooks of columns of weights, as the `vptq` package and `transformers` load them (docs/formats/vptq.md).

A weight `[N, K]` is cut into vectors of `v` weights down a column. `indices` int32 `[groups, N/v, words]` has for each
vector the index into `centroids` and above it that into `res_centroids`, bit after bit from the lowest of a word on.
The first columns, outliers, may have codebook and vectors of their own. Columns are in the order of `perm`; then each
is multiplied by its `weight_scale`, and its `weight_bias` added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int16, Int32, Int64
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError, UsageError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import exact, finite, row_chunks, stored
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    declared,
    planned,
    skipped_modules,
)
from lowbit.schemes import Block, Run, Scheme, vector_grid
from lowbit.tensors import QTensor, Vectors, run_groups, run_shapes

_COLUMN, _TENSOR = Block(0, 1), Block(0, 0)
_WORD, _COLUMNS = 32, 1 << 16


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """Vectors down the columns, of one or two books, after outliers of one; numbers of the weight's own dtype.

    Raises:
        UnsupportedError: another scheme, or runs that do not divide the weight.
    """
    check_matrix(weight, "vptq", scheme)
    *outliers, main = scheme.grid.runs or (Run(0, 0, ()),)
    fits = main.cols == 1 and len(main.bits) in (1, 2) and len(outliers) <= 1
    fits &= all(run.cols == 1 and run.rows > 1 and len(run.bits) == 1 and not run.group for run in outliers)
    fits &= (scheme.block, scheme.zero) in ((_COLUMN, "min"), (_TENSOR, "none")) and not scheme.nested
    if not fits or weight.shape[1] > _COLUMNS:
        raise UnsupportedError(
            f"vptq cannot hold {scheme}: it has vectors down the columns, as vectors[8x1:12+8]-column-min-perm, which "
            "no method makes yet; convert keeps those of a checkpoint"
        )
    try:
        run_shapes(scheme.grid, weight.shape)
    except FormatError as error:
        raise UnsupportedError(f"vptq cannot hold {scheme}: {error}") from None
    return replace(scheme, scale=SCALE_TYPES[weight.dtype])


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    scheme, cols = planned(weight), weight.shape[1]
    shapes = run_shapes(scheme.grid, weight.shape)
    main, (_, down, across) = scheme.grid.runs[-1], shapes[-1]
    groups = run_groups(main, shapes[-1])
    parts = {"indices": Spec(torch.int32, (groups, down, ceil(across // groups * sum(main.bits) / _WORD)))}
    for name, bits in zip(("centroids", "res_centroids"), main.bits, strict=False):
        parts[f"{name}.weight"] = Spec(weight.dtype, (groups, 2**bits * main.rows))
    if len(shapes) > 1:
        first = scheme.grid.runs[0]
        parts["outlier_centroids.weight"] = Spec(weight.dtype, (1, 2 ** first.bits[0] * first.rows))
        parts["outlier_indices"] = Spec(torch.int16, (1, *shapes[0][1:]))
    if scheme.block == _COLUMN:
        parts |= {name: Spec(weight.dtype, (cols,)) for name in ("weight_scale", "weight_bias")}
    if scheme.perm:
        parts["perm"] = Spec(torch.int16, (cols,))
    return {f"{weight.module}.{name}": spec for name, spec in parts.items()}


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a number that the weight's dtype does not have, or a scale of a whole tensor that is not 1.
    """
    check_planned(weight, q)
    module, main = weight.module, q.vectors[-1]
    for name, book in zip(("centroids", "res_centroids"), main.books, strict=False):
        _fill(into, f"{module}.{name}.weight", book.flatten(1))
    groups = main.books[0].shape[0]
    _pack_indices(main.codes, q.scheme.grid.runs[-1].bits, groups, into[f"{module}.indices"])
    if len(q.vectors) > 1:
        _fill(into, f"{module}.outlier_centroids.weight", q.vectors[0].books[0].flatten(1))
        into[f"{module}.outlier_indices"].copy_(_signed(q.vectors[0].codes))
    if q.order is not None:
        into[f"{module}.perm"].copy_(_signed(q.order))
    assert isinstance(q.scales, Tensor) and not isinstance(q.minima, QTensor)
    if q.minima is None:
        if q.scales.item() != 1:
            raise FormatError(f"{module}: without weight_scale the scale is 1, this has {q.scales.item()}")
        return
    order = slice(None) if q.order is None else q.order.long().argsort()
    _fill(into, f"{module}.weight_scale", q.scales[0, order])
    _fill(into, f"{module}.weight_bias", -q.minima[0, order])


def _fill(into: Mapping[str, Tensor], name: str, values: Float[Tensor, "..."]) -> None:
    into[name].copy_(exact(name, values, into[name].dtype))


def _signed(numbers: Int32[Tensor, "..."]) -> Int16[Tensor, "..."]:
    """Numbers below 2**16 as the int16 of the same bits."""
    return ((numbers + 2**15) % 2**16 - 2**15).to(torch.int16)


def _places(cols: int, bits: int) -> tuple[Int64[Tensor, "cols"], Int64[Tensor, "cols"]]:
    """Word and bit at which each of `cols` numbers of some bits starts."""
    starts = torch.arange(cols) * bits
    return starts // _WORD, starts % _WORD


def _pack_indices(
    codes: Int32[Tensor, "books down across"], bits: Sequence[int], groups: int, out: Int32[Tensor, "groups down words"]
) -> None:
    cols = codes.shape[2] // groups
    word, bit = _places(cols, sum(bits))
    for group in range(groups):
        part = codes[:, :, group * cols : (group + 1) * cols]
        for rows in row_chunks(codes.shape[1], cols):
            whole = part[0, rows].long()
            whole = whole | (part[1, rows].long() << bits[0]) if len(bits) > 1 else whole
            shifted = whole << bit  # below 2**63: of each, some bits are in one word and some in the next
            words = torch.zeros(len(whole), out.shape[2] + 1, dtype=torch.int64)
            words.index_add_(1, word, shifted & 2**_WORD - 1).index_add_(1, word + 1, shifted >> _WORD)
            out[group, rows] = torch.where(words < 2 ** (_WORD - 1), words, words - 2**_WORD)[:, :-1].int()


def _unpack_indices(
    packed: Int32[Tensor, "groups down words"], bits: Sequence[int], cols: int
) -> Int32[Tensor, "books down across"]:
    groups, down, _ = packed.shape
    codes = torch.empty(len(bits), down, groups * cols, dtype=torch.int32)
    word, bit = _places(cols, sum(bits))
    for group in range(groups):
        for rows in row_chunks(down, cols):
            words = torch.nn.functional.pad(packed[group, rows].long() & 2**_WORD - 1, (0, 1))
            whole = (words[:, word] >> bit) | (words[:, word + 1] << (_WORD - bit))
            for book, size in enumerate(bits):
                codes[book, rows, group * cols : (group + 1) * cols] = whole & 2**size - 1
                whole = whole >> size
    return codes


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme, module = planned(weight), f"{weight.module}."
    found = {name.removeprefix(module): stored(tensors, name, spec.dtype, spec.shape)
             for name, spec in layout(weight).items()}  # fmt: skip
    values = {name: finite(module + name, part).float() for name, part in found.items() if part.is_floating_point()}
    order = None if not scheme.perm else _order(f"{module}perm", found["perm"])
    runs, held = scheme.grid.runs, []
    if len(runs) > 1:
        book = values["outlier_centroids.weight"].view(1, -1, runs[0].rows, 1)
        held.append(Vectors(found["outlier_indices"].int() & 2**16 - 1, (book,)))
        if held[0].codes.numel() and int(held[0].codes.max()) >= book.shape[1]:
            raise FormatError(
                f"{module}outlier_indices holds {int(held[0].codes.max())}, codes end at {book.shape[1] - 1}"
            )
    names = ("centroids.weight", "res_centroids.weight")[: len(runs[-1].bits)]
    books = tuple(values[name].view(len(found[name]), -1, runs[-1].rows, 1) for name in names)
    across = run_shapes(scheme.grid, weight.shape)[-1][2]
    held.append(Vectors(_unpack_indices(found["indices"], runs[-1].bits, across // len(books[0])), books))
    scales, minima = torch.ones(1, 1), None
    if scheme.block == _COLUMN:
        at = slice(None) if order is None else order.long()
        scales, minima = values["weight_scale"][None, at], -values["weight_bias"][None, at]
    nothing = torch.empty(0, 0, dtype=torch.uint8)
    return QTensor(scheme, weight.shape, nothing, scales, minima=minima, vectors=tuple(held), order=order)


def _order(name: str, perm: Int16[Tensor, "cols"]) -> Int32[Tensor, "cols"]:
    order = perm.int() & 2**16 - 1
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=torch.int32)):
        raise FormatError(f"{name} is no order of {len(order)} columns: it does not name each of them once")
    return order


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `VptqConfig`, each module by name."""
    chosen = [weight for weight in weights if weight.scheme]
    if not chosen:
        return {"config.json": declare(source, None)}
    biased = {weight.module for weight in weights if weight.name.endswith(".bias")}
    modules = {weight.module: _parameters(weight, weight.module in biased) for weight in chosen}
    quantization = {
        "quant_method": "vptq",
        "config_for_layers": modules,
        "modules_to_not_convert": skipped_modules(weights),
    }
    return {"config.json": declare(source, quantization)}


def _parameters(weight: Weight, bias: bool) -> dict[str, Any]:
    """What `vptq.VQuantLinear` is made with."""
    scheme = planned(weight)
    runs, shape = scheme.grid.runs, run_shapes(scheme.grid, weight.shape)[-1]
    first, main, groups = runs[0] if runs[1:] else None, runs[-1], run_groups(runs[-1], shape)
    return {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "vector_lens": [first.rows if first else -1, main.rows],
        "num_centroids": [2 ** first.bits[0] if first else -1, 2 ** main.bits[0]],
        "num_res_centroids": [-1, 2 ** main.bits[1] if main.bits[1:] else -1],
        "group_num": groups,
        "group_size": shape[2] // groups,
        "outlier_size": first.width if first else 0,
        "enable_norm": scheme.block == _COLUMN,
        "enable_perm": scheme.perm,
        "bias": bias,
        "indices_as_float": False,
        "is_indice_packed": True,
    }


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares VPTQ; what vectors they have stands in its declaration alone.

    Raises:
        FormatError: tensors that contradict the declaration, or a kind of VPTQ that is not read.
    """
    quantization = declared(config)
    if quantization.get("quant_method") != "vptq":
        return None
    weights = []
    for module in (name.removesuffix(".centroids.weight") for name in specs if name.endswith(".centroids.weight")):
        parameters = _declared(quantization, module)
        try:
            weights.append(_recognised(module, parameters, specs))
        except UsageError as error:
            raise FormatError(f"{module}: config.json describes no layer of vptq that is read: {error}") from None
    return {weight.name: weight for weight in weights}


def _declared(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The parameters of one module, by its name or by the last part of it."""
    places = (("config_for_layers", module), ("shared_layer_config", module.rpartition(".")[2]))
    tables = [(quantization.get(table) or {}, key) for table, key in places]
    found = [table[key] for table, key in tables if isinstance(table, Mapping) and isinstance(table.get(key), Mapping)]
    if not found:
        raise FormatError(f"{module}: config.json has no parameters of this layer for vptq")
    parameters: Mapping[str, Any] = found[0]
    return parameters


def _number(parameters: Mapping[str, Any], field: str, at: int | None = None) -> int:
    """A whole number, or that of the outliers (0) or the other columns (1)."""
    given = parameters.get(field)
    value = given if at is None else given[at] if isinstance(given, list) and len(given) == 2 else None
    if not isinstance(value, int):
        raise UsageError(f"{field} is {given!r}")
    return value


def _bits(parameters: Mapping[str, Any], field: str, at: int) -> int:
    entries = _number(parameters, field, at)
    if entries < 2 or entries & (entries - 1):
        raise UsageError(f"{field} is {entries}, which is no power of two from 2 on")
    return entries.bit_length() - 1


def _scheme(parameters: Mapping[str, Any], dtype: torch.dtype) -> Scheme:
    if parameters.get("indices_as_float") or not parameters.get("is_indice_packed", True):
        raise UsageError("indices that are not packed, or stored as floats, are not read; vptq's pack_model packs them")
    outliers = _number(parameters, "vector_lens", 0) > 1 and _number(parameters, "num_centroids", 0) > 0
    if outliers and _number(parameters, "num_res_centroids", 0) > 0:
        raise UsageError("outliers have no residual")
    first = Run(_number(parameters, "vector_lens", 0), 1, (_bits(parameters, "num_centroids", 0),),
                _number(parameters, "outlier_size")) if outliers else None  # fmt: skip
    residual = _number(parameters, "num_res_centroids", 1) > 0
    bits = (_bits(parameters, "num_centroids", 1), *([_bits(parameters, "num_res_centroids", 1)] if residual else []))
    group = _number(parameters, "group_size") if _number(parameters, "group_num") > 1 else 0
    main = Run(_number(parameters, "vector_lens", 1), 1, bits, 0, group)
    norm, perm = (bool(parameters.get(field, True)) for field in ("enable_norm", "enable_perm"))
    grid = vector_grid(*([first] if first else []), main)
    block, zero = (_COLUMN, "min") if norm else (_TENSOR, "none")
    return Scheme(grid, block, zero, SCALE_TYPES[dtype], perm=perm)  # type: ignore[arg-type]


def _recognised(module: str, parameters: Mapping[str, Any], specs: Mapping[str, Spec]) -> Weight:
    dtype = specs[f"{module}.centroids.weight"].dtype
    if dtype not in SCALE_TYPES:
        raise FormatError(f"{module}.centroids.weight is {dtype}")
    shape = (_number(parameters, "out_features"), _number(parameters, "in_features"))
    scheme = _scheme(parameters, dtype)
    if min(*shape, *(side for run in scheme.grid.runs for side in (run.rows, 1 + run.group, 1 + run.width))) < 1:
        raise UsageError(f"a weight of {list(shape)} in {scheme}")
    weight = Weight(f"{module}.weight", shape, dtype, scheme)
    for name, spec in layout(weight).items():
        if specs.get(name) != spec:
            what = f"{specs[name].dtype} {list(specs[name].shape)}" if name in specs else "missing"
            raise FormatError(f"{name} is {what}, config.json declares {spec.dtype} {list(spec.shape)}")
    width, groups = run_shapes(scheme.grid, shape)[-1][2], _number(parameters, "group_num")
    if groups * _number(parameters, "group_size") != width:
        raise UsageError(f"{groups} groups of {parameters['group_size']} for {width} columns")
    return weight


FORMAT = Format(
    about="VPTQ: codebooks for vectors down the columns, with residuals, outliers and an order of columns",
    default="vectors[8x1:8]-column-min-perm",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
)
