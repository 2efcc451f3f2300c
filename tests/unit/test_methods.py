"""The methods without data: against their slow definitions, numbers worked out by hand, and packages that have them."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import plugins
from lowbit.errors import WeightError
from lowbit.methods import Method, NoOptions, hqq, mse, rtn
from lowbit.methods._scales import nest, regions, round_scales
from lowbit.schemes import DOUBLE, Block, parse
from lowbit.tensors import QTensor, level_table
from tests.reference import grids as slow_grids
from tests.reference import methods as slow

FAMILIES = [*(f"int{bits}" for bits in range(1, 9)), "nf4", "fp4", "fp8-e4m3", "fp8-e5m2"]
BLOCKS = ["tensor", "row", "g8", "g7", "3x5"]
SCHEMES = [f"{family}-{block}" for family in FAMILIES for block in BLOCKS if family in ("int4", "nf4") or block == "g8"]
SCHEMES += [
    f"int{bits}-{block}-{zero}" for bits in (1, 3, 4, 8) for block in ("row", "g7") for zero in ("asym", "fzero")
]
SCHEMES += [
    f"{grid}-{kind}" for grid in ("int4", "nf4", "int3-fzero", "fp8-e4m3-3x5") for kind in ("f16", "bf16", "f32")
]
SCHEMES += ["mxfp4", "mxfp8", "nvfp4", "fp8-e4m3-tensor", "fp8-e5m2-row"]
SCHEMES += ["levels[-1,-0.3,0,0.2,0.5]-g8", "levels[0,0.1,1]-g8", "levels[-3,-1]-g7", "levels[0.5,1,4]"]
ROUND = NoOptions()

MINIMA = [f"int{bits}-{block}-min" for bits in (1, 4, 8) for block in ("row", "g7", "g7-bf16", "g7-f32")]


def heavy(rows: int, cols: int, seed: int = 0, size: float = 0.02) -> Tensor:
    """A weight with heavy tails: Student's t with 3 degrees of freedom."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(3, (rows, cols)).astype(np.float32) * np.float32(size))


def effective(q: QTensor) -> np.ndarray[Any, Any]:
    return q.scale_values().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*SCHEMES, *MINIMA])
def test_rtn_is_its_definition(name: str, dtype: torch.dtype) -> None:
    scheme, weight = parse(name), heavy(5, 43, seed=len(name)).to(dtype)
    weight[1], weight[2, :8], weight[3, 8:16] = 0, weight[2, :8].abs(), -weight[3, 8:16].abs()
    q = rtn.quantize(weight, {}, scheme, ROUND)
    blocks = slow.rtn(weight.float().numpy(), scheme)
    decoded = q.dequantize().numpy()
    assert len(blocks) == q.scale_values().numel()
    for i, block in enumerate(blocks):
        assert effective(q).flat[i] == block.scale, i
        shifts = q.zero_values()
        assert shifts is None or shifts.flatten()[i].item() == block.zero, i
        np.testing.assert_array_equal(q.codes[block.rows, block.cols], block.codes)
        np.testing.assert_array_equal(decoded[block.rows, block.cols], block.decoded)


def test_rtn_by_hand() -> None:
    weight = torch.tensor([[-7.5, -3.5, -2.5, -0.5, 0.5, 1.5, 2.5, 6.0]])
    q = rtn.quantize(weight, {}, parse("int4-row"), ROUND)  # scale 15 / 15; ties to even, -7.5 to -8
    assert q.scale_values().item() == 1 and q.codes.tolist() == [[0, 4, 6, 8, 8, 10, 10, 14]]
    q = rtn.quantize(weight, {}, parse("int4-row-asym"), ROUND)  # 13.5 / 15 = 0.9, in float16 0.89990; 7.5 / s = 8.334
    assert q.scale_values().item() == 0.89990234375 and q.zeros is not None and q.zeros.item() == 8
    assert q.codes.tolist() == [[0, 4, 5, 7, 9, 10, 11, 15]]
    q = rtn.quantize(weight, {}, parse("int4-row-fzero-f32"), ROUND)
    assert q.zeros is not None and q.zeros.item() == np.float32(7.5) / np.float32(0.9)
    q = rtn.quantize(weight / 7.5 * 3, {}, parse("mxfp4"), ROUND)  # absmax 3 = 1.5 * 2: 2**(1 - 2)
    assert q.scale_values().item() == 0.5 and q.codes.tolist() == [[15, 13, 12, 9, 1, 2, 4, 6]]


