"""lqer: the error's singular value decomposition, each channel weighted by how large its inputs are."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lowbit.corrections import Correction, Options, Term
from lowbit.corrections._lowrank import approximate
from lowbit.methods import Stats


def fit(error: Float[Tensor, "rows cols"], stats: Stats, options: Options) -> Term:
    """L2QER (LQER, arXiv:2402.02446, section 3.2): the best `up @ down` in `||(error - up @ down) S||`.

    `S` is the diagonal of the mean absolute inputs; the paper divides it by `sqrt(min * max)`, which changes nothing.
    Channels that are always 0 weigh nothing; where all are, every channel weighs the same (ZeroQuant-V2's LoRC).
    """
    return approximate(error, _moment(stats), options)


def _moment(stats: Stats) -> Float[Tensor, "cols"]:
    mean = stats["mean_abs"].float()
    return mean.square() if mean.any() else mean + 1


CORRECTION = Correction(
    about="low-rank error, channels weighted by their mean absolute input (L2QER)",
    fit=fit,
    needs=frozenset({"mean_abs"}),
)
