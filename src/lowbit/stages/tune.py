"""Tune: with every code fixed, scales and norms follow the original model's predictions, end to end.

Block by block, a method can only imitate a block. When all of them are done, what is left of their errors adds up at
the output, and the few values beside the codes can still move against it. Training the step sizes alone is the second
phase of EfficientQAT (arXiv:2407.11062, section 3.3, E2E-QP). Here norms move too, and by default the loss is the
divergence from the original's predictions, not that of the text's next tokens: the aim is the original model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Literal, final

import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, pad
from torch.optim.lr_scheduler import CosineAnnealingLR

from lowbit.budget import MARGIN, MemoryWatch, anonymous_bytes, format_size, format_sum
from lowbit.errors import ResourceError, UnsupportedError
from lowbit.schemes import FLOATS
from lowbit.stages._cost import rate
from lowbit.stages._model import open_blueprint
from lowbit.stages._observe import split_windows
from lowbit.stages._recipe import TUNE, parse_options, parse_recipe
from lowbit.stages._store import store
from lowbit.stages._words import duration
from lowbit.stages.calibrate import Prepared
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Entry
from lowbit.stages.quantize import Progress, measure, silent
from lowbit.stages.write import WORK, Output, Record, write_atomic
from lowbit.tensors import QTensor, block_size, view_shape

_TOKENS = 2048  # that go through the model at once
_MOST = 0.5  # change of a value, relative to itself
_BESIDE = 4.0  # what else takes time beside the products: measured on a model of 8M parameters
_TUNED = "tuned"


@final
@dataclass(frozen=True)
class Options:
    """How far scales and norms are moved.

    Attributes:
        epochs: times that every window is used.
        batch: windows per step.
        lr: first step of Adam, relative to each value; falls to 0 along a cosine.
        target: `model`: the original's predictions; `text`: the next token. The latter is fine-tuning on the
            calibration text: the perplexity of such text falls, below the original's even, and the distance to the
            original grows.
    """

    epochs: int = 2
    batch: int = 8
    lr: float = 1e-3
    target: Literal["model", "text"] = "model"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.lr <= 0:
            raise ValueError("epochs, batch and lr must be above 0")


@final
@dataclass(frozen=True)
class Cost:
    """Estimate of tuning: bytes of the process before, of both models with gradients, and of a pass; seconds."""

    base: int
    models: int
    activations: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of anonymous memory in all."""
        return self.base + self.models + self.activations

    def __str__(self) -> str:
        parts = {"process": self.base, "both models": self.models, "activations": self.activations}
        return f"{format_size(self.total)} = {format_sum(parts)}, for tuning; about {duration(self.seconds)}"


def estimate(prepared: Prepared, limit: int | None) -> list[Cost]:
    """What tuning takes, where the recipe asks for it: it is the one step that holds the whole model, with gradients.

    Raises:
        ResourceError: more than the limit.
        UnsupportedError: activations are quantized, whose rounding has no derivative.
        UsageError: a wrong option.
    """
    if not parse_recipe(prepared.plan.recipe).tune:
        return []
    options = parse_options(Options, TUNE, prepared.plan.options)
    if any(entry.weight.activations for entry in prepared.plan.entries):
        raise UnsupportedError(f"{TUNE} cannot follow the rounding of activations; leave one of the two out")
    blueprint, tokens = prepared.blueprint, max(_TOKENS, prepared.ids.shape[1])
    weights = sum(prod(entry.weight.shape) for entry in prepared.plan.entries if entry.weight.scheme)
    size = blueprint.dtype.itemsize
    # Of the student: its weights, these in float32, as they are made of the scales, and their gradients.
    models = 2 * blueprint.resident_bytes + weights * (2 * 4 + 2 * size)
    passes = tokens * (3 * blueprint.token_bytes(prepared.ids.shape[1]) * len(blueprint.blocks))
    # Forward by both, and backward; a product takes two operations per weight.
    work = 4 * options.epochs * 2 * blueprint.resident_bytes / size * prepared.ids.numel()
    seconds = _BESIDE * work / rate(blueprint.dtype)
    cost = Cost(anonymous_bytes() + MARGIN, models, passes + 4 * 4 * tokens * blueprint.vocabulary, seconds)
    if limit is not None and cost.total > limit:
        raise ResourceError(
            f"--ram {format_size(limit)} is too little for {TUNE}, which holds the whole model and needs "
            f"{format_size(cost.total)}; leave {TUNE} out of the method, or raise --ram"
        )
    return [cost]


