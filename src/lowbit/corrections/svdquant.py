"""svdquant: the largest part of the weight itself stays in 16 bits; codes are made of the rest. See `docs/methods`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.corrections import Correction, Options, Term
from lowbit.corrections._lowrank import approximate
from lowbit.methods import Stats


def fit(weight: Float[Tensor, "rows cols"], stats: Stats, options: Options) -> Term:
    """SVDQuant (arXiv:2411.05007, section 4.2): the first singular vectors of the weight, as transforms left it."""
    return approximate(weight, torch.ones(weight.shape[1]), options)


CORRECTION = Correction(
    about="low-rank part of the weight kept beside the codes of the rest (SVDQuant)",
    fit=fit,
    before=True,
)
