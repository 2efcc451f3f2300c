"""A quantized checkpoint as one of floats, to quantize in another way; nothing is read to look.

Some models are published in 8 or 4 bits only (DeepSeek's and Qwen's FP8, gpt-oss's MXFP4): there is no float
checkpoint to start from. A weight is read as the float32 that its codes stand for, and declared in the model's type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from lowbit.formats import Spec, Weight
from lowbit.formats._linear import declare
from lowbit.stages._adapter import ADAPTER, CONFIG, read_adapter
from lowbit.stages._changes import model_dtype
from lowbit.stages._experts import apart, check_alike, spread
from lowbit.stages._row_views import at_first, joined_rows
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.convert import lasting

# Bytes of each element that is read: its code, its float32, and once more, where it is transposed or cut into pieces.
_MAKING = 9


def dequantized(source: Checkpoint) -> Checkpoint:
    """A view in which every quantized weight is one of floats, with its low-rank term where there is an adapter.

    Where its inputs are quantized too, they no longer are. A float checkpoint is returned as it is.
    """
    if source.format is None:
        return source
    dtype, adapter = model_dtype(source), source.root / ADAPTER
    adapted = source.path.is_dir() and (adapter / CONFIG).exists()
    plain = {name: replace(weight, activations=None) for name, weight in source.weights.items()}
    stored = joined_rows(
        replace(source, weights=plain, terms=read_adapter(adapter) if adapted else {}), "float", dtype, lossy=True
    )
    quantized = {name: weight for name, weight in stored.weights.items() if weight.scheme}
    made = {n: Weight(n, each.held, dtype or each.dtype, scaled=each.scaled) for n, each in quantized.items()}
    pieces = {name: stored.pieces(name) for name in made}
    read = {piece for found in pieces.values() for piece in found}
    # Read is the first piece, which the edit then replaces.
    files = {name: stored.files[found[0]].alone(found[0], name) for name, found in pieces.items()}
    specs = {name: Spec(weight.dtype, weight.shape) for name, weight in made.items()}
    return replace(
        stored,
        config=declare(source.config, None),
        specs=spread(stored.specs, at_first(pieces, specs)),
        extras=lasting(source),
        format=None,
        view=replace(
            stored.view,
            made_bytes=_MAKING * max((prod(weight.shape) for weight in made.values()), default=0),
            was={name: f"{weight.scheme} of {source.format}" for name, weight in quantized.items()},
        ),
        weights={**stored.weights, **made},
        files=spread(stored.files, at_first(pieces, files)),
        edits={name: edit for name, edit in stored.edits.items() if name not in read}
        | {name: partial(_read, stored, name) for name in made},
        terms={},
    )


def taken_apart(source: Checkpoint, form: str | None, whole: Callable[[str], bool], requantize: bool) -> Checkpoint:
    """The checkpoint with tensors that hold several matrices apart, and what is quantized as floats, if `requantize`.

    Stacks of codes come apart as these (gpt-oss's), others as what they stand for (DeepSeek's keys and values).

    Raises:
        UnsupportedError: one that stays whole, where readers of the format would not find it.
    """
    stored = apart(source, form, whole)
    found = apart(dequantized(stored), form, whole) if requantize else stored
    check_alike(found, form)
    return found


def told_dequantized(source: Checkpoint) -> str | None:
    """What to say of such a view; None of another checkpoint."""
    kinds = Counter(source.view.was.values())
    said = ", ".join(f"{number} weights in {kind}" for kind, number in kinds.items())
    return f"taken for the original is what the codes of {said} stand for" if kinds else None


def _read(stored: Checkpoint, name: str, _: Tensor) -> Tensor:
    return stored.dequantized(name, torch.float32)
