"""Experts that a checkpoint has in one tensor, taken apart into matrices and joined again; nothing is copied to look.

What lies where is data (`arch/experts.toml`). Taken apart is a view of the checkpoint: all that follows sees matrices
by names of their own. Joined again is what the model's class wants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.errors import UnsupportedError
from lowbit.formats import Format, Spec, Weight, never_stacked
from lowbit.formats._switch import APART_ONLY
from lowbit.stages._weightfile import Slot, WeightFile
from lowbit.stages.checkpoint import Checkpoint, arch_rows

T = TypeVar("T")
Cut = Callable[[Tensor], dict[str, Tensor]]  # a stack to its matrices, by name
UNREAD = "experts have names of llm-compressor and vLLM, which transformers' class of this model does not read"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 4096  # experts of a layer; a header may claim more names than there is memory for


@final
@dataclass(frozen=True)
class Layout:
    """How one kind of tensor holds the matrices of experts: a row of `arch/experts.toml`."""

    model_types: Sequence[str]
    formats: Sequence[str]
    stack: str
    parts: Sequence[str]
    transformers: Sequence[str] = ()
    mlx: Sequence[str] = ()
    hidden: str = ""
    turned: bool = False
    interleaved: bool = False
    heads: Sequence[str] = ()
    single: bool = False

    def of_type(self, model_type: str) -> Layout:
        """The same for one type of model: `mlx` is among its formats where mlx-lm loads that."""
        more = ("mlx",) if model_type in self.mlx else ()
        return replace(self, formats=(*self.formats, *more), transformers=(*self.transformers, *more))

    def part(self, stack: Tensor, expert: int, part: int, first: int = 0) -> Tensor:
        """View of one matrix `[outputs, inputs]`, or bias, in the tensor that holds all.

        `first`: rows of a head that are keys.
        """
        if self.heads:
            return stack[expert, first:] if part else stack[expert, :first].T
        one = stack if self.single else stack[expert].T if self.turned else stack[expert]
        rows = one.shape[0] // len(self.parts)
        return one[part :: len(self.parts)] if self.interleaved else one[part * rows : (part + 1) * rows]

    def join(self, experts: Iterable[Sequence[Tensor]]) -> Tensor:
        """The tensor that holds all, of the parts of each expert, which are taken one by one: the inverse of `part`."""
        if self.heads:
            return torch.cat([torch.cat([keys.T, values]) for keys, values in experts])
        if self.single:
            return torch.cat([part for expert in experts for part in expert])
        wide = [torch.stack(tuple(p), 1).flatten(0, 1) if self.interleaved else torch.cat(tuple(p)) for p in experts]
        return torch.stack([one.T if self.turned else one for one in wide])

    def holds(self, shape: Sequence[int], hidden: object) -> bool:
        """Whether a tensor of this shape can be one, of a model with this `hidden_size`, where it is known."""
        if self.heads or self.single:
            return len(shape) == 2 and 0 not in shape and not shape[0] % len(self.parts)
        matrices = not self.parts[0].endswith(".bias")
        if len(shape) != 2 + matrices or 0 in shape or shape[0] > _MOST:
            return False
        sides = {"outputs": shape[-1 if self.turned else 1], "inputs": shape[1 if self.turned else -1]}
        if sides["outputs"] % len(self.parts):
            return False
        return hidden is None or not self.hidden or sides[self.hidden] == hidden

    def names(self, prefix: str, experts: int) -> list[list[str]]:
        """Names of the parts of each expert."""
        return [[prefix + part.format(expert) for part in self.parts] for expert in range(experts)]


@final
@dataclass(frozen=True)
class Stack:
    """A tensor that is not in a checkpoint, for its matrices are: names of the parts of each expert."""

    layout: Layout
    members: Sequence[Sequence[str]]


def nowhere(name: str) -> bool:
    """No tensor stays whole."""
    return False


def finds(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether one of these regular expressions is found in a name; what is none is left to others to refuse."""

    def found(pattern: str, name: str) -> bool:
        with suppress(re.error):
            return re.search(pattern, name) is not None
        return False

    return lambda name: any(found(pattern, name) for pattern in patterns)


