"""Rotate: the same model with its residual stream and its attention values turned, so that outliers are spread.

The result is a view: a `Checkpoint` whose tensors are made when they are read, one at a time. What a rotation must
touch is found by running the model without weights (`_flow`). With x a row of the stream and R orthogonal, x becomes
x R: weights that write it get R on their outputs, weights that read it through an RMSNorm with weight s get `W
diag(s) R`, and the norm's weight becomes 1 (QuaRot, arXiv:2404.00456, sections 3.1 and 4; SliceGPT, arXiv:2401.15024,
section 3.2). Values of attention are turned head by head between the weight that makes them and the weight that reads
them (SpinQuant's R2, arXiv:2405.16406, section 3.1).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from lowbit.errors import UnsupportedError, UsageError, VerifyError, WeightError
from lowbit.formats import Weight
from lowbit.rotations import Rotation, hadamard_orders, orthogonal_rotation, random_rotation
from lowbit.stages._cayley import Learned, Part, learn
from lowbit.stages._flow import Flow, Pair, trace
from lowbit.stages._model import Blueprint, _sources, silent_transformers
from lowbit.stages._weightfile import one_line
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.quantize import not_finite, one_torch_thread

# Elements of a weight that are turned at a time: each takes a few float64.
_PIECE = 2**22
# Relative difference of the logits in float32 up to which a rotated model counts as the same.
TOLERANCE = 1e-4


@final
@dataclass(frozen=True)
class Options:
    """How a model is rotated.

    Attributes:
        kind: random Hadamard matrices, or any orthogonal matrix, uniformly drawn.
        heads: whether values of attention are turned too.
        seed: of signs and matrices.
        learn: Cayley steps that improve the residual stream's rotation (`_cayley`); 0 for none.
        group: columns that will share a scale, which the steps look at; 0 for whole rows.
        online: refused; see `_refuse_online`.
    """

    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    heads: bool = True
    seed: int = 0
    learn: int = 0
    group: int = 128
    online: bool = False


@final
@dataclass(frozen=True, eq=False)
class Rotated:
    """A rotated model.

    Attributes:
        checkpoint: the view; weights that were touched are read in float32, `specs` and `weights` keep their dtype.
        blueprint: a model over it (its output layer is its own).
        width: of the residual stream.
        orders: of the Hadamard matrices whose product turns it, or did before steps; empty for another matrix.
        norms: norms whose weight was folded into the weights that read them.
        heads: attention layers whose values are turned.
        untied: the output layer that was one with the embedding and is not any more.
        learned: what the steps lowered, before and after; None where there were none.
    """

    checkpoint: Checkpoint
    blueprint: Blueprint
    width: int
    orders: tuple[int, ...]
    norms: int
    heads: int
    untied: str | None
    learned: tuple[float, float] | None


@final
@dataclass(frozen=True)
class Step:
    """One linear map along one axis of a weight (negative: from the end), in float64."""

    axis: int
    apply: Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Edit:
    """Steps on a stored weight; computed in float64, rounded once, to float32."""

    steps: tuple[Step, ...]

    def __call__(self, stored: Tensor) -> Tensor:
        """The weight after all steps."""
        out = torch.empty(stored.shape)
        free = set(range(-stored.ndim, 0)) - {step.axis for step in self.steps}
        axis = max(free, key=lambda each: stored.shape[each], default=None)
        size = stored.shape[axis] if axis is not None else 1
        count = max(_PIECE * size // max(stored.numel(), 1), 1)
        for start in range(0, size, count):
            source, target = (
                each if axis is None else each.narrow(axis, start, min(count, size - start)) for each in (stored, out)
            )
            value = source.double()
            for step in self.steps:
                value = step.apply(value.movedim(step.axis, -1)).movedim(-1, step.axis)
            target.copy_(value)
        return out


def rotate(blueprint: Blueprint, options: Options | None = None, residual: Rotation | None = None) -> Rotated:
    """A view of a checkpoint with rotated weights, which computes the same.

    Args:
        blueprint: the float model.
        options: how.
        residual: the rotation of the residual stream; None for what the options say.

    Raises:
        UsageError: the checkpoint is quantized.
        UnsupportedError: the model does something that no rotation passes, or an online rotation was asked for.
    """
    options = options or Options()
    _refuse_online(options)
    if blueprint.checkpoint.format:
        raise UsageError(f"{blueprint.checkpoint.path} is already quantized; rotate the float checkpoint")
    model = _Model.of(blueprint)
    _check(blueprint, model.flow)
    start = residual or _draw(model.flow.width, options, 0)
    better = _learn(start, model.parts(), options) if options.learn else None
    turn = better.rotation if better else start
    pairs = [pair for pair in model.flow.pairs if options.heads and model.whole(*pair.writers, pair.reader)]
    steps = model.stream_steps(turn)
    for number, pair in enumerate(pairs, 1):
        for name, step in _pair_steps(pair, model.axes, _draw(pair.width, options, number)):
            steps[name].append(step)
    view, untied = _view(blueprint.checkpoint, model, model.edits(steps))
    folded = sum(norm.parameter is not None for norm in model.flow.norms.values())
    orders = hadamard_orders(turn.width) if options.kind == "hadamard" and residual is None else None
    learned = (better.before, better.after) if better else None
    return Rotated(view, _over(blueprint, view), turn.width, orders or (), folded, len(pairs), untied, learned)


def _learn(start: Rotation, parts: Sequence[Part], options: Options) -> Learned:
    with one_torch_thread():  # another number of threads would end in other bits, and a run could not be resumed
        return learn(start, parts, options.learn, options.group, options.seed)


def prove(original: Blueprint, rotated: Rotated, streamed: bool = False, tokens: int = 64, seed: int = 0) -> float:
    """Logits of both models on random tokens, in float32; the largest relative difference of a token's, by 2-norm.

    `streamed`: for models that do not fit into the memory.

    Raises:
        VerifyError: it is above `TOLERANCE`.
        WeightError: NaN or Inf in a weight, naming tensor and index.
    """
    count = min(tokens, original.positions or tokens)
    ids = torch.randint(original.vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))
    found = []
    with torch.inference_mode():
        for each in (original, rotated.blueprint):
            exact = replace(each, dtype=torch.float32)
            model = exact.streamed() if streamed else exact.resident()
            found.append(model(input_ids=ids, use_cache=False).logits[0].double())
            del model
    worst = float(((found[0] - found[1]).norm(dim=1) / found[0].norm(dim=1).clamp(min=1e-30)).max())
    if not found[0].isfinite().all():
        _refuse_not_finite(original.checkpoint)
    if not worst <= TOLERANCE:
        raise VerifyError(
            f"{original.checkpoint.path}: rotated, the model's logits differ by {worst:.2g} relative, more than "
            f"{TOLERANCE:g}; this model does something that was not seen, quantize it without rotation"
        )
    return worst


def _refuse_not_finite(checkpoint: Checkpoint) -> None:
    """Name the weight for which a model that is not rotated yet gives no numbers."""
    fault = next((found for name in checkpoint.weights if (found := not_finite(name, checkpoint.tensor(name)))), None)
    if fault:
        raise WeightError(f"{fault}, so that no rotation can be proved to change nothing; repair the checkpoint")
    raise VerifyError(
        f"{checkpoint.path} computes values that are not finite, so that no rotation can be proved to change nothing; "
        "quantize it without rotation"
    )


def _refuse_online(options: Options) -> None:
    """QuaRot's R3 and R4 turn keys and the input of the last weight of an MLP while the model runs."""
    if options.online:
        raise UnsupportedError(
            "online rotations (before down_proj, on queries and keys) are computed while the model runs, and no public "
            "checkpoint format says so; only rotations that fold into the weights are made"
        )