@pytest.mark.parametrize(("largest", "exponent"), [(4.0, 0), (6.9, 0), (7.0, 1), (7.9, 1), (8.0, 1), (1e-38, -127)])
def test_mxfp4_scales_round_absmax_up_from_seven_fourths(largest: float, exponent: int) -> None:
    """Absmax 4 to 6.99 has scale 1: FP4's greatest power of two is 4."""
    q = rtn.quantize(torch.tensor([[largest, -largest / 3]]), {}, parse("mxfp4"), ROUND)
    assert q.scale_values().item() == 2.0**exponent


def test_nvfp4_has_a_global_divisor_and_fp8_scales() -> None:
    weight = torch.tensor([[6.0] * 16 + [0.3] * 16 + [0.0] * 8])
    q = rtn.quantize(weight, {}, parse("nvfp4"), ROUND)
    assert isinstance(q.scales, QTensor) and q.scales.scale_values().item() == 1 / np.float32(448)
    stored = level_table(q.scales.scheme.grid)[q.scales.codes.long()]
    assert stored.tolist() == [[448.0, 22.0, 1.0]]  # 448 * 0.3 / 6 = 22.4; all-zero blocks have 1
    whole = {"range": torch.tensor([-12.0, 3.0])}
    wider = rtn.quantize(weight, whole, parse("nvfp4"), ROUND)
    assert isinstance(wider.scales, QTensor) and wider.scales.scale_values().item() == 1 / np.float32(224)


def test_one_scale_for_all_rows_comes_from_the_range_of_the_whole_tensor() -> None:
    weight, whole = heavy(4, 8), {"range": torch.tensor([-3.0, 1.5])}
    for name in ("int8-tensor-f32", "fp8-e4m3-tensor"):
        for method in (rtn, mse):
            q = method.quantize(weight, whole, parse(name), method.METHOD.options())
            assert q.scale_values().item() == np.float32(3) / np.float32(448 if "fp8" in name else 127.5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("int4-row", [0.0, 0.0]),
        ("int4-row-fzero", [0.0, 0.0]),
        ("nvfp4", [0.0, 0.0]),
        ("mxfp8", [0.0, -0.0]),
        ("int1-row", [0.5, 2.0]),  # the table is -1 and 0: nothing to choose
        ("int4-row-asym", [1e30, 0.0]),
        ("int4-row-f32-asym", [3.4e38, -3.4e38]),
        ("int8-row-f32", [-3.4e38, 0.0]),
        ("nf4-row", [1e-45, 0.0]),
        ("fp8-e4m3-row", [1e-45, -1e-45, 0.0]),
        ("int4-row", [1e-30, 0.0]),
        ("nvfp4", [1e-40, 0.0]),
        ("nvfp4", [3e38, 0.0]),
        ("mxfp4", [1e-45, 0.0]),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_zero_stays_zero_and_scales_stay_finite(method: str, name: str, values: list[float]) -> None:
    record: Method = plugins.load("methods", method)
    weight = torch.tensor([values])
    q = record.quantize(weight, {}, parse(name), record.options())
    scales, decoded = q.scale_values(), q.dequantize()
    assert scales.isfinite().all() and (scales > 0).all() and decoded.isfinite().all()
    assert (decoded[weight == 0] == 0).all()
    stored = q.scales if isinstance(q.scales, Tensor) else level_table(q.scales.scheme.grid)[q.scales.codes.long()]
    assert weight.any() or stored.item() == 1


def test_all_zero_blocks_of_a_table_without_zero_come_close() -> None:
    q = rtn.quantize(torch.zeros(1, 4), {}, parse("levels[-1,1]-row"), ROUND)
    assert q.dequantize().abs().max() == 2.0**-24


@pytest.mark.parametrize("value", [100.0, -0.37, 1e-3, 1e4])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1e-6])
def test_float_zero_points_keep_nearly_constant_blocks(value: float, spread: float) -> None:
    """A range far from 0 needs a zero point of thousands of codes, which the type of the scales cannot hold exactly."""
    weight = value * (1 + spread * torch.rand(1, 64, generator=torch.Generator().manual_seed(0)))
    for kind, bits in (("f16", 10), ("bf16", 7)):
        q = rtn.quantize(weight, {}, parse(f"int4-row-fzero-{kind}"), ROUND)
        assert (q.dequantize() - weight).abs().max() <= abs(value) * max(spread / 15, 2.0**-bits) * 1.01


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_is_not_finite_is_refused_with_its_place(method: str, value: float) -> None:
    record: Method = plugins.load("methods", method)
    weight = torch.ones(6, 40, dtype=torch.bfloat16)
    weight[4, 7] = weight[5, 1] = value
    with pytest.raises(WeightError, match=rf"^{value} at row 4, column 7 \(element 167\)$"):
        record.quantize(weight, {}, parse("int4-g16-fzero"), record.options())


