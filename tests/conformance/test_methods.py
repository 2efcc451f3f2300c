"""Every file of `methods/`, found by listing, against the contract in `lowbit.methods.Method`."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lowbit import plugins
from lowbit.errors import WeightError
from lowbit.methods import Method, Stats
from lowbit.schemes import Block, Scheme, parse
from lowbit.tensors import QTensor, scale_shape
from tests.reference import grids

METHODS = plugins.names("methods")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods"

INTEGERS = [f"int{bits}-g16" for bits in range(1, 9)]
INTEGERS += [f"int{bits}-g16-{zero}" for bits in (1, 3, 8) for zero in ("asym", "fzero")]
INTEGERS += [
    f"int4-{block}{zero}" for block in ("tensor", "row", "g7", "flat64", "4x24") for zero in ("", "-asym", "-fzero")
]
INTEGERS += ["int4-g32-f32", "int4-g32-bf16-asym", "int8-row-bf16-fzero", "int4-g7-min-bf16"]
FLOATS = [f"fp8-{grid}-{block}" for grid in ("e4m3", "e5m2") for block in ("tensor", "row", "128x128")]
TABLES = ["nf4", "nf4-flat64", "nf4-dq", "fp4-row", "fp4-flat64-dq", "levels[-1,0,0.4]-g16", "levels[0,1,3]-row-f16"]
LLAMA = [
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "tq1_0",
    "tq2_0",
]
SCHEMES = [*INTEGERS, *FLOATS, *TABLES, *LLAMA, "mxfp4", "mxfp8", "nvfp4"]
# Their results are another program's to the byte, or start there: scales of either sign, 0 where a block is.
COPIES = ("ggml", "imatrix", "ggml_fit", "imatrix_fit")


def starts_there(name: str, scheme: Scheme) -> bool:
    """Whether scales are llama.cpp's, of this method and of all in its super-blocks."""
    return name in COPIES or (scheme.nested is not None and not scheme.nested.offset and scheme.scale != "e4m3")


ONE_OF_EACH = ["int3-g7", "int4-4x24-asym", "int4-g7-fzero", "int8-tensor", "nf4-dq", "fp4-flat64", "fp8-e4m3-row"]
ONE_OF_EACH += ["fp8-e5m2-128x128", "mxfp4", "mxfp8", "nvfp4", "q4_0", "q4_k", "iq4_xs"]
SHAPES = [(1, 1), (3, 7), (5, 16), (9, 130), (33, 48), (0, 8), (4, 0)]


def record(name: str) -> Method:
    method: Method = plugins.load("methods", name)
    return method


@cache
def statistics(method: Method, cols: int, scheme: Scheme, options: Any) -> Stats:
    """What the method asks for, of correlated random rows (the float model's are a little off), and prepared."""
    dice = torch.Generator().manual_seed(cols)
    rows = torch.randn(300, cols, generator=dice)
    rows = (rows + 0.3 * rows.roll(1, 1)) * (1 + torch.rand(cols, generator=dice))
    found = {}
    for name in method.needs:
        statistic = plugins.load("stats", name)
        state = statistic.start(cols, 0)
        statistic.update(state, rows, rows * 1.01 if statistic.paired else None)
        found[name] = statistic.finish(state)
    return method.prepare(found, scheme, options)


def weight_of(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    dice = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape, generator=dice) * torch.randn(shape, generator=dice) * 0.05
    return (weight.reshape(1, -1) if scheme.block.flat else weight).to(dtype)


def run(method: Method, weight: Tensor, scheme: Scheme, stats: Stats | None = None) -> QTensor:
    """With few steps of any search: the contract holds for every number of them."""
    few = {key: 6 for key in ("steps", "iterations") if hasattr(method.options(), key)}
    options = method.options(**few)
    known = statistics(method, weight.shape[1], scheme, options)
    return method.quantize(weight, {**known, **(stats or {})}, scheme, options)


def spared(method: str, name: str) -> bool:
    """The loop of GPTQ and its relatives is one, and slow here: llama.cpp's own types stand for each other."""
    own = name in LLAMA and (parse(name).zero == "min" or parse(name).nested is not None)
    return own and (method in ("gptaq", "ldlq") or (method == "gptq" and name not in ("q4_k", "iq4_xs")))