def tune(prepared: Prepared, output: Output, watch: MemoryWatch, progress: Progress = silent) -> dict[str, float]:
    """Move the scales and norms of a quantized model that is all there, and store them; nothing where that is no gain.

    Returns:
        The loss on held-out windows in nats per token, `before` and `after`: the divergence from the original, or that
        of the next token for the target `text`; and how many quantized weights stayed `fixed`, having no scales that
        can be moved. Nothing where the recipe does not ask for it.

    Raises:
        ResourceError: the disk is full, or the memory limit was passed.
        VerifyError: what was stored is not what was meant.
    """
    if not parse_recipe(prepared.plan.recipe).tune:
        return {}
    state = output.path / WORK / "tuned.safetensors"
    with open_checkpoint(output.path, prepared.source.trusted) as written:
        if not state.exists():
            tuned, found = _learn(prepared, written, watch, progress)
            write_atomic(state, save(tuned, {key: repr(value) for key, value in found.items()}))
        entries = {entry.weight.name: entry for entry in prepared.plan.entries}
        with safe_open(state, "pt") as file:
            # this is no dict: it cannot be iterated over itself
            left = [output.records[name] for name in list(file.keys()) if not output.records[name].facts.get(_TUNED)]
            for record in left:  # all before the first is stored: files are synced and named once, not for each
                output.forget(record)
            for record in left:
                _replace(prepared, written, output, entries[record.name], record, file.get_tensor(record.name))
            return {key: float(value) for key, value in file.metadata().items()}


def _replace(
    prepared: Prepared, written: Checkpoint, output: Output, entry: Entry, record: Record, values: Tensor
) -> None:
    """Store a weight again, with other scales, or another vector."""
    name, value = record.name, written.unpacked(record.name, output.read(entry))
    facts = {**record.facts, _TUNED: True}
    if isinstance(value, QTensor):
        value = replace(value, codes=value.codes.clone(), scales=values)
        if not record.facts["folded"]:
            error = measure(prepared.source.tensor(name), value)
            facts |= error.facts
    else:
        value = values
    store(output, entry, value, record.source, facts, scratch=False)


@final
class _Scaled:
    """A quantized weight, which is proportional to each block's scale."""

    def __init__(self, weight: QTensor) -> None:
        self.scales = weight.scale_values()
        self.move = torch.zeros_like(self.scales, requires_grad=True)
        self._dtype, self._shape, block = FLOATS[weight.scheme.scale], weight.shape, weight.scheme.block
        (rows, cols), (high, wide) = view_shape(weight.shape, block), block_size(weight.shape, block)
        (down, across), self._cut = self.scales.shape, (slice(0, rows), slice(0, cols))
        whole = pad(weight.dequantize().view(rows, cols), (0, across * wide - cols, 0, down * high - rows))
        self._values = whole.view(down, high, across, wide)

    def parameter(self) -> Tensor:
        """The weight under scales as they are rounded to be stored; the rounding has the derivative 1."""
        factor = _moved(self.scales, self.move, self._dtype) / self.scales
        whole = self._values * factor[:, None, :, None]
        return whole.flatten(2).flatten(0, 1)[self._cut].reshape(self._shape)

    def stored(self) -> Tensor:
        """Scales, float32."""
        return _moved(self.scales, self.move, self._dtype).detach()