def apart(source: Checkpoint, form: str | None, whole: Callable[[str], bool] = nowhere) -> Checkpoint:
    """A view in which each expert's matrices are weights, where readers of the format `form` know them so.

    `whole`: of the name of a tensor that holds all, whether it stays as it is; not where the format has all experts in
    one tensor, and each of these stays as it is too.
    """
    if source.format not in (None, "mxfp4") or form is None:
        return source
    rows = _known_apart(source, form)
    if not rows:
        return source
    stays = partial(_stays, whole, _has_stacks(form))
    cuts = {name: cut for name in source.specs if _row(rows, name) and (cut := _cut(source, rows, name))}
    views = {name: cut(_hollow(source, name)) for name, cut in cuts.items()}
    found = {
        name: {new: _slot(source.files[name].slots[name], view) for new, view in parts.items()}
        for name, parts in views.items()
        if not stays(name, parts)
    }
    made = {name: {n: Weight(n, s.spec.shape, s.spec.dtype) for n, s in p.items()} for name, p in found.items()}
    for weight in source.weights.values():
        row = _row(rows, weight.name) if weight.scheme else None
        stored, parts = _quantized(source, row, weight) if row else ({}, {})
        if row and not stays(weight.name, parts):
            made[weight.name] = parts
            found |= stored
    if not found:
        return source
    held = {file: replace(file, slots=spread(file.slots, found)) for file in set(source.files.values())}
    specs = spread(source.specs, {name: {new: slot.spec for new, slot in p.items()} for name, p in found.items()})
    files = spread(
        {name: held[file] for name, file in source.files.items()},
        {name: dict.fromkeys(pieces, held[source.files[name]]) for name, pieces in found.items()},
    )
    edits, alone = _made_apart(
        source, {name: cut for name, cut in cuts.items() if name in found and name in source.view.was}, found
    )
    return replace(source, specs=specs, weights=spread(source.weights, made), files=files | alone, edits=edits)


def _stays(whole: Callable[[str], bool], stacked: bool, name: str, parts: Iterable[str]) -> bool:
    return whole(name) and not (stacked and all(map(whole, parts)))


def _has_stacks(form: str) -> bool:
    """Whether a format has experts in one tensor by rules of its own."""
    record: Format = plugins.load("formats", form)
    return record.stacks is not never_stacked


def _made_apart(
    source: Checkpoint, cuts: Mapping[str, Cut], found: Mapping[str, Mapping[str, Slot]]
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, WeightFile]]:
    """How the parts of stacks that are made, and lie in no file, are read: edits of all, and files of these."""
    read = lru_cache(maxsize=1)(lambda name: cuts[name](source.tensor(name)))  # its parts are read one after the other
    edits, files = dict(source.edits), {}
    for name in cuts:
        del edits[name]
        for part in found[name]:
            edits[part], files[part] = _part(read, name, part), source.files[name].alone(name, part)
    return edits, files


def _part(read: Callable[[str], Mapping[str, Tensor]], name: str, part: str) -> Callable[[Tensor], Tensor]:
    return lambda stored: read(name)[part].contiguous()


def told_apart(before: Checkpoint, after: Checkpoint, form: str | None) -> str | None:
    """What to say of tensors that were taken apart; None where none was."""
    names = [name for name in before.weights if name not in after.weights]
    if not names or form is None:
        return None
    first = next(name for name in after.weights if name not in before.weights)
    text = f"{len(names)} tensors that hold several matrices are taken apart, into {first} and others"
    if not unread(after, form):
        return text
    return f"{text}: {UNREAD}; what --skip finds, as {names[0]}, stays whole in 16 bits"


def check_whole(source: Checkpoint, form: str) -> None:
    """Refuse codes that a GGUF file would have in parts, of which some are transposed.

    Raises:
        UnsupportedError: with the first, and what takes it apart.
    """
    rows = _known_apart(source, form)
    for weight in source.weights.values() if form == "gguf" else ():
        if weight.scheme and _row(rows, weight.name):
            raise UnsupportedError(
                f"{weight.name} is quantized as one, and llama.cpp has parts of it; take it apart from what its codes "
                "stand for, with lowbit quantize --requantize --format gguf"
            )


def check_alike(source: Checkpoint, form: str | None) -> None:
    """Refuse a stack of floats that stays whole where mlx-lm would look for its experts.

    Raises:
        UnsupportedError: with the first, and what keeps it in 16 bits.
    """
    model_type = str(source.config.get("model_type"))
    rows = _known_apart(source, form) if form else []
    if form is None or not rows or not _has_stacks(form):
        return
    left = next((name for name in source.weights if _row(rows, name)), None)
    if left and (model_type in APART_ONLY or stacks(model_type, source.weights)):
        beside = "" if model_type in APART_ONLY else " beside others that are taken apart"
        raise UnsupportedError(
            f"{left} stays whole, and mlx-lm does not load it so{beside}; let --skip find its experts, as with "
            r"'experts\.\d', to keep these in 16 bits"
        )


def unread(source: Checkpoint, form: str) -> list[str]:
    """Tensors that a class has of experts that are apart, where its reader of the format does not join them."""
    found = stacks(str(source.config.get("model_type")), source.weights)
    return [name for name, stack in found.items() if form.replace("-", "_") not in stack.layout.transformers]