def pairs(schemes: list[str]) -> pytest.MarkDecorator:
    """Every method with every scheme that it supports."""
    every = [(method, name) for method in METHODS for name in schemes if not spared(method, name)]
    both = [(method, name) for method, name in every if record(method).supports(parse(name)) is None]
    return pytest.mark.parametrize(("name", "scheme"), both)


each_scheme = pairs(SCHEMES)
one_of_each = pairs(ONE_OF_EACH)


def parts_of(q: QTensor) -> dict[str, Tensor]:
    return dict(q.parts())


def same(one: QTensor, other: QTensor) -> bool:
    first, second = parts_of(one), parts_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[part], second[part]) for part in first)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_describes_itself(name: str) -> None:
    method = record(name)
    assert method.about and "\n" not in method.about and method.workspace > 0
    assert is_dataclass(method.options) and method.options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert method.options() == method.options()
    for field in fields(method.options):
        assert f"{field.name}:" in (method.options.__doc__ or ""), f"say what {field.name} means"
    page = (DOCS / f"{name}.md").read_text()
    assert all(f"`{field.name}`" in page for field in fields(method.options))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_cannot_do_is_a_reason(name: str) -> None:
    objections = {scheme: record(name).supports(parse(scheme)) for scheme in SCHEMES}
    assert all(reason is None or len(reason.split()) > 3 for reason in objections.values())
    assert None in objections.values()


@each_scheme
def test_results_keep_the_contract(name: str, scheme: str) -> None:
    for shape in SHAPES:
        assert_contract(name, parse(scheme), shape)


def assert_contract(name: str, kind: Scheme, shape: tuple[int, int]) -> None:
    weight = weight_of(shape, kind)
    before = weight.clone()
    q = run(record(name), weight, kind)
    assert torch.equal(weight, before)
    assert q.shape == tuple(weight.shape) and q.codes.shape == weight.shape
    assert q.scale_values().shape == scale_shape(q.shape, kind.block)
    assert (q.scheme.grid, q.scheme.block, q.scheme.zero, q.scheme.scale) == (
        kind.grid,
        kind.block,
        kind.zero,
        kind.scale,
    )
    assert isinstance(q.scales, QTensor) == (kind.nested is not None and not kind.nested.offset)
    legal = torch.tensor([isfinite(level) for level in kind.grid.levels])
    assert legal[q.codes.long()].all()
    assert_storable(q, starts_there(name, q.scheme))
    decoded = q.dequantize()
    assert decoded.isfinite().all()
    spread = float(weight.abs().max()) if weight.numel() else 0.0
    assert ((decoded - weight).abs() <= 1.0001 * spread).all()  # nothing is worse than leaving the weight out


def assert_storable(q: QTensor, any_sign: bool) -> None:
    """Scales are finite, not 0 and exact in the type that stores them; negative for symmetric integers at most."""
    scales = q.scale_values() if isinstance(q.scales, Tensor) else q.scales.scale_values()
    kind = q.scheme.scale if isinstance(q.scales, Tensor) else q.scales.scheme.scale
    whole = q.scheme.grid.kind == "int" and q.scheme.grid.bits > 1 and q.zeros is None and q.scheme.nested is None
    assert scales.isfinite().all()
    assert any_sign or ((scales != 0).all() and (whole or (q.scale_values() > 0).all()))
    if kind != "f32":
        assert set(scales.abs().flatten().tolist()) <= values_of(kind)
    if q.scheme.zero == "int":
        assert q.zeros is not None and q.zeros.dtype == torch.uint8
        assert (q.zeros.int() < 2**q.scheme.grid.bits).all()
    if q.scheme.zero == "float":
        assert q.zeros is not None and q.zeros.dtype == torch.float32
        assert kind == "f32" or set(q.zeros.abs().flatten().tolist()) <= values_of(kind)
    if q.scheme.zero == "min":
        minima = q.minima.scales if isinstance(q.minima, QTensor) else q.minima
        assert isinstance(minima, Tensor) and minima.dtype == torch.float32
        assert set(minima.abs().flatten().tolist()) <= values_of(kind)


@cache
def values_of(kind: str) -> frozenset[float]:
    return frozenset(grids.positive_values(kind))


