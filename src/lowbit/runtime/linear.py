"""A linear layer of `torch` that computes with a quantized weight, and lets gradients through to its inputs."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowbit.runtime.panels import Packed


@final
class Linear(nn.Module):
    """`inputs @ weight.T + bias` on the kernels, in float32; the result has the dtype of the inputs.

    Attributes:
        packed: the weight.
        bias: what is added, or None.
        matrix: the weight with its bias, to multiply by.
        in_features: its columns.
        out_features: its rows.
        threads: that share a product.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, threads: int) -> None:
        super().__init__()
        self.packed, self.bias, self.threads = packed, bias, threads
        self.matrix = packed.matrix(bias)
        self.in_features, self.out_features = packed.inputs, packed.panels.rows

    def forward(self, inputs: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """The product for any number of leading axes."""
        flat = inputs.reshape(-1, self.in_features).float()
        out: Tensor = _Product.apply(flat.contiguous(), self)  # type: ignore[no-untyped-call]
        return out.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape, bits and way, for `print(model)`."""
        panels = self.packed.panels
        return f"{self.in_features} to {self.out_features}, {panels.bits} bits, {panels.way}"


@final
class _Product(torch.autograd.Function):
    """The product; its slope by the inputs comes from products with the unit vectors, which give the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Linear) -> Tensor:
        ctx.layer = layer
        return layer.matrix(inputs, layer.threads)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        packed, threads = ctx.layer.packed, ctx.layer.threads
        return slopes[0].float() @ packed.matrix()(torch.eye(packed.inputs), threads).T, None
