"""The native kernels against `tests/reference/kernels.py`, torch, and themselves on other instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import unwrap
from math import ceil, inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit import native
from tests.reference import kernels as oracle

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
INT4 = [float(i - 8) for i in range(16)]
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Rows, columns, rows and columns of a block: whole and cut blocks, one column, no rows, blocks beyond the weight.
SHAPES = [
    (3, 256, 1, 128),
    (3, 150, 1, 32),
    (4, 77, 3, 24),
    (2, 40, 9, 99),
    (3, 50, 2, 1),
    (3, 44, 1, 8),
    (1, 1, 1, 1),
    (0, 8, 1, 4),
]
shapes = pytest.mark.parametrize("shape", SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
every_width = pytest.mark.parametrize("bits", range(1, 9))


def make(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with many exact ties, its scales, and integer zeros."""
    rows, cols, high, wide = shape
    rng = torch.Generator().manual_seed(rows * cols)
    scale = 2.0 ** torch.randint(-3, 4, (ceil(rows / high), ceil(cols / wide)), generator=rng)
    zero = torch.randint(0, 16, scale.shape, generator=rng).float()
    weight = torch.randn(rows, cols, generator=rng) * 8
    ties = torch.rand(rows, cols, generator=rng) < 0.5
    return torch.where(ties, (weight * 2).round() / 4, weight).to(dtype), scale, zero


def full(blocks: Tensor, shape: tuple[int, int, int, int]) -> oracle.FloatArray:
    return oracle.expand(blocks.numpy(), shape[:2], shape[2:])


def table(levels: list[float]) -> Tensor:
    return torch.tensor(levels + [nan] * (256 - len(levels)))


def test_isa() -> None:
    assert native.isa() in native.supported_isas()
    assert native.supported_isas()[0] == "scalar"


