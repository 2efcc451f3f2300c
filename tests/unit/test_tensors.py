"""`Scheme` and `QTensor`: names, tables, shapes, bytes worked out by hand, and what codes stand for."""

from __future__ import annotations

import re
from math import inf, isfinite
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, UsageError
from lowbit.schemes import DOUBLE, FAMILIES, Block, Scheme, dynamic_map, parse
from lowbit.tensors import QTensor, block_size, level_table, scale_shape, scheme_bytes, view_shape
from tests.reference.grids import E2M1
from tests.reference.qtensors import random_qtensor, slow_dequantize

NAMES = [
    *FAMILIES,
    *(f"int{bits}-{block}" for bits in range(1, 9) for block in ("tensor", "row", "g32", "flat64", "128x128")),
    "int4-g128-asym", "int4-g64-fzero", "int3-row-asym-bf16", "int8-g128", "int4-g64-dq", "nf4-dq", "nf4-flat64-dq",
    "fp4-flat128", "nf4-row-f16", "fp8-e4m3-tensor", "fp8-e5m2-128x128", "fp8-e4m3-bf16", "levels[-1,-0.25,0,0.5]",
    "levels[-1,0.1]-row-f32", "levels[-1.5,0,1e-07]-flat16-dq", "int8-column",
    "vectors[1x8:16]", "vectors[8x1:12+4]-column-min-perm-bf16", "vectors[64*4x1:12,8x1:12+12/256]-tensor",
    "spqr", "spqr-perm-sparse12",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_and_schemes_are_inverse_to_each_other(name: str) -> None:
    scheme = parse(name)
    assert parse(str(scheme)) == scheme
    assert hash(parse(str(scheme))) == hash(scheme)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("int4", "int4-g128"),
        ("INT4-asym-g64", "int4-g64-asym"),
        ("int4-f16", "int4-g128"),
        ("int8", "int8-row"),
        ("nf4-f32-dq", "nf4-g64-dq"),
        (" mxfp4 ", "mxfp4"),
        ("mxfp4-g32", "mxfp4"),
        ("nvfp4-g16", "nvfp4"),
        ("fp8-e4m3", "fp8-e4m3-row"),
        ("levels[1,-1, 0,0]", "levels[-1,0,1]-g64"),
        ("levels[0.1,1]", "levels[0.100000001,1]-g64"),  # the values are float32
        ("vectors[1x8:8+8]-f16", "vectors[1x8:8+8]-row"),
    ],
)
def test_a_scheme_has_one_canonical_name(name: str, canonical: str) -> None:
    assert str(parse(name)) == canonical


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int9", "no scheme is called 'int9'"),
        ("int4-g0", "'g0' is neither a block"),
        ("int4-gx", "'gx' is neither a block"),
        ("nf4-asym", "only integer grids have zero points"),
        ("fp8-e4m3-fzero", "only integer grids have zero points"),
        ("mxfp4-g16", "mxfp4 fixes its block"),
        ("nvfp4-f16", "nvfp4 fixes its block"),
        ("levels[1]", "2 to 256 distinct finite values"),
        ("levels[1,inf]", "2 to 256 distinct finite values"),
        ("levels[a,b]", "could not convert"),
        ("vectors[8]", "'8' is no run of vectors"),
        ("vectors[1x8:17]", "1 to 16 bits"),
        ("vectors[1x8:16+16+1]", "32 at most"),
        ("vectors[8x1:4,8x1:4]", "every run of vectors but the last has a width"),
        ("vectors[4*8x1:4]", "the last takes all"),
        ("vectors[1x8:8]-dq", "leave out dq"),
        ("vectors[1x8:8]-asym", "only integer grids have zero points"),
        ("spqr-g32", "spqr fixes its block"),
        ("int4-sparse5", "sparseN one of spqr"),
        ("int4-perm", "perm is an option of grids of vectors"),
        ("", "no scheme is called ''"),
    ],
)
def test_a_wrong_name_is_explained(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse(name)


@pytest.mark.parametrize("name", ["W4A16", "w8a8", "w4a8", "fp8", "FP8_DYNAMIC", "fp8_block", "w4a4", "w3a16", "w8a16"])
def test_what_others_call_a_scheme_is_answered_with_schemes(name: str) -> None:
    with pytest.raises(UsageError, match="write --scheme") as caught:
        parse(name)
    words = re.findall(r"--(?:scheme|activations) ([a-z0-9-]+)", str(caught.value))
    assert words and all(parse(word) for word in words)


# ---- tables ----


@pytest.mark.parametrize(("name", "dtype"), [("fp8-e4m3", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2)])
def test_fp8_levels_are_the_bytes_of_torch(name: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    ours = torch.tensor(parse(name).grid.levels)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours[ours.isfinite()], theirs[theirs.isfinite()])
    assert torch.equal(torch.signbit(ours[[0, 128]]), torch.tensor([False, True]))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_fp4_levels_are_those_of_the_specification(name: str) -> None:
    assert parse(name).grid.levels == (*E2M1, *(-level for level in E2M1))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4_bit_tables_are_those_of_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes").functional
    assert torch.equal(torch.tensor(parse(name).grid.levels), functional.get_4bit_type(name, device="cpu"))


def test_nf4_is_made_of_normal_quantiles() -> None:
    """QLoRA, appendix E: quantiles of the normal distribution, 8 above and 7 below 0, scaled to 1."""
    stats = pytest.importorskip("scipy.stats")
    offset = 0.9677083
    above = stats.norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -stats.norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    wanted = sorted([*above, 0.0, *below])
    levels = parse("nf4").grid.levels
    assert levels == pytest.approx([value / max(wanted) for value in wanted], abs=2e-7)


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes").functional
    assert torch.equal(torch.tensor(dynamic_map()), functional.create_dynamic_map(signed=True))


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_offset_binary(bits: int) -> None:
    assert parse(f"int{bits}").grid.levels == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def test_a_free_table_is_sorted_and_counts_its_bits() -> None:
    grid = parse("levels[3,-1,0,0.5,-1]").grid
    assert grid.levels == (-1, 0, 0.5, 3) and grid.bits == 2
    assert parse("levels[0,1,2,3,4]").grid.bits == 3


# ---- bytes ----

BYTES = [
    # name, shape, codes + scales + zeros (+ nested), bits per weight
    ("int4-g128", (1024, 1024), 2**19 + 2 * 2**13, 4.125),
    ("int4-g128-asym", (1024, 1024), 2**19 + 2 * 2**13 + 2**12, 4.15625),
    ("int4-g64-fzero", (1024, 1024), 2**19 + 2 * 2**14 + 2 * 2**14, 4.5),
    ("int3-g128", (1024, 1024), 3 * 2**17 + 2 * 2**13, 3.125),
    ("int8-row", (1024, 1024), 2**20 + 2 * 1024, 8.015625),
    ("int8-tensor-f32", (1024, 1024), 2**20 + 4, 8.000030517578125),
    ("nf4", (1024, 1024), 2**19 + 4 * 2**14, 4.5),
    ("nf4-dq", (1024, 1024), 2**19 + 2**14 + 4 * 64 + 4, 4.126983642578125),
    ("nf4-flat64-dq", (1024, 1024), 2**19 + 2**14 + 4 * 64 + 4, 4.126983642578125),
    ("mxfp4", (1024, 1024), 2**19 + 2**15, 4.25),
    ("mxfp8", (1024, 1024), 2**20 + 2**15, 8.25),
    ("nvfp4", (1024, 1024), 2**19 + 2**16 + 4, 4.500030517578125),
    ("fp8-e4m3-128x128", (1024, 1024), 2**20 + 4 * 64, 8.001953125),
    ("fp8-e4m3", (3, 5), 15 + 12, 14.4),
    ("int4-g128", (3, 130), 195 + 2 * 6, 8 * 207 / 390),  # two blocks in each row of 130
    ("int5-g16-asym", (3, 7), 14 + 2 * 3 + 2, 8 * 22 / 21),  # 105 bits of codes, 15 bits of zero points
    ("int1-tensor", (1, 1), 1 + 2, 24.0),
    ("int4-128x128", (200, 300), 30_000 + 2 * 6, 8 * 30_012 / 60_000),
    ("levels[0,1,2]-g4", (2, 6), 3 + 2 * 4, 8 * 11 / 12),
    ("int4-flat64", (3, 3, 11), 50 + 2 * 2, 8 * 54 / 99),
    # codes, scales and zero points in 3 bits, 4 float16 of each tile, order, outliers and where the rows of them start
    ("spqr-perm-sparse7", (32, 48), 576 + 2 * 36 + 8 * 6 + 96 + 4 * 7 + 4 * 33, 8 * 952 / 1536),
    # indices, books, scales
    ("vectors[1x8:16]-row", (1024, 1024), 2**18 + 2**20 + 2048, 8 * (2**18 + 2**20 + 2048) / 2**20),
    # indices of 4 outlier columns and of two groups of 8 (the last down is padded), books, scales, minima, order
    ("vectors[4*2x1:3,8x1:4+2/8]-column-min-perm", (10, 20), 8 + 24 + 2 * (16 + 2 * 160) + 2 * 40 + 40, 32.96),
]


@pytest.mark.parametrize(("name", "shape", "count", "bits"), BYTES)
def test_bytes_are_counted_exactly(name: str, shape: tuple[int, ...], count: int, bits: float) -> None:
    scheme = parse(name)
    assert scheme_bytes(scheme, shape) == count
    q = random_qtensor(scheme, shape)
    assert q.nbytes == count
    assert q.bits_per_weight == pytest.approx(bits, rel=1e-12)


def test_nothing_takes_no_bytes() -> None:
    q = QTensor(parse("int4-g4"), (0, 7), torch.empty(0, 7, dtype=torch.uint8), torch.empty(0, 2))
    assert q.nbytes == 0 and q.bits_per_weight == 0 and q.dequantize().shape == (0, 7)


def test_an_act_order_index_counts() -> None:
    q = random_qtensor(parse("int4-g8"), (4, 16))
    ordered = QTensor(q.scheme, q.shape, q.codes, q.scales, group_index=torch.zeros(16, dtype=torch.int32))
    assert ordered.nbytes == q.nbytes + 64


# ---- shapes ----


@pytest.mark.parametrize(
    ("block", "shape", "view", "size", "blocks"),
    [
        (Block(1, 128), (7, 300), (7, 300), (1, 128), (7, 3)),
        (Block(1, 0), (7, 300), (7, 300), (1, 300), (7, 1)),
        (Block(0, 0), (7, 300), (7, 300), (7, 300), (1, 1)),
        (Block(128, 128), (7, 300), (7, 300), (128, 128), (1, 3)),
        (Block(1, 64, flat=True), (7, 300), (1, 2100), (1, 64), (1, 33)),
        (Block(1, 4), (2, 3, 5), (6, 5), (1, 4), (6, 2)),
        (Block(1, 4), (5,), (1, 5), (1, 4), (1, 2)),
        (Block(1, 4), (), (1, 1), (1, 4), (1, 1)),
        (Block(1, 0), (4, 0), (4, 0), (1, 1), (4, 0)),
        (Block(0, 0), (0, 4), (0, 4), (1, 4), (0, 1)),
    ],
)
def test_shapes(block: Block, shape: tuple[int, ...], view: Any, size: Any, blocks: Any) -> None:
    assert (view_shape(shape, block), block_size(shape, block), scale_shape(shape, block)) == (view, size, blocks)


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_parts_that_do_not_fit_together_are_refused(part: str) -> None:
    q = random_qtensor(parse("int4-g4-asym"), (3, 8))
    parts: dict[str, Any] = {"codes": q.codes, "scales": q.scales, "zeros": q.zeros}
    parts[part] = parts[part][:2]
    with pytest.raises(
        FormatError, match=rf"{part} have shape \[2, \d\] where the scheme and the weight need \[3, \d\]"
    ):
        QTensor(q.scheme, q.shape, **parts)


def test_zero_points_where_there_should_be_none_are_refused() -> None:
    q = random_qtensor(parse("int4-g4-asym"), (3, 8))
    for name, zeros in (("int4-g4", q.zeros), ("int4-g4-asym", None)):
        with pytest.raises(FormatError, match="zero points do not agree"):
            QTensor(parse(name), q.shape, q.codes, q.scales, zeros)


# ---- meaning ----

MEANINGS = [
    "int4-g7",
    "int8-row-asym",
    "int3-g16-fzero",
    "nf4-g8",
    "nf4-flat16",
    "nf4-flat16-dq",
    "fp4-tensor",
    "mxfp4",
]
MEANINGS += ["fp8-e4m3-3x5", "fp8-e5m2", "mxfp8", "nvfp4", "levels[-1,0,2]-g4", "int1-g8-asym-bf16"]


@pytest.mark.parametrize("shape", [(5, 43), (2, 3, 17), (9,), (1, 1)])
@pytest.mark.parametrize("name", MEANINGS)
def test_dequantize_is_its_slow_definition(name: str, shape: tuple[int, ...]) -> None:
    q = random_qtensor(parse(name), shape, seed=len(name))
    exact = slow_dequantize(q)
    assert q.dequantize().shape == shape and torch.equal(q.dequantize(), exact)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(q.dequantize(dtype), exact.to(dtype))


@pytest.mark.parametrize("cols", [48, 41])
@pytest.mark.parametrize("name", ["nf4-flat16", "nf4-flat16-dq", "int4-flat8-asym", "int4-flat48", "int4-g16"])
def test_rows_are_those_of_the_slow_definition(name: str, cols: int) -> None:
    q = random_qtensor(parse(name), (7, cols), seed=len(name))
    exact = slow_dequantize(q)
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        assert torch.equal(q.rows(start, stop), exact[start:stop])


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[0, 8, 15, 9]], dtype=torch.uint8)
    q = QTensor(parse("int4-g2"), (1, 4), codes, torch.tensor([[0.5, 2.0]]))
    assert q.dequantize().tolist() == [[-4.0, 0.0, 14.0, 2.0]]
    q = QTensor(
        parse("int4-g2-asym"), (1, 4), codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[3, 15]], dtype=torch.uint8)
    )
    assert q.dequantize().tolist() == [[-1.5, 2.5, 0.0, -12.0]]


