"""Frequency: how many tokens of a text go to each expert of a model, and how often each token occurs, for policies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from lowbit.budget import MemoryWatch
from lowbit.errors import UnsupportedError
from lowbit.stages._model import open_tokenizer
from lowbit.stages._policy import expert_of
from lowbit.stages._products import Product
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.imatrix import estimate, run_through
from lowbit.stages.quantize import Progress, silent

_ENOUGH = 2**16  # tokens that are counted


def count_tokens(
    source: Checkpoint,
    ids: Int64[Tensor, "windows tokens"],
    folder: Path,
    ram: int | None,
    watch: MemoryWatch,
    progress: Progress = silent,
) -> dict[str, int]:
    """Tokens that each weight of an expert multiplies, of the first 65,536 of these windows.

    Args:
        folder: for a temporary folder with hidden states.
        ram: bytes of anonymous memory allowed; None for no limit.

    Raises:
        UnsupportedError: the model has no experts with weights of their own, or its blocks cannot be run alone.
        ResourceError: the limit is too small, with the least that works.
    """
    counts = {name: 0 for name in source.weights if expert_of(name)}
    if not counts:
        raise UnsupportedError(
            f"{source.path} has no experts by name, of which the policy asks how often they are used"
        )
    windows = ids[: max(_ENOUGH // ids.shape[1], 1)]

    def seen(product: Product) -> None:
        for name in product.names:
            if name in counts:
                counts[name] += len(product.rows)

    tokens = estimate(source, (windows.shape[0], windows.shape[1]), ram).tokens
    run_through(source, windows, folder, tokens, seen, watch, lambda done, total: progress("experts", done, total))
    return counts


def rank_tokens(source: Checkpoint, ids: Int64[Tensor, "windows tokens"]) -> tuple[int, ...]:
    """Rank of each token of the vocabulary in these windows: the most frequent first, of equals the smaller number.

    Special tokens of the tokenizer are the first, and have -1: no number of tokens leaves them out.

    Raises:
        CheckpointError: there is no tokenizer.
        UnsupportedError: `config.json` does not say how many tokens there are.
    """
    text = source.config.get("text_config")
    size = source.config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    if not isinstance(size, int):
        raise UnsupportedError(f"{source.path}: config.json does not say how many tokens the model has (vocab_size)")
    tokenizer = open_tokenizer(source)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    counts = ids.flatten().bincount(minlength=size).tolist()
    order = sorted(range(size), key=lambda token: (token not in special, -counts[token], token))
    ranks = {token: rank for rank, token in enumerate(order)}
    return tuple(-1 if token in special else ranks[token] for token in range(size))