@one_of_each
def test_16_bit_weights_give_what_their_float32_copies_give(name: str, scheme: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = weight_of((9, 130), parse(scheme), dtype)
        short, long = (run(record(name), w, parse(scheme)) for w in (weight, weight.float()))
        assert same(short, long)


@each_scheme
def test_runs_of_rows_give_the_whole(name: str, scheme: str) -> None:
    """Pieces that end on block borders, with the range of the whole tensor where one scale spans it."""
    kind = parse(scheme)
    weight = weight_of((40, 130), kind, torch.bfloat16)
    shared = kind.block.rows == 0 and not kind.block.flat
    stats = {"range": torch.stack([weight.min(), weight.max()]).float()}
    stats = stats if shared or (kind.nested and not kind.nested.offset) else {}
    whole = run(record(name), weight, kind, stats)
    for axis, start, stop in borders(kind.block, tuple(weight.shape)):
        piece = weight.narrow(axis, start, stop - start).contiguous()
        part = run(record(name), piece, kind, stats)
        assert torch.equal(part.codes, whole.codes.narrow(axis, start, stop - start))
        assert torch.equal(part.dequantize(), whole.dequantize().narrow(axis, start, stop - start))


def borders(block: Block, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Axis, start and end of three pieces that end on block borders."""
    axis, step = (1, block.cols) if block.flat else (0, max(block.rows, 1))
    cuts = [0, step * max(7 // step, 1), step * max(24 // step, 2), shape[axis]]
    return [(axis, start, stop) for start, stop in pairwise(cuts) if start < stop <= shape[axis]]


@one_of_each
def test_the_same_weight_gives_the_same_result_on_any_number_of_threads(name: str, scheme: str) -> None:
    weight = weight_of((33, 130), parse(scheme))
    threads = torch.get_num_threads()
    first = run(record(name), weight, parse(scheme))
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert same(first, run(record(name), weight, parse(scheme)))
    finally:
        torch.set_num_threads(threads)


def odd_weights() -> dict[str, Tensor]:
    """By name, 4 rows of 48; the last row of each is zero."""
    weight = torch.rand(4, 48, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    lonely = torch.zeros_like(weight)
    lonely[2, 5] = 0.7
    constant = torch.where(weight == 0, 0, torch.tensor(-0.37))
    huge, subnormal = (torch.where(weight == 0, 0, weight - 0.5) * size for size in (2e30, 1e-39))
    kinds = {"zero": weight * 0, "constant": constant, "negative": -weight, "positive": weight}
    return kinds | {"huge": huge, "subnormal": subnormal, "one element": lonely}


@each_scheme
def test_odd_blocks(name: str, scheme: str) -> None:
    parsed = parse(scheme)
    free = name not in ("ggml", "imatrix", "rtn") and parsed.zero == "min"  # 0 is one value among others
    has_zero = parsed.zero != "float" and 0 in parsed.grid.levels and not free
    own_blocks = parsed.block.rows == 1 and not parsed.block.flat  # the last row shares no block with others
    for kind, weight in odd_weights().items():
        view = weight.view(1, -1) if parsed.block.flat else weight
        q = run(record(name), view, parsed)
        assert_storable(q, starts_there(name, q.scheme))
        decoded = q.dequantize()
        assert decoded.isfinite().all(), kind
        zeros = view == 0 if has_zero else torch.zeros_like(view, dtype=torch.bool)
        exact = 0 in parsed.grid.levels or name in COPIES  # a grid without 0 comes as near as its least scale
        if own_blocks and exact:
            zeros[3] = True
        assert (decoded[zeros] == 0).all(), kind
        assert (decoded.abs() <= (0 if exact else 1e-7)).all() or kind != "zero"


@each_scheme
def test_what_no_grid_holds_is_refused(name: str, scheme: str) -> None:
    for value in (inf, -inf, nan):
        weight = weight_of((9, 48), parse(scheme), torch.bfloat16)
        weight.view(9, 48)[7, 3] = value
        place = "row 0, column 339" if parse(scheme).block.flat else "row 7, column 3"
        with pytest.raises(WeightError, match=rf"^{value} at {place} \(element 339\)$"):
            run(record(name), weight, parse(scheme))


@pairs(["int4-g16", "int4-g100-fzero", "int4-flat64-asym", "mxfp4", "int8-tensor"])
def test_memory_stays_within_the_workspace(name: str, scheme: str) -> None:
    method = record(name)
    weight = weight_of((80, 1001), parse(scheme), torch.bfloat16) * 30
    run(method, weight, parse(scheme))  # statistics are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(method, weight, parse(scheme))
    peak = peak_bytes(recorded)
    assert 0.9 * weight.numel() < peak < method.workspace * weight.numel() + 4096


def peak_bytes(recorded: Any) -> int:
    """Most bytes that torch's CPU allocator held at once."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