def stacks(model_type: str, names: Collection[str]) -> dict[str, Stack]:
    """The tensors that a class wants in place of matrices that are there by these names, all of each."""
    found: dict[str, Stack] = {}
    for row in _layouts(model_type):
        pattern = re.compile(re.escape(row.parts[0]).replace(r"\{\}", r"0") + "$")
        for prefix in (name[: match.start()] for name in names if (match := pattern.search(name))):
            every = (e for e in range(_MOST + 1) if prefix + row.parts[0].format(e) not in names)
            count = 1 if row.single else next(every)
            members = row.names(prefix, count)
            if all(name in names for expert in members for name in expert):
                found.setdefault(prefix + row.stack, Stack(row, members))
    return found


def is_stack(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor holds all experts of a layer, in a way that is known."""
    return _row(_layouts(str(config.get("model_type"))), name) is not None


@cache
def _layouts(model_type: str) -> list[Layout]:
    rows = (Layout(**row) for row in arch_rows("experts"))
    return [row.of_type(model_type) for row in rows if model_type in row.model_types]


def _known_apart(source: Checkpoint, form: str) -> list[Layout]:
    """How stacks lie of which readers of a format take each expert apart."""
    known = form.replace("-", "_")
    return [row for row in _layouts(str(source.config.get("model_type"))) if known in row.formats]


def _cut(source: Checkpoint, rows: Sequence[Layout], name: str) -> Cut | None:
    """What takes a stack apart; None where it is none that can be."""
    file, spec = source.files[name], source.specs[name]
    text = source.config.get("text_config")
    facts = {**source.config, **text} if isinstance(text, Mapping) else source.config
    held = (row for row in rows if name.endswith(row.stack) and row.holds(spec.shape, facts.get("hidden_size")))
    row = next(held, None)
    fixed = name in file.values or (name in source.edits and name not in source.view.was)
    if row is None or fixed or spec.dtype not in _FLOATS or name in file.tied or name in file.tied.values():
        return None
    sizes = _sizes(row, facts, spec)
    cut = partial(_views, row, name, *sizes) if sizes else None
    return None if cut is None or cut(_hollow(source, name)).keys() & source.specs.keys() else cut


def _views(row: Layout, name: str, heads: int, first: int, stack: Tensor) -> dict[str, Tensor]:
    """The matrices of a stack by name."""
    stack = stack.view(heads, -1, stack.shape[-1]) if row.heads else stack
    names = row.names(name.removesuffix(row.stack), 1 if row.single else stack.shape[0])
    return {new: row.part(stack, e, p, first) for e, one in enumerate(names) for p, new in enumerate(one)}


def _hollow(source: Checkpoint, name: str) -> Tensor:
    """A tensor without storage that lies as a stack does in its file; one that is made is dense."""
    spec, slot = source.specs[name], source.files[name].slots[name]
    stride = None if name in source.view.was else slot.stride
    dense = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    return torch.empty_strided(spec.shape, stride, dtype=spec.dtype, device="meta") if stride else dense


def _sizes(row: Layout, facts: Mapping[str, Any], spec: Spec) -> tuple[int, int] | None:
    """Heads of a matrix that has them one after the other, and rows of keys in each; None where these do not fit."""
    if not row.heads:
        return 0, 0
    heads, first = (facts.get(key) for key in row.heads)
    if type(heads) is not int or type(first) is not int or not 0 < heads <= _MOST or spec.shape[0] % heads:
        return None
    return (heads, first) if 0 < first < spec.shape[0] // heads else None


def _quantized(source: Checkpoint, row: Layout, weight: Weight) -> tuple[dict[str, dict[str, Slot]], dict[str, Weight]]:
    """The places of the pieces of a stack in gpt-oss's MXFP4, which has outputs first, and the matrices they make."""
    names, found = row.names(weight.name.removesuffix(row.stack), weight.shape[0]), dict[str, dict[str, Slot]]()
    shape, straight = (weight.shape[1] // len(row.parts), weight.shape[2]), replace(row, turned=False)
    for piece in source.pieces(weight.name):
        slot = source.files[piece].slots[piece]
        stack = torch.empty(slot.spec.shape, dtype=slot.spec.dtype, device="meta")
        end = piece.removeprefix(weight.name)
        found[piece] = {
            f"{new}{end}": _slot(slot, straight.part(stack, e, p))
            for e, one in enumerate(names)
            for p, new in enumerate(one)
        }
    return found, {new: Weight(new, shape, weight.dtype, weight.scheme) for one in names for new in one}


def _row(rows: Sequence[Layout], name: str) -> Layout | None:
    return next((row for row in rows if name.endswith(row.stack)), None)


def _slot(stack: Slot, view: Tensor) -> Slot:
    """Where a view of a stack lies in the file."""
    extent = 1 + sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    start = stack.start + int(view.storage_offset()) * view.element_size()
    return Slot(Spec(view.dtype, tuple(view.shape)), start, extent, None if view.is_contiguous() else view.stride())


def spread(values: Mapping[str, T], found: Mapping[str, Mapping[str, Any]]) -> dict[str, T]:
    """Values by name, with several in the place of each that was found."""
    return {new: each for name, value in values.items() for new, each in found.get(name, {name: value}).items()}