def test_rounding_of_scales() -> None:
    values = torch.tensor([[1.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1e30, 1e-30, 0.0, 65519.0]])
    largest = torch.tensor([[1.0, 1, 1, 1, 1, 0, 1]])
    halves = round_scales(values, largest, parse("int4-row"))
    assert halves.tolist() == [[1.0, 1.0, 1 + 2.0**-9, 65504.0, 2.0**-24, 1.0, 65504.0]]


@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (130, 3001), (3, 700_001), (0, 5), (5, 0)])
@pytest.mark.parametrize("block", [Block(1, 128), Block(1, 0), Block(0, 0), Block(64, 48), Block(1, 7, flat=True)])
@pytest.mark.parametrize("size", [1 << 18, 1 << 21])
def test_regions_cover_every_element_and_block_once(shape: tuple[int, int], block: Block, size: int) -> None:
    if block.flat:
        shape = (1, shape[0] * shape[1])
    high, wide = block.rows or shape[0], block.cols or shape[1]
    seen = torch.zeros(shape, dtype=torch.uint8)
    blocks = torch.zeros(-(-shape[0] // max(high, 1)), -(-shape[1] // max(wide, 1)), dtype=torch.uint8)
    for rows, cols, down, across, (height, width) in regions(shape, block, size):
        seen[rows, cols] += 1
        blocks[down, across] += 1
        assert seen[rows, cols].shape == (height * (down.stop - down.start), width * (across.stop - across.start))
        assert rows.start == down.start * high and cols.start == across.start * wide
    assert (seen == 1).all() and (blocks == 1).all()


# ---- double quantization ----


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes").functional


@pytest.mark.parametrize("count", [2, 255, 256, 257, 5000])
def test_nested_scales_are_the_nearest_levels_that_bitsandbytes_finds(count: int) -> None:
    functional = bitsandbytes()
    scales = heavy(1, count, size=0.1).abs() + 0.05
    ours = nest(scales, DOUBLE)
    assert ours.offset is not None and torch.allclose(ours.offset, scales.mean(), rtol=1e-6)
    # in float64 the package searches all levels; its float32 kernel is tested below
    code = functional.create_dynamic_map()
    centred = (scales - ours.offset).flatten()
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), code, 256)
    assert isinstance(ours.scales, Tensor) and torch.equal(ours.scales.flatten(), absmax)
    assert torch.equal(ours.codes.flatten(), theirs)
    decoded = functional.dequantize_blockwise(theirs, absmax=absmax, code=code, blocksize=256) + ours.offset
    assert torch.equal(ours.dequantize().flatten(), decoded)