@shapes
@dtypes
def test_block_range(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    weight, scale, _ = make(shape, dtype)
    least, greatest, bad = native.block_range(weight, *shape[2:])
    wanted = oracle.block_range(weight.float().numpy(), shape[2:])
    assert bad == -1 and least.shape == scale.shape
    np.testing.assert_array_equal(least.numpy(), wanted[0].reshape(scale.shape))
    np.testing.assert_array_equal(greatest.numpy(), wanted[1].reshape(scale.shape))


@dtypes
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("at", [0, 299, 300, 777, 1199])
def test_block_range_finds_the_first_value_that_is_not_finite(dtype: torch.dtype, value: float, at: int) -> None:
    weight = torch.ones(4, 300, dtype=dtype)
    weight.view(-1)[[at, 1199]] = value
    assert native.block_range(weight, 1, 64)[2] == at


def test_block_range_takes_negative_zero_for_zero() -> None:
    least, greatest, _ = native.block_range(-torch.zeros(1, 40), 1, 20)
    assert not least.signbit().any() and not greatest.signbit().any()


@shapes
@dtypes
@pytest.mark.parametrize("round_sum", [False, True])
def test_quantize_affine(shape: tuple[int, int, int, int], dtype: torch.dtype, round_sum: bool) -> None:
    weight, scale, zero = make(shape, dtype)
    zero = zero + 0.3 if round_sum else zero
    values = weight.float().numpy(), full(scale, shape)
    codes = native.quantize_affine(weight, scale, zero, 0, 15, *shape[2:], round_sum=round_sum)
    wanted = oracle.quantize_affine(*values, full(zero, shape), 15, round_sum=round_sum)
    np.testing.assert_array_equal(codes.numpy(), wanted)
    symmetric = native.quantize_affine(weight, scale, None, 8, 15, *shape[2:], round_sum=round_sum)
    wanted = oracle.quantize_affine(*values, np.full(shape[:2], 8, np.float32), 15, round_sum=round_sum)
    np.testing.assert_array_equal(symmetric.numpy(), wanted)


def test_quantize_affine_clamps_what_overflows() -> None:
    weight = torch.tensor([[3e38, -3e38, 1e10, -1e10, 300.0, nan]])
    codes = native.quantize_affine(weight, torch.full((1, 1), 1e-10), None, 128, 255, 1, 6)
    assert codes.tolist() == [[255, 0, 255, 0, 255, 0]]


@shapes
@pytest.mark.parametrize("count", [1, 2, 3, 8, 16, 17, 100, 256])
def test_quantize_levels(shape: tuple[int, int, int, int], count: int) -> None:
    weight, scale, _ = make(shape)
    rng = torch.Generator().manual_seed(count)
    levels = torch.randperm(300, generator=rng)[:count].sort().values / 4 - 35
    codes = torch.randperm(256, generator=rng)[:count].to(torch.uint8)
    wanted = dict(zip(codes.tolist(), levels.tolist(), strict=True))
    got = native.quantize_levels(weight, scale, levels, codes, *shape[2:])
    np.testing.assert_array_equal(got.numpy(), oracle.quantize_levels(weight.numpy(), full(scale, shape), wanted))


def test_quantize_levels_ties_of_e2m1() -> None:
    middles = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    codes = native.quantize_levels(middles, torch.ones(1, 1), torch.tensor(E2M1), torch.arange(8).byte(), 1, 7)
    assert [E2M1[c] for c in codes[0].tolist()] == [0, 1, 1, 2, 2, 4, 4]


near = st.floats(-2, 2, width=32)


@settings(max_examples=300, deadline=None)
@given(st.lists(near, min_size=2, max_size=2, unique=True), st.integers(-2, 2), st.booleans())
def test_quantize_levels_is_exact_around_a_midpoint(pair: list[float], ulps: int, odd_first: bool) -> None:
    levels = np.sort(np.array(pair, np.float32))
    value = (levels[0] + levels[1]) / np.float32(2)
    for _ in range(abs(ulps)):
        value = np.nextafter(value, np.float32(ulps * inf))
    codes = [3, 4] if odd_first else [4, 3]
    got = native.quantize_levels(
        torch.tensor([[value]]), torch.ones(1, 1), torch.from_numpy(levels), torch.tensor(codes).byte(), 1, 1
    )
    assert got.item() == oracle.nearest(float(value), dict(zip(codes, levels.tolist(), strict=True)))


FP8 = [
    ("e4m3fn", torch.float8_e4m3fn, oracle.fp8_table(4, 3, 448.0)),
    ("e5m2", torch.float8_e5m2, oracle.fp8_table(5, 2, 57344.0)),
]
fp8 = pytest.mark.parametrize(("name", "dtype", "numbers"), FP8, ids=["e4m3fn", "e5m2"])


@fp8
def test_quantize_fp8_equals_torch(name: str, dtype: torch.dtype, numbers: dict[int, float]) -> None:
    greatest = max(numbers.values())
    bits = torch.arange(-(2**31), 2**31, 40009, dtype=torch.int64).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, inf, -inf])])
    values = torch.where(values.isnan(), 1.0, values)
    grid = torch.tensor(list(numbers.values())).sort().values
    values = torch.cat([values, grid, (grid[1:] + grid[:-1]) / 2])[None]
    codes = native.quantize_fp8(values, torch.ones(1, 1), name, 1, values.numel())  # type: ignore[arg-type]
    wanted = values.clamp(-greatest, greatest).to(dtype).view(torch.uint8)
    torch.testing.assert_close(codes, wanted, rtol=0, atol=0)


@fp8
@shapes
def test_quantize_fp8(
    name: str, dtype: torch.dtype, numbers: dict[int, float], shape: tuple[int, int, int, int]
) -> None:
    weight, scale, _ = make(shape, torch.bfloat16)
    codes = native.quantize_fp8(weight, scale, name, *shape[2:])  # type: ignore[arg-type]
    values = weight.float().numpy() / full(scale, shape)
    wanted = [numbers[oracle.nearest(float(value), numbers)] for value in values.ravel()]
    assert [numbers[code] for code in codes.view(-1).tolist()] == wanted


@fp8
def test_quantize_fp8_keeps_nan(name: str, dtype: torch.dtype, numbers: dict[int, float]) -> None:
    codes = native.quantize_fp8(torch.tensor([[nan]]), torch.ones(1, 1), name, 1, 1)  # type: ignore[arg-type]
    assert codes.view(dtype).float().isnan().all()


