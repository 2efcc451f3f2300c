"""A small gated block with residual, as methods and transforms are given it; written out in plain float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.blocks import Block, Site, Weights
from lowbit.methods import Stats
from lowbit.methods.rtn import METHOD as RTN
from lowbit.schemes import parse

Rounding = Callable[[Tensor], Tensor]
SITES = (Site(("gate", "up"), 32), Site(("down",), 48))


@dataclass(frozen=True)
class Small:
    """`x + down(silu(gate n) * up n)` with `n = x / rms(x) * norm` over windows `[windows, tokens, 32]`."""

    weights: Mapping[str, Tensor]
    norm: Tensor
    x: Tensor

    def inputs(self, indices: Sequence[int], weights: Weights, rounding: Mapping[str, Rounding]) -> dict[str, Tensor]:
        """What each weight reads, before any rounding, and the block's output under the name `out`."""
        own = {name: weights.get(name, value).double() for name, value in self.weights.items()}
        x = self.x[list(indices)].double()
        n = x / x.square().mean(-1, keepdim=True).sqrt() * self.norm.double()

        def linear(name: str, value: Tensor) -> Tensor:
            seen = rounding[name](value) if name in rounding else value
            return torch.nn.functional.linear(seen, own[name])

        hidden = torch.nn.functional.silu(linear("gate", n)) * linear("up", n)
        return {"gate": n, "up": n, "down": hidden, "out": x + linear("down", hidden)}


def small(outliers: Sequence[int] = (3, 17), times: float = 60.0, windows: int = 6) -> Small:
    """Random weights; the given channels of the norm's output are large, and the weights that read them small."""
    dice = torch.Generator().manual_seed(11)
    weights = {
        name: torch.randn(shape, generator=dice) / shape[1] ** 0.5
        for name, shape in {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}.items()
    }
    norm = torch.rand(32, generator=dice) + 0.5
    for channel in outliers:
        norm[channel] *= times
        weights["gate"][:, channel] /= times
        weights["up"][:, channel] /= times
    return Small(weights, norm, torch.randn((windows, 20, 32), generator=dice))


def as_block(
    model: Small, scheme: str, activations: str | None = None, rounding: Callable[[str], Rounding] | None = None
) -> Block:
    """The block of the contract; `rounding(scheme)` quantizes inputs where `activations` is set."""
    kind = parse(scheme)
    inputs = {name: parse(activations) for name in model.weights} if activations else {}

    def run(indices: Sequence[int], weights: Weights, factors: Weights | None = None) -> Tensor:
        def around(name: str) -> Rounding:
            assert rounding and activations
            plain, s = rounding(activations), (factors or {}).get(name, torch.ones(()))
            return lambda x: plain(x / s) * s

        return model.inputs(indices, weights, {name: around(name) for name in inputs})["out"].float()

    def nearest(name: str, weight: Tensor) -> Tensor:
        return RTN.quantize(weight, {}, kind, RTN.options()).dequantize()

    return Block(
        weights=dict(model.weights),
        schemes=dict.fromkeys(model.weights, kind),
        windows=len(model.x),
        run=run,
        target=lambda indices: model.inputs(indices, {}, {})["out"].float(),
        nearest=nearest,
        activations=inputs,
    )


def statistics(model: Small, site: Site) -> Stats:
    """Those of the site's input over all windows."""
    x = model.inputs(range(len(model.x)), {}, {})[site.weights[0]].reshape(-1, site.channels)
    return {
        "mean_abs": x.abs().mean(0).float(),
        "absmax": x.abs().amax(0).float(),
        "second_moment": (x.T @ x / len(x)).float(),
    }
