"""A linear layer of `torch` that computes with a quantized weight, and lets gradients through to inputs and bias.

It is an `nn.Linear` to whatever asks (PEFT's adapters do), with a weight that has no storage: it says its shape, type
and bytes, gives its values where they are asked for, and can be neither written to nor saved. What else is set as the
weight is multiplied by `torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_leaves, tree_map_only

from lowbit.errors import UnsupportedError
from lowbit.native import Matrix
from lowbit.runtime.panels import Packed

# What code that sorts or counts the entries of a state dict calls, none of which reads a value.
_FACTS = {
    "__deepcopy__", "__get__", "__len__", "__repr__", "copy_", "detach", "dim", "element_size", "is_complex",
    "is_contiguous", "is_floating_point", "ndimension", "nelement", "numel", "size", "stride",
}  # fmt: skip
_SETTERS = {Tensor.data.__set__, Tensor.__setitem__}  # type: ignore[attr-defined]
_LEARNING = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_TO_NUMPY = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__}  # read the memory that is not there


@final
class PackedWeight(Tensor):
    """A weight in panels. It has no storage: for every operation its values are made anew.

    Attributes:
        packed: the weight.
        matrix: what multiplies by it.
        threads: that share a product.
        entry: its name, where it is an entry of a state dict, which reads as nothing but its shape and type.
    """

    packed: Packed
    matrix: Matrix
    threads: int
    entry: str | None

    @staticmethod
    def __new__(
        cls, packed: Packed, matrix: Matrix, threads: int, dtype: torch.dtype = torch.float32, entry: str | None = None
    ) -> PackedWeight:
        """Of the shape that the weight has, and no memory."""
        shape = (packed.panels.rows, packed.inputs)
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        torch._C._set_throw_on_mutable_data_ptr(made)  # no memory to be read past `torch`
        made.packed, made.matrix, made.threads, made.entry = packed, matrix, threads, entry
        return made

    def again(self, dtype: torch.dtype | None = None, entry: str | None = None) -> PackedWeight:
        """The same weight as another tensor."""
        return PackedWeight(self.packed, self.matrix, self.threads, dtype or self.dtype, entry or self.entry)

    def values(self) -> Float[Tensor, "outputs inputs"]:
        """As floats: its products with the unit vectors."""
        return (
            self.matrix(torch.eye(self.packed.inputs, dtype=torch.float32), self.threads).T.contiguous().to(self.dtype)
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _FACTS:
            _refuse_entries(cls, (args, kwargs))
        if func is Tensor.element_size:
            return args[0].packed.panels.nbytes / args[0].numel()
        if func in _SETTERS or (func in _LEARNING and all((*args[1:], *(kwargs or {}).values()))):
            raise _fixed()
        if func in _TO_NUMPY:
            args = (args[0].values(), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func.overloadpacket == torch.ops.aten.detach:
            return args[0].again()
        for made in _of(cls, _written(func, args, kwargs or {})):
            if func.overloadpacket == torch.ops.aten.copy_ and getattr(args[1], "packed", None) is made.packed:
                return made  # of a state dict of its own
            raise _fixed()
        _refuse_entries(cls, (args, kwargs))
        args, kwargs = tree_map_only(cls, lambda made: made.values(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """The same weight, which never changes."""
        made: Tensor = self.again()
        memo[id(self)] = made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return made

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse to be pickled: `torch` would write a weight without its values."""
        raise _unsaved(self.entry or "a weight of the model")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Shape and bits; values would be made for it."""
        return f"PackedWeight({list(self.shape)}, {self.packed.panels.bits} bits, {self.dtype})"


def _of(kind: type[PackedWeight], arguments: Any) -> list[PackedWeight]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, kind)]


def _refuse_entries(kind: type[PackedWeight], arguments: Any) -> None:
    """Raise UnsupportedError for an entry of a state dict."""
    for made in _of(kind, arguments):
        if made.entry:
            raise _unsaved(made.entry)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Arguments that an operation writes to."""
    named = {spec.name: value for spec, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return [named.get(spec.name) for spec in func._schema.arguments if spec.alias_info and spec.alias_info.is_write]


def _fixed() -> UnsupportedError:
    return UnsupportedError(
        "weights on the kernels do not change, by training or by merging an adapter; "
        "`lowbit.load(path, reference=True)` has all weights as floats"
    )


def _unsaved(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} is on the kernels, which give no weights to save; an adapter beside them can be saved, "
        "`lowbit convert` and `lowbit quantize` write checkpoints, and `lowbit.load(path, reference=True)` has all "
        "weights as floats"
    )