LEVELS = [INT4, [float(i - 128) for i in range(256)], NF4, list(FP8[0][2].values())]


@shapes
@dtypes
@pytest.mark.parametrize("levels", LEVELS, ids=["int4", "int8", "nf4", "fp8"])
def test_dequantize_and_error(shape: tuple[int, int, int, int], dtype: torch.dtype, levels: list[float]) -> None:
    weight, scale, zero = make(shape, dtype)
    scale = scale * 1.1
    codes = torch.randint(0, len(levels), weight.shape).byte()
    for zeros in (None, zero + 0.3):
        got = native.dequantize(codes, scale, zeros, table(levels), *shape[2:], dtype=dtype)
        full_zero = None if zeros is None else full(zeros, shape)
        wanted = oracle.dequantize(codes.numpy(), full(scale, shape), full_zero, table(levels).numpy())
        torch.testing.assert_close(got, torch.from_numpy(wanted).to(dtype), rtol=0, atol=0)
        sums = native.error(weight, codes, scale, zeros, table(levels), *shape[2:])
        exact = oracle.error_sums(weight.float().numpy(), wanted)
        assert sums[:2] == pytest.approx(exact[:2], rel=1e-13) and sums[2] == exact[2]
        sums = native.error(dtype, codes, scale, zeros, table(levels), *shape[2:])
        exact = oracle.error_sums(got.float().numpy(), wanted)
        assert sums[:2] == pytest.approx(exact[:2], rel=1e-13) and sums[2] == exact[2]


@shapes
@pytest.mark.parametrize("rule", ["quotient", "sum", "levels"])
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_blocks(shape: tuple[int, int, int, int], rule: str, weighted: bool) -> None:
    """Those of the codes that the oracle finds, in float64; each element in one block, columns counted as told."""
    weight, scale, zero = make(shape)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) if weighted else None
    values = weight.numpy(), full(scale, shape)
    if rule == "levels":
        given, codes = None, torch.arange(len(E2M1), dtype=torch.uint8)
        coder = native.Coder(levels=torch.tensor(E2M1), codes=codes, table=table(E2M1))
        meant = np.asarray(E2M1)[oracle.quantize_levels(*values, dict(enumerate(E2M1)))]
    else:
        given, coder = (zero + 0.3 if rule == "sum" else zero), native.Coder(0, 15, rule == "sum")
        zeros = full(given, shape)
        meant = oracle.quantize_affine(*values, zeros, 15, round_sum=rule == "sum") - zeros.astype(np.float64)
    squares = (meant * values[1] - weight.double().numpy()) ** 2
    squares = squares * (importance.numpy() if importance is not None else 1)
    high, wide = shape[2:]
    wanted = [
        [squares[r : r + high, c : c + wide].sum() for c in range(0, shape[1], wide)] for r in range(0, shape[0], high)
    ]
    got = native.block_errors(weight, scale, given, coder, high, wide, importance=importance)
    np.testing.assert_allclose(got.numpy(), np.reshape(wanted, scale.shape), rtol=2e-5, atol=1e-9)