def _draw(width: int, options: Options, number: int) -> Rotation:
    draw = random_rotation if options.kind == "hadamard" else orthogonal_rotation
    return draw(width, options.seed + number)


def _check(blueprint: Blueprint, flow: Flow) -> None:
    """Refuse what no rotation passes, with the first reason."""
    path = blueprint.checkpoint.path
    means = [name for name, norm in flow.norms.items() if norm.kind == "mean"]
    if means:
        raise UnsupportedError(_LAYER_NORM.format(path=path, name=f"{means[0]} is"))
    if not flow.width or not flow.readers:
        raise UnsupportedError(f"{path}: no residual stream was found that begins at an embedding; it is not rotated")
    if flow.lost:
        raise UnsupportedError(f"{path} cannot be rotated: {flow.lost[0]}, through which no rotation passes")


_LAYER_NORM = (
    "{path} cannot be rotated: {name} a LayerNorm, which takes off the mean of the channels; a rotation needs norms "
    "that do not (RMSNorm), and to rewrite the norms would need another class of model"
)


@final
@dataclass(frozen=True, eq=False)
class _Model:
    """What is known of a model without its weights.

    Attributes:
        flow: its streams, by parameter.
        sources: parameter to the weights of the checkpoint that make it.
        shapes: of the parameters.
        stored: weights of the checkpoint, and their shapes.
        tables: parameters with a row for every token of the vocabulary.
        head: what the checkpoint calls an output layer that is one with the embedding; and the embedding.
        turned: weights whose transpose is in the parameter.
    """

    flow: Flow
    sources: Mapping[str, frozenset[str]]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, tuple[int, ...]]
    tables: frozenset[str]
    head: tuple[str, str] | None
    checkpoint: Checkpoint
    turned: frozenset[str]

    @property
    def axes(self) -> Mapping[str, int]:
        """Axis of the outputs of every weight."""
        return self.flow.axes

    @classmethod
    def of(cls, blueprint: Blueprint) -> _Model:
        """Run the model without weights.

        Raises:
            UnsupportedError: it cannot be run so.
        """
        model: Any = blueprint._build(frozenset())
        sources = {name: _sources(tensor) for name, tensor in model.named_parameters()}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        stored = {name: weight.shape for name, weight in blueprint.checkpoint.weights.items()}
        if hasattr(model.config, "_experts_implementation"):  # the one that does not look at values
            model.set_experts_implementation("batched_mm")
        flow = _trace(blueprint, model.to("meta"))
        tables = frozenset(name for name, shape in shapes.items() if shape[:-1] == (blueprint.vocabulary,))
        head = _tied_head(model, blueprint.checkpoint, sources)
        return cls(flow, sources, shapes, stored, tables, head, blueprint.checkpoint, blueprint.turned)

    def whole(self, *names: str) -> bool:
        """Whether each of these parameters is one stored weight, as it is."""
        return all(
            len(self.sources[name]) == 1 and self.stored[next(iter(self.sources[name]))] == self.shapes[name]
            for name in names
        )

    def stream_steps(self, turn: Rotation) -> defaultdict[str, list[Step]]:
        """Steps that turn the stream, by parameter; those of an output layer that is the embedding under `""`."""
        steps: defaultdict[str, list[Step]] = defaultdict(list)
        for name, axis in self.flow.axes.items():
            if name in self.flow.writers:
                steps[name].append(Step(axis, turn.apply))
        for reader in dict.fromkeys(self.flow.readers):
            target = "" if self.flow.axes.get(reader.name) == reader.axis else reader.name
            if [step for step in steps[target] if step.axis == reader.axis]:
                raise UnsupportedError(f"{reader.name} reads the residual stream in two ways; it cannot be rotated")
            folded = reader.norm and self.flow.norms[reader.norm].parameter
            steps[target] += [Step(reader.axis, partial(self._fold, reader.norm))] if folded else []
            steps[target].append(Step(reader.axis, turn.apply))
        for norm in self.flow.norms.values():
            if norm.parameter:
                steps[norm.parameter] = [Step(-1, partial(torch.full_like, fill_value=float(norm.kind == "weight")))]
        return steps

    def factor(self, norm: str | None) -> Tensor | None:
        """What a norm multiplies its channels by, float64; None where that is nothing."""
        found = self.flow.norms[norm] if norm else None
        if found is None or found.parameter is None:
            return None
        (source,) = self.sources[found.parameter]
        return self.checkpoint.tensor(source).double() + float(found.kind == "one plus weight")

    def parts(self) -> list[Part]:
        """The stored matrices that the stream's rotation turns and that will be rounded: not those of a vocabulary."""
        readers = {reader.name: reader for reader in self.flow.readers if reader.axis == -1}
        found = []
        for name in sorted({*readers, *self.flow.writers} - self.tables):
            writes = name in self.flow.writers
            norm = None if writes else readers[name].norm
            for source in sorted(self.sources[name]):
                if len(self.stored[source]) == 2 and self.flow.axes[name] == -2:
                    found.append(Part(partial(self.checkpoint.tensor, source), self.factor(norm), writes))
        return found

    def _fold(self, norm: str | None, value: Tensor) -> Tensor:
        factor = self.factor(norm)  # read when it is needed
        return value if factor is None else value * factor

    def edits(self, steps: Mapping[str, list[Step]]) -> dict[str, Edit]:
        """Steps of parameters as edits of the stored weights that make them."""
        found: dict[str, Edit] = {}
        for name, each in steps.items():
            if not each:
                continue
            if not name:
                assert self.head
                found[self.head[0]] = Edit(tuple(each))
            for source in self.sources.get(name, ()):
                own = [replace(step, axis=-3 - step.axis) if source in self.turned else step for step in each]
                for step, mine in zip(each, own, strict=True):
                    wanted, there = self.shapes[name][step.axis], self.stored[source]
                    if len(there) < -mine.axis or there[mine.axis] != wanted:
                        raise UnsupportedError(f"{source} is stored in another layout than {name}; it is not rotated")
                found[source] = Edit(tuple(own))
        return found


