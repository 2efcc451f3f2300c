"""What the corrections share: the best low-rank term in the norm that a matrix of input correlations gives.

`E` is the error of a weight, `[rows, cols]`, and `H`, `[cols, cols]`, says how its input is distributed. Over all
`B A` of rank r, `tr((E - B A) H (E - B A)^T) = ||(E - B A) H^(1/2)||^2` is least for `B = U`, the first r left singular
vectors of `E H^(1/2)`, and `A = U^T E` (Eckart-Young: `U U^T M` is the best rank-r approximation of any `M`). So no
root of `H` is ever inverted, and an `H` without full rank is no special case.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.corrections import LowRank, Options, Term


def approximate(matrix: Float[Tensor, "rows cols"], moment: Tensor, options: Options) -> Term:
    """The best term of the options' rank (of the smaller side, where that is less), exact in the options' dtype.

    `moment` is `H`; a vector stands for its diagonal. What a rank takes from the loss is its squared singular value.
    """
    import scipy.linalg  # type: ignore[import-untyped]

    square, weighted = _gram(matrix, moment)
    if not square.isfinite().all():  # values of which float32 does not hold the squares
        square, weighted = _gram(matrix.double(), moment.double())
    side, (rows, cols) = len(square), matrix.shape
    least = max(side - options.most(rows, cols), 0)
    values, vectors = scipy.linalg.eigh(square.numpy(), subset_by_index=(least, side - 1), driver="evr")
    up = torch.from_numpy(vectors).flip(1)
    if weighted is not None:  # the vectors are of the other side: carry them over
        up = torch.linalg.qr(weighted.double() @ up)[0]
    down, up = _stored(up.float(), up.float().T @ matrix, matrix, options.storage)
    gains = torch.from_numpy(values).flip(0).clamp(min=0).float()
    return Term(down, up, gains, (rows + cols) * options.storage.itemsize)


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
    result: Tensor = root.to(moment.dtype)
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


def ranks(terms: Mapping[str, Term], budget: int) -> dict[str, int]:
    """A rank for each term, up to its own, under a budget in bytes: always the next that takes most loss per byte.

    Greedy; optimal up to the last rank that did not fit, since what a rank brings only falls. What gets nothing has
    rank 0.
    """
    chosen = dict.fromkeys(terms, 0)
    queue = [(-float(term.gains[0]) / term.nbytes, name) for name, term in terms.items() if len(term.gains)]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        term = terms[name]
        if term.nbytes > budget or gain >= 0:
            continue
        budget, chosen[name] = budget - term.nbytes, chosen[name] + 1
        if chosen[name] < len(term.gains):
            heapq.heappush(queue, (-float(term.gains[chosen[name]]) / term.nbytes, name))
    return chosen
