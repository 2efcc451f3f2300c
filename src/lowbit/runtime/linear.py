"""A linear layer of `torch` that computes with a quantized weight, and lets gradients through to its inputs."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from lowbit import native
from lowbit.runtime.panels import Packed


@final
class Linear(nn.Module):
    """`inputs @ weight.T + bias` on the kernels, in float32; the result has the dtype of the inputs.

    Attributes:
        packed: the weight.
        in_features: its columns.
        out_features: its rows.
        bias: as of `torch.nn.Linear`.
        threads: that share a product.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, threads: int) -> None:
        super().__init__()
        self.packed, self.in_features, self.out_features = packed, packed.inputs, packed.panels.rows
        self.bias, self.threads = bias, threads

    def forward(self, inputs: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """The product for any number of leading axes."""
        flat = inputs.reshape(-1, self.in_features).float()
        out: Tensor = _Product.apply(flat, self.packed, self.threads)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape, bits and way, for `print(model)`."""
        panels = self.packed.panels
        return f"{self.in_features} to {self.out_features}, {panels.bits} bits, {panels.way}"


@final
class _Product(torch.autograd.Function):
    """The product; its slope by the inputs comes from products with the unit vectors, which give the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Packed, threads: int) -> Tensor:
        ctx.packed, ctx.threads, ctx.width = packed, threads, inputs.shape[1]
        return multiply(packed, inputs, threads)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        transposed = multiply(ctx.packed, torch.eye(ctx.width), ctx.threads)
        return slopes[0].float() @ transposed.T, None, None


def multiply(packed: Packed, inputs: Float[Tensor, "tokens cols"], threads: int = 1) -> Float[Tensor, "tokens rows"]:
    """`inputs @ weight.T`."""
    ordered = inputs if packed.order is None else inputs[:, packed.order]
    return native.multiply(packed.panels, pad(ordered, (0, packed.panels.cols - ordered.shape[1])).contiguous(), threads)
