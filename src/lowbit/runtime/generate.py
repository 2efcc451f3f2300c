"""Text from a loaded model, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.runtime.runner import Runner
from lowbit.runtime.words import Words, require_text
from lowbit.stages._model import refusals
from lowbit.stages._weightfile import one_line

_BEFORE = 8  # tokens of a prompt with which those after it are made text
_COLDEST = 1e-35  # a temperature


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
        stop: strings right after which it ends; the text of a special token stands for that token.
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

    @property
    def likeliest(self) -> bool:
        """Whether no dice are thrown: at temperature 0, and so near to it that float32 has no quotient of a logit."""
        return self.temperature < _COLDEST

    @property
    def greedy(self) -> bool:
        """Whether it is the likeliest token each time, whatever was there."""
        return self.likeliest and self.repetition_penalty == 1


@final
@dataclass(frozen=True)
class Generated:
    """What came of it: text without the prompt, numbers of tokens, seconds to the first and of all.

    `decoder` says what ran the blocks: `native`, or why it was the class of transformers. `ended` says why there is no
    more: `end` (the model ended it), `stop` (a string of `Sampling.stop`), `tokens` (as many as were asked for),
    `context` (it is full); empty where it was interrupted.
    """

    decoder: str
    text: str
    prompt_tokens: int
    tokens: int
    first: float
    seconds: float
    ended: str

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else 0.0


def generate(
    runner: Runner, prompt: str, sampling: Sampling, show: Callable[[str], None] = lambda text: None
) -> Generated:
    """Continue a prompt; `show` gets the text piece by piece.

    Raises:
        UsageError: the prompt is empty, no text, or too long for the context.
    """
    return _run(runner, _Text(runner, _ids(runner, prompt), sampling, show), sampling)


def generate_all(runner: Runner, prompts: Sequence[str], sampling: Sampling) -> list[Generated]:
    """Continue some prompts; natively all at once, so that weights are read once for a token of each.

    Raises:
        UsageError: a prompt is empty, no text, or too long for the context.
    """
    made, engine = _all_ids(runner, prompts), runner.engine
    if engine is None:
        return [_run(runner, _Text(runner, ids, sampling, lambda part: None), sampling) for ids in made]
    texts = [_Text(runner, ids, sampling, lambda part: None) for ids in made]
    sessions = {text: engine.start(runner.limit, runner.keep) for text in texts}
    with torch.inference_mode():
        left = [text for text in texts if text.take(text.choose(sessions[text].follow(torch.tensor(text.seen))))]
        while left:
            if sampling.greedy:
                tokens = engine.likeliest([(sessions[text], text.seen[-1]) for text in left])
            else:
                logits = engine.read([(sessions[text], torch.tensor(text.seen[-1:])) for text in left])
                tokens = [text.choose(row) for text, row in zip(left, logits, strict=True)]
            left = [text for text, token in zip(left, tokens, strict=True) if text.take(token)]
    return [text.result() for text in texts]


def answer(
    runner: Runner,
    messages: Sequence[dict[str, str]],
    sampling: Sampling,
    show: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Answer a conversation, `{"role": ..., "content": ...}` each, through the chat template of the model.

    What the last text of the runner and this one begin with is not read again.

    Raises:
        UsageError: the model has no chat template, a message is no text, or all are too long for the context.
    """
    return _run(runner, _Text(runner, _conversation(runner, messages), sampling, show, answers=True), sampling)


def prepare(runner: Runner, messages: Sequence[dict[str, str]], sampling: Sampling) -> None:
    """Open all that `answer` takes, for a conversation that begins with these messages.

    An answer of one token is made for it: much is imported where it is first used, and what is interrupted there, as an
    answer may be, is half a module from then on.

    Raises:
        UsageError: as `answer`.
    """
    ids = _conversation(runner, [*messages, {"role": "user", "content": "Hello"}])
    _require_room(runner, len(ids))
    one = replace(sampling, tokens=1)
    _run(runner, _Text(runner, ids[:1], one, lambda part: None, answers=True), one)