def test_nested_scales_differ_from_the_float32_kernel_of_bitsandbytes_near_midpoints_only() -> None:
    """That kernel rounds quotients to 16 bits first (0.50 on AVX-512), and so misses the nearest level now and then."""
    functional = bitsandbytes()
    scales = heavy(1, 100_000, size=0.1).abs() + 0.05
    ours = nest(scales, DOUBLE)
    assert ours.offset is not None and isinstance(ours.scales, Tensor)
    theirs, state = functional.quantize_blockwise((scales - ours.offset).flatten(), blocksize=256)
    assert torch.equal(ours.scales.flatten(), state.absmax)
    quotients = (scales - ours.offset).flatten() / state.absmax.repeat_interleave(256)[: scales.numel()]
    levels = torch.tensor(DOUBLE.grid.levels)
    far = (levels[theirs.long()] - quotients).abs() - (levels[ours.codes.flatten().long()] - quotients).abs()
    assert far.min() >= 0 and far.max() < 2.0**-14
    assert (theirs != ours.codes.flatten()).float().mean() < 0.005


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantized_tables_are_what_bitsandbytes_stores(kind: str) -> None:
    functional = bitsandbytes()
    weight = heavy(96, 64)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(1, -1)
    ours = rtn.quantize(weight.view(1, -1), {}, parse(f"{kind}-flat64"), ROUND)
    assert isinstance(ours.scales, Tensor) and torch.equal(ours.scales.flatten(), state.absmax)
    levels = torch.tensor(parse(kind).grid.levels)
    assert torch.equal(levels[theirs.long()], levels[ours.codes.long()])  # codes too, but for 0 and -0 of fp4
    assert torch.equal(functional.dequantize_4bit(packed, state).view(1, -1), ours.dequantize())


def test_nested_scales_stay_positive() -> None:
    scales = torch.full((1, 300), 1e-7)
    scales[0, 7] = 1.0
    decoded = nest(scales, DOUBLE).dequantize()
    assert (decoded > 0).all() and decoded[0, 7] == pytest.approx(1, rel=1e-3)


def test_all_zero_blocks_do_not_spoil_the_scales_of_their_neighbours() -> None:
    functional = bitsandbytes()
    weight = heavy(64, 64)
    weight[::5] = 0
    q = rtn.quantize(weight, {}, parse("nf4-g64-dq"), ROUND)
    scales = nest(q.scale_values(), DOUBLE)
    kept = weight.abs().amax(1, keepdim=True) > 0
    assert (scales.dequantize()[kept] / q.scale_values()[kept] - 1).abs().max() < 0.05
    assert (scales.dequantize() > 0).all()
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert scales.offset is not None and torch.allclose(scales.offset, state.offset, rtol=1e-6)


def test_nested_scales_of_nothing() -> None:
    assert nest(torch.ones(0, 3), DOUBLE).dequantize().shape == (0, 3)


# ---- compressed-tensors ----


def ct_rtn(weight: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, zero points and decoded weight of compressed-tensors' own round-to-nearest, in float32."""
    package = pytest.importorskip("compressed_tensors.quantization", reason="compares with compressed-tensors")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    arguments: dict[str, Any] = {
        "int4": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "int3-asym": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
        "int8-row": {"num_bits": 8, "strategy": "channel"},
        "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        "nvfp4": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    }[name]  # fmt: skip
    args = package.QuantizationArgs(**{"symmetric": True, "zp_dtype": torch.int8} | arguments)
    size = args.group_size or weight.shape[1]
    groups = weight.view(len(weight), -1, size)
    divisor = utils.generate_gparam(weight.min(), weight.max()) if name == "nvfp4" else None
    scale, zero = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=divisor)
    decoded = package.fake_quantize(weight, scale, zero, args, global_scale=divisor)
    return scale if divisor is None else scale / divisor, zero, decoded


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("int4", "int4-g32-f32"),
        ("int3-asym", "int3-g32-asym-f32"),
        ("int8-row", "int8-row-f32"),
        ("fp8", "fp8-e4m3-row"),
        ("mxfp4", "mxfp4"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
    ],
)
def test_rtn_is_that_of_compressed_tensors(name: str, ours: str) -> None:
    weight = heavy(64, 128, seed=1)
    scale, zero, decoded = ct_rtn(weight, name)
    q = rtn.quantize(weight, {}, parse(ours), ROUND)
    # NVFP4: we multiply by 1 / g, which is what a file means, they divide by g: one rounding apart
    exact = name != "nvfp4"
    assert torch.equal(q.scale_values(), scale) if exact else torch.allclose(q.scale_values(), scale, rtol=3e-7, atol=0)
    if q.zeros is not None:
        assert torch.equal(q.zeros.int() - 4, zero.int())
    tolerance = 0.0 if exact else 3e-7
    near = torch.isclose(q.dequantize(), decoded, rtol=tolerance, atol=0)
    assert (~near).sum() <= 2  # a quotient within one float32 step of a tie may fall on either side