@final
class _Vector:
    """A norm's weight or a bias."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.move = torch.zeros(values.shape, requires_grad=True)

    def parameter(self) -> Tensor:
        """As rounded to be stored."""
        return _moved(self.values.float(), self.move, self.values.dtype)

    def stored(self) -> Tensor:
        """In its own type."""
        return self.parameter().detach().to(self.values.dtype)


_Movable = _Scaled | _Vector  # functions of a few numbers, `move`, each 0 where it is as it was


def _moved(values: Tensor, move: Tensor, dtype: torch.dtype) -> Tensor:
    """`values (1 + move)`, rounded to a type; the rounding has the derivative 1."""
    exact = values * (1 + move.clamp(-_MOST, _MOST))
    return exact + (exact.to(dtype).float() - exact).detach()


def _movable(value: QTensor | Tensor) -> _Movable | None:
    """What can be moved of a weight; None for matrices that are not quantized, and for scales without small steps."""
    if isinstance(value, Tensor):
        return _Vector(value) if value.dim() == 1 and value.is_floating_point() else None
    plain = value.scheme.scale in FLOATS and not value.scheme.nested and value.group_index is None
    return _Scaled(value) if plain else None


@final
class _Student:
    """The quantized model, computed with what was moved."""

    def __init__(self, written: Checkpoint, dtype: torch.dtype) -> None:
        blueprint = open_blueprint(written, dtype)
        self.model, self.dtype = blueprint.resident().requires_grad_(False), dtype
        self.parts: dict[str, _Movable] = {}  # by weight of the checkpoint
        self.places: dict[str, str] = {}  # weight of each parameter
        self.swapped = {name for name, weight in written.weights.items() if weight.swapped}
        for parameter, owners in blueprint.sources("").items():
            if len(owners) == 1:
                (name,) = owners
                part = _movable(written.load(name))
                if part is not None:
                    self.parts[name], self.places[parameter] = part, name
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        for parameter, value in self.weights().items():  # a weight may fill a part of a parameter
            if value.shape != shapes[parameter]:
                del self.parts[self.places.pop(parameter)]

    def weights(self) -> dict[str, Tensor]:
        """Parameters as they are now, in the type of the computation, with their derivatives."""
        moved = {place: (name, self.parts[name].parameter().to(self.dtype)) for place, name in self.places.items()}
        return {place: value.T if name in self.swapped else value for place, (name, value) in moved.items()}

    def logits(self, ids: Int64[Tensor, "windows tokens"], weights: dict[str, Tensor]) -> Tensor:
        """What the model predicts."""
        logits: Tensor = functional_call(self.model, weights, (ids,), {"use_cache": False}).logits.float()
        return logits


def _learn(
    prepared: Prepared, written: Checkpoint, watch: MemoryWatch, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What scales and vectors come to, and the held-out loss; nothing moves where that is not less, or not finite."""
    options = parse_options(Options, TUNE, prepared.plan.options)
    student, teacher = _Student(written, prepared.blueprint.dtype), prepared.blueprint.resident()
    loss = _Loss(student, teacher, options.target)
    windows = split_windows(prepared.ids, 1)
    fit, held = windows.ids[: windows.fit], windows.ids[windows.fit :]
    before = loss.mean(held)
    fixed = sum(bool(weight.scheme) and name not in student.parts for name, weight in written.weights.items())
    if not isfinite(before):
        return {}, {"before": before, "after": before, "fixed": float(fixed)}
    steps = list(_batches(len(fit), options))
    optimizer = torch.optim.Adam([part.move for part in student.parts.values()], options.lr)
    schedule = CosineAnnealingLR(optimizer, len(steps))
    for done, indices in enumerate(steps):
        progress("tune", done, len(steps))
        watch.check()
        loss.slopes(fit[indices])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = loss.mean(held)
    better = after < before
    found = {name: part.stored() for name, part in student.parts.items()} if better else {}
    return found, {"before": before, "after": after if better else before, "fixed": float(fixed)}


def _batches(windows: int, options: Options) -> Iterator[Tensor]:
    """Indices of each step's windows, in random order."""
    dice = torch.Generator().manual_seed(0)
    for _ in range(options.epochs):
        yield from torch.split(torch.randperm(windows, generator=dice), options.batch)


@final
@dataclass(frozen=True)
class _Loss:
    """The distance of a student's predictions from its target."""

    student: _Student
    teacher: nn.Module
    target: str

    def slopes(self, ids: Int64[Tensor, "windows tokens"]) -> None:
        """Add the derivatives of the mean loss over some windows to those of what moves."""
        exact = self.student.weights()
        leaves = {name: weight.detach().requires_grad_() for name, weight in exact.items()}
        for some in _passes(ids):
            torch.autograd.backward(self.total(some, leaves) / ids.numel())
        gradients = [leaf.grad for leaf in leaves.values()]
        torch.autograd.backward(list(exact.values()), gradients)

    @torch.no_grad()
    def mean(self, ids: Int64[Tensor, "windows tokens"]) -> float:
        """Nats per token."""
        weights = self.student.weights()
        return sum(float(self.total(some, weights)) for some in _passes(ids)) / max(ids.numel(), 1)

    def total(self, ids: Int64[Tensor, "windows tokens"], weights: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Summed over tokens."""
        logits = self.student.logits(ids, weights)
        if self.target == "text":
            return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        with torch.no_grad():
            wanted = self.teacher(ids, use_cache=False).logits.float().log_softmax(-1)
        return kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)


def _passes(ids: Int64[Tensor, "windows tokens"]) -> Sequence[Tensor]:
    """Windows that go through the model together."""
    return torch.split(ids, max(_TOKENS // ids.shape[1], 1))