def fitted(runner: Runner, messages: Sequence[dict[str, str]], sampling: Sampling) -> list[dict[str, str]]:
    """A conversation without its oldest turns, as few as leave room for an answer, or for a quarter of the context.

    What the model is told before it stays, and the last message does.

    Raises:
        UsageError: these alone are too long for the context; else as `answer`.
    """
    room, kept = min(sampling.tokens, runner.limit // 4), list(messages)
    start = 1 if kept[0]["role"] == "system" else 0
    while (count := len(_conversation(runner, kept))) + room > runner.limit and len(kept) > start + 1:
        del kept[start : start + 2]
    _require_room(runner, count)
    return kept


def _conversation(runner: Runner, messages: Sequence[dict[str, str]]) -> Int64[Tensor, " tokens"]:
    if not getattr(runner.tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer of this model has no chat template; continue a text with lowbit generate --prompt"
        )
    for message in messages:
        require_text(message["content"], "the message")
    try:
        found: Any = runner.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program, and refuses what it does not know by raising something
        raise UsageError(f"the chat template of this model refuses the conversation: {one_line(error)}") from error
    ids: Tensor = found["input_ids"].view(-1)
    return ids


def _ids(runner: Runner, prompt: str) -> Int64[Tensor, " tokens"]:
    require_text(prompt, "the prompt")
    return torch.tensor(runner.words.encode(prompt), dtype=torch.int64)


def _all_ids(runner: Runner, prompts: Sequence[str]) -> list[Int64[Tensor, " tokens"]]:
    """Of all prompts, before the first is continued; an error says which it is about."""
    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            found.append(_ids(runner, prompt))
            _require_room(runner, len(found[-1]))
        except UsageError as error:
            raise UsageError(f"prompt {number} of {len(prompts)}: {error}") from None
    return found


def _require_room(runner: Runner, count: int) -> None:
    if not count:
        raise UsageError("the prompt is empty: it has no tokens")
    if count >= runner.limit:
        larger = "give a larger --context" if runner.limit < runner.positions else "this model takes no more"
        raise UsageError(f"{count} tokens leave no room to go on in a context of {runner.limit}; {larger}")


def _run(runner: Runner, text: _Text, sampling: Sampling) -> Generated:
    with torch.inference_mode():
        for token in _tokens(runner, text, sampling):
            if not text.take(token):
                break
    return text.result()


def _tokens(runner: Runner, text: _Text, sampling: Sampling) -> Iterator[int]:
    """The next token, again and again. What is done with it is not in here: its errors are not the model's."""
    with refusals("the model fails on this prompt"):
        reader = runner.reader
        yield text.choose(reader.follow(torch.tensor(text.seen)))
        while True:
            last = text.seen[-1]
            yield reader.likeliest(last) if sampling.greedy else text.choose(reader.read(torch.tensor([last])))


def chooser(sampling: Sampling) -> Callable[[Tensor, Tensor], int]:
    """A function of the tokens so far and the logits of the next, which chooses as `generate` of transformers does."""
    if sampling.greedy:
        return lambda seen, logits: int(logits.argmax())
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
    if not sampling.likeliest:
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
        if sampling.likeliest:
            return int(scores.argmax())
        return int(scores.softmax(-1).multinomial(1, generator=dice))

    return choose


def _last_words(words: Words, ids: list[int]) -> list[int]:
    """The end of a prompt, from the beginning of a character on: a tokenizer may have it in bytes."""
    count = _BEFORE
    while count < len(ids) and words.decode(ids[-count:]).startswith("\ufffd"):
        count *= 2
    return ids[-count:]


@final
class _Text:
    """A text while it is written: chooses and takes tokens, and shows what can no longer change.

    Attributes:
        seen: its tokens, the prompt's first.
    """

    def __init__(
        self, runner: Runner, ids: Tensor, sampling: Sampling, show: Callable[[str], None], answers: bool = False
    ) -> None:
        _require_room(runner, len(ids))
        self.seen: list[int] = ids.tolist()
        self._before = [] if answers else _last_words(runner.words, self.seen)  # an answer is a text of its own
        self._prompt, self._runner, self._show = len(ids), runner, show
        self._room, self._most, self._stops = runner.limit - len(ids), sampling.tokens, sampling.stop
        special = runner.words.special if sampling.stop else {}
        self._stop_tokens = {special[stop] for stop in sampling.stop if stop in special}
        self._ended = ""
        self._choose = chooser(sampling)
        self._shown = self._written = ""
        self._start, self._first, self._end = perf_counter(), 0.0, 0.0

    def choose(self, logits: Tensor) -> int:
        """The next token."""
        return self._choose(torch.tensor(self.seen), logits)

    def take(self, token: int) -> bool:
        """One more token; whether the text goes on after it."""
        self.seen.append(token)
        whole = self._decoded()
        stops = [at + len(stop) for stop in self._stops if (at := whole.find(stop)) >= 0]
        self._written = whole[: min(stops)] if stops else whole
        if not self._written.endswith("\ufffd"):  # bytes of a character that is not whole yet
            self._show(self._written[len(self._shown) :])
            self._shown = self._written
        self._end = perf_counter()
        self._first = self._first or self._end
        self._ended = "stop" if stops else self._reason(token)
        return not self._ended

    def _reason(self, token: int) -> str:
        """Why a text ends with this token; nothing where it does not."""
        if token in self._stop_tokens:
            return "stop"
        if token in self._runner.ends or token in self._runner.words.ends:
            return "end"
        count = len(self.seen) - self._prompt
        return "tokens" if count >= self._most else "context" if count >= self._room else ""

    def _decoded(self) -> str:
        """What came after the prompt, cut off a longer text: some tokenizers drop the space with which one begins."""
        decode, new = self._runner.words.decode, self.seen[self._prompt :]
        before = decode(self._before) if self._before else ""
        whole = decode(self._before + new)
        return whole[len(before) :] if whole.startswith(before) else decode(new)

    def result(self) -> Generated:
        """What came, and how long it took."""
        self._show(self._written[len(self._shown) :])
        count, first, whole = len(self.seen) - self._prompt, self._first - self._start, self._end - self._start
        return Generated(self._runner.decoder, self._written, self._prompt, count, first, whole, self._ended)
