"""What the corrections share: the best low-rank term in the norm that a matrix of input correlations gives.

`E` is the error of a weight, `[rows, cols]`, and `H`, `[cols, cols]`, says how its input is distributed. Over all
`B A` of rank r, `tr((E - B A) H (E - B A)^T) = ||(E - B A) H^(1/2)||^2` is least for `B = U`, the first r left singular
vectors of `E H^(1/2)`, and `A = U^T E` (Eckart-Young: `U U^T M` is the best rank-r approximation of any `M`). So no
root of `H` is ever inverted, and an `H` without full rank is no special case.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import scipy.linalg  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.corrections import LowRank

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@final
@dataclass(frozen=True)
class Options:
    """Options of every low-rank correction."""

    rank: int = 32
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank}: a low-rank term needs a rank of at least 1; leave the correction out")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")


def approximate(error: Float[Tensor, "rows cols"], moment: Tensor, options: Options) -> LowRank:
    """The best term of the options' rank (of the smaller side, where that is less), exact in the options' dtype.

    `moment` is `H`; a vector stands for its diagonal.
    """
    matrix, weighted = _gram(error, moment)
    side = len(matrix)
    least = max(side - options.rank, 0)
    _, vectors = scipy.linalg.eigh(matrix.numpy(), subset_by_index=(least, side - 1), driver="evr")
    up = torch.from_numpy(vectors).flip(1)
    if weighted is not None:  # the vectors are of the other side: carry them over
        up = torch.linalg.qr(weighted.double() @ up)[0]
    return _stored(up.float(), up.float().T @ error, error, DTYPES[options.dtype])


def energies(error: Float[Tensor, "rows cols"], moment: Tensor) -> Float[Tensor, "rank"]:
    """Squared singular values of the weighted error, largest first: what each further rank takes from the loss."""
    values: Tensor = torch.linalg.eigvalsh(_gram(error, moment)[0]).flip(0).clamp(min=0).float()
    return values


def _gram(
    error: Float[Tensor, "rows cols"], moment: Tensor
) -> tuple[Float[Tensor, "side side"], Float[Tensor, "rows cols"] | None]:
    """`M M^T` of `M = E H^(1/2)` in float64; for a tall error `M^T M`, which is smaller, and `M` itself."""
    if error.shape[0] <= error.shape[1]:
        moved = error * moment if moment.ndim == 1 else error @ moment
        return (moved @ error.T).double(), None
    weighted = error * moment.sqrt() if moment.ndim == 1 else error @ _root(moment)
    return (weighted.T @ weighted).double(), weighted


def _root(moment: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """A matrix that makes `H` with its transpose; eigenvalues that rounding made negative become 0."""
    root, failed = torch.linalg.cholesky_ex(moment.double())
    if failed:
        values, vectors = torch.linalg.eigh(moment.double())
        root = vectors * values.clamp(min=0).sqrt()
    result: Tensor = root.float()
    return result


def _stored(
    up: Float[Tensor, "rows rank"], down: Float[Tensor, "rank cols"], error: Tensor, dtype: torch.dtype
) -> LowRank:
    """Both factors rounded to what a file holds: `up` first, `down` fitted again to what became of it.

    Each pair is balanced by a power of two, which costs nothing and keeps float16 away from its subnormals.
    """
    high, wide = up.abs().amax(0).clamp(min=1e-30), down.abs().amax(1).clamp(min=1e-30)
    balance = torch.exp2(((wide.log2() - high.log2()) / 2).round())
    rounded = (up * balance).to(dtype).float()
    if dtype != torch.float32:
        normal = rounded.double().T @ rounded.double()
        fitted = torch.linalg.lstsq(normal, rounded.double().T @ error.double(), driver="gelsd").solution.float()
    else:
        fitted = down / balance[:, None]
    return fitted.to(dtype).float(), rounded


@final
@dataclass(frozen=True, eq=False)
class Spectrum:
    """What ranks bring to one weight, and cost.

    Attributes:
        energies: what each further rank takes from the loss, falling (`energies`).
        nbytes: of one rank: `(rows + cols) * itemsize`.
    """

    energies: Float[Tensor, "rank"]
    nbytes: int


def ranks(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """A rank for each weight under a budget in bytes: always the next rank that takes most loss per byte.

    Greedy; optimal up to the last rank that did not fit, since what a rank brings only falls. Weights that get nothing
    have rank 0.
    """
    chosen = dict.fromkeys(spectra, 0)
    queue = [(-float(s.energies[0]) / s.nbytes, name) for name, s in spectra.items() if len(s.energies)]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        spectrum = spectra[name]
        if spectrum.nbytes > budget or gain >= 0:
            continue
        budget, chosen[name] = budget - spectrum.nbytes, chosen[name] + 1
        if chosen[name] < len(spectrum.energies):
            heapq.heappush(queue, (-float(spectrum.energies[chosen[name]]) / spectrum.nbytes, name))
    return chosen
