"""Narrow: what it costs to round what layers read, and the keys and values that attention keeps, in nats per token.

As for weights (`sensitivity.py`) half the mean over tokens of `(g^T d)^2`: `d` is what rounding changes of a token's
input, key or value, and `g` the gradient there of the log probability of drawn tokens. Keys and values are rounded as
attention reads them, after the rotation, each head of a token a row. Errors of several tokens are taken to be
independent, but for what is the same for all keys of a window: softmax does not see it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lowbit.errors import UsageError
from lowbit.methods._scales import unscaled
from lowbit.schemes import Scheme, parse
from lowbit.stages._activations import input_scale, rounded

KEPT = ("keys", "values")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.| |$)")
_MOST = 3

Pairs = Sequence[tuple[Tensor, Tensor]]  # values, and gradients there


def narrow_schemes(names: Sequence[str]) -> dict[str, Scheme]:
    """The schemes of these names, with tokens as rows.

    Raises:
        UsageError: no scheme, or one by which no runtime rounds what it has just computed.
    """
    found = {name: parse(name) for name in names}
    for name, scheme in found.items():
        apart = scheme.block.rows < 2 and not scheme.block.flat and (scheme.nested is None or scheme.scale == "e4m3")
        if not apart or scheme.zero not in ("none", "int") or unscaled(scheme):
            raise UsageError(
                f"--narrow {name}: tokens are rounded one by one, on a grid with or without whole zero points; as "
                "int8-row, int8-g32, int4-g32-asym, fp8-e4m3-tensor, mxfp8, nvfp4"
            )
    return found


@final
class Attended(TorchFunctionMode):
    """While it is entered, sees keys and values of passes with gradients, and the gradients there.

    Args:
        step: of the tokens one in so many is kept.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step
        self._seen: dict[str, list[list[Tensor]]] = {name: [] for name in KEPT}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            for name, tensor in zip(KEPT, (given["key"], given["value"]), strict=True):
                if tensor.requires_grad:
                    self._keep(name, tensor)
        return func(*args, **(kwargs or {}))

    def _keep(self, name: str, tensor: Tensor) -> None:
        pair = [tensor.detach()[:, :, :: self._step].clone()]
        self._seen[name].append(pair)

        def keep(gradient: Tensor) -> None:
            pair.append(gradient[:, :, :: self._step].clone())

        tensor.register_hook(keep)  # type: ignore[no-untyped-call]

    def pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Keys or values and gradients, `[windows, heads, tokens, size]` each."""
        return [(pair[0], pair[1]) for pair in self._seen[name] if len(pair) == 2]


def kept_loss(pairs: Pairs, scheme: Scheme, keys: bool) -> float:
    """What rounding keys or values costs."""
    scale, moved = _scale([values for values, _ in pairs], scheme), list[Tensor]()
    for x, g in pairs:
        error = rounded(x, scheme, scale) - x
        moved.append(((_unshifted(error, g) if keys else error) * g).sum((1, 3)).double().square().flatten())
    return float(torch.cat(moved).mean()) / 2


def _unshifted(error: Tensor, gradients: Tensor) -> Tensor:
    """Errors of keys without what is the same for all tokens of a window, which moves all scores of a query alike.

    The mean is weighted by how much a token counts, so that what is left is predicted to cost least.
    """
    counts = gradients.square().sum(-1, keepdim=True)
    return error - (error * counts).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1e-30)


def input_loss(readers: Sequence[tuple[Float[Tensor, "_ inputs"], Pairs]], scheme: Scheme, tokens: float) -> float:
    """What rounding one input costs.

    Args:
        readers: of each weight that reads it the weight, and rows of the input with the gradients of what it makes of
            them; the rows are the same for all.
        tokens: that these rows stand for.
    """
    rows = [x for x, _ in readers[0][1]]
    scale, total = _scale(rows, scheme), 0.0
    for at, x in enumerate(rows):
        error = rounded(x, scheme, scale) - x
        moved = sum(((error @ weight.T) * pairs[at][1]).sum(1) for weight, pairs in readers)
        total += float(torch.as_tensor(moved).double().square().sum())
    return total / (2 * tokens)


def _scale(rows: Sequence[Tensor], scheme: Scheme) -> float | None:
    """What a calibrated run would store, where all tokens share a scale."""
    return input_scale(max((float(x.abs().max()) for x in rows), default=0.0), scheme)


def kept_losses(losses: Mapping[str, Mapping[str, float]], schemes: Sequence[str]) -> dict[str, float]:
    """What keeping the keys and values of all blocks in each of these schemes costs.

    Raises:
        UsageError: none were seen.
    """
    rows = [row for name, row in losses.items() if name.endswith(tuple(f" {kind}" for kind in KEPT))]
    if schemes and not rows:
        raise UsageError(
            "what a narrower cache costs was not seen: this model's attention is not torch's own function; name the "
            "cache's type with --kv"
        )
    return {scheme: sum((row[scheme] for row in rows), 0.0) for scheme in schemes}


@final
@dataclass(frozen=True)
class Narrowed:
    """Losses of inputs, each under the name of the first weight that reads it, and of keys and values of each block."""

    losses: Mapping[str, Mapping[str, float]]

    def lines(self) -> Iterator[str]:
        """What is said of it: for all alike the sum, and where most of it is."""
        kinds: dict[str, dict[str, float]] = {}
        for name, row in self.losses.items():
            kind, place = _NUMBER.sub("*", name), ".".join(_NUMBER.findall(name))
            for scheme, loss in row.items():
                kinds.setdefault(f"{_said(kind)} in {scheme}", {})[place] = loss
        wide = max(map(len, kinds), default=0)
        yield "rounding inputs and cache is predicted to cost, in nats per token:"
        for kind, losses in kinds.items():
            most = sorted(losses, key=lambda place: -losses[place])[:_MOST]
            where = ", ".join(f"{place} ({losses[place]:.2g})" for place in most)
            yield f"  {kind:<{wide}}  {sum(losses.values()):.3g}, most in {where}"


def _said(kind: str) -> str:
    return kind if kind.endswith(KEPT) else f"input of {kind.removesuffix('.weight')}"
