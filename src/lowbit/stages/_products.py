"""Which weights a block multiplies by, and with which inputs: seen by running it, not by names.

A mode of `torch` watches the products of a forward pass. It knows a weight by the memory that a product reads, so that
linear layers, GPT-2's transposed ones, merged projections and stacked experts are all seen alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Operations that multiply rows by a weight, and where the weight and the rows stand among the arguments. `linear` has
# the weight as [outputs, inputs], the others as [inputs, outputs].
_LINEAR = torch.nn.functional.linear
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _LINEAR: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    torch.bmm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.bmm: (0, 1),
    Tensor.addmm: (1, 2),
}


@final
@dataclass(frozen=True)
class Region:
    """Memory of one weight inside a parameter, as a view of `[high, wide]` in the layout of the checkpoint."""

    name: str
    view: Tensor

    @property
    def start(self) -> int:
        """Address of its first element."""
        return self.view.data_ptr()

    @property
    def last(self) -> int:
        """Address of its last element."""
        steps = sum((size - 1) * stride for size, stride in zip(self.view.shape, self.view.stride(), strict=True))
        return self.start + steps * self.view.element_size()


@final
@dataclass(frozen=True)
class Product:
    """One product with weights that read the same rows.

    Attributes:
        names: the weights.
        rows: `[n, inputs]`: what they read.
        swapped: whether the weights are stored as `[inputs, outputs]`.
    """

    names: tuple[str, ...]
    rows: Tensor
    swapped: bool


@final
class Products(TorchFunctionMode):
    """Watches the products with known weights while it is active.

    Args:
        regions: the weights.
        before: called before each product; rows that it returns replace those read.
        after: called with each product and its result; what it returns replaces the result.
    """

    def __init__(
        self,
        regions: Iterable[Region],
        before: Callable[[Product], Tensor | None] | None,
        after: Callable[[Product, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._regions = sorted(((region.start, region.last, region) for region in regions), key=lambda known: known[0])
        self._before, self._after = before, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places, found = _PRODUCTS.get(func), []
        if places and len(args) > places[1] and isinstance(args[places[1]], Tensor):
            args, (at, weight) = list(args), places
            if self._is_stack(args[at], args[weight]):
                return self._one_by_one(args[at], args[weight])
            found = self._products(args[at], args[weight], func is _LINEAR)
            for product in found:
                rows = self._before(product) if self._before else None
                if rows is not None:
                    args[at] = rows.view(args[at].shape)
        result = func(*args, **(kwargs or {}))
        for product in found if self._after else ():
            assert self._after is not None
            result = self._after(product, result)
        return result

    def _is_stack(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether one operation is a product for each expert of a stack that is known."""
        return weight.dim() == 3 and rows.dim() == 3 and len(rows) == len(weight) and bool(self._inside(weight))

    def _one_by_one(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The products of a stack, each on its own; rows of zeros stand for tokens that other experts get (Llama 4)."""
        results = []
        for x, matrix in zip(rows, weight, strict=True):
            sent = x.detach().any(-1).nonzero().squeeze(-1)
            result = x.new_zeros(len(x), matrix.shape[-1])
            if len(sent):
                result = result.index_copy(0, sent, self.__torch_function__(torch.mm, (), (x[sent], matrix)))
            results.append(result)
        return torch.stack(results)

    def _products(self, rows: Tensor, weight: Tensor, outputs_first: bool) -> list[Product]:
        """The products that one operation on a matrix stands for."""
        matrix = weight if outputs_first else weight.transpose(-1, -2)
        return self._one(rows.reshape(-1, rows.shape[-1]), matrix) if matrix.dim() == 2 else []

    def _inside(self, tensor: Tensor) -> list[Region]:
        """The weights that lie in a tensor."""
        whole = Region("", tensor)
        start, last = whole.start, whole.last
        return [region for first, end, region in self._regions if start <= first and end <= last]

    def _one(self, rows: Tensor, matrix: Tensor) -> list[Product]:
        """`rows @ matrix.T`, where the matrix, `[outputs, inputs]`, holds weights that are known."""
        inside = self._inside(matrix)
        straight = [region for region in inside if region.view.stride(-1) == matrix.stride(-1)]
        found = [(straight, False), ([region for region in inside if region not in straight], True)]
        return [Product(tuple(r.name for r in regions), rows, swapped) for regions, swapped in found if regions]
