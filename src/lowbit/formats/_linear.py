"""What the formats of quantized `Linear` modules share: which weights they take, and what stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Weight, _autoround
from lowbit.schemes import FLOATS, Block, ScaleType, Scheme
from lowbit.tensors import QTensor

SCALE_TYPES: dict[torch.dtype, ScaleType] = {dtype: name for name, dtype in FLOATS.items()}
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_TYPES}


def check_matrix(weight: Weight, format: str, scheme: Scheme, smooth: bool = False) -> None:
    """Refuse what is no `weight` of a `Linear`, and factors of inputs where the format has no place for them.

    Raises:
        UnsupportedError: another name, another number of axes than 2, or such a scheme.
    """
    if scheme.smooth and not smooth:
        raise UnsupportedError(f"{format} cannot hold {scheme}: it has no place for factors of inputs")
    if not weight.name.endswith(".weight") or len(weight.shape) != 2:
        raise UnsupportedError(
            f"{format} stores matrices that are the `weight` of a module, {weight.name} with {len(weight.shape)} axes "
            "is none; leave it as it is (--skip)"
        )


def row_block(block: Block, cols: int) -> Block:
    """The same blocks in the plainest words, for rows of `cols`: row, gN, or flatN where they run on over rows.

    A last group that is shorter than the others stays; blocks of several rows are returned as they are.
    """
    if block.rows != 1:
        return block
    if not block.flat:
        return Block(1, 0) if block.cols >= cols else block
    if block.cols == cols:
        return Block(1, 0)
    return block if cols % block.cols else Block(1, block.cols)


def divisor(cols: int, most: int, sizes: Sequence[int]) -> int | None:
    """The largest of `sizes`, at most `most`, that divides `cols`: what to suggest instead of a group that does not."""
    return max((size for size in sizes if size <= most and cols % size == 0), default=None)


def planned(weight: Weight) -> Scheme:
    """The scheme of a weight that must be quantized.

    Raises:
        FormatError: it is not.
    """
    if weight.scheme is None:
        raise FormatError(f"{weight.name} is not quantized")
    return weight.scheme


def check_planned(weight: Weight, q: QTensor) -> None:
    """A tensor to pack must be the planned one.

    Raises:
        FormatError: it has another scheme or shape.
    """
    if (q.scheme, q.shape) != (weight.scheme, weight.shape):
        raise FormatError(
            f"{weight.name}: {q.scheme} {list(q.shape)} was made where {weight.scheme} {list(weight.shape)} was planned"
        )


def kept_modules(weights: Sequence[Weight]) -> Iterator[str]:
    """Modules whose matrix stays as it is, in order; none with a quantized one inside (Mamba's, which has `A_log`).

    Readers leave all that is inside of a module that is named.
    """
    above = {
        name for weight in weights if weight.scheme for name in accumulate(weight.module.split("."), "{}.{}".format)
    }
    kept = (weight.module for weight in weights if weight.scheme is None and len(weight.shape) == 2)
    return (module for module in kept if module not in above)


def skipped_modules(weights: Sequence[Weight]) -> list[str]:
    """Modules that no reader may take for quantized: those kept, and a tied head, which has no weight of its own."""
    quantized = {weight.module for weight in weights if weight.scheme}
    return sorted({*kept_modules(weights), "lm_head"} - quantized)


_DECLARING = ("quantization_config", "quantization")


def declare(source: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """The source's config.json with this `quantization_config` in place of any it had, in its part for the text too.

    MLX's goes by another name as well.
    """
    document = {key: value for key, value in source.items() if key not in _DECLARING}
    text = document.get("text_config")
    if isinstance(text, Mapping):
        document["text_config"] = {key: value for key, value in text.items() if key not in _DECLARING}
    return {**document, "quantization_config": dict(quantization)} if quantization else document


def documents(
    weights: Sequence[Weight], source: Mapping[str, Any], quantization: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """config.json with this `quantization_config`, which names what stays too; without where nothing is quantized."""
    if not any(weight.scheme for weight in weights):
        return {"config.json": declare(source, None)}
    return {"config.json": declare(source, {**quantization, "modules_to_not_convert": skipped_modules(weights)})}


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Float dtype that a model declares; bfloat16 where it does not."""
    return declared_dtype(config) or torch.bfloat16


def declared_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """Float dtype that a model declares, at its top or in its part for text."""
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    words = [place.get(key) for place in places for key in ("dtype", "torch_dtype")]
    return next((_FLOATS[word] for word in words if isinstance(word, str) and word in _FLOATS), None)


def declared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a config.json or of its part for the text model, empty where there is none.

    What auto-round declares as its own comes in the words of the layout that it is.

    Raises:
        FormatError: it is no JSON object, or auto-round's for something that is not read.
    """
    text = config.get("text_config")
    within = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = config.get("quantization_config") or within or {}
    if not isinstance(found, Mapping):
        raise FormatError(f"quantization_config of config.json is {type(found).__name__}, not an object")
    return _autoround.as_layout(found) if found.get("quant_method") in _autoround.METHODS else found
