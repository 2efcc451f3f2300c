"""One block of a model on its own: its weights, filled from the checkpoint, and calls that its model would make.

The arguments that a model hands to its blocks besides the hidden state (masks, positions) are recorded once per number
of windows, with the blocks replaced by recorders, so that no block but the first has to run for it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from lowbit.errors import UnsupportedError
from lowbit.stages._attention import Remembered
from lowbit.stages._model import Blueprint, refusals
from lowbit.stages._products import Product, Products, Region
from lowbit.stages._shortcuts import End, StandIn, with_shortcuts

_HIDDEN = "hidden_states"


@final
class _Reached(Exception):
    """The model called the last block; what follows is not needed."""


@final
@dataclass(frozen=True)
class Call:
    """Arguments of one call of a block, its hidden state left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for this hidden state."""
        if self.named:
            return self.args, {**self.kwargs, _HIDDEN: hidden}
        return (hidden, *self.args), dict(self.kwargs)

    def on(self, device: torch.device) -> Call:
        """The same arguments there."""
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.named)


@final
class _Recorder(StandIn):
    """In the place of a block: keeps its arguments and answers with a given output."""

    def __init__(self, block: nn.Module, answer: Any, last: bool) -> None:
        super().__init__(block)
        self.answer, self._last = answer, last
        self.call: Call | None = None
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = _HIDDEN in kwargs
        self.hidden = kwargs.pop(_HIDDEN) if named else args[0]
        self.call = Call(args if named else args[1:], kwargs, named)
        if self._last:
            raise _Reached
        return self.answer


@final
class Entrance:
    """What stands before the blocks of a model: turns tokens into the first hidden state, and records calls.

    It runs on the processor; `device` is where the blocks are called. `tables`: embeddings, by path, in the place of
    those of the checkpoint, in the type of the blueprint.
    """

    def __init__(
        self, blueprint: Blueprint, device: torch.device, tables: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self._blueprint, self.device = blueprint, device
        self._calls: dict[int, dict[str, Call]] = {}
        self._recording = threading.Lock()
        self._first = next(iter(blueprint.blocks))
        self._model = blueprint.streamed()
        self._recorder = _replace(self._model, [self._first], None)[self._first]
        for path, table in tables.items():
            self._model.get_submodule(path).register_forward_pre_hook(partial(_look_up_in, table))

    def hidden(self, ids: Int64[Tensor, "windows tokens"]) -> Tensor:
        """The first block's input for these windows, `[windows, tokens, width]`."""
        self._run(self._model, ids)
        hidden = self._recorder.hidden
        assert hidden is not None
        if hidden.shape != (*ids.shape, self._blueprint.width):
            raise UnsupportedError(
                f"{self._first}: the model hands its blocks {list(hidden.shape)} for {list(ids.shape)} tokens, where a "
                f"row of {self._blueprint.width} for each can be calibrated; use a method without calibration"
            )
        return hidden

    @torch.enable_grad()
    def slopes(
        self, ids: Int64[Tensor, "windows tokens"], slopes: Float[Tensor, "windows tokens width"]
    ) -> dict[str, Tensor]:
        """Gradients at what each embedding gives for these windows, by path, from those at the first block's input."""
        given: dict[str, Tensor] = {}

        def leave(path: str, module: nn.Module, args: object, output: Tensor) -> Tensor:
            given[path] = output.detach().requires_grad_()
            return given[path]

        embeddings = {path: self._model.get_submodule(path) for path in self._blueprint.tables}
        with ExitStack() as hooks:
            for path, embedding in embeddings.items():
                hooks.callback(embedding.register_forward_hook(partial(leave, path)).remove)
            hidden = self.hidden(ids)
        found = torch.autograd.grad(hidden, list(given.values()), slopes, allow_unused=True)
        return {path: rows for path, rows in zip(given, found, strict=True) if rows is not None}

    def calls(self, ids: Int64[Tensor, "windows tokens"]) -> dict[str, Call]:
        """How the model calls each block for so many windows of this length.

        Raises:
            UnsupportedError: the arguments depend on the tokens.
        """
        with self._recording, torch.no_grad():
            if len(ids) not in self._calls:
                self._calls[len(ids)] = self._calls_for(ids)
            return self._calls[len(ids)]

    def _calls_for(self, ids: Int64[Tensor, "windows tokens"]) -> dict[str, Call]:
        paths = list(self._blueprint.blocks)
        hidden, first = self.hidden(ids), self._recorder.call
        assert first is not None
        args, kwargs = first.with_hidden(hidden)
        with self._refusals():
            answer = self._blueprint.filled(paths[0])(*args, **kwargs)
        model = self._blueprint.streamed()
        recorders = _replace(model, paths, answer)
        found: list[dict[str, Call]] = []
        for tokens in (ids, (ids + 1) % self._blueprint.vocabulary):
            self._run(model, tokens)
            found.append({path: recorder.call for path, recorder in recorders.items() if recorder.call})
        for path in paths:
            if not _same(found[0][path], found[1][path]):
                raise UnsupportedError(
                    f"{path}: the model hands it more of the tokens than the hidden state, which is not calibrated; "
                    "use a method without calibration"
                )
        return {path: call.on(self.device) for path, call in found[0].items()}

    def _run(self, model: nn.Module, ids: Tensor) -> None:
        with self._refusals(), suppress(_Reached):
            model(input_ids=ids, use_cache=False)

    def _refusals(self) -> AbstractContextManager[None]:
        return refusals(f"{self._blueprint.checkpoint.path} fails on calibration windows")


