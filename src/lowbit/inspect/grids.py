"""Whether float weights lie on a quantization grid: a checkpoint that was quantized and stored as floats again.

A block on a grid has all values at `levels * scale` (`k * step` for integers, `offset + k * step` where minima are
subtracted), but for the rounding to the type that they were stored in. Every scale under which the largest value is a
level is tried. What passes by chance is told from what does not by evidence in bits: each different value that is near
a level costs chance `2 * tolerance / gap`, of each repeated one `_REPEATED` bits count at most. Blocks with little
evidence are not counted. Levels are those of `lowbit.schemes`. The method is ours; integers follow from the definition
of affine quantization: `(code - zero) * scale` with whole zero points is a multiple of `scale`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lowbit.schemes import FAMILIES

Blocks = Float[Tensor, "blocks values"]

LEAST = 1024  # weights: below this a matrix is not judged
_BLOCKS, _VALUES, _WHOLE = 32, 256, 4096  # blocks that are looked at, values of each, values of a whole tensor
_SIZES = (16, 32, 64, 128, 256)
_STEPS = 255  # of 8-bit integers under any zero point
_SLACK = 1e-3  # of a gap between levels, beyond the rounding of the values
_SPARE = 1.5  # times the rounding: the scale is found from rounded values, too
_BLUNT = 0.25  # of a gap: steps of float types are not taken for those of a grid with an offset
_ENOUGH = 16.0  # bits of evidence in a block
_REPEATED = 3.0
_MISSES = 0.05  # of the blocks may not fit; at least half must be proved to
_SOME = 8  # one block in so many is looked at first, which is enough to tell ordinary weights
_TABLES = ("nf4", "fp4", "iq4_nl", "mxfp4", "fp8-e5m2", "fp8-e4m3")


@final
@dataclass(frozen=True)
class OnGrid:
    """The grid that a float matrix lies on, and why that is believed.

    Attributes:
        scheme: name of the scheme, as `int4-g128`; of several that fit, that of fewest bits and largest blocks.
        bits: of its codes.
        blocks: blocks that were looked at.
        fitting: share of them that fits.
        distinct: most different values in a block.
        residual: largest distance from a level, in gaps between levels, of nine blocks in ten.
    """

    scheme: str
    bits: int
    blocks: int
    fitting: float
    distinct: int
    residual: float


@final
@dataclass(frozen=True)
class _Fit:
    """How blocks fit a kind of grid: which pass, with how much evidence; steps, codes' range, and largest residual."""

    passes: Bool[Tensor, "blocks"]
    evidence: Float[Tensor, "blocks"]
    scale: Float[Tensor, "blocks"]
    low: Float[Tensor, "blocks"]
    high: Float[Tensor, "blocks"]
    residual: Float[Tensor, "blocks"]

    @property
    def proved(self) -> Bool[Tensor, "blocks"]:
        """Blocks that pass, and hardly could by chance."""
        return self.passes & (self.evidence >= _ENOUGH)

    @property
    def misses(self) -> int:
        """Blocks that do not pass."""
        return int((~self.passes).sum())

    @property
    def missed(self) -> float:
        """Share of the blocks that do not pass; 1 where there are no blocks."""
        return self.misses / len(self.passes) if len(self.passes) else 1.0


def recognise(weight: Tensor) -> OnGrid | None:
    """The grid that a float matrix lies on, judged by a sample of its blocks; None where it is an ordinary one."""
    if weight.ndim < 2 or not weight.dtype.is_floating_point or weight.numel() < LEAST:
        return None
    matrix = weight.reshape(-1, weight.shape[-1])
    samples = [(name, values, _rounding(values)) for name, values in _samples(matrix)]
    found = [each for kind in ("int", *_TABLES, "offset") for each in _described(samples, kind)]
    least = min((each.bits for each in found), default=0)
    return next((each for each in found if each.bits == least), None)


def _described(samples: Sequence[tuple[str, Tensor, Tensor]], kind: str) -> list[OnGrid]:
    """What a kind of grid is in blocks that fit it, the largest first; larger ones miss where smaller do."""
    found = []
    for name, values, rounding in samples:
        some = _fit(values[::_SOME], rounding[::_SOME], kind)
        if some.misses > _MISSES * len(values):
            break
        fit = _fit(values, rounding, kind)
        if fit.missed > _MISSES:
            break
        if 2 * int(fit.proved.sum()) >= len(values):
            found.append(_describe(kind, name, values, fit))
    return found[::-1]