# ---- mse ----


@pytest.mark.parametrize("p", [2.0, 2.4, 1.0])
@pytest.mark.parametrize(
    "name", ["int4-g16-f32", "int4-g16-asym", "int3-g9", "nf4-g16", "fp8-e4m3-g16", "int2-2x8", "int1-g16"]
)
def test_mse_finds_what_the_slow_search_finds(name: str, p: float) -> None:
    scheme, weight = parse(name), heavy(4, 41, seed=3)
    for signed in (True, False):
        q = mse.quantize(weight, {}, scheme, mse.Options(p=p, signed=signed))
        decoded, turns = q.dequantize().numpy(), signed and name in ("int4-g16-f32", "int3-g9", "int2-2x8")
        assert (effective(q) < 0).any() == turns
        for rows, cols in slow.cut((4, 41), scheme):
            part = weight[rows, cols].numpy()
            found = slow.norm(part, decoded[rows, cols], p)
            assert found <= slow.shrink_search(part, scheme, p, turns) * (1 + 1e-4)


@pytest.mark.parametrize("name", [*SCHEMES, "levels[-1,-0.3,0,0.2,0.5]-tensor"])
def test_mse_is_never_worse_than_rtn(name: str) -> None:
    scheme, weight = parse(name), heavy(9, 70, seed=4).bfloat16()
    exact = weight.double()
    for p in (2.0, 0.7):
        searched = mse.quantize(weight, {}, scheme, mse.Options(p=p, steps=25)).dequantize().double()
        rounded = rtn.quantize(weight, {}, scheme, ROUND).dequantize().double()
        for rows, cols in slow.cut((9, 70), scheme):
            at = (rows, cols)
            assert (searched[at] - exact[at]).abs().pow(p).sum() <= (rounded[at] - exact[at]).abs().pow(p).sum()


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("int4-g64", 0.9),
        ("int2-g64", 0.7),
        ("int4-g64-asym", 0.95),
        ("nf4-g64", 0.95),
        ("nvfp4", 0.8),
        ("mxfp4", 0.999),
    ],
)
def test_mse_gains_what_it_should(name: str, gain: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = [
        (m.quantize(weight, {}, parse(name), m.METHOD.options()).dequantize() - weight).square().sum()
        for m in (mse, rtn)
    ]
    assert error[0] < gain * error[1]


def test_nvfp4_search_meets_every_fp8_scale_around_the_start() -> None:
    """In each block the best of all E4M3 scales from a fifth of round-to-nearest's to one and a half of it."""
    weight, whole, scheme = heavy(1, 16 * 24, seed=8), {"range": torch.tensor([-2.0, 2.0])}, parse("nvfp4")
    found, start = (m.quantize(weight, whole, scheme, m.METHOD.options()) for m in (mse, rtn))
    assert isinstance(found.scales, QTensor) and isinstance(start.scales, QTensor)
    table = level_table(found.scales.scheme.grid)
    for i, (code, first) in enumerate(zip(found.scales.codes[0].tolist(), start.scales.codes[0].tolist(), strict=True)):
        part, errors = weight[:, 16 * i : 16 * i + 16].numpy(), {}
        for trial in (code for code in range(1, 127) if 0.2 <= table[code] / table[first] <= 1.5):
            scale = float(np.float32(table[trial].item()) * np.float32(1 / np.float32(448 * 6 / 2)))
            errors[trial] = slow.norm(part, slow.encode(part, scale, None, scheme)[1], 2)
        assert first in errors and len(errors) > 10
        assert errors[code] <= min(errors.values()) * (1 + 1e-4)


@pytest.mark.parametrize("name", ["int4-g16-asym", "int2-g16-asym", "int3-g16-fzero", "int3-g16-min-f32"])
def test_mse_leaves_no_better_zero_point_beside_the_one_it_found(name: str) -> None:
    scheme, weight = parse(name), heavy(12, 64, seed=7)
    q = mse.quantize(weight, {}, scheme, mse.Options())
    zeros = q.minima / q.scale_values() if isinstance(q.minima, Tensor) else q.zeros
    assert zeros is not None
    beside = (-1.0, 1.0) if scheme.zero == "int" else (-0.5, -0.25, 0.125, 0.375)
    scheme = replace(scheme, zero="float") if scheme.zero == "min" else scheme
    for i, (rows, cols) in enumerate(slow.cut((12, 64), scheme)):
        part, scale, zero = weight[rows, cols].numpy(), float(effective(q).flat[i]), float(zeros.flatten()[i])
        found, *others = (slow.norm(part, slow.encode(part, scale, zero + d, scheme)[1], 2) for d in (0.0, *beside))
        legal = [
            error
            for error, d in zip(others, beside, strict=True)
            if scheme.zero != "int" or 0 <= zero + d < 2**scheme.grid.bits
        ]
        assert found <= min(legal) * (1 + 1e-4)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"max_shrink": 1.0}, {"p": 0.0}, {"p": inf}])
