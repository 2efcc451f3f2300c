"""A linear layer of `torch` that computes with a quantized weight, and lets gradients through to its inputs."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowbit.errors import UnsupportedError
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

    @property
    def weight(self) -> Tensor:
        """The weight for model code that takes it from the layer; of no cost where only its shape or dtype is asked."""
        return _Weight(self)

    def values(self) -> Float[Tensor, "outputs inputs"]:
        """The weight: its products with the unit vectors."""
        return self.packed.matrix()(torch.eye(self.in_features), self.threads).T

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Refuse: without these weights a saved model is none, and would be loaded with random ones.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{prefix}weight is on the kernels, which give no weights to save; `lowbit convert` and `lowbit quantize` "
            "write checkpoints, and `lowbit.load(path, reference=True)` has all weights as floats"
        )

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
        return slopes[0].float() @ ctx.layer.values(), None


@final
class _Weight(Tensor):
    """A layer's weight without storage, which is made anew for every operation."""

    layer: Linear

    @staticmethod
    def __new__(cls, layer: Linear) -> _Weight:
        shape = (layer.out_features, layer.in_features)
        made: _Weight = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        made.layer = layer
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, lambda made: made.layer.values(), (args, kwargs or {}))
        return func(*args, **kwargs)
