"""A checkpoint that is ready to continue texts: natively, or as the class of `transformers` computes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.native import DecoderShape
from lowbit.runtime.adapters import add_adapter
from lowbit.runtime.decoder import Engine, Native, Session, native_of
from lowbit.runtime.model import Loaded, open_weights
from lowbit.runtime.stored import Stored, damaged, keep_stored, read_stored, stored_path
from lowbit.runtime.told import told_model
from lowbit.runtime.words import Words, open_words
from lowbit.stages._model import open_tokenizer
from lowbit.stages._weightfile import read_json, show
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:  # the run-time check of annotations needs names, and importing these costs a second
    PreTrainedModel = PreTrainedTokenizerBase = object

KEEP = "float16"  # how keys and values are kept where nothing is said
_ENDLESS = 1 << 31
_KEPT = ("past_key_values", "cache_params", "state")  # what classes call that which they keep of a text


@final
class Plain:
    """A text that a model of `transformers` reads: the whole again for each token, where its class keeps nothing."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None
        self._ids = torch.tensor([], dtype=torch.int64)
        known = signature(model.forward).parameters
        self._keeps = next((name for name in _KEPT if name in known), None)
        self._asked = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def follow(self, ids: Tensor) -> Tensor:
        """Be the text of these tokens."""
        self._cache, self._ids = None, ids[:0]
        return self.read(ids)

    def read(self, ids: Tensor) -> Tensor:
        """Read more tokens."""
        self._ids = torch.cat([self._ids, ids])
        with torch.inference_mode():
            out = self._model(**self._given(ids), **self._asked)
        if self._keeps:
            self._cache = getattr(out, self._keeps, None)
            self._keeps = self._keeps if self._cache is not None else None
        logits: Tensor = out.logits[0, -1]
        return logits

    def _given(self, ids: Tensor) -> dict[str, Any]:
        """What the model is called with for these tokens, the last of the text."""
        if self._keeps:
            return {"input_ids": ids[None], self._keeps: self._cache, "use_cache": True}
        found: dict[str, Any] = self._model.prepare_inputs_for_generation(self._ids[None])
        return found

    @property
    def nbytes(self) -> int:
        """Of what is kept of the text: keys and values, or states."""
        layers = getattr(self._cache, "layers", [self._cache])
        tensors = tree_leaves([getattr(each, "__dict__", each) for each in layers])
        return sum(each.nbytes for each in tensors if isinstance(each, Tensor))

    def likeliest(self, token: int) -> int:
        """Read one more token; the likeliest after it."""
        return int(self.read(torch.tensor([token])).argmax())


@final
@dataclass(frozen=True, eq=False)
class Runner:
    """What continues texts. Made by `open_runner`.

    Attributes:
        checkpoint: where the model comes from.
        decoder: what computes its blocks: `native`, or why it is the class of transformers.
        engine: the native decoder, if it is that.
        model: of transformers, where it computes; None beside the native decoder.
        limit: most tokens of a text, with its prompt.
        positions: most that the model takes.
        ends: tokens that end one.
        keep: how the native decoder keeps keys and values, one of `native.KEEPS`.
        kernels: number of weights that the kernels multiply.
        others: weights that are computed with in another way, with the reason.
    """

    checkpoint: Checkpoint
    decoder: str
    engine: Engine | None
    model: PreTrainedModel | None
    limit: int
    positions: int
    ends: frozenset[int]
    keep: str
    kernels: int
    others: dict[str, str]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That lies with the checkpoint.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        return open_tokenizer(self.checkpoint)

    @cached_property
    def words(self) -> Words:
        """Texts to tokens and back; raises as `tokenizer`."""
        return open_words(self.checkpoint)

    @cached_property
    def reader(self) -> Session | Plain:
        """One text, the last: the native decoder does not read again what a new text begins with too."""
        return self.engine.start(self.limit, self.keep) if self.engine else Plain(self.model)