@dtypes
def test_dequantize_rounds_like_torch(dtype: torch.dtype) -> None:
    codes = torch.arange(256).byte().repeat(200, 1)
    scale = torch.logspace(-45, 36, 200, dtype=torch.float64).float()[:, None]
    levels = torch.arange(256) - 100.5
    got = native.dequantize(codes, scale, None, levels, 1, 256, dtype=dtype)
    torch.testing.assert_close(got, (levels * scale).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("levels", [INT4, NF4, NF4 + INT4], ids=["int4", "nf4", "more than 16"])
@dtypes
def test_a_code_that_the_grid_does_not_have_is_nan(levels: list[float], dtype: torch.dtype) -> None:
    codes = torch.arange(256).byte()[None]
    got = native.dequantize(codes, torch.ones(1, 1), None, table(levels), 1, 256, dtype=dtype)
    assert got.isnan().nonzero()[:, 1].tolist() == list(range(len(levels), 256))


@every_width
@pytest.mark.parametrize("size", [(3, 64), (5, 1), (2, 7), (4, 31), (3, 333), (0, 5), (4, 0), (37, 1100)])
def test_pack_bits(bits: int, size: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(bits)).byte()
    words, columns = native.pack_bits(codes, bits), native.pack_bits_transposed(codes, bits)
    wanted = torch.from_numpy(oracle.pack_bits(codes.numpy(), bits).copy())
    kept = codes & (2**bits - 1)
    torch.testing.assert_close(words, wanted, rtol=0, atol=0)
    torch.testing.assert_close(columns, wanted.T.contiguous(), rtol=0, atol=0)
    torch.testing.assert_close(native.unpack_bits(words, bits, size[1]), kept, rtol=0, atol=0)
    torch.testing.assert_close(native.unpack_bits_transposed(columns, bits, size[1]), kept, rtol=0, atol=0)


@every_width
def test_pack_bits_at_an_address_that_is_not_aligned(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 100)).byte()
    wanted = native.pack_bits(codes, bits)
    raw = bytearray(4 * wanted.numel() + 1)
    out = torch.frombuffer(raw, dtype=torch.int32, offset=1, count=wanted.numel()).view(wanted.shape)
    assert out.data_ptr() % 2 == 1
    torch.testing.assert_close(native.pack_bits(codes, bits, out=out), wanted, rtol=0, atol=0)
    torch.testing.assert_close(native.unpack_bits(out, bits, 100), codes, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (8, 0), (8, 1), (16, 31), (136, 33), (128, 513), (264, 1030)])