def _trace(blueprint: Blueprint, model: nn.Module) -> Flow:
    path = blueprint.checkpoint.path
    try:
        with silent_transformers():
            return trace(model)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
            raise UnsupportedError(_LAYER_NORM.format(path=path, name="it has")) from error
        raise UnsupportedError(
            f"{path} cannot be rotated: what its weights do is found by running it without values, which "
            f"fails ({one_line(error)})"
        ) from error


def _tied_head(model: Any, checkpoint: Checkpoint, sources: Mapping[str, frozenset[str]]) -> tuple[str, str] | None:
    """The output layer's name in the checkpoint and the embedding it is one with, where it is."""
    head = model.get_output_embeddings()
    names = [name for name, tensor in model.named_parameters() if head is not None and tensor is head.weight]
    paths = [path for path, module in model.named_modules() if module is head]
    if not names or names[0] == f"{paths[0]}.weight":
        return None
    (embedding,) = sources[names[0]]
    alias = next((alias for alias, name in checkpoint.tied.items() if name == embedding), f"{paths[0]}.weight")
    return alias, embedding


def _pair_steps(pair: Pair, axes: Mapping[str, int], turn: Rotation) -> Iterable[tuple[str, Step]]:
    """Heads turned where they are written, and turned back where they are read."""

    def heads(value: Tensor, start: int, length: int) -> Tensor:
        part = value[..., start : start + length]
        turned = turn.apply(part.reshape(*part.shape[:-1], -1, pair.width)).flatten(-2)
        return torch.cat([value[..., :start], turned, value[..., start + length :]], -1)

    for name in sorted(pair.writers):
        yield name, Step(axes[name], partial(heads, start=pair.start, length=pair.count * pair.width))
    yield pair.reader, Step(pair.axis, lambda value: heads(value, 0, value.shape[-1]))