def open_runner(
    path: str | Path,
    *,
    exact: bool = False,
    threads: int | None = None,
    trust_remote_code: bool = False,
    context: int | None = None,
    keep: str = KEEP,
    cache: Path | None = None,
    adapter: Path | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Runner:
    """Open a checkpoint (as `open_model` does) to continue texts with it.

    Args:
        context: most tokens of a text, with its prompt; None for what the model takes.
        keep: how the native decoder keeps keys and values: `float32`, `float16` or `int8`.
        cache: folder where what is made of the checkpoint for the native decoder is kept, and found at the next start.
        adapter: folder with an adapter of `peft` to put beside the weights; the class of `transformers` computes.
        note: told where that folder cannot be written to, and what of these has no say.

    Raises:
        UsageError: `context` is more than the model takes.
        LowbitError: see `lowbit.errors`.
    """
    checkpoint = open_checkpoint(path, trust_remote_code)
    if adapter:
        loaded = open_weights(checkpoint, exact, threads=threads).loaded()
        runner = runner_of(loaded, threads, context, keep, add_adapter(loaded, adapter, note))
        _note_unused(runner, cache, note)
        return runner
    file = stored_path(cache, checkpoint, f"native, exact {exact}") if cache else None
    if file and file.exists():
        return _stored_runner(checkpoint, file, threads, context, keep)
    for loaded in _ways(checkpoint, exact, threads):
        runner = runner_of(loaded, threads, context, keep)
        if runner.engine:
            break
    if file and runner.engine:
        keep_stored(file, _stored(runner.engine.native, loaded), note)
    _note_unused(runner, cache, note)
    return runner


def _note_unused(runner: Runner, cache: Path | None, note: Callable[[str], None]) -> None:
    """Say what was asked of the native decoder, where something else computes."""
    if runner.engine is None and runner.keep != KEEP:
        note(f"keys and values are not kept in {runner.keep}, but as transformers keeps them")
    if runner.engine is None and cache:
        note(f"nothing is kept in {cache}: that is for the native decoder")


def _ways(checkpoint: Checkpoint, exact: bool, threads: int | None) -> Iterator[Loaded]:
    """What a runner may be made of: the native decoder's part first, where that is all, the whole model last."""
    told = told_model(checkpoint, exact, threads or torch.get_num_threads())
    if told:
        yield told
    opened = open_weights(checkpoint, exact, threads=threads)
    bare = opened.bare()
    if bare:
        yield bare
    yield opened.loaded()


def runner_of(
    loaded: Loaded, threads: int | None = None, context: int | None = None, keep: str = KEEP, other: str = ""
) -> Runner:
    """A runner of a model that is loaded; see `open_runner`. `other`: why the native decoder is not asked."""
    engine, decoder = None, other or "native"
    try:
        engine = None if other else Engine(native_of(loaded), threads)
    except UnsupportedError as error:
        decoder = str(error)
    positions, ends = _positions(loaded), _ends(loaded)
    return Runner(
        loaded.checkpoint, decoder, engine, None if engine else loaded.model, _limit(positions, context), positions,
        ends, keep, len(loaded.kernels), loaded.others,
    )  # fmt: skip


def _positions(loaded: Loaded) -> int:
    return getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or _ENDLESS


def _limit(model: int, asked: int | None) -> int:
    if asked and asked > model:
        raise UsageError(f"a context of {asked} tokens is more than this model takes, which is {model}")
    return asked or model


def _ends(loaded: Loaded) -> frozenset[int]:
    """Tokens that end a text."""
    path = loaded.checkpoint.root / "generation_config.json"
    told = read_json(path).get("eos_token_id") if path.exists() else None
    said = {str(path): told, "the configuration": getattr(loaded.model.generation_config, "eos_token_id", None)}
    return frozenset(token for where, each in said.items() for token in _tokens(each, where))


def _tokens(told: object, where: str) -> list[int]:
    """One or several, as a file has them."""
    found: list[Any] = [] if told is None else told if isinstance(told, list) else [told]
    if any(not isinstance(token, int) for token in found):
        raise CheckpointError(f"{where} has {show(told)} as eos_token_id, where the number of a token should be")
    return found


def _stored(native: Native, loaded: Loaded) -> Stored:
    """What a later start needs of a model."""
    facts = {name: value for name, value in vars(native).items() if name not in ("shape", "matrices", "vectors")}
    about = {"positions": _positions(loaded), "ends": sorted(_ends(loaded)), "kernels": len(loaded.kernels)}
    vectors = {**native.vectors, "embedding": _narrow(native.vectors["embedding"])}
    facts = {"native": facts, "shape": asdict(native.shape), **about, "others": loaded.others}
    return Stored(facts, native.matrices, vectors)


def _narrow(table: Tensor) -> Tensor:
    """Floats of 32 bits in 16, where these hold every value."""
    if table.dtype != torch.float32:
        return table
    found = (table.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((each for each in found if torch.equal(each.float(), table)), table)


def _stored_runner(checkpoint: Checkpoint, file: Path, threads: int | None, context: int | None, keep: str) -> Runner:
    stored = read_stored(file)
    facts = stored.facts
    try:
        told: dict[str, Any] = {
            name: tuple(each) if isinstance(each, list) else each for name, each in facts["native"].items()
        }
        native = Native(DecoderShape(**facts["shape"]), stored.matrices, stored.vectors, **told)
        engine, positions, ends = Engine(native, threads), int(facts["positions"]), frozenset(map(int, facts["ends"]))
        kernels, others = int(facts["kernels"]), dict(facts["others"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(file, error) from error
    limit = _limit(positions, context)
    return Runner(checkpoint, "native", engine, None, limit, positions, ends, keep, kernels, others)
