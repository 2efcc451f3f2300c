"""What the corrections share: the best low-rank term in the norm that a matrix of input correlations gives.

`E` is the error of a weight, `[rows, cols]`, and `H`, `[cols, cols]`, says how its input is distributed. Over all
`B A` of rank r, `tr((E - B A) H (E - B A)^T) = ||(E - B A) H^(1/2)||^2` is least for `B = U`, the first r left singular
vectors of `E H^(1/2)`, and `A = U^T E` (Eckart-Young: `U U^T M` is the best rank-r approximation of any `M`). So no root of `H`
is ever inverted, and an `H` without full rank is no special case.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

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


@final
@dataclass(frozen=True, eq=False)
class Factor:
    """`H = root @ root.T`; a vector stands for a diagonal root."""

    root: Tensor

    def times(self, x: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """`x @ root`."""
        return x * self.root if self.root.ndim == 1 else x @ self.root


def root_of(moment: Float[Tensor, "cols cols"]) -> Factor:
    """The root of a symmetric matrix that should have no negative eigenvalue; those that rounding made become 0."""
    values, vectors = torch.linalg.eigh((moment.double() + moment.double().T) / 2)
    return Factor((vectors * values.clamp(min=0).sqrt()).float())


def approximate(error: Float[Tensor, "rows cols"], factor: Factor, options: Options) -> LowRank:
    """The best term of the options' rank (of the smaller side, where that is less), exact in the options' dtype."""
    weighted = factor.times(error)
    _, vectors = _principal(weighted)
    up = vectors[:, : options.rank]
    if weighted.shape[0] > weighted.shape[1]:  # the vectors are of the other side: carry them over
        up = torch.linalg.qr((weighted @ up).double())[0].float()
    return _stored(up, up.T @ error, error, DTYPES[options.dtype])


def energies(error: Float[Tensor, "rows cols"], factor: Factor) -> Float[Tensor, "rank"]:
    """Squared singular values of the weighted error, largest first: what each further rank takes from the loss."""
    return _principal(factor.times(error))[0]


def _principal(matrix: Float[Tensor, "rows cols"]) -> tuple[Float[Tensor, "side"], Float[Tensor, "side side"]]:
    """Squared singular values, falling, and the singular vectors of the smaller side as columns; both float32."""
    rows, cols = matrix.shape
    gram = matrix @ matrix.T if rows <= cols else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram.double())
    return values.flip(0).clamp(min=0).float(), vectors.flip(1).float()


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
