"""eora: the low-rank term with the least error at the layer's output, over the calibration inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.corrections import Correction, Options, Term
from lowbit.corrections._lowrank import approximate
from lowbit.methods import Stats


def fit(error: Float[Tensor, "rows cols"], stats: Stats, options: Options) -> Term:
    """EoRA (arXiv:2410.21271, section 3): the best `up @ down` in the eigenspace of the inputs' second moment.

    The paper projects the error by `Q sqrt(L)` of `X^T X = Q L Q^T`, cuts its singular values, and projects back by the
    inverse; `_lowrank` finds the same product without an inverse.
    """
    return approximate(error, _moment(stats), options)


def _moment(stats: Stats) -> Tensor:
    moment = stats["second_moment"].float()
    return moment if moment.any() else torch.ones(len(moment))


CORRECTION = Correction(
    about="low-rank error, least at the layer's output over the calibration inputs (EoRA)",
    fit=fit,
    needs=frozenset({"second_moment"}),
)
