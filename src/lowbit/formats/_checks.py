"""Checks that formats make on tensors they read and write: what a file claims is believed only after a look at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.tensors import Shape

CHUNK = 2**18


def stored(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: Shape) -> Tensor:
    """The stored tensor of this name, which must have this dtype and shape.

    Raises:
        FormatError: it is missing, or has another dtype or shape.
    """
    if name not in tensors:
        raise FormatError(f"{name} is missing")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise FormatError(f"{name} is {_describe(tensor.dtype, tensor.shape)}, not {_describe(dtype, shape)}")
    return tensor


def _describe(dtype: torch.dtype, shape: Shape) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor (scales, zero points: small ones), which must hold neither NaN nor Inf.

    Raises:
        FormatError: it does; the text has the first such element.
    """
    # A sum is finite only where everything in it is; to look at each number takes twenty times as long.
    suspect = not isfinite(tensor.sum(dtype=torch.float32).item())
    for index in (~tensor.isfinite()).nonzero()[:1].tolist() if suspect else ():
        raise FormatError(f"{name} holds {tensor[tuple(index)].item()} at {index}; it must be finite")
    return tensor


def below(name: str, codes: UInt8[Tensor, "..."], limit: int) -> UInt8[Tensor, "..."]:
    """Codes of any shape, which must all be smaller than `limit`.

    Raises:
        FormatError: one is not; the text has the first and its position in the flattened tensor.
    """
    flat = codes.reshape(-1)
    for start in range(0, flat.numel() if limit < 256 else 0, CHUNK):
        chunk = flat[start : start + CHUNK]
        if chunk.amax() >= limit:
            at = start + int((chunk >= limit).int().argmax())
            raise FormatError(f"{name} holds code {int(flat[at])} at element {at}, codes end at {limit - 1}")
    return codes


def equal(left: Tensor, right: Tensor) -> bool:
    """As `torch.equal`; of float32 by numpy, which takes a fifth of its time."""
    if left.dtype != torch.float32:
        return torch.equal(left, right)
    return np.array_equal(left.numpy(), right.numpy())


def exact(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values converted to a storage dtype that must hold every one of them exactly.

    Raises:
        FormatError: one would change; the text has it.
    """
    converted = values.to(dtype)
    back = converted.to(values.dtype)
    if not equal(back, values):
        value = values[back != values].flatten()[0].item()
        raise FormatError(
            f"{name}: {value:.9g} cannot be stored as {str(dtype).removeprefix('torch.')} without changing it"
        )
    return converted


def fill(out: Tensor, values: Tensor) -> None:
    """Copy, unless the values were made there."""
    if out.data_ptr() != values.data_ptr():
        out.copy_(values)


def row_chunks(rows: int, cols: int, elements: int = CHUNK) -> Iterator[slice]:
    """Runs of rows of about so many elements, by default few enough for temporaries to stay in cache."""
    step = max(elements // max(cols, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
