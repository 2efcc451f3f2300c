"""Windows: a text, read, split into tokens once, and cut into windows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit.budget import MARGIN, anonymous_bytes, format_size
from lowbit.errors import ResourceError, UsageError
from lowbit.stages._model import open_tokenizer, refusals, silent_transformers
from lowbit.stages.checkpoint import Checkpoint

# Bytes that a tokenizer takes per character of text: 150 were measured.
_SPLITTING = 200


@final
@dataclass(frozen=True)
class Text:
    """A text to evaluate on, and what to call it."""

    name: str
    content: str

    @cached_property
    def sha256(self) -> str:
        """Hash of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@final
@dataclass(frozen=True)
class Windows:
    """A text's tokens cut into windows; each token but the first of a window without overlap is scored once."""

    ids: Int64[Tensor, "windows context"]
    stride: int
    special: tuple[str, ...]

    @property
    def counts(self) -> list[int]:
        """Scored tokens of each window."""
        most = self.ids.shape[1] - 1
        return [most] + [min(self.stride, most)] * (len(self.ids) - 1)

    def positions(self, start: int, stop: int) -> Int64[Tensor, "scored"]:
        """Positions whose next token is scored, in a batch of windows that is seen as one row of tokens."""
        context = self.ids.shape[1]
        rows = [
            torch.arange(context - 1 - count, context - 1) + row * context
            for row, count in enumerate(self.counts[start:stop])
        ]
        return torch.cat(rows)


def read_text(path: Path) -> Text:
    """A UTF-8 file as it is, line ends included; its name is the file's.

    Raises:
        UsageError: no such file, or not UTF-8.
    """
    try:
        return Text(path.name, path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"the text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; convert it to UTF-8"
        ) from None


def encode(
    sources: Sequence[Checkpoint], text: Text, limit: int | None, ram: int | None
) -> tuple[Int64[Tensor, "tokens"], tuple[str, ...]]:
    """Token ids of the whole text, which must be the same by each checkpoint's tokenizer, and its special tokens."""
    if not text.content:
        raise UsageError(f"{text.name} is empty; name a text to evaluate on")
    splitting = _SPLITTING * len(_beginning(text, limit))
    if ram and splitting > MARGIN and (need := anonymous_bytes() + splitting) > ram:
        raise ResourceError(
            f"--ram {format_size(ram)} is too little: splitting {text.name} into tokens takes up to "
            f"{format_size(need)}; limit it with --tokens, or take a shorter text"
        )
    found = [_encode_one(source, text, limit) for source in sources]
    for ids, _ in found[1:]:
        if not torch.equal(ids, found[0][0]):
            raise UsageError(
                f"{sources[0].path} and {sources[1].path} split {text.name} into other tokens; "
                "a model can be compared only with a reference that has the same tokenizer"
            )
    return found[0]


def _encode_one(source: Checkpoint, text: Text, limit: int | None) -> tuple[Int64[Tensor, "tokens"], tuple[str, ...]]:
    tokenizer = open_tokenizer(source)
    with silent_transformers(), refusals(f"the tokenizer of {source.path} fails on {text.name}"):
        special = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
        for content in (_beginning(text, limit), text.content):
            ids = tokenizer(content, return_attention_mask=False, return_token_type_ids=False, verbose=False)
            if len(content) == len(text.content) or len(ids["input_ids"]) > (limit or 0) + 64:
                break
    return torch.tensor(ids["input_ids"][:limit], dtype=torch.int64), tuple(map(str, special))


def _beginning(text: Text, limit: int | None) -> str:
    """As much text as so many tokens take, unless they are long; tokens that are far from the cut do not see it."""
    return text.content if limit is None else text.content[: 16 * limit + 4096]


def cut(
    text: Text, encoded: tuple[Int64[Tensor, "tokens"], tuple[str, ...]], context: int, stride: int | None
) -> Windows:
    """Windows over encoded text.

    Raises:
        UsageError: impossible windows, or a text shorter than one.
    """
    ids, special = encoded
    stride = context if stride is None else stride
    if context < 2 or not 1 <= stride <= context:
        raise UsageError(
            f"context {context}, stride {stride}: the context must be at least 2, the stride from 1 to the context"
        )
    if len(ids) < context:
        raise UsageError(
            f"{text.name} gives {len(ids):,} tokens, fewer than one window of {context:,}; "
            "take a longer text or a smaller --context"
        )
    return Windows(ids.unfold(0, context, stride), stride, special)
