"""What must hold for any weight, any scheme, any scale: properties that hypothesis tries to break."""

from __future__ import annotations

from math import isfinite

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from lowbit.methods import NoOptions, mse, rtn
from lowbit.methods._scales import round_scales
from lowbit.schemes import Scheme, parse
from lowbit.tensors import QTensor, scheme_bytes
from tests.reference import grids

BLOCKS = st.sampled_from(["tensor", "row", "g1", "g3", "g8", "g64", "flat5", "2x3", "16x16"])
TYPES = st.sampled_from(["", "-f16", "-bf16", "-f32"])
INTEGERS = st.builds("int{}-{}{}{}".format, st.integers(1, 8), BLOCKS, st.sampled_from(["", "-asym", "-fzero"]), TYPES)
TABLES = st.builds(
    "{}-{}{}{}".format,
    st.sampled_from(["nf4", "fp4", "fp8-e4m3", "fp8-e5m2"]),
    BLOCKS,
    st.sampled_from(["", "-dq"]),
    TYPES,
)
LEVELS = st.lists(st.floats(-8, 8, width=16).filter(bool), min_size=1, max_size=9, unique=True)
FREE = st.builds(lambda values, block: f"levels[0,{','.join(map(str, values))}]-{block}", LEVELS, BLOCKS)
NAMES = st.one_of(INTEGERS, TABLES, FREE, st.sampled_from(["mxfp4", "mxfp8", "nvfp4"]))

SHAPES = st.tuples(st.integers(0, 5), st.integers(0, 40))
NUMBERS = st.one_of(st.floats(-1, 1, width=32), st.floats(-1000, 1000, width=16), st.sampled_from([0.0, 1e30, -1e-40]))
WEIGHTS = arrays.arrays(np.float32, SHAPES, elements=NUMBERS)
ORDINARY = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3),
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def seen(weight: np.ndarray[tuple[int, int], np.dtype[np.float32]], scheme: Scheme) -> Tensor:
    """The weight as a method gets it."""
    tensor = torch.from_numpy(weight)
    return tensor.reshape(1, -1) if scheme.block.flat else tensor


def spread(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each element."""
    (rows, cols), (high, wide) = q.codes.shape, (q.scheme.block.rows or 10**6, q.scheme.block.cols or 10**6)
    down, across = torch.arange(rows)[:, None] // high, torch.arange(cols)[None] // wide
    return q.scale_values()[down, across], None if q.zeros is None else q.zeros.float()[down, across]


def candidates(q: QTensor) -> Tensor:
    """Every value that each element could have been given, in float64, `[rows, cols, codes]`."""
    scale, zero = spread(q)
    if zero is None:
        levels = torch.tensor([level for level in q.scheme.grid.levels if isfinite(level)], dtype=torch.float64)
        return levels * scale.double()[..., None]
    return (torch.arange(2**q.scheme.grid.bits) - zero.double()[..., None]) * scale.double()[..., None]


@given(NAMES)
@settings(max_examples=300, deadline=None)
def test_a_name_means_its_scheme(name: str) -> None:
    assert parse(str(parse(name))) == parse(name)


@given(NAMES, WEIGHTS)
@QUICK
def test_every_weight_gets_the_nearest_value_there_is(
    name: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> None:
    scheme = parse(name)
    view = seen(weight, scheme)
    q = rtn.quantize(view, {}, scheme, NoOptions())
    assume(view.numel())
    exact = view.double()
    least = (candidates(q) - exact[..., None]).abs().amin(-1)
    slack = 1e-6 * (exact.abs() + spread(q)[0].double() * 2**scheme.grid.bits)
    assert ((q.dequantize().double() - exact).abs() <= least + slack).all()


@given(NAMES, WEIGHTS)
@QUICK
def test_results_are_finite_and_counted(name: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    scheme = parse(name)
    view = seen(weight, scheme)
    q = rtn.quantize(view, {}, scheme, NoOptions())
    assert q.scale_values().isfinite().all() and (q.scale_values() > 0).all()
    assert q.dequantize().isfinite().all()
    assert q.nbytes == scheme_bytes(q.scheme, q.shape)
    if scheme.zero != "float":
        assert (q.dequantize()[view == 0] == 0).all()


@given(NAMES, ORDINARY)
@QUICK
def test_codes_follow_the_order_of_weights(
    name: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> None:
    """Within a block a larger weight never gets a smaller value."""
    scheme = parse(name)
    view = seen(weight, scheme)
    q = rtn.quantize(view, {}, scheme, NoOptions())
    decoded = q.dequantize()
    high, wide = q.scheme.block.rows or view.shape[0], q.scheme.block.cols or view.shape[1]
    block = view[:high, :wide].flatten()
    order = block.argsort()
    assert (decoded[:high, :wide].flatten()[order].diff() >= 0).all()


@given(NAMES, ORDINARY, st.integers(-6, 6))
@QUICK
def test_a_power_of_two_passes_through(
    name: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]], exponent: int
) -> None:
    """Scaling the weight by a power of two scales the result, where scales have room for it."""
    scheme = parse(name)
    assume(scheme.scale in ("f32", "bf16", "e8m0") or exponent > 0)
    view = seen(weight, scheme)
    plain, scaled = (rtn.quantize(view * 2.0**e, {}, scheme, NoOptions()) for e in (0, exponent))
    low, high = plain.scale_values() >= 2.0**-14, scaled.scale_values() < torch.finfo(torch.float16).max
    assume(scheme.nested is None and (scheme.scale != "f16" or bool((low & high).all())))
    assert torch.equal(scaled.dequantize(), plain.dequantize() * 2.0**exponent)


@given(st.sampled_from(["fp8-e4m3-g8", "fp8-e5m2-row", "mxfp4", "mxfp8", "nvfp4", "fp4-g8"]), ORDINARY)
@QUICK
def test_symmetric_tables_treat_both_signs_alike(
    name: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> None:
    plain, negated = (rtn.quantize(torch.from_numpy(w), {}, parse(name), NoOptions()) for w in (weight, -weight))
    assert torch.equal(negated.dequantize(), -plain.dequantize())


@given(INTEGERS, ORDINARY)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_search_is_never_worse_than_its_start(
    name: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> None:
    scheme = parse(name)
    view = seen(weight, scheme)
    errors = [
        (method.quantize(view, {}, scheme, options).dequantize().double() - view.double()).square().sum()
        for method, options in ((mse, mse.Options(steps=8)), (rtn, NoOptions()))
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("kind", ["f16", "bf16", "e4m3", "f32"])
@given(value=st.floats(2.0**-149, 2.0**127, width=32))
@settings(max_examples=200, deadline=None)
def test_scales_are_rounded_to_the_nearest_that_can_be_stored(kind: str, value: float) -> None:
    scheme = parse("nvfp4") if kind == "e4m3" else parse(f"nf4-row-{kind}")
    rounded = round_scales(torch.tensor([[value]]), torch.ones(1, 1), scheme).item()
    assert rounded == grids.round_positive(value, kind)


@given(value=st.floats(2.0**-149, 2.0**127, width=32), name=st.sampled_from(["mxfp4", "mxfp8"]))
@settings(max_examples=200, deadline=None)
def test_scales_of_microscaling_are_powers_of_two(value: float, name: str) -> None:
    scheme = parse(name)
    top = max(level for level in scheme.grid.levels if isfinite(level))
    largest = torch.tensor([[value]])
    assert round_scales(largest, largest, scheme).item() == grids.mx_scale(value, top)
