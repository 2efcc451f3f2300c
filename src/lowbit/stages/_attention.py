"""Attention in calibration passes: faster tiles than the CPU kernel's, and results kept from one pass to the next.

The passes over a block for its later steps repeat the attention of the earlier ones: what feeds it is on its grid
already. So its output is kept in mapped files until the block is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lowbit import native

_TILE = 128
_HEADS = 8  # that are computed together: their scores stay in the cache


@final
class Memory:
    """Attention of one block, by pass over a batch and number of the call.

    Args:
        folder: for the files; they are deleted by `forget`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._known = folder, dict[str, tuple[Tensor, torch.device]]()

    def get(self, key: str) -> Tensor | None:
        """What was kept, where it was."""
        known = self._known.get(key)
        return known and known[0].to(known[1])

    def keep(self, key: str, value: Tensor) -> None:
        """Keep a result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        room = torch.from_file(str(self._folder / key), shared=True, size=prod(value.shape), dtype=value.dtype)
        self._known[key] = room.view(value.shape).copy_(value), value.device

    def forget(self) -> None:
        """Delete all."""
        for key in self._known:
            (self._folder / key).unlink()
        self._known = {}


@final
class Remembered(TorchFunctionMode):
    """While it is entered, attention is taken from memory, or computed in tiles and kept.

    Args:
        memory: of the block.
        key: names the batch and what it reads.
        final: whether what was computed so far will be the same in later passes.
    """

    def __init__(self, memory: Memory, key: str, final: Callable[[], bool]) -> None:
        super().__init__()
        self._memory, self._key, self._final, self._calls = memory, key, final, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        key = f"{self._key}-{self._calls}"
        self._calls += 1
        known = self._memory.get(key)
        if known is None:
            known = attend(*args, **(kwargs or {}))
            if self._final():
                self._memory.keep(key, known)
        return known


def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention`; causal, in bfloat16 and without a mask it goes in tiles, with float32 scores."""
    plain = not args and kwargs.get("attn_mask") is None and kwargs.get("is_causal") and not kwargs.get("dropout_p")
    shared = query.shape[1] // key.shape[1] if query.dim() == 4 else 0
    same = query.dim() == 4 and query.shape[2] == key.shape[2] and query.dtype == torch.bfloat16
    here = query.device.type == "cpu"
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    if not (plain and same and here and scale > 0 and (shared == 1 or kwargs.get("enable_gqa"))):
        return scaled_dot_product_attention(query, key, value, *args, **kwargs)
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    rows, result = (each.reshape(-1, *each.shape[2:]) for each in (query, out))
    keys, values = (each.repeat_interleave(shared, 1).reshape(-1, *each.shape[2:]) for each in (key, value))
    for at in range(0, len(rows), _HEADS):
        heads = slice(at, at + _HEADS)
        _tiles(rows[heads], keys[heads].float().mT, values[heads], result[heads], scale)
    return result.view(out.shape)


def _tiles(rows: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float) -> None:
    """Some heads: tiles of rows, each against the keys up to its end."""
    for start in range(0, rows.shape[1], _TILE):
        stop = min(start + _TILE, rows.shape[1])
        tile = rows[:, start:stop].float()
        scores = torch.bmm(tile, keys[:, :, :stop])
        shares = torch.empty_like(scores, dtype=rows.dtype)
        native.causal_softmax(scores.view(-1, stop), stop - start, start, scale, out=shares.view(-1, stop))
        out[:, start:stop] = torch.bmm(shares, values[:, :stop])


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products of values that are exact in bfloat16 run on bfloat16 units: same sums, twice as fast.

    It holds for a process, so all float32 products of the passes over a block in bfloat16 are made of such values.
    """
    products: Any = torch.backends.mkldnn
    before = products.matmul.fp32_precision
    if dtype == torch.bfloat16:
        products.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.matmul.fp32_precision = before
