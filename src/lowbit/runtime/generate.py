"""Text from a loaded model, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, final

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError, UsageError
from lowbit.runtime.decoder import start
from lowbit.runtime.model import Loaded
from lowbit.stages._model import refusals
from lowbit.stages._weightfile import read_json


@final
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        tokens: most that are generated.
        temperature: 0 takes the likeliest token each time.
        top_k: only among the likeliest so many; 0 for all.
        top_p: only among the likeliest that have this probability together.
        min_p: only among those at least so likely, as a share of the likeliest.
        repetition_penalty: logits of tokens that were there are divided by it (multiplied, where below 0).
        stop: strings after which it ends.
        seed: of the choices.
    """

    tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@final
@dataclass(frozen=True)
class Generated:
    """What came of it: text without the prompt, numbers of tokens, seconds to the first and of all.

    `decoder` says what ran the blocks: `native`, or why it was the class of transformers.
    """

    decoder: str
    text: str
    prompt_tokens: int
    tokens: int
    first: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else 0.0


def generate(
    loaded: Loaded, prompt: str, sampling: Sampling, show: Callable[[str], None] = lambda text: None
) -> Generated:
    """Continue a prompt; `show` gets the text piece by piece.

    Raises:
        UsageError: the prompt is empty, or too long for the model.
    """
    return _run(loaded, loaded.tokenizer(prompt, return_tensors="pt").input_ids, sampling, show)


def answer(
    loaded: Loaded,
    messages: Sequence[dict[str, str]],
    sampling: Sampling,
    show: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Answer a conversation, `{"role": ..., "content": ...}` each, through the chat template of the model.

    Raises:
        UsageError: the model has no chat template.
    """
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer of this model has no chat template; continue a text with lowbit generate --prompt"
        )
    with refusals("the chat template of this model"):
        found: Any = loaded.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return _run(loaded, found["input_ids"], sampling, show)


def _run(loaded: Loaded, ids: Tensor, sampling: Sampling, show: Callable[[str], None]) -> Generated:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if ids.shape[-1] == 0 or (limit and ids.shape[-1] >= limit):
        raise UsageError(f"the prompt has {ids.shape[-1]} tokens; this model takes 1 to {(limit or 1 << 31) - 1}")
    tokens = min(sampling.tokens, limit - ids.shape[-1]) if limit else sampling.tokens
    reader = _Reader(loaded, show)
    step, decoder = _steps(loaded, ids.shape[-1] + tokens)
    choose, ends = chooser(sampling), _ends(loaded)
    with torch.inference_mode(), refusals("the model fails on this prompt"):
        seen, new = ids.view(-1), ids.view(-1)
        for _ in range(tokens):
            token = choose(seen, step(new))
            reader.take(token)
            if token in ends or reader.ended(sampling.stop):
                break
            new = torch.tensor([token])
            seen = torch.cat([seen, new])
    return reader.result(ids.shape[-1], decoder)


def _steps(loaded: Loaded, capacity: int) -> tuple[Callable[[Tensor], Tensor], str]:
    """What reads tokens and gives the logits of the next: the native decoder, or transformers; and which, or why."""
    try:
        return start(loaded, capacity).read, "native"
    except UnsupportedError as error:
        reason = str(error)
    cache: list[Any] = [None]

    def step(new: Tensor) -> Tensor:
        out = loaded.model(input_ids=new[None], past_key_values=cache[0], use_cache=True, logits_to_keep=1)
        cache[0] = out.past_key_values
        return out.logits[0, -1]  # type: ignore[no-any-return]

    return step, reason


def chooser(sampling: Sampling) -> Callable[[Tensor, Tensor], int]:
    """A function of the tokens so far and the logits of the next, which chooses as `generate` of transformers does."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )  # fmt: skip

    steps: Any = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            steps.append(MinPLogitsWarper(sampling.min_p))
    dice = torch.Generator().manual_seed(sampling.seed)

    def choose(seen: Tensor, logits: Tensor) -> int:
        scores = steps(seen[None], logits.float()[None])[0]
        if sampling.temperature == 0:
            return int(scores.argmax())
        return int(scores.softmax(-1).multinomial(1, generator=dice))

    return choose


def _ends(loaded: Loaded) -> set[int]:
    """Tokens that end a text."""
    path = loaded.checkpoint.path / "generation_config.json"
    told = read_json(path).get("eos_token_id") if path.exists() else None
    said = (told, getattr(loaded.model.generation_config, "eos_token_id", None), loaded.tokenizer.eos_token_id)
    return {int(token) for each in said for token in (each if isinstance(each, list) else [each]) if token is not None}


@final
class _Reader:
    """Takes tokens as they come and shows the text that can no longer change."""

    def __init__(self, loaded: Loaded, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = loaded.tokenizer, show
        self._ids: list[int] = []
        self._shown = self._text = ""
        self._start, self._first = perf_counter(), 0.0

    def take(self, token: int) -> None:
        """One more token."""
        self._first = self._first or perf_counter()
        self._ids.append(token)
        self._text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if not self._text.endswith("\ufffd"):  # bytes of a character that is not whole yet
            self._show(self._text[len(self._shown) :])
            self._shown = self._text

    def ended(self, stops: Sequence[str]) -> bool:
        """Whether one of these strings is in the text."""
        return any(stop in self._text for stop in stops)

    def result(self, prompt: int, decoder: str) -> Generated:
        """What came, and how long it took."""
        self._show(self._text[len(self._shown) :])
        end, first = perf_counter(), self._first or self._start
        return Generated(decoder, self._text, prompt, len(self._ids), first - self._start, end - self._start)