def test_columns_may_belong_to_any_block() -> None:
    q = random_qtensor(parse("int4-g4-asym"), (3, 8), seed=1)
    index = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.int32)
    ordered = QTensor(q.scheme, q.shape, q.codes, q.scales, q.zeros, group_index=index)
    assert torch.equal(ordered.dequantize(), slow_dequantize(ordered))
    assert not torch.equal(ordered.dequantize(), q.dequantize())


def test_parts_are_named_in_a_fixed_order() -> None:
    flat = random_qtensor(parse("nf4-flat8-dq"), (4, 16))
    assert [name for name, _ in flat.parts()] == ["codes", "scales.codes", "scales.scales", "scales.offset"]
    asym = random_qtensor(parse("int4-asym"), (4, 16))
    assert [name for name, _ in asym.parts()] == ["codes", "scales", "zeros"]
    assert all(isinstance(part, Tensor) for _, part in flat.parts())


@pytest.mark.parametrize("name", ["int2", "nf4", "fp8-e4m3", "fp8-e5m2", "mxfp4"])
def test_codes_that_a_grid_does_not_have_decode_to_nan(name: str) -> None:
    grid = parse(name).grid
    table = level_table(grid)
    legal = [code for code, level in enumerate(grid.levels) if isfinite(level)]
    assert table.isfinite().nonzero().flatten().tolist() == legal
    assert table[legal].tolist() == [grid.levels[code] for code in legal]
    assert all(abs(level) == inf for code, level in enumerate(grid.levels) if code not in legal)


def test_double_quantization_is_a_scheme_like_any_other() -> None:
    assert isinstance(DOUBLE, Scheme) and parse("nf4-dq").nested == DOUBLE and DOUBLE.offset
    assert len(DOUBLE.grid.levels) == 256 and DOUBLE.grid.levels[127] == 0