@final
@dataclass(frozen=True)
class Read:
    """What a layer after the blocks reads, and what it makes of it."""

    path: str
    rows: Tensor
    made: Tensor


@final
class Exit:
    """What stands after the blocks of a model: turns the last hidden state into logits, on the processor.

    `held`: all weights outside of the blocks stay in memory; else each is read again at every call.
    """

    def __init__(
        self, blueprint: Blueprint, entrance: Entrance, ids: Int64[Tensor, "windows tokens"], held: bool = False
    ) -> None:
        paths = list(blueprint.blocks)
        args, kwargs = entrance.calls(ids[:1])[paths[0]].with_hidden(entrance.hidden(ids[:1]))
        with torch.no_grad():
            answer = blueprint.filled(paths[0])(*args, **kwargs)
        self._rest = tuple(answer[1:]) if isinstance(answer, tuple) else None
        outside = blueprint.checkpoint.weights.keys() - frozenset[str]().union(*blueprint.blocks.values())
        model = blueprint.with_parts(outside) if held else blueprint.streamed()
        self._model = model.requires_grad_(False)
        self._recorders = _replace(self._model, paths, None, ends=False)
        self._layers = {path: self._model.get_submodule(path) for path in blueprint.layers}

    def logits(self, ids: Int64[Tensor, "windows tokens"], hidden: Tensor, seen: list[Read] | None = None) -> Tensor:
        """Logits for the hidden state after the last block; differentiable. Each position stands alone.

        `seen` gets what each layer after the blocks reads and makes.
        """

        if seen is None:
            return self._run(ids, hidden)

        def see(path: str, module: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> None:
            if made.requires_grad:  # others are of what enters the blocks
                seen.append(Read(path, args[0], made))

        with ExitStack() as hooks:
            for path, layer in self._layers.items():
                hooks.callback(layer.register_forward_hook(partial(see, path)).remove)
            return self._run(ids, hidden)

    def rows(self, ids: Int64[Tensor, "windows tokens"], hidden: Tensor, path: str) -> Tensor:
        """What a layer after the blocks reads, `[windows, tokens, inputs]`, without running it."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Reached

        hook = self._layers[path].register_forward_pre_hook(stop, prepend=True)  # before its weight is read
        with suppress(_Reached):
            try:
                self._run(ids, hidden)
            finally:
                hook.remove()
        return found[0]

    def _run(self, ids: Tensor, hidden: Tensor) -> Tensor:
        for recorder in self._recorders.values():
            recorder.answer = hidden if self._rest is None else (hidden, *self._rest)
        found: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return found


def _look_up_in(table: Tensor, module: nn.Module, ids: object) -> None:
    """A hook: the embedding looks up rows of `table` this time."""
    module.load_state_dict({"weight": table}, assign=True)


def _replace(model: nn.Module, paths: Sequence[str], answer: Any, ends: bool = True) -> dict[str, _Recorder]:
    """Put recorders in the place of blocks; the last one `ends` the run."""
    recorders = {path: _Recorder(model.get_submodule(path), answer, ends and path == paths[-1]) for path in paths}
    for path, recorder in recorders.items():
        model.set_submodule(path, recorder)
    return recorders


def _same(one: Call, other: Call) -> bool:
    left, right = tree_leaves((one.args, dict(one.kwargs))), tree_leaves((other.args, dict(other.kwargs)))
    pairs = zip(left, right, strict=True)
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


@final
@dataclass(frozen=True)
class Place:
    """Where a weight of the checkpoint stands: a parameter of the block, and a part of it.

    Attributes:
        parameter: name in the block.
        expert: index along the first axis of a stack; None where the parameter is a matrix.
        rows: the part of the rows of that matrix.
        turned: whether the parameter holds the transposed weight.
        swapped: whether the weight is stored as `[inputs, outputs]`.
    """

    parameter: str
    expert: int | None
    rows: slice
    turned: bool
    swapped: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """View of the weight in the parameter, in the checkpoint's layout."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return (matrix.T if self.turned else matrix)[self.rows]


@final
class LiveBlock:
    """A filled block on its device: what calibration runs, and whose weights it replaces one after the other.

    Attributes:
        places: where each weight is.
        ends: modules that need not be run again where it is known what their last layer reads; see `_shortcuts`.
    """

    def __init__(self, blueprint: Blueprint, path: str, names: Sequence[str], device: torch.device) -> None:
        self.path = path
        self.module = blueprint.filled(path).requires_grad_(False)
        self._parameters = dict(self.module.named_parameters())
        self._local, self.ends = threading.local(), dict[str, End]()
        sources = blueprint.sources(path)
        self.places = {name: place for name in names if (place := self._find(blueprint, name, sources)) is not None}
        self.device = device
        self._parameters = dict(self.module.to(device).named_parameters())

    def _find(self, blueprint: Blueprint, name: str, sources: Mapping[str, frozenset[str]]) -> Place | None:
        """The part of a parameter that equals the weight; None where it is not there as a whole."""
        weight = blueprint.checkpoint.weights[name]
        shape = weight.held
        for parameter, made_of in sources.items():
            tensor = self._parameters[parameter]
            if name in made_of and len(made_of) == 1 and tuple(tensor.shape) == shape:
                return Place(parameter, None, slice(None), False)
            if name in made_of and len(shape) == 2:
                whole = blueprint.checkpoint.dequantized(name, tensor.dtype)
                places = _candidates(parameter, tensor, shape)
                if weight.rows and tensor.dim() == 2:
                    places = [Place(parameter, None, slice(*weight.rows[0]), False)]
                return next((place for place in places if _holds(place, tensor, whole)), None)
        return None

    def weight(self, name: str) -> Tensor:
        """The weight as a view of its parameter, `[outputs, inputs]`: writing to it changes the block."""
        return self._logical(name, self._parameters[self.places[name].parameter].detach())

    def _regions(self, replaced: Mapping[str, Tensor]) -> list[Region]:
        """Where each weight lies in memory, in the checkpoint's layout."""
        held = {**self._parameters, **replaced}
        return [Region(name, place.of(held[place.parameter].detach())) for name, place in self.places.items()]

    def swap(self, name: str) -> None:
        """Note that a weight is stored as `[inputs, outputs]`."""
        self.places[name] = replace(self.places[name], swapped=True)

    def tensor(self, parameter: str) -> Tensor:
        """A parameter of the block, to read and to write."""
        return self._parameters[parameter].detach()

    def run(
        self,
        call: Call,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        watch: Callable[[Product], Tensor | None] | None = None,
        after: Callable[[Product, Tensor], Tensor] | None = None,
        recall: Remembered | None = None,
    ) -> Tensor:
        """The block's output, with the given weights (`[outputs, inputs]`) and parameters in the place of its own.

        `watch` sees every product of a weight with its rows, and may return other rows; `after` may change the result.
        `recall` knows what earlier passes of the block as it is computed, and keeps what this one does.
        What is given may be elsewhere than the block; the output is where `hidden` is.
        """
        args, kwargs = call.with_hidden(hidden.to(self.device))
        moved = {name: tensor.to(self.device) for name, tensor in (parameters or {}).items()}
        replaced = moved | self._replaced(weights or {})
        module = self._own_module() if replaced else self.module
        watched = watch is not None or after is not None
        with ExitStack() as around:
            if recall:
                module = around.enter_context(self._short(recall))
            if watched:
                around.enter_context(Products(self._regions(replaced), watch, after))
            out = functional_call(module, replaced, args, kwargs) if replaced else module(*args, **kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found.to(hidden.device)

    def _own_module(self) -> nn.Module:
        """This thread's twin of the module, over the same parameters: `functional_call` changes it for a while."""
        if not hasattr(self._local, "module"):
            self._local.module = self._twin()
        found: nn.Module = self._local.module
        return found

    def _twin(self) -> nn.Module:
        shared = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return copy.deepcopy(self.module, shared)

    @contextmanager
    def _short(self, recall: Remembered) -> Iterator[nn.Module]:
        """This thread's twin of the module with shortcuts; itself where a device computes faster than it is told."""
        if not hasattr(self._local, "short"):
            module, ends = (self._twin(), self.ends) if self.ends and self.device.type == "cpu" else (self.module, {})
            self._local.short = module, with_shortcuts(module, ends)
        module, shortcuts = self._local.short
        with recall, ExitStack() as after:
            for shortcut in shortcuts:
                shortcut.recall = recall
                after.callback(setattr, shortcut, "recall", None)  # it knows of rows
            yield module

    def _replaced(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that hold the given weights; differentiable."""
        parameters: dict[str, Tensor] = {}
        for name, weight in weights.items():
            place = self.places[name]
            own = self._parameters[place.parameter]
            if place == Place(place.parameter, None, slice(None), False):
                parameters[place.parameter] = weight.to(own)
                continue
            merged = parameters.setdefault(place.parameter, own.detach().clone())
            self._logical(name, merged).copy_(weight)
        return parameters

    def _logical(self, name: str, parameter: Tensor) -> Tensor:
        place = self.places[name]
        view = place.of(parameter)
        return view.T if place.swapped else view


def _candidates(parameter: str, tensor: Tensor, shape: tuple[int, ...]) -> list[Place]:
    """Every place that a matrix of this shape may have in a parameter that is merged from several."""
    experts: list[int | None] = list(range(len(tensor))) if tensor.dim() == 3 else [None]
    places = []
    for turned in (False, True):
        high, wide = (tensor.shape[-1], tensor.shape[-2]) if turned else tuple(tensor.shape[-2:])
        if wide == shape[1]:
            runs = [slice(at, at + shape[0]) for at in range(0, high - shape[0] + 1, gcd(high, shape[0]))]
            runs += [slice(at, None, 2) for at in (0, 1) if high == 2 * shape[0]]  # gpt-oss: gate and up alternate
            places += [Place(parameter, e, rows, turned) for e in experts for rows in runs]
    return places


def _holds(place: Place, tensor: Tensor, weight: Tensor) -> bool:
    view = place.of(tensor)
    return view.shape == weight.shape and torch.equal(view[:1], weight[:1]) and torch.equal(view, weight)
