"""Products on the kernels against the definition: what the `QTensor` stands for, times the inputs, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from lowbit import native
from lowbit.errors import UnsupportedError
from lowbit.formats._ggml import BLOCKS, unpack
from lowbit.methods import NoOptions, rtn
from lowbit.native import Panels
from lowbit.runtime.linear import Linear
from lowbit.runtime.panels import (
    Packed,
    pack,
    pack_blocks,
    pack_dense,
    pack_noise,
    pack_wide,
    packed_bytes,
    wide_bytes,
)
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.reference.checkpoints import scattered
from tests.reference.qtensors import random_qtensor, slow_dequantize

CODES = ["int2-g64", "int3-g32", "int4-g64", "int4-row", "int4-tensor", "int4-g64-asym", "int8-g128", "int8-row",
         "int8-g32-asym", "int4-g64-fzero", "int4-g64-min", "int8-g16-min", "int2-g16-min", "int4-g48", "q4_0", "q8_0",
         "q4_k", "q2_k", "q6_k", "q3_k", "int3-g64", "int5-g32-min", "int6-row", "int4-64x64",
         "levels[-1,0,1]-tensor"]  # fmt: skip
TABLE = ["mxfp4", "nvfp4", "iq4_nl", "iq4_xs"]
NESTED = {
    "q2_k": 2.625,
    "q3_k": 3.5625,
    "q4_k": 4.625,
    "q5_k": 5.625,
    "q6_k": 6.5625,
    "iq4_xs": 4.3125,
}  # bits a weight
NEAR = {"nf4-g64": 112.03125, "nf4-g64-dq": 112.03125, "fp4-g64": 120.0}  # tables of bytes but for a small error
FLOATS = ["fp8-e4m3-tensor", "fp8-e4m3-row", "fp8-e4m3-64x64", "mxfp8"]
SHAPES = [(1, 1), (16, 32), (17, 33), (5, 130), (130, 48), (33, 300)]


def inputs(tokens: int, cols: int, seed: int = 0) -> Tensor:
    """Ordinary values, and a large one."""
    found = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    found[:, cols // 2] *= 20
    return found


def multiply(packed: Packed, x: Tensor, threads: int = 1) -> Tensor:
    return packed.matrix()(x, threads)


def wanted(q: QTensor, x: Tensor) -> Tensor:
    return x.double() @ slow_dequantize(q).double().T


def rounded(packed: Packed, x: Tensor) -> Tensor:
    """What the kernel makes of its inputs, block by block in the order in which it takes them."""
    block = packed.panels.sub
    ordered = x if packed.order is None else x[:, packed.order]
    out = ordered.double().clone()
    for row in out:
        for start in range(0, len(row), block):
            part = row[start : start + block]
            step = part.abs().max() / 127
            part.copy_((part / step).round() * step if step else part)
    return out if packed.order is None else out[:, packed.order.argsort()]


def close(got: Tensor, want: Tensor, slack: float = 2e-6) -> None:
    scale = want.abs().max().clamp_min(1e-30)
    assert ((got.double() - want).abs().max() / scale).item() < slack


@pytest.mark.parametrize("scheme", [*CODES, *TABLE, *NEAR, *FLOATS])
def test_exact_products_are_those_of_what_is_stored(scheme: str) -> None:
    for shape in SHAPES:
        q = random_qtensor(parse(scheme), shape, seed=1)
        x = inputs(5, shape[1])
        packed = pack(q, exact=True)
        assert packed.panels.way == "floats"
        close(multiply(packed, x), wanted(q, x))


@pytest.mark.parametrize("scheme", ["fp8-e4m3-row", "fp8-e5m2-g32", "fp8-e4m3-16x32"])
def test_small_floats_need_no_table_but_where_a_code_is_no_number(scheme: str) -> None:
    """Every code that is a number, and then one that is none: its row alone is not finite."""
    q, x = random_qtensor(parse(scheme), (48, 256), seed=1), inputs(5, 256)
    levels = torch.tensor(parse(scheme).grid.levels)
    numbers = levels.isfinite().nonzero().flatten().to(torch.uint8)
    q = replace(q, codes=numbers[torch.arange(48 * 256) % len(numbers)].view(q.codes.shape))
    packed = pack(q)
    assert packed.panels.level is not None and packed.panels.level.isfinite().all()
    for each in (packed, pack(q, exact=True)):
        for tokens in (1, 5):
            close(multiply(each, x[:tokens]), wanted(q, x[:tokens]))
    codes = q.codes.clone()
    codes.view(48, 256)[7, 3] = 127
    found = multiply(pack(replace(q, codes=codes)), x)
    assert found[:, 7].isnan().all() and found[:, torch.arange(48) != 7].isfinite().all()


@pytest.mark.parametrize("scheme", [*CODES, *TABLE])
def test_integer_products_differ_by_the_rounding_of_inputs_alone(scheme: str) -> None:
    for shape in SHAPES:
        q = random_qtensor(parse(scheme), shape, seed=2)
        x = inputs(6, shape[1], seed=3)
        packed = pack(q)
        assert packed.panels.way == ("table" if scheme in TABLE else "codes")
        close(multiply(packed, x), wanted(q, rounded(packed, x)), 2e-5)


@pytest.mark.parametrize("scheme", NEAR)
def test_levels_that_are_nearly_bytes_are_rounded_to_them(scheme: str) -> None:
    levels = torch.tensor(parse(scheme).grid.levels, dtype=torch.float64)
    near = (levels * NEAR[scheme]).round() / NEAR[scheme]
    assert ((near - levels).square().mean() / levels.square().mean()).sqrt() < 0.005
    for shape in SHAPES:
        q = random_qtensor(parse(scheme), shape, seed=2)
        x, packed, codes = inputs(6, shape[1], seed=3), pack(q), q.codes.view(shape).long()
        factor = torch.where(levels == 0, 1.0, near / levels)[codes]
        assert packed.panels.way == "table"
        close(multiply(packed, x), rounded(packed, x) @ (factor * slow_dequantize(q)).T, 2e-5)


@pytest.mark.parametrize("scheme", NESTED)
def test_nested_scales_stay_nested(scheme: str) -> None:
    for rows, cols in [(16, 256), (33, 768)]:
        q = random_qtensor(parse(scheme), (rows, cols), seed=4)
        packed, x = pack(q), inputs(19, cols, seed=5)
        assert packed.panels.over == 256
        assert packed.panels.nbytes * 8 == NESTED[scheme] * -(-rows // 16) * 16 * cols
        close(multiply(packed, x), wanted(q, rounded(packed, x)), 2e-5)


@pytest.mark.parametrize(
    "scheme",
    [
        "int3-g64",
        "int5-g16",
        "int6-row",
        "int8-g48",
        "iq4_nl",
        "iq4_xs",
        "q4_k",
        "q3_k",
        "tq2_0",
        "nf4-g64",
        "float16",
        "wide",
    ],
)
def test_many_tokens_give_the_bits_of_each_alone(scheme: str) -> None:
    shape, x = (20, 768), inputs(70, 768)
    floats = {"float16": pack_dense, "wide": pack_wide}.get(scheme)
    packed = floats(torch.randn(shape).half()) if floats else pack(random_qtensor(parse(scheme), shape, seed=6))
    assert torch.equal(multiply(packed, x, 2), torch.cat([multiply(packed, each[None]) for each in x]))


@pytest.mark.parametrize("scheme", ["tq2_0", "int2-g256-asym"])
def test_inputs_of_a_ternary_block_are_rounded_together(scheme: str) -> None:
    packed, x = pack(q := random_qtensor(parse(scheme), (17, 768), seed=7)), inputs(6, 768, seed=8)
    assert packed.panels.sub == 256
    close(multiply(packed, x), wanted(q, rounded(packed, x)), 2e-5)


def test_small_tables_are_kept_in_four_bits() -> None:
    packed, x = pack(q := random_qtensor(parse("levels[-2,-0.5,0,1]-g64"), (16, 128))), inputs(3, 128)
    assert (packed.panels.way, packed.panels.bits) == ("table", 4)
    close(multiply(packed, x), wanted(q, rounded(packed, x)), 2e-5)


@pytest.mark.parametrize("scheme", ["q4_k", "q2_k", "q3_k", "int4-g32-asym"])
def test_rows_of_a_merged_matrix_are_multiplied_alone(scheme: str) -> None:
    packed, x = pack(random_qtensor(parse(scheme), (80, 512))), inputs(3, 512)
    whole = multiply(packed, x)
    for first, count in ((0, 32), (32, 16), (48, 32)):
        assert torch.equal(multiply(packed.part(first, count), x), whole[:, first : first + count])


HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "iq4_nl": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "iq4_xs": [0],
}  # first bytes of float16 in a block


def any_blocks(name: str, rows: int, count: int) -> Tensor:
    """Blocks of any bits whose scales are finite."""
    stored = torch.randint(256, (rows, count, BLOCKS[name].bytes), dtype=torch.uint8)
    stored[..., [first + 1 for first in HALVES[name]]] &= 0xBF
    return stored


@pytest.mark.parametrize("name", HALVES)
def test_blocks_become_the_panels_of_what_is_in_them(name: str) -> None:
    for rows, count in [(16, 1), (1, 3), (37, 2)]:
        stored = any_blocks(name, rows, count).view(rows, -1)
        wanted = pack(unpack(name, stored, (rows, count * BLOCKS[name].weights)))
        for from_rows, order in [(stored, None), (stored.flip(0), torch.arange(rows).flip(0))]:
            found = pack_blocks(BLOCKS[name], from_rows, order, threads=2)
            assert found and (found.inputs, found.order) == (wanted.inputs, None)
            for field in fields(Panels):
                got, want = getattr(found.panels, field.name), getattr(wanted.panels, field.name)
                if isinstance(want, Tensor):
                    assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8)), field
                else:
                    assert got == want, field


@pytest.mark.parametrize("name", HALVES)
def test_blocks_with_a_scale_that_is_not_finite_are_left_to_what_says_so(name: str) -> None:
    for first in HALVES[name]:
        for high in (0x7C, 0xFE):
            stored = any_blocks(name, 17, 2)
            stored[16, 1, first : first + 2] = torch.tensor([0, high], dtype=torch.uint8)
            assert pack_blocks(BLOCKS[name], stored.view(17, -1), None) is None


def test_blocks_whose_integers_are_small_are_left_to_what_joins_them() -> None:
    for name in ("q4_k", "q5_k"):
        stored = any_blocks(name, 16, 1)
        stored[..., 4:16] &= 0x0F
        assert pack(unpack(name, stored.view(16, -1), (16, 256))).panels.joined
        assert pack_blocks(BLOCKS[name], stored.view(16, -1), None) is None


SMALL = ["fp8-e4m3-row", "fp8-e4m3-128x128", "fp8-e4m3-64x64", "fp8-e5m2-tensor", "mxfp8", "fp8-e4m3-g512"]


@pytest.mark.parametrize("scheme", SMALL)
def test_small_floats_of_many_tokens_are_exact_but_for_inputs_in_16_bits(scheme: str) -> None:
    for rows, cols in [*SHAPES, (17, 800), (33, 1024)]:
        q, x = random_qtensor(parse(scheme), (rows, cols), seed=2), inputs(17, cols)
        q.codes.view(rows, cols)[0] &= 0x83  # the smallest there are
        q.codes.view(rows, cols)[-1] = 0
        x[0], x[1, cols - 1] = 0, 1000
        packed = pack(q)
        assert packed.panels.way == "small"
        close(multiply(packed, x[:1]), wanted(q, x[:1]))
        assert torch.equal(multiply(packed, x[2:]), multiply(pack(q, exact=True), x[2:]))
        weight = slow_dequantize(q).double()
        off = (multiply(packed, x) - in_16_bits(x, 20479, packed.panels.sub) @ weight.T).abs()
        norms = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)
        off = off / norms.clamp_min(1e-30)
        # an integer is off by half of one at most, and the greatest of its run, or the norm, is half its limit at least
        assert off.max() < 0.5 / 6144 + 2e-6 and off.median() < 1e-5 and (off[:, -1] == 0).all()


def test_small_floats_err_no_more_than_inputs_in_float16() -> None:
    """Ordinary weights, and some that are small beside the others of their run, whose codes are rounded."""
    generator = torch.Generator().manual_seed(1)
    for scheme, large, allowed in (("fp8-e4m3-128x128", 1, 0.5), ("fp8-e5m2-row", 1, 0.6), ("fp8-e4m3-row", 30, 1.0)):
        weight = torch.randn(48, 512, generator=generator)
        weight[:, 5::256] *= large
        x, q = torch.randn(64, 512, generator=generator), rtn.quantize(weight, {}, parse(scheme), NoOptions())
        exact, halves = wanted(q, x), wanted(q, x.half().float())
        assert 0 < (multiply(pack(q), x) - exact).norm() < allowed * (halves - exact).norm()


@pytest.mark.parametrize("tokens", [16, 70])
@pytest.mark.parametrize("scheme", ["fp8-e4m3-row", "fp8-e5m2-row"])
def test_sums_of_small_floats_never_leave_32_bits(scheme: str, tokens: int) -> None:
    """Every number in all columns of a row: powers of two, and what is just below one, among them."""
    numbers = torch.tensor(parse(scheme).grid.levels).isfinite().nonzero().to(torch.uint8)
    q = random_qtensor(parse(scheme), (len(numbers), 256))
    q = replace(q, codes=numbers.expand(-1, 256).contiguous())
    x = torch.ones(tokens, 256)
    off, want = (multiply(pack(q), x) - wanted(q, x)).abs(), wanted(q, x).abs()
    assert (off <= 1e-3 * want).all()


def test_small_floats_that_have_codes_that_are_none_or_odd_steps_are_multiplied_as_floats() -> None:
    none = random_qtensor(parse("fp8-e4m3-row"), (16, 64))
    none.codes.view(16, 64)[3, 3] = 127
    for q in (none, random_qtensor(parse("fp8-e4m3-g48"), (16, 96)), random_qtensor(parse("fp8-e4m3-g384"), (16, 768))):
        assert pack(q).panels.way == "floats"


@pytest.mark.parametrize("cols", [*range(1, 131, 7), 128, 130])
def test_odd_sizes(cols: int) -> None:
    for rows in (1, 15, 16, 31, 130):
        q = random_qtensor(parse("int4-g32-asym"), (rows, cols), seed=cols)
        x = inputs(1 + cols % 5, cols)
        close(multiply(pack(q, exact=True), x), wanted(q, x))


@pytest.mark.parametrize("exact", [False, True])
def test_columns_of_an_order_of_their_own(exact: bool) -> None:
    q = scattered(random_qtensor(parse("int4-g32"), (48, 128)))
    packed, x = pack(q, exact), inputs(3, 128)
    close(multiply(packed, x), wanted(q, x if exact else rounded(packed, x)), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_weights(dtype: torch.dtype) -> None:
    for rows, cols in SHAPES:
        weight, x = torch.randn(rows, cols).to(dtype), inputs(5, cols)
        close(multiply(pack_dense(weight), x), x.double() @ weight.double().T)


def in_16_bits(values: Tensor, largest: int, run: int = 256) -> Tensor:
    """Rows as integers of a norm of 46300 in each `run` columns, or whose greatest is `largest`, times their scale."""
    out = values.double().clone()
    for row in out:
        for start in range(0, len(row), run):
            part = row[start : start + run]
            top = part.abs().max()
            if top > 1e-30:
                unit = (part.norm() / 46300).maximum(top / largest)
                part.copy_((part / unit).round() * unit)
            else:
                part.zero_()
    return out


def wide_values(dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    """Ordinary weights; a row of zeros, one with a large weight, and one of the smallest and of large ones."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight[-1], weight[0, cols // 3] = 0, 100
    weight[rows // 2] *= 1e-4 if dtype == torch.float16 else 1e30
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wide_products_are_those_of_both_sides_in_16_bits(dtype: torch.dtype) -> None:
    for rows, cols in [*SHAPES, (17, 800)]:
        weight, x = wide_values(dtype, rows, cols), inputs(5, cols)
        x[0], x[1, cols - 1] = 0, 1000
        got, want = multiply(pack_wide(weight), x), in_16_bits(x, 20479) @ in_16_bits(weight, 12287).T
        norms = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
        off = (got - want).abs() / norms.clamp_min(1e-30)
        assert off.max() < 5e-5 and off.median() < 2e-7  # at a tie of float32 an integer may be another


@pytest.mark.parametrize("tokens", [1, 70])
def test_sums_of_wide_products_never_leave_32_bits(tokens: int) -> None:
    """The greatest that norms allow: all the same, and one column with all of it."""
    same, one = torch.ones(16, 512), torch.zeros(16, 512)
    one[:, [3, 300]] = 1
    for weight in (same, -same, one):
        got = multiply(pack_wide(weight), weight[:1].expand(tokens, 512).contiguous())
        close(got, torch.full_like(got, float(weight.abs().sum() / 16), dtype=torch.float64), 1e-3)


def test_wide_products_err_no_more_than_inputs_in_float16() -> None:
    """Relative to the norms of both sides, which is what an error in sums is a share of; float16 is llama.cpp's way."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 2048, generator=generator).half()
    for heavy, allowed in ((0, 0.8), (8, 0.9), (100, 1.5)):
        x = torch.randn(64, 2048, generator=generator)
        x[:, ::256] += heavy
        exact = x.double() @ weight.double().T
        ours = (multiply(pack_wide(weight), x) - exact).norm()
        assert 0 < ours < allowed * (x.half().double() @ weight.double().T - exact).norm()


def test_weights_that_are_not_finite_stay_floats() -> None:
    for value in (torch.inf, torch.nan):
        weight = torch.randn(20, 600)
        weight[19, 599] = value
        packed = pack_wide(weight)
        assert packed.panels.way == "dense" and multiply(packed, torch.ones(2, 600))[:, :19].isfinite().all()


@pytest.mark.parametrize("scheme", ["int4-g64-asym", "nf4-g64", "mxfp4", "int8-row"])
def test_any_number_of_threads_gives_the_same_bits(scheme: str) -> None:
    q, x = random_qtensor(parse(scheme), (3000, 256)), inputs(3, 256)
    one = multiply(pack(q), x)
    for threads in (2, 3, 7):
        assert torch.equal(multiply(pack(q), x, threads), one)


@pytest.mark.parametrize("isa", native.supported_isas()[1:] or ["scalar"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = """
import hashlib, torch
from lowbit import native
from lowbit.runtime.panels import pack, pack_dense, pack_wide
from lowbit.schemes import parse
from tests.reference.qtensors import random_qtensor
from tests.unit.test_multiply import CODES, TABLE, NEAR, FLOATS, NESTED, SHAPES, SMALL, inputs, multiply, wide_values
digest = hashlib.sha256()
for scheme in [*CODES, *TABLE, *NEAR, *FLOATS]:
    for shape in SHAPES[1:]:
        for exact in (False, True):
            packed = pack(random_qtensor(parse(scheme), shape), exact)
            digest.update(multiply(packed, inputs(5, shape[1])).numpy().tobytes())
for scheme in SMALL:
    packed = pack(random_qtensor(parse(scheme), (33, 1024)))
    for tokens in (1, 17):
        digest.update(multiply(packed, inputs(tokens, 1024)).numpy().tobytes())
for scheme in NESTED:
    digest.update(multiply(pack(random_qtensor(parse(scheme), (20, 512))), inputs(17, 512)).numpy().tobytes())
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    weight = torch.randn(33, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    digest.update(multiply(pack_dense(weight), inputs(5, 130)).numpy().tobytes())
    wide = pack_wide(wide_values(dtype, 33, 544))
    digest.update(wide.panels.codes.numpy().tobytes() + wide.panels.scale.numpy().tobytes())
    for tokens in (1, 17):
        digest.update(multiply(wide, inputs(tokens, 544)).numpy().tobytes())
print(native.isa(), digest.hexdigest())
"""
    found = {}
    for each in (isa, "scalar"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LOWBIT_ISA": each},
            capture_output=True,
            text=True,
            check=True,
        )
        name, found[each] = run.stdout.split()
        assert name == each
    assert found[isa] == found["scalar"]


def test_blocks_that_no_panel_holds_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="every 8 columns"):
        pack(random_qtensor(parse("int4-g8"), (16, 64)))
    with pytest.raises(UnsupportedError, match="no scale for each part of a row"):
        pack(random_qtensor(parse("nf4-flat64"), (16, 40)))


def test_gradients_reach_the_inputs() -> None:
    q = random_qtensor(parse("int4-g32-asym"), (24, 64))
    bias = torch.randn(24)
    x = inputs(3, 64).requires_grad_()
    layer = Linear(pack(q, exact=True), bias, 1)
    torch.autograd.backward(layer(x.view(3, 1, 64)).square().sum())
    again = x.detach().double().requires_grad_()
    torch.autograd.backward((again @ slow_dequantize(q).double().T + bias).square().sum())
    assert x.grad is not None and again.grad is not None
    close(x.grad, again.grad, 1e-5)
    assert "64 to 24, 4 bits, floats" in repr(layer)


def test_bfloat16_inputs_give_bfloat16_outputs() -> None:
    layer = Linear(pack(random_qtensor(parse("int8-row"), (16, 32))), None, 1)
    assert layer(torch.ones(2, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_panels_that_lie_are_refused() -> None:
    good = pack(random_qtensor(parse("int4-g32"), (16, 64))).panels

    x = torch.ones(1, 64)
    for wrong in (
        replace(good, bits=3), replace(good, bits=7), replace(good, over=64), replace(good, joined=True),
        replace(good, step=24), replace(good, rows=17), replace(good, step=128),
        replace(good, offset=0.5), replace(good, offset=129.0),
        replace(good, scale=None), replace(good, way="table"), replace(good, way="floats"),
        replace(good, way="table", table=torch.zeros(16, dtype=torch.uint8), bits=2, codes=good.codes[:, :4]),
        replace(good, zero=torch.zeros(1, 2, 16)), replace(good, codes=good.codes[:, 1:]),
    ):  # fmt: skip
        with pytest.raises((ValueError, AssertionError)):
            native.Matrix(wrong, 64)(x)
    for bad in (
        {"inputs": 65},
        {"inputs": 64, "order": torch.zeros(64, dtype=torch.int64)},
        {"inputs": 64, "bias": x[0]},
    ):
        with pytest.raises(ValueError, match=r"inputs|order|bias"):
            native.Matrix(good, **bad)
    with pytest.raises(ValueError, match="inputs"):
        native.Matrix(good, 64)(torch.ones(1, 65))


@pytest.mark.parametrize("scheme", [*CODES, *TABLE, *NEAR, *FLOATS])
def test_bytes_are_known_without_a_weight(scheme: str) -> None:
    for shape in SHAPES:
        q = random_qtensor(parse(scheme), shape, seed=4)
        noise = pack_noise(q.scheme, shape)
        assert packed_bytes(q.scheme, shape) == noise.panels.nbytes >= pack(q).panels.nbytes
        assert multiply(noise, inputs(2, shape[1])).isfinite().all()
    for dtype in (torch.bfloat16, torch.float32):
        assert wide_bytes((17, 289)) == pack_wide(torch.zeros(17, 289, dtype=dtype)).panels.nbytes
    with pytest.raises(UnsupportedError, match="no multiple of 16"):
        packed_bytes(parse("int4-g24"), (16, 48))


_PROCESSORS = """
import os, torch
from lowbit.runtime.panels import pack_noise
from lowbit.schemes import parse

def threads():
    return set(os.listdir("/proc/self/task"))

matrix, x, own = pack_noise(parse("int8-row"), (4096, 512)).matrix(), torch.ones(1, 512), threads()
may = os.sched_getaffinity(0)
first, second, *_ = may
matrix(x, threads=2)
(worker,) = map(int, threads() - own)
for here in (first, second, first):
    os.sched_setaffinity(0, {here})  # this thread alone
    matrix(x, threads=2)
    assert os.sched_getaffinity(worker) == may - {here}, here
os.sched_setaffinity(worker, {first})  # as someone else wants
os.sched_setaffinity(0, {second})
matrix(x, threads=2)
assert os.sched_getaffinity(worker) == {first}
os.sched_setaffinity(0, {first})
matrix(x, threads=2)
assert os.sched_getaffinity(worker) == {first}  # there is no other
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors of Linux"
)
def test_threads_keep_from_the_callers_processor() -> None:
    """Where its caller is a thread would wait for it, and the scheduler of a virtual machine wakes it there."""
    run = subprocess.run([sys.executable, "-c", _PROCESSORS], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["int4-g64", "q2_k", "iq4_xs", "nf4-g64", "fp8-e4m3-row", "float16"])
def test_an_input_that_is_no_number_is_not_rounded_away(scheme: str, value: float) -> None:
    """Of that token, and of it alone, nothing is finite: a model that is broken must show it."""
    cols = 512
    dense = pack_wide(wide_values(torch.float16, 48, cols)) if scheme == "float16" else None
    packed = dense or pack(random_qtensor(parse(scheme), (48, cols), seed=1))
    for tokens in (1, 17):
        x = inputs(tokens, cols)
        x[tokens // 2, 77] = value
        found = multiply(packed, x).isfinite()
        assert not found[tokens // 2].any()
        assert found[torch.arange(tokens) != tokens // 2].all()
