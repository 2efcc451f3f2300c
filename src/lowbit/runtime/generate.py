"""Text from a loaded model, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, final

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.runtime.model import Loaded
from lowbit.stages._model import refusals, silent_transformers


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

    def arguments(self) -> dict[str, Any]:
        """For `generate` of transformers."""
        found: dict[str, Any] = {
            "max_new_tokens": self.tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            found |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return found | ({"stop_strings": list(self.stop)} if self.stop else {})


@final
@dataclass(frozen=True)
class Generated:
    """What came of it: text without the prompt, numbers of tokens, seconds to the first and of all."""

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
    loaded: Loaded, messages: Sequence[dict[str, str]], sampling: Sampling, show: Callable[[str], None] = lambda text: None
) -> Generated:
    """Answer a conversation, `{"role": ..., "content": ...}` each, through the chat template of the model.

    Raises:
        UsageError: the model has no chat template.
    """
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise UsageError("the tokenizer of this model has no chat template; continue a text with lowbit generate --prompt")
    with refusals("the chat template of this model"):
        ids = loaded.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    return _run(loaded, ids, sampling, show)


def _run(loaded: Loaded, ids: Tensor, sampling: Sampling, show: Callable[[str], None]) -> Generated:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if ids.shape[-1] == 0 or (limit and ids.shape[-1] >= limit):
        raise UsageError(f"the prompt has {ids.shape[-1]} tokens; this model takes 1 to {(limit or 1 << 31) - 1}")
    tokens = min(sampling.tokens, limit - ids.shape[-1]) if limit else sampling.tokens
    streamer = _Streamer(loaded, show)
    torch.manual_seed(sampling.seed)
    arguments = {**sampling.arguments(), "max_new_tokens": tokens, "streamer": streamer}
    with torch.inference_mode(), silent_transformers(), refusals("the model fails on this prompt"):
        loaded.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), tokenizer=loaded.tokenizer, pad_token_id=_pad(loaded), **arguments
        )
    return streamer.result(ids.shape[-1])


def _pad(loaded: Loaded) -> int:
    """Any token: nothing is padded, and `generate` warns where it knows none."""
    return int(loaded.tokenizer.pad_token_id or 0)


@final
class _Streamer:
    """Takes tokens as `generate` gives them, the prompt first, and shows text that can no longer change."""

    def __init__(self, loaded: Loaded, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = loaded.tokenizer, show
        self._ids: list[int] = []
        self._shown = ""
        self._start, self._first, self._seen_prompt = perf_counter(), 0.0, False

    def put(self, ids: Tensor) -> None:
        """More tokens."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self._first = self._first or perf_counter()
        self._ids += ids.flatten().tolist()
        text = self._text()
        if not text.endswith("\ufffd"):  # bytes of a character that is not whole yet
            self._show(text[len(self._shown) :])
            self._shown = text

    def end(self) -> None:
        """No more tokens."""
        self._show(self._text()[len(self._shown) :])

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def result(self, prompt: int) -> Generated:
        """What came, and how long it took."""
        end, first = perf_counter(), self._first or self._start
        return Generated(self._text(), prompt, len(self._ids), first - self._start, end - self._start)