def _samples(matrix: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Values of some blocks, by the block's name: groups of the rows, rows, the whole; not those of one value."""
    rows, cols = matrix.shape
    for size in [size for size in _SIZES if size < cols and cols % size == 0]:
        yield f"g{size}", _spread(matrix, rows * cols // size, size)
    yield "row", _spread(matrix, rows, cols)
    flat = matrix.reshape(1, -1)
    chosen = torch.linspace(0, flat.shape[1] - 1, min(_WHOLE, flat.shape[1]), dtype=torch.float64).long()
    yield "tensor", _telling(flat[:, chosen].float())


def _spread(matrix: Tensor, blocks: int, size: int) -> Tensor:
    """Blocks from all over the matrix, of large ones some values; read row by row, so that little of a file is."""
    chosen = torch.linspace(0, blocks - 1, min(blocks, _BLOCKS), dtype=torch.float64).long().tolist()
    across = matrix.shape[1] // size
    starts = [(at // across, at % across * size) for at in chosen]
    some = torch.linspace(0, size - 1, min(size, _VALUES), dtype=torch.float64).long()
    found = torch.stack([matrix[row, col : col + size][some] for row, col in starts]).float()
    return _telling(found)


def _telling(blocks: Blocks) -> Tensor:
    """Without those that hold one value alone, or NaN."""
    return blocks[blocks.isfinite().all(1) & (blocks != blocks[:, :1]).any(1)]


def _fit(values: Blocks, rounding: Blocks, kind: str) -> _Fit:
    if not len(values):
        nothing = torch.zeros(0)
        return _Fit(nothing.bool(), nothing, nothing, nothing, nothing, nothing)
    return _fit_table(values, rounding, kind) if kind in _TABLES else _fit_integers(values, rounding, kind == "offset")


def _rounding(values: Blocks) -> Blocks:
    """Half a unit in the last place of each value, in the narrowest float type that holds all of them."""
    kinds = ((torch.bfloat16, 8, -133), (torch.float16, 11, -24), (torch.float32, 24, -149))
    fitting = (row for row in kinds if torch.equal(values.to(row[0]).float(), values))
    _, digits, least = next(fitting)
    exponent = torch.where(values == 0, least, torch.frexp(values)[1] - digits)
    return torch.exp2(exponent.clamp(min=least) - 1.0)


def _worth(values: Blocks) -> Blocks:
    """Most bits of evidence that each value can give: any for a new magnitude, few for one seen before, none for 0.

    The largest gave the scale, and proves nothing.
    """
    size, order = values.abs().sort(1)
    most = torch.full_like(size, _REPEATED)
    most[:, 1:] = torch.where(size[:, 1:] != size[:, :-1], torch.inf, _REPEATED)
    most[:, 0] = torch.inf
    most = torch.where((most == torch.inf) & (size == size[:, -1:]), 0.0, most)
    most = torch.where(size == 0, 0.0, most)
    return torch.zeros_like(most).scatter(1, order, most)


def _fit_integers(values: Blocks, rounding: Blocks, offset: bool) -> _Fit:
    """Multiples of a step, from the least value where there is an offset; the largest step that fits is taken."""
    start = values.min(1, keepdim=True).values if offset else torch.zeros(len(values), 1)
    x = values - start
    steps = torch.arange(1, _STEPS + 1.0)[None, :, None]
    reach = x.abs().max(1).values[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
    x = x[:, None, :]
    k = (x * (steps / reach)).round()
    shift, scale = _regress(x, k, offset)
    k = ((x - shift) / scale).round()
    residual = ((x - shift) / scale - k).abs()
    rounding = rounding * _SPARE
    if offset:  # it is found from rounded values, and moves even those that are near 0
        rounding = rounding + rounding.max(1, keepdim=True).values
    tolerance = rounding[:, None, :] / scale + _SLACK
    if offset:
        # What only follows the places of the type itself says nothing.
        residual = torch.where(tolerance.amax(-1, keepdim=True) > _BLUNT, torch.inf, residual)
    return _judge(values, k, residual, tolerance, scale[..., 0])


def _regress(x: Tensor, k: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """Least-squares `x = shift + scale * k` over the last axis."""
    mean_x, mean_k = (
        (x.mean(-1, keepdim=True), k.mean(-1, keepdim=True)) if offset else (x[..., :1] * 0, k[..., :1] * 0)
    )
    product = ((x - mean_x) * (k - mean_k)).sum(-1, keepdim=True)
    scale = product / ((k - mean_k) ** 2).sum(-1, keepdim=True).clamp(min=1e-9)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return mean_x - scale * mean_k, scale


def _fit_table(values: Blocks, rounding: Blocks, kind: str) -> _Fit:
    """Levels of a table times a scale: the largest value is each of them in turn."""
    levels = torch.tensor(sorted({level for level in FAMILIES[kind].grid.levels if abs(level) < float("inf")}))
    at = values.abs().argmax(1, keepdim=True)
    largest = values.gather(1, at)
    tried = levels[levels.abs() > levels.abs().max() / 64].flip(0)[None, :]
    scale = (largest / tried)[..., None]
    signed = scale > 0
    scale = torch.where(signed, scale, 1.0)
    x = values[:, None, :]
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(x / scale, middles)]
    _, scale = _regress(x, nearest, offset=False)
    index = torch.bucketize(x / scale, middles)
    far = torch.tensor([float("inf")])
    gaps = torch.minimum(torch.cat([far, levels.diff()]), torch.cat([levels.diff(), far]))[index]
    residual = (x / scale - levels[index]).abs() / gaps
    tolerance = rounding[:, None, :] * _SPARE / scale / gaps + _SLACK
    residual = torch.where(signed, residual, torch.inf)
    return _judge(values, levels[index], residual, tolerance, scale[..., 0])


def _judge(values: Blocks, k: Tensor, residual: Tensor, tolerance: Tensor, scale: Tensor) -> _Fit:
    """The scale of each block under which every value is near a level, and that with most evidence."""
    most = _worth(values)[:, None, :]
    passing = (residual <= tolerance).all(-1)
    bits = -(2 * tolerance).clamp(max=1).log2()
    evidence = torch.minimum(bits, most).sum(-1) - log2(passing.shape[1])
    order = 1e-3 * torch.arange(passing.shape[1])  # of scales that nothing tells apart, the largest
    pick = torch.arange(len(values)), torch.where(passing, evidence - order, -torch.inf).argmax(1)
    codes = k[pick]
    low, high = codes.min(1).values, codes.max(1).values
    return _Fit(passing[pick], evidence[pick], scale[pick], low, high, residual[pick].max(1).values)


def _describe(kind: str, block: str, values: Blocks, fit: _Fit) -> OnGrid:
    """Name and evidence of what was found."""
    proved = fit.proved
    name, bits = _integers(kind, block, fit) if kind in ("int", "offset") else _table(kind, block, fit)
    distinct = max(len(torch.unique(row)) for row in values[proved])
    residual = float(fit.residual[proved].quantile(0.9))
    return OnGrid(name, bits, len(values), 1 - fit.missed, distinct, residual)


def _integers(kind: str, block: str, fit: _Fit) -> tuple[str, int]:
    """Bits hold the range of codes of nine blocks in ten; symmetric where these stay in the range around 0."""
    low, high = fit.low[fit.proved], fit.high[fit.proved]
    span = int((high - low).quantile(0.9, interpolation="higher"))
    bits = min(max(ceil(log2(span + 1)), 1), 8)
    reach = int(torch.maximum(-low, high).quantile(0.9, interpolation="higher"))
    if kind == "int" and reach == 1:
        return f"levels[-1,{'0,' if span == 2 else ''}1]-{block}", 2 if span == 2 else 1
    shifted = "-min" if kind == "offset" else ("" if reach <= 2 ** (bits - 1) else "-asym")
    return f"int{bits}-{block}{shifted}", bits


def _table(kind: str, block: str, fit: _Fit) -> tuple[str, int]:
    """MXFP4 and NVFP4 have one table, and blocks of 32 with powers of two, of 16 with any scale."""
    bits = FAMILIES[kind].grid.bits
    if kind != "mxfp4":
        return f"{kind}-{block}", bits
    powers = fit.scale[fit.proved].log2()
    whole = bool(((powers - powers.round()).abs() < 0.01).all())
    if block == "g16":
        return "nvfp4", bits
    return ("mxfp4" if whole and block == "g32" else f"e2m1-{block}"), bits
