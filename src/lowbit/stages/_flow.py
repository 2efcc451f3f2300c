"""Which weights write the residual stream, which read it, and through which norms: found by running the model.

The model runs once without any weight (on the meta device) while every operation is watched. A tensor carries a mark
that says what its last axis is: outputs of certain weights, the output of a norm, or a head's share of outputs. Marks
pass through operations under which turning that axis and then computing is the same as computing and then turning; an
operation that is not known to be so loses the mark, and is remembered as the reason. No name of a module or of an
architecture occurs here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Tokens of the run: a length that no other axis is likely to have, so that axes can be told apart.
_TOKENS = 11

_SWAPS = {"t", "T", "mT", "transpose", "permute", "swapaxes"}
_RESHAPES = _SWAPS | {
    "view", "reshape", "contiguous", "to", "float", "half", "bfloat16", "type", "type_as", "clone", "detach", "dropout",
    "unsqueeze", "squeeze", "expand", "expand_as", "repeat_interleave", "index_select", "flatten", "unflatten", "sum",
    "chunk", "split", "narrow", "__getitem__", "alias", "view_as", "reshape_as", "data",
}  # fmt: skip
_SCALES = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "div", "__truediv__", "true_divide"}
_SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "mm"}
_EMPTY = {"zeros_like", "empty_like", "ones_like", "new_zeros", "new_empty", "new_ones", "full_like", "new_full"}


@final
@dataclass(frozen=True)
class Param:
    """A weight; `swapped` where its last two axes are."""

    name: str
    swapped: bool = False


@final
@dataclass(frozen=True)
class Written:
    """A sum of outputs of weights, from row `start` of them on; `column`: along the last axis but one."""

    writers: frozenset[str]
    start: int = 0
    column: bool = False


@final
@dataclass(frozen=True)
class Normed:
    """What a norm makes of a sum of outputs; the rest as there."""

    writers: frozenset[str]
    norm: str
    column: bool = False


@final
@dataclass(frozen=True)
class Heads:
    """Outputs of weights from row `start` on, cut into `count` heads of `width`; `flat` once they are joined again."""

    writers: frozenset[str]
    start: int
    count: int
    width: int
    flat: bool = False


Stream = Written | Normed | Heads
Mark = Param | Stream
# The marks of an operation's results; None where it loses them.
Marks = Sequence[Mark | None] | None


@final
@dataclass(frozen=True)
class Reader:
    """A weight that reads the stream along `axis` (negative: from the end), through a norm or directly."""

    name: str
    axis: int
    norm: str | None


@final
@dataclass(frozen=True)
class Pair:
    """`count` heads of `width` that weights write from row `start` on, and that `reader` reads along `axis`."""

    writers: frozenset[str]
    start: int
    count: int
    width: int
    reader: str
    axis: int


@final
@dataclass(frozen=True)
class Norm:
    """A norm, by what scales its output; `mean`: it takes the mean off, as LayerNorm does.

    `parameter` is the name of its weight; None where it has none.
    """

    kind: Literal["weight", "one plus weight", "none", "mean"]
    parameter: str | None


@final
@dataclass(frozen=True)
class Flow:
    """What the run found; names are of the model's parameters.

    Attributes:
        width: of the stream; 0 where no embedding was used.
        writers: weights that write the stream.
        axes: every weight that was used, and the axis of its outputs.
        readers: weights that read it.
        norms: norms of the stream, by the name of their module.
        pairs: values of attention: heads written and read with nothing but sums over tokens between.
        lost: what else is done with the stream, a reason each.
    """

    width: int
    writers: frozenset[str]
    axes: Mapping[str, int]
    readers: tuple[Reader, ...]
    norms: Mapping[str, Norm]
    pairs: tuple[Pair, ...]
    lost: tuple[str, ...]


def trace(model: nn.Module) -> Flow:
    """Run a causal language model that is on the meta device, and say what flows where.

    Raises:
        RuntimeError: the model cannot be run without values; and whatever else it raises then.
    """
    watch = _Watch(model)
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    # Where none is given, one would be made by looking at values; and a model without attention takes another shape.
    config: Any = model.config
    attends = getattr(config.get_text_config(), "num_attention_heads", None)
    whole = torch.zeros(1, 1, _TOKENS, _TOKENS, device="meta", dtype=next(model.parameters()).dtype)
    mask = whole if attends else None
    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watch.before(path)).remove)
            stack.callback(module.register_forward_hook(watch.after(path), always_call=True).remove)
        stack.enter_context(watch)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return watch.found()


@final
class _Watch(TorchFunctionMode):
    """Marks of all tensors of a run, and what was learned from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._tensors: list[Tensor] = []  # an id is a tensor's only as long as the tensor lives
        self._marks: dict[int, Mark] = {}
        self._axes: dict[str, int] = {}
        self._tables: set[str] = set()
        self._readers: list[tuple[frozenset[str], Reader]] = []
        self._norms: dict[str, tuple[frozenset[str], Norm]] = {}
        self._pairs: list[Pair] = []
        self._lost: list[tuple[frozenset[str], str]] = []
        self._path: list[str] = []
        self._norming: str | None = None
        self._width = 0
        for name, parameter in model.named_parameters():
            self._set(parameter, Param(name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then see where the marks go."""
        out = func(*args, **(kwargs or {}))
        if self._norming is None:
            name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
            results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self._follow(name, args, kwargs or {}, results)
        return out

    def before(self, path: str) -> Callable[[nn.Module, Any], None]:
        """What happens before a module runs: is it a norm?"""

        def hook(module: nn.Module, args: Any) -> None:
            self._path.append(path)
            mark = self._mark(args[0]) if len(args) == 1 else None
            if self._norming is not None or not isinstance(mark, Written) or mark.start or mark.column:
                return
            self._norming = path
            norm = probe(module, path, args[0].shape[-1])
            self._norming = path if norm else None
            if norm:
                self._norms[path] = mark.writers, norm

        return hook

    def after(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        """What happens after a module ran."""

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._path.pop()
            if self._norming == path and self._path[-1:] != [path]:  # not its second run, for the probe
                self._norming = None
                self._set(out, Normed(self._norms[path][0], path))

        return hook

    def found(self) -> Flow:
        """The result, of the one stream that begins at the embedding."""
        named = [writers for writers, _ in (*self._readers, *self._norms.values()) if writers & self._tables]
        writers = frozenset[str]().union(*named)
        return Flow(
            self._width,
            writers,
            dict(self._axes),
            tuple(reader for source, reader in self._readers if source & self._tables),
            {path: norm for path, (source, norm) in self._norms.items() if source & self._tables},
            tuple(self._pairs),
            tuple(dict.fromkeys(reason for source, reason in self._lost if source & writers)),
        )

    def _mark(self, value: object) -> Mark | None:
        return self._marks.get(id(value)) if isinstance(value, Tensor) else None

    def _set(self, tensor: Tensor, mark: Mark | None) -> None:
        self._tensors.append(tensor)
        self._marks.pop(id(tensor), None)
        if mark:
            self._marks[id(tensor)] = mark

    def _follow(self, name: str, args: Any, kwargs: Any, results: Sequence[Tensor]) -> None:
        inputs = tree_leaves((args, kwargs))
        if not results or name in _EMPTY or not any(map(self._mark, inputs)):
            return
        marks = self._rule(name, args, kwargs, results)
        for value in inputs if marks is None else ():
            self._lose(self._mark(value), name)
        for tensor, mark in zip(results, marks or [None] * len(results), strict=True):
            self._set(tensor, mark)

    def _lose(self, mark: Mark | None, name: str) -> None:
        if isinstance(mark, Written | Normed | Heads):
            what = f"the output of {mark.norm}" if isinstance(mark, Normed) else "the stream"
            self._lost.append((mark.writers, f"{self._path[-1] or 'the model'} uses {what} in {name}"))

    def _rule(self, name: str, args: Any, kwargs: Any, results: Sequence[Tensor]) -> Marks:
        if name == "embedding":
            return self._embedding(*args[1:2], **{key: kwargs[key] for key in ("weight",) if key in kwargs})
        if name == "linear":
            return self._linear(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return [mark if isinstance(mark := self._mark((*args, *kwargs.values())[2]), Heads) else None]
        if name in _PRODUCTS:
            return self._product(*args[:2])
        if name in _SUMS:
            return self._sum(name, *args[:2])
        if name in _SCALES:
            return self._scaled(name, *args[:2])
        if name in _RESHAPES and (mark := self._mark(args[0])):
            return _reshape_param(mark, name, args, results[0]) if isinstance(mark, Param) else _reshape(
                mark, name, args, results
            )  # fmt: skip
        return None

    def _embedding(self, weight: Tensor) -> Marks:
        mark = self._mark(weight)
        if not isinstance(mark, Param):
            return None
        self._axes[mark.name], self._width = -1, weight.shape[-1]
        self._tables.add(mark.name)
        return [Written(frozenset([mark.name]))]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Marks:
        param, offset = self._mark(weight), self._mark(bias)
        if not isinstance(param, Param):
            return None
        added = {offset.name: -1} if isinstance(offset, Param) else {}
        return self._used(self._mark(input), param.name, (-1, -2) if not param.swapped else (-2, -1), added)

    def _product(self, left: Tensor, right: Tensor) -> Marks:
        one, two = self._mark(left), self._mark(right)
        if isinstance(two, Param) and not isinstance(one, Param) and not getattr(one, "column", False):
            return self._used(one, two.name, (-2, -1) if not two.swapped else (-1, -2))
        if isinstance(one, Param) and right.shape[-1] == 1 and (two is None or getattr(two, "column", False)):
            used = self._used(two, one.name, (-1, -2) if not one.swapped else (-2, -1))
            return [replace(mark, column=True) for mark in used or () if isinstance(mark, Written)]
        return [two] if one is None and isinstance(two, Heads) and not two.flat else None

    def _used(
        self, mark: Mark | None, name: str, axes: tuple[int, int], added: Mapping[str, int] | None = None
    ) -> Marks:
        """A weight's input and output axes are known now."""
        if isinstance(mark, Normed | Written):
            norm = mark.norm if isinstance(mark, Normed) else None
            self._readers.append((mark.writers, Reader(name, axes[0], norm)))
        elif isinstance(mark, Heads):
            if not mark.flat:
                return None
            self._pairs.append(Pair(mark.writers, mark.start, mark.count, mark.width, name, axes[0]))
        if name in self._tables:  # an output layer that is the embedding
            return [None]
        self._axes |= {name: axes[1], **(added or {})}
        return [Written(frozenset([name, *(added or {})]))]

    def _sum(self, name: str, left: object, right: object) -> Marks:
        one, two = self._mark(left), self._mark(right)
        for first, second in ((one, two), (two, one)):
            if isinstance(first, Written) and isinstance(second, Param) and not first.start and not first.column:
                self._axes[second.name] = -1
                return [Written(first.writers | {second.name})]
            if isinstance(first, Written) and isinstance(second, Normed):
                self._lost.append((first.writers, f"{second.norm} norms what is added to the stream"))
        if isinstance(one, Written) and isinstance(two, Written) and one.start == two.start == 0 == one.column:
            return None if two.column else [Written(one.writers | two.writers)]
        return None

    def _scaled(self, name: str, left: object, right: object) -> Marks:
        pairs = [(left, right)] if "div" in name else [(left, right), (right, left)]
        for value, factor in pairs:
            mark = self._mark(value)
            uniform = not isinstance(factor, Tensor) or factor.shape[-1:] in ((), (1,))
            if isinstance(mark, Written | Normed | Heads) and not getattr(mark, "column", False) and uniform:
                return [mark]
        return None


def _reshape_param(mark: Param, name: str, args: Any, result: Tensor) -> Marks:
    """A weight whose last two axes stay, or change places; or one of a stack of biases."""
    shape = args[0].shape
    if name in _SWAPS:
        last = {-1, -2, len(shape) - 1, len(shape) - 2}
        swap = name in ("t", "T", "mT") or (name in ("transpose", "swapaxes") and set(args[1:]) <= last)
        return [replace(mark, swapped=not mark.swapped)] if swap else [None]
    picked = name == "__getitem__" and isinstance(args[1], Tensor)  # of a stack, by number
    kept = min(len(shape) - picked, 2, max(result.ndim, 1))
    return [mark if result.shape[-kept:] == shape[-kept:] else None]


def _reshape(mark: Stream, name: str, args: Any, results: Sequence[Tensor]) -> Marks:
    """The marks of parts or of another shape of a marked tensor; results are in the order of the parts."""
    shape, start, marks = args[0].shape, _start(name, args), []
    for result in results:
        new = _reshape_one(mark, name, shape, result.shape, start)
        if new is None:
            return None
        marks.append(new)
        start += result.shape[-1] if len(results) > 1 and result.shape[-1] < shape[-1] else 0
    return marks


def _start(name: str, args: Any) -> int:
    """Where along the last axis an index begins."""
    index = args[1] if name == "__getitem__" else None
    last = index[-1] if isinstance(index, tuple) and index and Ellipsis in index else None
    if name == "__getitem__" and isinstance(index, tuple) and len(index) == args[0].ndim:
        last = index[-1]
    return last.start or 0 if isinstance(last, slice) else 0


def _reshape_one(mark: Stream, name: str, old: torch.Size, new: torch.Size, start: int) -> Stream | None:
    joined = name in ("view", "reshape", "flatten") and prod(old[-2:]) == new[-1]
    if isinstance(mark, Heads):
        if not mark.flat and joined and old[-2] % mark.count == 0:
            return replace(mark, flat=True)
        return mark if old[-1] == new[-1] else None
    if mark.column:
        return replace(mark, column=False) if name == "squeeze" and new[-1] == old[-2] and old[-1] == 1 else None
    if old[-1] == new[-1]:
        return mark
    if name == "unsqueeze" and new[-1] == 1 and new[-2] == old[-1]:
        return replace(mark, column=True)
    if not isinstance(mark, Written):
        return None
    if name in ("__getitem__", "chunk", "split", "narrow") and name != "narrow":
        return replace(mark, start=mark.start + start)
    split = name in ("view", "reshape", "unflatten") and old[-1] == prod(new[-2:])
    return Heads(mark.writers, mark.start, new[-2], new[-1]) if split else None


def probe(module: nn.Module, path: str, width: int) -> Norm | None:
    """Whether a module is a norm over `width` channels, found by running it on values that show it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    if any(True for _ in module.children()) or len(shapes) > 2 or set(shapes.values()) - {(width,)}:
        return None
    draw = torch.Generator().manual_seed(width)
    x = 100 * torch.randn(5, width, generator=draw)  # so large that no epsilon matters
    values = {name: 0.5 + torch.rand(shape, generator=draw) for name, shape in shapes.items()}

    def run(rows: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, values, (rows,))
        return result

    try:
        out, shifted, scaled = run(x), run(x + 50), run(7 * x)
    except (RuntimeError, TypeError, ValueError):  # it wants something else, and so it is no norm
        return None
    if not isinstance(out, Tensor) or out.shape != x.shape or not torch.allclose(out, scaled, 1e-3, 1e-3):
        return None
    weight = next(iter(values.values()), None)
    name = f"{path}.{next(iter(shapes))}" if shapes else None
    unit = x * x.square().mean(-1, keepdim=True).rsqrt()
    kinds = {"none": unit} if weight is None else {"weight": unit * weight, "one plus weight": unit * (1 + weight)}
    kind = next((kind for kind, wanted in kinds.items() if torch.allclose(out, wanted, 1e-3, 1e-3)), None)
    if kind is None:
        kind = "mean" if torch.allclose(out, shifted, 1e-3, 1e-3) else None
    return Norm(kind, name) if kind else None  # type: ignore[arg-type]
