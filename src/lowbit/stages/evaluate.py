"""Evaluate: score a model, and its difference from a reference, on the tokens of a text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from lowbit import plugins
from lowbit.arguments import at_least_one, public
from lowbit.budget import MARGIN, MemoryWatch, anonymous_bytes, format_size
from lowbit.corrections import LowRank
from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.metrics import Metric, Score, Values
from lowbit.metrics._blocks import CONFIDENCE, FEWEST_BLOCKS, make_blocks
from lowbit.stages._adapter import read_adapter
from lowbit.stages._model import Blueprint, open_blueprint, refusals
from lowbit.stages._weightfile import show
from lowbit.stages._windows import Text, Windows, cut, encode, read_text
from lowbit.stages._words import counted
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Conditions", "Evaluation", "Text", "Way", "evaluate", "evaluation_bytes", "plan_evaluation", "read_text"]

Progress = Callable[[str, int, int], None]

# Tokens in one pass: more than this is not faster, and streamed parts want more tokens for each time they are filled.
_RESIDENT_TOKENS, _STREAMED_TOKENS = 2048, 8192
_LOGIT_BYTES = 2**29
# Log-probabilities that metrics see at a time: a few of them stay in a core's cache.
_CHUNK = 2**19


@final
@dataclass(frozen=True)
class Conditions:
    """What two evaluations must share to be compared.

    Attributes:
        text: name of the text.
        sha256: of its UTF-8 bytes.
        context: tokens per window.
        stride: tokens from one window's begin to the next's.
        tokens: tokens in the windows, special ones included; a last window that is not full is left out.
        windows: number of windows.
        scored: number of tokens whose prediction is scored: in the first window all but the first token, in the
            others the last `stride` (all but the first, where windows do not overlap).
        special: special tokens as the tokenizer adds them, once, to the whole text.
        dtype: of weights and computation; logits become float64 log-probabilities.
        blocks: runs of windows that the intervals resample.
        confidence: level of the intervals.
        seed: of the resampling.
    """

    text: str
    sha256: str
    context: int
    stride: int
    tokens: int
    windows: int
    scored: int
    special: tuple[str, ...]
    dtype: str
    blocks: int
    confidence: float
    seed: int

    def __str__(self) -> str:
        special = " ".join(self.special) or "no special token"
        intervals = f"{self.confidence:.0%} intervals over {self.blocks} blocks of windows, seed {self.seed}"
        if self.blocks < FEWEST_BLOCKS:
            intervals = (
                f"no intervals, for which {FEWEST_BLOCKS} windows are needed: take more text, or a smaller --context"
            )
        return (
            f"{self.text} (sha256 {self.sha256[:12]}): context {self.context}, stride {self.stride}, "
            f"{self.tokens:,} tokens in {counted(self.windows, 'window')}, {self.scored:,} scored, {special} once, "
            f"{self.dtype}; {intervals}"
        )


@final
@dataclass(frozen=True)
class Evaluation:
    """Scores by name, and the conditions under which they hold.

    Scores: `perplexity`; with a reference also `reference_perplexity`, `log_perplexity_change`, `kl_mean`, `kl_median`,
    `kl_p99` (nats per token) and `top1_agreement`; and whatever else the files in `metrics/` define.
    """

    model: str
    reference: str | None
    conditions: Conditions
    scores: Mapping[str, Score]

    def to_dict(self) -> dict[str, Any]:
        """The whole as JSON types; a value that is not finite becomes None."""
        scores = {
            name: {key: part if part is None or isfinite(part) else None for key, part in asdict(score).items()}
            for name, score in self.scores.items()
        }
        conditions = asdict(self.conditions) | {"special": list(self.conditions.special)}
        return {"model": self.model, "reference": self.reference, "conditions": conditions, "scores": scores}


@final
@dataclass(frozen=True)
class Way:
    """How an evaluation works, and the anonymous memory in bytes that it takes at most.

    Attributes:
        resident: models whose weights are held in memory, the reference first; others are streamed from disk.
        batch: windows per pass.
        base: what the process holds before it starts.
        work: what it takes beyond that.
    """

    resident: int
    streamed: int
    batch: int
    base: int
    work: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.base + self.work

    def __str__(self) -> str:
        streamed = f", {self.streamed} of {self.resident + self.streamed} models streamed" if self.streamed else ""
        return (
            f"{format_size(self.total)} = process {format_size(self.base)} + "
            f"{format_size(self.work)} for weights, activations and logits at {self.batch} windows a pass{streamed}"
        )


@public
def evaluate(
    model: str | Path,
    text: Text | str | Path,
    *,
    reference: str | Path | None = None,
    context: int = 512,
    stride: int | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    ram: int | None = None,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    announce: Callable[[Way], None] = lambda way: None,
    trust_remote_code: bool = False,
    adapter: Path | None = None,
    encoded: tuple[Int64[Tensor, "tokens"], tuple[str, ...]] | None = None,
) -> Evaluation:
    """Score a causal language model on a text; `Conditions` is the protocol, `docs/evaluate.md` has its reasons.

    Args:
        model: directory, file or hub name of a checkpoint, float or quantized.
        text: path of a UTF-8 file, or a `Text`.
        reference: checkpoint to compare with, on the same tokens.
        context, stride: tokens per window, and from one window's begin to the next's; None: windows without overlap.
        tokens: use at most this many tokens from the beginning of the text.
        batch: windows per pass; None for what is fast and fits.
        ram, dtype: bytes of anonymous memory allowed, None for no limit; of weights and computation.
        threads: of torch; None leaves them as they are.
        seed: of the bootstrap and of the permutation test.
        progress, announce: called with `("evaluate", windows done, windows)`; once with the estimate of memory.
        trust_remote_code: run Python code that a checkpoint brings.
        adapter: directory of low-rank terms to add to the model's weights.
        encoded: the text's tokens and special tokens, where it is known that both tokenizers make these.

    Raises:
        UsageError: text, context or stride cannot be used, or the two models do not share their tokens.
        CheckpointError: a checkpoint does not fit its configuration, has no tokenizer, or computes NaN.
        ResourceError: the limit is too small; for the models, with the least that works.
    """
    at_least_one(threads=threads)
    text = text if isinstance(text, Text) else read_text(Path(text))
    sources = _open(model, reference, adapter, trust_remote_code)
    blueprints = [open_blueprint(source, dtype) for source in sources]
    windows = cut(text, encoded or encode(sources, text, tokens, ram), context, stride)
    _check(blueprints, windows)
    with MemoryWatch(ram).running() as watch, _threads(threads), torch.inference_mode():
        way = plan_evaluation(blueprints, context, len(windows.ids), batch, ram)
        announce(way)
        models = [each.resident() if n < way.resident else each.streamed() for n, each in enumerate(blueprints)]
        values = _score(models, windows, way.batch, _within(watch, progress))
    blocks = make_blocks(windows.counts, seed)
    scores = {k: v for metric in _metrics(len(models)) for k, v in metric.summarise(values, blocks).items()}
    conditions = Conditions(
        text.name, text.sha256, context, windows.stride, context + (len(windows.ids) - 1) * windows.stride,
        len(windows.ids), sum(windows.counts), windows.special, str(dtype).removeprefix("torch."),
        len(blocks.starts), CONFIDENCE, seed,
    )  # fmt: skip
    return Evaluation(str(model), None if reference is None else str(reference), conditions, scores)


def _open(
    model: str | Path, reference: str | Path | None, adapter: Path | None, trust: bool = False
) -> list[Checkpoint]:
    """The checkpoints, the reference first; the model with its low-rank terms, where there are any."""
    found = open_checkpoint(model, trust)
    if adapter:
        found = replace(found, terms=_fitting(read_adapter(adapter), found, adapter))
    return [found] if reference is None else [open_checkpoint(reference, trust), found]


def _fitting(terms: dict[str, LowRank], source: Checkpoint, adapter: Path) -> dict[str, LowRank]:
    """Terms of an adapter, all of which stand beside a weight of this checkpoint."""
    for name, (down, up) in terms.items():
        shape, weight = (len(up), down.shape[1]), source.weights.get(name)
        if weight is None or weight.shape != shape:
            what = f"one of {list(weight.shape)}" if weight else "no such weight"
            raise CheckpointError(
                f"the adapter in {adapter} does not fit {source.path}: its term of {show(name)} is {list(shape)}, and "
                f"there is {what}"
            )
    return terms


def _check(blueprints: Sequence[Blueprint], windows: Windows) -> None:
    context = windows.ids.shape[1]
    for each in blueprints:
        if each.positions is not None and context > each.positions:
            path, most = each.checkpoint.path, each.positions
            raise UsageError(f"{path} takes {most:,} tokens at most; lower --context {context:,}")
        if int(windows.ids.max()) >= each.vocabulary:
            raise CheckpointError(
                f"the tokenizer of {each.checkpoint.path} gives token {int(windows.ids.max()):,}, "
                f"and the model knows {each.vocabulary:,} tokens; put the right tokenizer files there"
            )
    if len({each.vocabulary for each in blueprints}) > 1:
        sizes = " and ".join(f"{each.vocabulary:,} in {each.checkpoint.path}" for each in blueprints)
        raise UsageError(f"the vocabularies differ, {sizes}; divergence is defined over one vocabulary only")


def evaluation_bytes(blueprints: Sequence[Blueprint], resident: int, context: int, windows: int, batch: int) -> int:
    """Anonymous memory that an evaluation takes beyond what the process holds before, in bytes: an upper estimate.

    Args:
        blueprints: the models, the reference first.
        resident: how many of them, from the first, are held in memory; the others are streamed.
        context: tokens per window.
        windows: number of windows.
        batch: windows per pass.
    """
    weights = sum(each.resident_bytes if n < resident else each.streamed_bytes for n, each in enumerate(blueprints))
    # The last model's logits, two copies that its head may make of them, and the other model's.
    logits = max(each.vocabulary * each.dtype.itemsize for each in blueprints) * (2 + len(blueprints))
    activations = max(each.token_bytes(context) for each in blueprints)
    chunks = 12 * 8 * max(_CHUNK, *(each.vocabulary for each in blueprints))
    kept = 64 * context * windows
    return weights + batch * context * (activations + logits) + chunks + kept


def plan_evaluation(
    blueprints: Sequence[Blueprint], context: int, windows: int, batch: int | None, ram: int | None
) -> Way:
    """The fastest way that fits the limit: all models in memory, then fewer; as many windows a pass as is useful.

    Raises:
        ResourceError: nothing fits; the text names the least limit that works.
    """
    base = anonymous_bytes() + MARGIN
    ways = []
    for resident in range(len(blueprints), -1, -1):
        for size in _batches(blueprints, resident, context, windows, batch):
            work = evaluation_bytes(blueprints, resident, context, windows, size)
            ways.append(Way(resident, len(blueprints) - resident, size, base, work))
            if ram is None or ways[-1].total <= ram:
                return ways[-1]
    least = min(ways, key=lambda way: way.total)
    raise ResourceError(
        f"--ram {format_size(ram or 0)} is too little: this evaluation needs at least {format_size(least.total)} "
        f"({least}); a smaller --context needs less"
    )


def _batches(
    blueprints: Sequence[Blueprint], resident: int, context: int, windows: int, batch: int | None
) -> Iterator[int]:
    """Windows per pass to try, most first."""
    wanted = _RESIDENT_TOKENS if resident == len(blueprints) else _STREAMED_TOKENS
    logits = max(each.vocabulary * each.dtype.itemsize for each in blueprints)
    size = batch or max(min(wanted // context, _LOGIT_BYTES // (context * logits), windows), 1)
    yield size
    while batch is None and size > 1:
        size //= 2
        yield size


def _within(watch: MemoryWatch, progress: Progress | None) -> Progress:
    """Report progress, and stop where the limit was passed nevertheless."""

    def report(stage: str, done: int, total: int) -> None:
        if watch.limit and watch.peak > watch.limit:
            raise ResourceError(
                f"the evaluation held {format_size(watch.peak)} of anonymous memory, over --ram "
                f"{format_size(watch.limit)}; give it more, or a smaller --context"
            )
        if progress:
            progress(stage, done, total)

    return report


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _metrics(models: int) -> list[Metric]:
    """The metrics that can be had, those that need no reference first."""
    metrics: list[Metric] = [plugins.load("metrics", name) for name in plugins.names("metrics")]
    usable = [metric for metric in metrics if models > 1 or not metric.needs_reference]
    return sorted(usable, key=lambda metric: metric.needs_reference)


def _score(models: Sequence[nn.Module], windows: Windows, batch: int, progress: Progress) -> dict[str, Values]:
    """Every metric's values for every scored token, in text order."""
    metrics, total, done = _metrics(len(models)), len(windows.ids), 0
    # One array per value from the start: small results among large temporaries would keep the heap from shrinking.
    values: dict[str, Tensor] = defaultdict(lambda: torch.empty(sum(windows.counts), dtype=torch.float64))
    for start in range(0, total, batch):
        progress("evaluate", start, total)
        ids = windows.ids[start : start + batch]
        with refusals(f"a model fails on windows {start} to {start + len(ids) - 1}"):
            logits = [model(input_ids=ids, use_cache=False).logits.flatten(0, 1) for model in models]
        positions = windows.positions(start, start + len(ids))
        for at in torch.split(positions, max(_CHUNK // logits[0].shape[1], 1)):
            *reference, model = (each[at].log_softmax(1, dtype=torch.float64) for each in logits)
            for metric in metrics:
                found = metric.score(model, reference[0] if reference else None, ids.flatten()[at + 1])
                _check_finite(found, start, start + len(ids))
                for name, part in found.items():
                    values[name][done : done + len(at)] = part
            done += len(at)
    progress("evaluate", total, total)
    return {name: whole.numpy() for name, whole in values.items()}


def _check_finite(found: Mapping[str, Tensor], start: int, stop: int) -> None:
    wrong = [name for name, values in found.items() if not values.isfinite().all()]
    if wrong:
        whose = "reference" if any(name.startswith("reference") for name in wrong) else "model"
        raise CheckpointError(
            f"the {whose} computes values that are not finite ({wrong[0]}, windows {start} to {stop - 1}); "
            "look for NaN or Inf in its weights with lowbit inspect"
        )
