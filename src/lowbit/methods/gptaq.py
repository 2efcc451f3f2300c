"""GPTAQ: GPTQ towards what the float model computes from its own inputs. See `docs/methods/gptaq.md`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.methods import Method, Stats, _gptq
from lowbit.methods._scales import finite_range
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


@final
@dataclass(frozen=True)
class Options:
    """GPTQ's, and how far to follow the float model.

    Attributes:
        alpha: share of the difference between the float model's inputs and the present ones that is made up for.
        damp: added to the diagonal of the second moment, as a share of its mean; ten times as much until it factors.
        block: columns between two matrix products.
        order: of rounding, as in `gptq`: `static`, `none`, `group` or `aware`.
        scales: `mse` (searched for the least error, weighted by the inputs) or `range` (cover the weights).
        passes: of coordinate descent over codes after the first pass.
        refit: let these passes move scales and zero points as well.
        signed: whether searched scales of symmetric integers may be negative, as in `autoround`.
    """

    alpha: float = 1.0
    damp: float = 0.01
    block: int = 128
    order: Literal["static", "none", "group", "aware"] = "static"
    scales: Literal["mse", "range"] = "mse"
    passes: int = 4
    refit: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        if self.damp <= 0 or self.block < 1 or self.passes < 0 or not 0 <= self.alpha <= 1:
            raise ValueError("alpha must be in [0, 1], damp above 0, block 1 or more, passes 0 or more")


def _loop(options: Options) -> _gptq.Loop:
    given = asdict(options)
    del given["alpha"]
    return _gptq.Loop(search=given.pop("scales") == "mse", fresh=True, **given)


def prepare(stats: Stats, scheme: Scheme, options: Options) -> Stats:
    """As `gptq`; and `shift`, alpha times the regression of the inputs' difference on the inputs."""
    prepared = _gptq.prepare(stats, scheme, _loop(options))
    cross = stats["cross_moment"]
    upper = stats["second_moment"].to(_gptq.precision(len(cross)), copy=True)
    upper.diagonal().copy_(prepared["curvature"])
    shift = cross.to(upper.dtype, copy=True)
    if _gptq.cholesky_(upper):
        solved = shift.mT  # in its place
        torch.linalg.solve_triangular(upper.mT, solved, upper=False, out=solved)
        torch.linalg.solve_triangular(upper, solved, upper=True, out=solved)
    else:
        shift.zero_()
    shift = shift.mul_(options.alpha).float()
    return {name: value for name, value in prepared.items() if name != "cross_moment"} | {"shift": shift}


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Round the weight that comes closest to the float model's output on the present inputs.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    finite_range(weight, stats, scheme)
    target = weight.to(torch.float32, copy=True)
    for start in range(0, len(weight), _gptq.LANES):
        rows = target[start : start + _gptq.LANES]
        full = torch.nn.functional.pad(rows, (0, 0, 0, _gptq.LANES - len(rows)))  # products of one shape round alike
        moved = (full.to(stats["shift"].device) @ stats["shift"])[: len(rows)].cpu()
        target[start : start + _gptq.LANES] += moved * (rows != 0)
    return _gptq.quantize(target, stats, scheme, _loop(options))


def _prepared_bytes(cols: int) -> int:
    """As `gptq`; and the cross moment, with the factor and the solution in `precision` once `gptq`'s is done."""
    exact = _gptq.precision(cols).itemsize
    solved = (16 + 2 * exact + 4 * (exact > 4)) * cols**2 + _gptq.stripe_bytes(cols)
    return max(_gptq.prepared_bytes(cols) + 4 * cols**2, solved)


METHOD = Method(
    about="GPTAQ: GPTQ towards what the float model computes from its own inputs",
    quantize=quantize,
    options=Options,
    beside="gptaq",
    needs=frozenset({"second_moment", "cross_moment"}),
    workspace=48.0,
    supports=_gptq.objection,
    prepare=prepare,
    anywhere=True,
    tables=True,
    act_order=lambda options: bool(options.order == "group"),
    prepared=_prepared_bytes,
    work=lambda rows, cols, scheme: _gptq.operations(rows, cols, Options().passes, scheme),
)