def _view(checkpoint: Checkpoint, model: _Model, edits: Mapping[str, Edit]) -> tuple[Checkpoint, str | None]:
    """The checkpoint with its edits, and with an output layer of its own."""
    if model.head is None or model.head[0] not in edits:
        return replace(checkpoint, edits=edits), None
    alias, embedding = model.head
    config = dict(checkpoint.config) | {"tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    file = checkpoint.files[embedding]
    slots = {**file.slots, alias: file.slots[embedding]}
    own = replace(file, slots=slots, tied={key: name for key, name in file.tied.items() if key != alias})
    files = {name: own if each is file else each for name, each in checkpoint.files.items()}
    weight, spec = checkpoint.weights[embedding], checkpoint.specs[embedding]
    view = replace(
        checkpoint, config=config, edits=edits, files={**files, alias: own},
        specs={**checkpoint.specs, alias: spec},
        weights={**checkpoint.weights, alias: Weight(alias, weight.shape, weight.dtype)},
    )  # fmt: skip
    return view, alias


def _over(blueprint: Blueprint, view: Checkpoint) -> Blueprint:
    """The model of a rotated checkpoint."""
    config = copy.deepcopy(blueprint.config)
    for part in (config, config.get_text_config()):
        if view.config.get("tie_word_embeddings") is False:
            part.tie_word_embeddings = False
    return replace(blueprint, checkpoint=view, config=config)