def test_mse_refuses_senseless_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        mse.Options(**wrong)


# ---- hqq ----

PUBLISHED = hqq.Options(ranges=1)


def lost(weight: Tensor, decoded: Tensor, bits: int = 4) -> Tensor:
    """What hqq judges by, of each group of 64: the mean error, below 4 bits that of its square."""
    return (decoded - weight).double().abs().pow(1 if bits >= 4 else 2).view(-1, 64).mean(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_hqq_keeps_the_best_point_of_the_published_walk(bits: int, size: float) -> None:
    weight, scheme = heavy(6, 64, seed=bits, size=size), parse(f"int{bits}-g64-fzero-f32")
    start = rtn.quantize(weight, {}, scheme, ROUND)
    found = hqq.quantize(weight, {}, scheme, PUBLISHED)
    assert isinstance(found.scales, Tensor) and torch.equal(found.scales, start.scale_values())
    for row, error in enumerate(lost(weight, found.dequantize(), bits)):
        part, scale = weight[row].numpy(), effective(start)[row, 0].item()
        assert start.zeros is not None
        first = start.zeros[row, 0].item()
        walk = slow.half_quadratic(part, scale, round(first) if bits == 4 else first, bits)
        errors = [
            (np.abs(slow.encode(part, scale, zero, scheme)[1] - part).astype(float) ** (1 if bits >= 4 else 2)).mean()
            for zero in [first, *walk]
        ]
        assert error <= min(errors) * 1.002  # float32 and float64 walks part a little where a weight sits on a tie


@pytest.mark.parametrize(
    "name",
    ["int4-g64-fzero", "int4-g64-fzero-bf16", "int3-g64-fzero", "int4-g64-asym", "int1-g64-fzero", "int3-g64-min-bf16"],
)
def test_hqq_is_never_worse_than_rtn(name: str) -> None:
    weight, scheme = heavy(20, 256, seed=5), parse(name)
    plain = lost(weight, rtn.quantize(weight, {}, scheme, ROUND).dequantize(), scheme.grid.bits)
    for options in (PUBLISHED, hqq.Options()):
        errors = lost(weight, hqq.quantize(weight, {}, scheme, options).dequantize(), scheme.grid.bits)
        assert (errors <= plain * (1 + 1e-6)).all()
        assert errors.sum() < (0.999 if "asym" not in name else 1.0001) * plain.sum()


@pytest.mark.parametrize("name", ["int4-g64-fzero", "int2-g64-fzero-f32", "int3-g64-asym", "int3-g64-min-f32"])
def test_hqq_takes_the_scale_of_the_range_with_the_least_squares(name: str) -> None:
    weight, scheme = heavy(20, 64, seed=7), parse(name)
    found, shrunk = hqq.quantize(weight, {}, scheme, hqq.Options(ranges=8)), 0
    scheme = replace(scheme, zero="float") if scheme.zero == "min" else scheme
    for row, scale in enumerate(effective(found)[:, 0].tolist()):
        part = weight[row].numpy()
        low, high = (float(part.min()), float(part.max())) if scheme.zero == "float" else (min(*part, 0), max(*part, 0))
        errors = {}
        for ratio in (1 - i / 16 for i in range(8)):
            margin = (high - low) * (1 - ratio) / 2
            ends = (low + margin, high - margin) if scheme.zero == "float" else (low * ratio, high * ratio)
            trial = slow.stored(slow.plain_scale(float(ends[0]), float(ends[1]), scheme), 1.0, scheme)
            zero = slow.stored_zero(float(ends[0]), trial, scheme)
            errors[trial] = slow.norm(part, slow.encode(part, trial, zero, scheme)[1], 2)
        nearest = min(errors, key=lambda trial: abs(trial - scale))
        assert nearest == pytest.approx(scale, rel=1e-3) and errors[nearest] <= min(errors.values()) * (1 + 1e-3)
        shrunk += scale < 0.99 * max(errors)
    assert shrunk > 5


@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_hqq_error_is_not_above_the_packages(kind: str, size: float) -> None:
    weight = heavy(64, 512, seed=6, size=size)
    assert_not_above_the_package(weight, kind)


def test_hqq_error_is_not_above_the_packages_on_a_model(shared: Path) -> None:
    from safetensors import safe_open

    with safe_open(shared / "models/wiki-8m/model.safetensors", "pt") as file:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            assert_not_above_the_package(file.get_tensor(name).float(), "f16")


def assert_not_above_the_package(weight: Tensor, kind: str) -> None:
    package = pytest.importorskip("hqq.core.quantize", reason="compares with the hqq package")
    codes, meta = package.Quantizer.quantize(
        weight, nbits=4, group_size=64, round_zero=True, axis=1, device="cpu", bitpack=False
    )
    dtype = torch.float16 if kind == "f16" else torch.float32
    scale, zero = (meta[part].to(dtype).float() for part in ("scale", "zero"))
    theirs = ((codes.float() - zero) * scale).reshape(weight.shape)
    ours = hqq.quantize(weight, {}, parse(f"int4-g64-fzero-{kind}"), PUBLISHED).dequantize()
    for p in (1.0, 0.7):  # what the package watches, and what it minimises
        errors = [(decoded - weight).abs().double().pow(p).mean().item() for decoded in (ours, theirs)]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("int4-g64", "zero points"), ("nf4", "zero points"), ("int4-tensor-fzero", "blocks within rows")],
)
def test_hqq_says_what_it_needs(name: str, reason: str) -> None:
    assert reason in (hqq.METHOD.supports(parse(name)) or "")
    assert hqq.METHOD.supports(parse("int4-g64-fzero")) is None


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"ranges": 0}, {"lp_norm": 1.1}, {"lp_norm": 0.0}, {"beta": 0.0}, {"kappa": 0.9}]
)
def test_hqq_refuses_senseless_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more, lp_norm"):
        hqq.Options(**wrong)


def test_double_quantization_is_left_to_the_caller() -> None:
    scheme, weight = parse("nf4-g64-dq"), heavy(4, 128)
    q = rtn.quantize(weight, {}, scheme, ROUND)
    assert q.scheme == replace(scheme, nested=None) and isinstance(q.scales, Tensor)


def test_slow_tables_are_what_torch_casts_to() -> None:
    """The tables of the oracles, against torch's own casts."""
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("e4m3", torch.float8_e4m3fn)):
        values = torch.tensor(slow_grids.positive_values(kind), dtype=torch.float64)
        assert torch.equal(values.to(dtype).double(), values)
        patterns = values.to(dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.int16).int()
        assert patterns.tolist() == list(range(len(values)))