class _Fused(NamedTuple):
    """A product that adds a bias, which it reads where it lies: what is written there counts."""

    packed: Packed
    bias: Tensor
    matrix: Matrix

    def __deepcopy__(self, memo: object) -> _Fused:
        return self  # a copy finds that its bias lies elsewhere


@final
class Linear(nn.Linear):
    """`inputs @ weight.T + bias` on the kernels, in float32; the result has the dtype of the inputs.

    Attributes:
        weight: in panels; or any other tensor that was set, which `torch` multiplies.
        bias: what is added, or None.
        in_features: columns of the weight.
        out_features: its rows.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, threads: int) -> None:
        nn.Module.__init__(self)  # that of `nn.Linear` makes a weight
        self.in_features, self.out_features = packed.inputs, packed.panels.rows
        self.weight = nn.Parameter(PackedWeight(packed, packed.matrix(), threads), requires_grad=False)
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter | None) else nn.Parameter(bias))
        self._fused: _Fused | None = None
        self._uncompiled = _uncompiled()

    @property
    def packed(self) -> Packed | None:
        """The weight in panels; None where another was set."""
        weight = self.weight
        return weight.packed if isinstance(weight, PackedWeight) else None

    def forward(self, inputs: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """The product for any number of leading axes."""
        return (self._uncompiled if torch.compiler.is_compiling() else _computed)(self, inputs)

    def product(self) -> tuple[Matrix, Tensor | None]:
        """What multiplies, and what is to be added to that."""
        weight, bias = self.weight, self.bias
        assert isinstance(weight, PackedWeight)
        learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if bias is None or learned or bias.dtype != torch.float32 or not bias.is_contiguous():
            return weight.matrix, bias
        known = self._fused
        if not known or known.packed is not weight.packed or known.bias.data_ptr() != bias.data_ptr():
            added = bias.detach()
            known = self._fused = _Fused(weight.packed, added, weight.packed.matrix(added))
        return known.matrix, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Bias, and type of the weight, in another type; the weight has no other place."""
        weight = self.weight
        if not isinstance(weight, PackedWeight):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        probe = fn(torch.empty(0, dtype=weight.dtype, device="cpu"))
        if probe.device.type != "cpu":
            raise UnsupportedError(
                f"the kernels compute on the CPU, not on {probe.device.type}; "
                "`lowbit.load(path, reference=True)` has all weights as floats, which can be moved"
            )
        self._parameters.pop("weight")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._parameters = {"weight": nn.Parameter(weight.again(probe.dtype), weight.requires_grad), **self._parameters}
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Its weight as an entry that says what it is, and raises `UnsupportedError` when it is written or read."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight, name = self.weight, f"{prefix}weight"
        if isinstance(weight, PackedWeight) and not keep_vars:
            destination[name] = weight.again(entry=name)

    def extra_repr(self) -> str:
        """Shape, bits and way, for `print(model)`."""
        if not self.packed:
            return super().extra_repr()
        panels = self.packed.panels
        return f"{self.in_features} to {self.out_features}, {panels.bits} bits, {panels.way}"


@cache
def _uncompiled() -> Callable[[Linear, Tensor], Tensor]:
    """The product as `torch.compile` leaves it alone; when a layer is made, for it imports what takes a second."""
    left: Callable[[Linear, Tensor], Tensor] = torch.compiler.disable(_computed)  # type: ignore[no-untyped-call]
    return left


def _computed(layer: Linear, inputs: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, PackedWeight):
        return linear(inputs, weight, bias)
    matrix, added = layer.product()
    flat = inputs.reshape(-1, weight.packed.inputs).float()
    out: Tensor = _Product.apply(flat.contiguous(), weight, matrix)  # type: ignore[no-untyped-call]
    out = out if added is None else out + added
    return out.to(inputs.dtype).view(*inputs.shape[:-1], weight.packed.panels.rows)


@final
class _Product(torch.autograd.Function):
    """The product; its slope by the inputs comes from products with the unit vectors, which give the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: PackedWeight, matrix: Matrix) -> Tensor:
        ctx.weight = weight
        return matrix(inputs, weight.threads)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0].float() @ ctx.weight.values().float(), None, None