def test_eight_rows_to_a_word(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, shape).byte()
    words = native.pack_awq(codes)
    assert words.tolist() == oracle.pack_awq(codes.numpy()).tolist()
    torch.testing.assert_close(native.unpack_awq(words), codes & 15, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_some_rows_of_transposed_words(bits: int) -> None:
    """Panels of rows fill the words of the whole, and are found in them; nothing beside them is touched."""
    codes = torch.randint(0, 2**bits, (200, 300)).byte()
    whole = native.pack_bits_transposed(codes, bits)
    made, back = torch.full_like(whole, -1), torch.empty_like(codes)
    for start, stop in ((128, 200), (0, 128)):
        native.pack_bits_transposed(codes[start:stop], bits, out=made[:, start:stop])
        native.unpack_bits_transposed(whole[:, start:stop], bits, 300, out=back[start:stop])
        assert start == 0 or bool((made[:, :start] == -1).all())
    assert torch.equal(made, whole) and torch.equal(back, codes)


def test_some_rows_of_eights() -> None:
    codes = torch.randint(0, 16, (200, 300)).byte()
    whole = native.pack_awq(codes)
    made, back = torch.full_like(whole, -1), torch.empty_like(codes)
    for start, stop in ((128, 200), (0, 128)):
        native.pack_awq(codes[start:stop], out=made[:, start // 8 : stop // 8])
        native.unpack_awq(whole[:, start // 8 : stop // 8], out=back[start:stop])
        assert start == 0 or bool((made[:, : start // 8] == -1).all())
    assert torch.equal(made, whole) and torch.equal(back, codes)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (17, 65), (48, 200)])
def test_transposed_words(shape: tuple[int, int]) -> None:
    """Of some columns of a matrix into some of another, and nothing beside these."""
    source, made = (
        torch.randint(-(2**31), 2**31, (shape[0], shape[1] + 3)).int(),
        torch.zeros(shape[1], shape[0] + 4).int(),
    )
    native.transpose_words(source[:, 2 : 2 + shape[1]], out=made[:, 1 : 1 + shape[0]])
    assert torch.equal(made[:, 1 : 1 + shape[0]], source[:, 2 : 2 + shape[1]].T)
    assert not made[:, :1].any() and not made[:, 1 + shape[0] :].any()


@pytest.mark.parametrize("count", [0, 1, 1000, (1 << 17) - 1, 1 << 17, (1 << 18) + 5])
def test_what_a_file_holds(count: int, tmp_path: Path) -> None:
    """Every other byte, one too few in the file, and a tensor that is in another place are found."""
    data, other = torch.randint(0, 256, (count,)).byte(), torch.randn(7)
    path = tmp_path / "file"
    path.write_bytes(b"12345" + other.numpy().tobytes() + data.numpy().tobytes())
    with path.open("r+b") as file:
        assert native.file_holds(file.fileno(), [(data, 33), (other, 5), (data[:0], 999)])
        assert not native.file_holds(file.fileno(), [(data, 33), (other, 6)])
        for at in {0, count // 2, count - 1} if count else ():
            wrong = data.clone()
            wrong[at] ^= 1
            assert not native.file_holds(file.fileno(), [(other, 5), (wrong, 33)])
        file.truncate(33 + count - 1)
        assert native.file_holds(file.fileno(), [(data, 33)]) == (count == 0)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (8, 8), (16, 136), (520, 72), (200, 304)])
def test_eights_from_words(shape: tuple[int, int]) -> None:
    """Words go over with no code on its own; some columns of a matrix are filled, and found, and nothing beside."""
    codes = torch.randint(0, 16, shape).byte()
    rows, wanted = native.pack_bits(codes, 4), torch.from_numpy(oracle.pack_awq(codes.numpy()))
    matrix = torch.full((shape[1], shape[0] // 8 + 3), -1, dtype=torch.int32)
    part = matrix[:, 2 : 2 + shape[0] // 8]
    assert torch.equal(native.lines_to_awq(rows.T.contiguous(), out=part), wanted)
    assert torch.equal(native.awq_to_rows(part), rows)
    assert torch.equal(native.awq_to_lines(part), rows.T)
    assert bool((matrix[:, :2] == -1).all() and (matrix[:, -1:] == -1).all())


@pytest.mark.parametrize("count", [0, 1, 2, 31, 4095, 4096, 4097, 10000])
def test_nibbles(count: int) -> None:
    codes = torch.randint(0, 16, (count,)).byte()
    packed = native.pack_nibbles_high_first(codes)
    assert packed.tolist() == oracle.pack_nibbles_high_first(codes.numpy()).tolist()
    torch.testing.assert_close(native.unpack_nibbles_high_first(packed, count), codes, rtol=0, atol=0)


def test_rows_may_be_cut_among_threads() -> None:
    weight, scale, zero = make((64, 300, 2, 32), torch.bfloat16)
    whole = native.quantize_affine(weight, scale, zero, 0, 15, 2, 32)
    out = torch.empty_like(whole)

    def piece(row: int) -> None:
        rows, blocks = slice(row, row + 8), slice(row // 2, row // 2 + 4)
        native.quantize_affine(weight[rows], scale[blocks], zero[blocks], 0, 15, 2, 32, out=out[rows])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(piece, range(0, 64, 8)))
    torch.testing.assert_close(out, whole, rtol=0, atol=0)


ONE = torch.ones(2, 1)
WEIGHT = torch.ones(2, 32)
CODES = torch.zeros(2, 32, dtype=torch.uint8)
WORDS = torch.zeros(2, 3, dtype=torch.int32)
MISTAKES: list[tuple[str, Callable[..., object], tuple[object, ...], dict[str, object]]] = [
    ("weight is torch.float64", native.block_range, (WEIGHT.double(), 1, 32), {}),
    ("weight must be contiguous", native.block_range, (torch.ones(32, 2).T, 1, 32), {}),
    ("block of 0 x 32", native.block_range, (WEIGHT, 0, 32), {}),
    ("a matrix is needed", native.block_range, (WEIGHT[0], 1, 32), {}),
    (r"scale has shape \[2, 1\]; it must be \[2, 2\]", native.quantize_fp8, (WEIGHT, ONE, "e5m2", 1, 16), {}),
    ("format is 'e3m4'", native.quantize_fp8, (WEIGHT, ONE, "e3m4", 1, 32), {}),
    ("zero has shape", native.quantize_affine, (WEIGHT, ONE, torch.ones(1, 2), 0, 15, 1, 32), {}),
    ("code_max is 256", native.quantize_affine, (WEIGHT, ONE, None, 0, 256, 1, 32), {}),
    ("out has shape", native.quantize_affine, (WEIGHT, ONE, None, 0, 15, 1, 32), {"out": CODES[:1]}),
    ("ascending", native.quantize_levels, (WEIGHT, ONE, torch.tensor([1.0, 0.0]), torch.zeros(2).byte(), 1, 32), {}),
    ("levels has shape", native.quantize_levels, (WEIGHT, ONE, torch.zeros(0), torch.zeros(0).byte(), 1, 32), {}),
    ("levels has shape", native.dequantize, (CODES, ONE, None, torch.ones(16), 1, 32), {}),
    ("levels are needed", native.dequantize, (CODES, ONE, None, None, 1, 32), {}),
    ("out is torch.float64", native.dequantize, (CODES, ONE, ONE, None, 1, 32), {"dtype": torch.float64}),
    ("weight has shape", native.error, (WEIGHT[:1], CODES, ONE, ONE, None, 1, 32), {}),
    ("bits is 9", native.pack_bits, (CODES, 9), {}),
    ("bits is 0", native.pack_bits_transposed, (CODES, 0), {}),
    ("words has shape", native.unpack_bits, (WORDS, 4, 32), {}),
    ("words has shape", native.unpack_bits_transposed, (WORDS, 4, 32), {}),
    ("12 rows", native.pack_awq, (torch.zeros(12, 4).byte(),), {}),
    ("words is torch.uint8", native.unpack_awq, (CODES,), {}),
    ("words must be contiguous", native.unpack_awq, (WORDS.T,), {}),
    ("words must be contiguous", native.unpack_bits_transposed, (WORDS.T, 4, 24), {}),
    ("out has shape", native.pack_bits_transposed, (CODES, 4), {"out": WORDS}),
    ("packed has shape", native.unpack_nibbles_high_first, (CODES[0], 5), {}),
]


@pytest.mark.parametrize(("words", "function", "args", "options"), MISTAKES)
def test_a_mistake_is_named(
    words: str, function: Callable[..., object], args: tuple[object, ...], options: dict[str, object]
) -> None:
    # Unwrapped: most of these break an annotation too, and users have no checker of annotations before them.
    with pytest.raises(ValueError, match=words):
        unwrap(function)(*args, **options)


DIGEST = """
import hashlib, torch
from lowbit import native
rng = torch.Generator().manual_seed(1)
seen = hashlib.sha256()
for rows, cols, wide in [(3, 77, 24), (2, 300, 32), (1, 4099, 4099)]:
    blocks = rows, -(-cols // wide)
    scale = torch.rand(blocks, generator=rng) + 0.1
    weight = torch.randn(rows, cols, generator=rng).bfloat16()
    codes = native.quantize_affine(weight, scale, None, 8, 15, 1, wide)
    levels = torch.linspace(-3, 3, 256)
    results = [codes, *native.block_range(weight, 1, wide)[:2], native.quantize_fp8(weight, scale, "e4m3fn", 1, wide)]
    results += [native.quantize_levels(weight, scale, levels, torch.arange(256).byte(), 1, wide)]
    results += [native.dequantize(codes, scale, None, levels, 1, wide), native.pack_bits(codes, 3)]
    results += [torch.tensor(native.error(weight, codes, scale, None, levels, 1, wide), dtype=torch.float64)]
    for result in results:
        seen.update(result.numpy().tobytes())
print(native.isa(), seen.hexdigest())
"""


def run_with(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LOWBIT_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_every_instruction_set_gives_the_same_bits() -> None:
    runs = [run_with(isa, DIGEST) for isa in native.supported_isas()]
    lines = [run.stdout.split() for run in runs]
    assert [line[0] for line in lines] == list(native.supported_isas()), runs[0].stderr
    assert len({line[1] for line in lines}) == 1


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    run = run_with("mmx", "from lowbit import native; native.isa()")
    assert run.returncode != 0 and "LOWBIT_ISA=mmx is not available on this CPU" in run.stderr


def test_bfloat16_is_computed_in_where_it_is_about_as_fast() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = native.computes_bfloat16()
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        assert not found
        return

    def seconds(left: Tensor) -> float:
        return min(timeit.repeat(lambda: left @ left.T, number=3, repeat=15))

    weight = torch.randn(384, 384)
    share = seconds(weight.bfloat16()) / seconds(weight)
    assert found or share > 1.1
    assert not found or share < 1.5 or "amx_bf16" in flags
