"""Shortcuts: parts of a block that end in a product are not run again where what this product reads is known.

The passes over a block for its later steps, and the one for its output, repeat what the earlier ones computed. A module
whose output is that of a layer inside of it, as of attention its output projection and of an MLP the projection down,
has to be run as far as that layer once; from then on it is this layer alone, on the same rows. Which modules are so is
found by running the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from lowbit.stages._attention import Remembered


@final
@dataclass(frozen=True)
class End:
    """A layer in which a module ends.

    Attributes:
        layer: its path in the block.
        nothing: how many times None follows the module's output; None where the output stands alone.
    """

    layer: str
    nothing: int | None


@contextmanager
def ends_of(block: nn.Module) -> Iterator[dict[str, End]]:
    """The outermost modules that end in a layer, by path, there when the block has been run once inside."""
    found, calls = dict[str, End](), Counter[str]()
    latest: list[tuple[str, Tensor, Tensor]] = []  # the layer that ran last: path, output, and a copy of that

    def see(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[path] += 1
        out, nothing = _alone(output)
        if out is None:
            return
        if not next(module.children(), None):
            if any(weight.dim() == 2 for weight in module.parameters(False)):
                latest[:] = [(path, out, out.clone())]
            return
        layer, own, copy = latest[0] if latest else ("", out, out)
        inside = layer.startswith(f"{path}.") and _more(module, layer.removeprefix(f"{path}."))
        plain = not any(isinstance(each, dict | list) for each in (*args, *kwargs.values()))  # it may write into them
        same = out.data_ptr() == own.data_ptr() and out.shape == own.shape and torch.equal(out, copy)
        if inside and plain and same:
            for inner in [each for each in found if each.startswith(f"{path}.")]:
                del found[inner]
            found[path] = End(layer, nothing)

    with ExitStack() as hooks:
        for path, module in block.named_modules():
            if path:
                hooks.callback(module.register_forward_hook(partial(see, path), with_kwargs=True).remove)
        yield found
    for path in [path for path, end in found.items() if max(calls[path], calls[end.layer]) > 1]:
        del found[path]


def _alone(output: Any) -> tuple[Tensor | None, int | None]:
    """A module's one output, and how often None follows it; None where it has others."""
    if isinstance(output, tuple) and output and all(each is None for each in output[1:]):
        return (output[0], len(output) - 1) if isinstance(output[0], Tensor) else (None, None)
    return (output, None) if isinstance(output, Tensor) else (None, None)


def _more(module: nn.Module, layer: str) -> bool:
    """Whether a module has matrices besides those of a layer."""
    return any(weight.dim() > 1 for name, weight in module.named_parameters() if not name.startswith(f"{layer}."))


class StandIn(nn.Module, ABC):
    """Stands in the place of a module, which whoever calls it may look at: what it has not is the module's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What is done in its place."""


@final
class Shortcut(StandIn):
    """In the place of a module that ends in a layer.

    Args:
        block: both are in it.
        path: of the module.
        end: which layer.
    """

    def __init__(self, block: nn.Module, path: str, end: End) -> None:
        super().__init__(block.get_submodule(path))
        self._path, self._nothing = path, end.nothing
        self._last = (block.get_submodule(end.layer),)  # a tuple: it is no second child
        self.recall: Remembered | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output: made of what the layer reads, where that is known."""
        recall = self.recall
        assert recall is not None
        (last,) = self._last
        rows = recall.known(self._path)
        if rows is not None:
            out = last(rows)
            return out if self._nothing is None else (out, *[None] * self._nothing)

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            return recall.keep(self._path, inputs[0])

        handle = last.register_forward_pre_hook(keep)
        try:
            with recall.kept_outside():
                return self.module(*args, **kwargs)
        finally:
            handle.remove()


def with_shortcuts(block: nn.Module, ends: Mapping[str, End]) -> list[Shortcut]:
    """Put a shortcut in the place of each module of a block that ends in a layer."""
    found = {path: Shortcut(block, path, end) for path, end in ends.items()}
    for path, shortcut in found.items():
        block.set_submodule(path, shortcut)
    return list(found.values())
