"""Schemes: which numbers a stored tensor can hold, and their short names.

A name reads `grid[-block][-option...]`:

    grid    int1..int8, nf4, fp4 (bitsandbytes' table), fp8-e4m3, fp8-e5m2, mxfp4, mxfp8, nvfp4,
            levels[-1,-0.3,0,0.4,1] (any table of 2 to 256 values),
            vectors[1x8:8+8] (vectors of one row and 8 columns, sums of two entries of codebooks of 8 bits; see `Run`),
            q2_k .. q6_k, iq1_s .. iq4_xs, tq1_0 (llama.cpp's block types), spqr (3 bits under quantized scales)
    block   tensor | row | column | gN (N along the input) | flatN (N of the flattened tensor) | RxC
    option  asym (integer zero point), fzero (float zero point), min (a float that is subtracted),
            dq (double-quantized scales), perm (columns in an order of their own), sparseN (spqr: N outliers),
            smooth (columns have factors, by which inputs are multiplied first),
            f16 | bf16 | f32 (type of the scales)

`int4-g128` is symmetric with float16 scales. `str(parse(name))` is the canonical spelling of `name`. Names of llama.cpp
whose grids have a name here already are other words for it: `q4_0` is `int4-g32`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, inf
from typing import Literal, get_args

import torch

from lowbit.arguments import public
from lowbit.errors import UsageError

Zero = Literal["none", "int", "float", "min", "quantized"]
ScaleType = Literal["f16", "bf16", "f32", "e8m0", "e4m3"]
SCALE_BITS: dict[ScaleType, int] = {"f16": 16, "bf16": 16, "f32": 32, "e8m0": 8, "e4m3": 8}
FLOATS: dict[ScaleType, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Run:
    """Columns that are stored in vectors of `rows x cols` weights, each the sum of one entry of every codebook.

    Attributes:
        rows, cols: of a vector. The last vectors down a column may reach beyond the last row, those across may not.
        bits: of the index into each codebook, which has `2**bits` entries.
        width: columns of the run; 0: all that are left.
        group: columns that share their codebooks; 0: all of the run.

    Written `[WIDTH*]ROWSxCOLS:BITS[+BITS...][/GROUP]`, as `64*4x1:12`.
    """

    rows: int
    cols: int
    bits: tuple[int, ...]
    width: int = 0
    group: int = 0

    def __str__(self) -> str:
        width, group = f"{self.width}*" if self.width else "", f"/{self.group}" if self.group else ""
        return f"{width}{self.rows}x{self.cols}:{'+'.join(map(str, self.bits))}{group}"


@dataclass(frozen=True)
class Grid:
    """A table of `2**bits` values or fewer, in the order of their codes.

    Kinds: `int` (offset binary: code c stands for c - 2**(bits-1)), `levels` (any table), `float` (codes are the
    bit pattern of a small float; patterns that mean NaN or Inf have the level `inf` and are never produced), `vectors`
    (no table: `runs` of columns, from the first to the last, whose values are in each tensor's own codebooks).
    `packed` are the bits that a code takes where several codes share their bytes, if these are fewer than `bits`.
    `table` is set where a tensor cannot have any code beside any other: its type has a table of runs of codes.
    """

    name: str
    kind: Literal["int", "levels", "float", "vectors"]
    bits: int
    levels: tuple[float, ...]
    packed: float | None = None
    table: bool = False
    runs: tuple[Run, ...] = ()

    @property
    def stored_bits(self) -> float:
        """Bits that a code takes on average."""
        return float(self.bits) if self.packed is None else self.packed


@dataclass(frozen=True)
class Block:
    """Rows and columns that share one scale; 0 means the whole axis. `flat`: columns run over the flattened tensor."""

    rows: int
    cols: int
    flat: bool = False

    def __str__(self) -> str:
        if self.flat:
            return f"flat{self.cols}"
        names = {(0, 0): "tensor", (1, 0): "row", (0, 1): "column"}
        return names.get((self.rows, self.cols)) or (f"g{self.cols}" if self.rows == 1 else f"{self.rows}x{self.cols}")


@dataclass(frozen=True)
class Scheme:
    """Grid, block that shares a scale, kind of zero point, type of the scales, and the scheme of the scales themselves.

    `nested` is set where scales (and, with the zero kind `min`, what is subtracted) are quantized too; `scale` is then
    the type in which they are computed.
    `offset` marks a nested scheme that subtracts the mean before it quantizes (QLoRA's double quantization).
    `perm`: columns are stored in an order of their own, which is stored too; blocks are of columns as they are stored.
    Codebooks of vectors are of the type of the scales. The zero kind `quantized`: zero points that are numbers in
    units of a code, quantized like the scales. `outliers`: numbers beside, each of which is added to one weight.
    `smooth`: each column has a factor beside its scales, which a runtime multiplies the inputs by.
    """

    grid: Grid
    block: Block
    zero: Zero = "none"
    scale: ScaleType = "f16"
    nested: Scheme | None = None
    offset: bool = False
    perm: bool = False
    outliers: int = 0
    smooth: bool = False

    def __str__(self) -> str:
        return _spelled(self)


@cache
def _spelled(scheme: Scheme) -> str:
    if scheme.smooth:
        return f"{replace(scheme, smooth=False)}-smooth"
    if scheme.zero == "quantized":
        words = ["spqr", "perm" if scheme.perm else "", f"sparse{scheme.outliers}" if scheme.outliers else ""]
        return "-".join(word for word in words if word)
    family = _family_of(scheme)
    if family in _FIXED and scheme == FAMILIES[family]:
        return family
    default = FAMILIES[family] if family in FAMILIES else Scheme(scheme.grid, _LEVELS_BLOCK)
    parts = [family, str(scheme.block) if scheme.block != default.block or family not in _FIXED else ""]
    parts.append({"none": "", "int": "asym", "float": "fzero", "min": "min"}[scheme.zero])
    parts.append("dq" if scheme.nested and not default.nested else "")
    parts.append("perm" if scheme.perm else "")
    parts.append(scheme.scale if scheme.scale != default.scale else "")
    return "-".join(part for part in parts if part)


def _int_grid(bits: int) -> Grid:
    half = 2 ** (bits - 1)
    return Grid(f"int{bits}", "int", bits, tuple(float(code - half) for code in range(2**bits)))


def _unsigned_grid(bits: int) -> Grid:
    return Grid(f"uint{bits}", "levels", bits, tuple(float(code) for code in range(2**bits)))


def _float_grid(name: str, exponent: int, mantissa: int, bias: int, finite: int) -> Grid:
    """Sign, exponent and mantissa bits; magnitudes with a pattern above `finite` are NaN or Inf."""

    def value(code: int) -> float:
        magnitude = code & (2 ** (exponent + mantissa) - 1)
        power, fraction = magnitude >> mantissa, magnitude % 2**mantissa
        if magnitude > finite:
            return inf
        size: float = (fraction + (2**mantissa if power else 0)) * 2.0 ** (max(power, 1) - bias - mantissa)
        return -size if code >> (exponent + mantissa) else size

    bits = 1 + exponent + mantissa
    return Grid(name, "float", bits, tuple(value(code) for code in range(2**bits)))


def dynamic_map() -> tuple[float, ...]:
    """bitsandbytes' signed 8-bit dynamic map, sorted (Dettmers 2016, arXiv:1511.04561; `create_dynamic_map`).

    7 decades, each with twice as many evenly spaced means as the one below, both signs, 0 and 1: 256 values,
    in float32 as the package stores them.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += (means.tolist()) + (-means).tolist()
    return tuple(sorted(values))


# QLoRA (arXiv:2305.14314, appendix E), as the constants stand in bitsandbytes.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _fp4_levels() -> tuple[float, ...]:
    half: list[float] = (torch.tensor(_FP4_TWELFTHS) / 12).tolist()
    return tuple(half + [-value or 0.0 for value in half])  # code 8 is +0, as in the package


# llama.cpp's block types with a scheme here, under the numbers that GGUF gives them (enum ggml_type).
GGML_TYPES = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23,
    "iq1_m": 29, "tq1_0": 34, "tq2_0": 35, "mxfp4": 39, "nvfp4": 40,
}  # fmt: skip
# llama.cpp's non-linear 4 bits (ggml-common.h, kvalues_iq4nl).
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

E4M3 = _float_grid("fp8-e4m3", 4, 3, 7, 0x7E)
E5M2 = _float_grid("fp8-e5m2", 5, 2, 15, 0x7B)
E2M1 = _float_grid("e2m1", 2, 1, 1, 0x7)

_TENSOR, _ROW, _COLUMN, _LEVELS_BLOCK = Block(0, 0), Block(1, 0), Block(0, 1), Block(1, 64)


def _super_blocks(grid: Grid, size: int, scales: Grid, zero: Zero = "none") -> Scheme:
    """llama.cpp's super-blocks of 256: blocks whose scales (and minima) are codes under one float16 of 256 weights."""
    return Scheme(grid, Block(1, size), zero, "f32", Scheme(scales, Block(1, 256 // size)))


def _tables() -> dict[str, Scheme]:
    """llama.cpp's types with tables: codes are twice the magnitude's number, plus 1 where it is negative.

    The magnitudes of IQ1 are -1, 0, 1 and are shifted by an eighth, down where the code is odd. Scales are odd.
    """
    two, three = (8.0, 25.0, 43.0), (4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0)
    odd = tuple(float(2 * number + 1) for number in range(16))

    def scheme(name: str, magnitudes: tuple[float, ...], size: int, packed: float, unit: float) -> Scheme:
        levels = tuple(sign * value for value in magnitudes for sign in (1, -1))
        scales = Grid(f"{name}-scales", "levels", 4, tuple(value * unit for value in odd))
        return _super_blocks(Grid(name, "levels", (len(levels) - 1).bit_length(), levels, packed, True), size, scales)

    def shifted(name: str, size: int, packed: float) -> Scheme:
        levels = tuple(value + shift for value in (-1.0, 0.0, 1.0) for shift in (0.125, -0.125))
        return _super_blocks(
            Grid(name, "levels", 3, levels, packed, True), size, Grid("iq1-scales", "levels", 3, odd[:8])
        )

    return {
        "iq1_s": shifted("iq1_s", 32, 1.40625),
        "iq1_m": shifted("iq1_m", 16, 1.5),
        "iq2_xxs": scheme("iq2_xxs", two, 32, 1.875, 0.125),
        "iq2_xs": scheme("iq2_xs", two, 16, 2.0, 0.125),
        "iq2_s": scheme("iq2_s", two, 16, 2.25, 0.125),
        "iq3_xxs": scheme("iq3_xxs", three, 32, 2.875, 0.25),
        "iq3_s": scheme("iq3_s", odd[:8], 32, 3.25, 1.0),
    }


def _llama() -> dict[str, Scheme]:
    iq4 = Grid("iq4_nl", "levels", 4, tuple(float(value) for value in _IQ4))
    ternary = Grid("tq1_0", "levels", 2, (-1.0, 0.0, 1.0), packed=1.625)  # five to a byte, the last 16 four to a byte
    return {
        "q2_k": _super_blocks(_int_grid(2), 16, _unsigned_grid(4), "min"),
        "q3_k": _super_blocks(_int_grid(3), 16, _int_grid(6)),
        "q4_k": _super_blocks(_int_grid(4), 32, _unsigned_grid(6), "min"),
        "q5_k": _super_blocks(_int_grid(5), 32, _unsigned_grid(6), "min"),
        "q6_k": _super_blocks(_int_grid(6), 16, _int_grid(8)),
        "iq4_nl": Scheme(iq4, Block(1, 32)),
        "iq4_xs": _super_blocks(iq4, 32, _int_grid(6)),
        "tq1_0": Scheme(ternary, Block(1, 256)),
        **_tables(),
    }


def _families() -> dict[str, Scheme]:
    table = {f"int{bits}": Scheme(_int_grid(bits), Block(1, 128)) for bits in range(1, 8)}
    return table | {
        "int8": Scheme(_int_grid(8), _ROW),
        "nf4": Scheme(Grid("nf4", "levels", 4, _NF4), Block(1, 64), scale="f32"),
        "fp4": Scheme(Grid("fp4", "levels", 4, _fp4_levels()), Block(1, 64), scale="f32"),
        "fp8-e4m3": Scheme(E4M3, _ROW, scale="f32"),
        "fp8-e5m2": Scheme(E5M2, _ROW, scale="f32"),
        "mxfp4": Scheme(E2M1, Block(1, 32), scale="e8m0"),
        "mxfp8": Scheme(E4M3, Block(1, 32), scale="e8m0"),
        "nvfp4": Scheme(E2M1, Block(1, 16), scale="e4m3", nested=Scheme(E4M3, _TENSOR, scale="f32")),
        **_llama(),
    }


FAMILIES = _families()  # the scheme that a grid's bare name stands for
_FIXED = {"mxfp4", "mxfp8", "nvfp4", *_llama()}  # the block is part of the name
ALIASES = {
    "q4_0": "int4-g32",
    "q4_1": "int4-g32-min",
    "q5_0": "int5-g32",
    "q5_1": "int5-g32-min",
    "q8_0": "int8-g32",
    "tq2_0": "levels[-1,0,1]-g256",
}
DOUBLE = Scheme(Grid("dynamic8", "levels", 8, dynamic_map()), Block(1, 256, flat=True), scale="f32", offset=True)


# SpQR (arXiv:2306.03078) as `spqr_quant` packs it: tiles of 16 rows x 16 columns, of which each row has a scale and a
# zero point in 3 bits, and all rows together two float16 for the scales and two for the zero points.
SPQR = Scheme(_int_grid(3), Block(1, 16), "quantized", "f32", Scheme(_int_grid(3), Block(16, 1), "float"))


def _family_of(scheme: Scheme) -> str:
    """The bare grid name under which a scheme is spelled."""
    exact = next((name for name in _FIXED if FAMILIES[name] == scheme), None)
    fixed = {("e2m1", "e8m0"): "mxfp4", ("fp8-e4m3", "e8m0"): "mxfp8", ("e2m1", "e4m3"): "nvfp4"}
    return exact or fixed.get((scheme.grid.name, scheme.scale), scheme.grid.name)


def levels_grid(values: tuple[float, ...]) -> Grid:
    """A free table of 2 to 256 distinct float32 values, sorted; codes count from the smallest.

    Raises:
        UsageError: fewer than 2 or more than 256 values, or one that is not finite.
    """
    table = tuple(sorted(set(torch.tensor(values).tolist())))
    if not 2 <= len(table) <= 256 or not all(abs(value) < inf for value in table):
        raise UsageError(f"a table of levels needs 2 to 256 distinct finite values, {values} has not")
    return Grid(f"levels[{','.join(format(v, '.9g') for v in table)}]", "levels", (len(table) - 1).bit_length(), table)


_RUN = re.compile(r"(?:(\d+)\*)?([1-9]\d*)x([1-9]\d*):(\d+(?:\+\d+)*)(?:/(\d+))?")


def vector_grid(*runs: Run) -> Grid:
    """Vectors whose values are in codebooks: runs of columns, of which the last takes all that are left.

    Raises:
        UsageError: no index, one of more than 16 bits, or widths that say nothing.
    """
    for run in runs:
        if not run.bits or not all(1 <= bits <= 16 for bits in run.bits) or sum(run.bits) > 32:
            raise UsageError(f"vectors {run}: an index has 1 to 16 bits, all of a vector 32 at most")
    if not runs or runs[-1].width or not all(run.width for run in runs[:-1]):
        raise UsageError("every run of vectors but the last has a width, the last takes all columns that are left")
    per_weight = sum(runs[-1].bits) / (runs[-1].rows * runs[-1].cols)
    name = f"vectors[{','.join(map(str, runs))}]"
    return Grid(name, "vectors", min(max(ceil(per_weight), 1), 8), (), packed=per_weight, runs=runs)


def _runs(text: str) -> tuple[Run, ...]:
    """Runs of vectors from their words.

    Raises:
        UsageError: words that are none.
    """
    found = [_RUN.fullmatch(part) for part in text.split(",")]
    if None in found:
        raise UsageError(f"{text!r} is no run of vectors, as 1x8:16 or 64*4x1:12,8x1:12+8 are")
    parts = [match.groups() for match in found if match]
    return tuple(
        Run(int(rows), int(cols), tuple(map(int, bits.split("+"))), int(width or 0), int(group or 0))
        for width, rows, cols, bits, group in parts
    )


def _base(name: str) -> tuple[Scheme, list[str]]:
    table = re.match(r"(levels|vectors)\[([^\]]*)\](.*)", name)
    rest = [part for part in table[3].split("-") if part] if table else []
    if name == "spqr" or name.startswith("spqr-"):
        return SPQR, name.split("-")[1:]
    if table and table[1] == "vectors":
        return Scheme(vector_grid(*_runs(table[2])), _ROW), rest
    if table:
        try:
            values = tuple(float(value) for value in table[2].split(","))
        except ValueError as error:
            raise UsageError(f"scheme {name!r}: {error}") from None
        return Scheme(levels_grid(values), _LEVELS_BLOCK), rest
    for family in sorted(FAMILIES, key=len, reverse=True):
        if name == family or name.startswith(family + "-"):
            return FAMILIES[family], [part for part in name[len(family) :].split("-") if part]
    raise UsageError(f"no scheme is called {name!r}; {_meant(name)}")


# What llm-compressor, vLLM and others call so. Rows are its channels; a row of inputs is a token.
_ELSEWHERE = {
    "w4a16": "--scheme int4-g128", "w8a16": "--scheme int8-row", "w3a16": "--scheme int3-g128",
    "w8a8": "--scheme int8-row --activations int8-row", "w4a8": "--scheme int4-g128 --activations int8-row",
    "fp8": "--scheme fp8-e4m3-row, with --activations fp8-e4m3-row for its inputs",
    "fp8-dynamic": "--scheme fp8-e4m3-row --activations fp8-e4m3-row", "fp8-block": "--scheme fp8-e4m3-128x128",
    "w8a8-fp8": "--scheme fp8-e4m3-row --activations fp8-e4m3-row", "w4a4": "--scheme nvfp4 --activations nvfp4",
}  # fmt: skip
_MIXTURE = re.compile(r"i?q[1-8](_k)?_(s|m|l|xs|xxs)")


def _meant(name: str) -> str:
    """What to write in place of a name that is no scheme's."""
    known = _ELSEWHERE.get(name.replace("_", "-"))
    if known:
        return f"write {known}"
    if _MIXTURE.fullmatch(name):
        return "llama.cpp's mixtures are for --format gguf"
    return f"grids are: {', '.join(FAMILIES)} (see `lowbit quantize --help`)"


def _block(text: str) -> Block | None:
    named = {"tensor": _TENSOR, "row": _ROW, "column": _COLUMN}.get(text)
    match = re.fullmatch(r"(?P<kind>g|flat)(?P<n>[1-9]\d*)|(?P<r>[1-9]\d*)x(?P<c>[1-9]\d*)", text)
    if named or not match:
        return named
    if match["kind"]:
        return Block(1, int(match["n"]), flat=match["kind"] == "flat")
    return Block(int(match["r"]), int(match["c"]))


_ZEROS: dict[str, Zero] = {"asym": "int", "fzero": "float", "min": "min"}


@public
@cache
def parse(name: str) -> Scheme:
    """The scheme that a short name stands for, as `int4-g128-asym`.

    Raises:
        UsageError: an unknown grid or option, or options that do not go together.
    """
    word = name.strip().lower()
    base, parts = _base(ALIASES.get(word, word))
    scheme = base
    for part in parts:
        block = _block(part)
        if block:
            scheme = replace(scheme, block=block)
        elif part in _ZEROS:
            scheme = replace(scheme, zero=_ZEROS[part])
        elif part == "dq":
            scheme = replace(scheme, nested=DOUBLE, scale="f32")
        elif part in ("perm", "smooth"):
            scheme = replace(scheme, perm=scheme.perm or part == "perm", smooth=scheme.smooth or part == "smooth")
        elif re.fullmatch(r"sparse[1-9]\d*", part):
            scheme = replace(scheme, outliers=int(part.removeprefix("sparse")))
        elif part in get_args(ScaleType)[:3]:
            scheme = replace(scheme, scale=part)  # type: ignore[arg-type]
        else:
            raise UsageError(f"scheme {name!r}: {part!r} is neither a block (tensor, row, g128, 128x128) nor an option")
    _check(name, base, scheme)
    return scheme


def _check(name: str, base: Scheme, scheme: Scheme) -> None:
    vectors = scheme.grid.kind == "vectors"
    if (vectors or scheme.perm) and scheme.nested == DOUBLE:
        raise UsageError(f"scheme {name!r}: its scales are not double-quantized; leave out dq")
    if (scheme.perm and not vectors and base != SPQR) or (scheme.outliers and base != SPQR):
        raise UsageError(f"scheme {name!r}: perm is an option of grids of vectors and of spqr, sparseN one of spqr")
    if base == SPQR and replace(scheme, perm=False, outliers=0) != SPQR:
        raise UsageError(f"scheme {name!r}: spqr fixes its block and its scales; it takes perm and sparseN alone")
    if scheme.zero != "none" and scheme.grid.kind != "int" and not (vectors and scheme.zero == "min"):
        raise UsageError(f"scheme {name!r}: only integer grids have zero points")
    if scheme.zero == "min" and scheme.nested == DOUBLE:
        raise UsageError(f"scheme {name!r}: what min subtracts is not double-quantized; leave out dq, or use q4_k")
    family = _family_of(base)
    if family in _FIXED and replace(scheme, smooth=False) != base:
        raise UsageError(f"scheme {name!r}: {family} fixes its block and its scales, write {family!r} alone")
