"""Attention in calibration passes: faster tiles than the CPU kernel's, and results kept from one pass to the next.

The passes over a block for its later steps repeat the attention of the earlier ones: what feeds it is on its grid
already. So its output is kept in mapped files until the block is done; where a module ends in a product (`_shortcuts`),
what this product reads is kept in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lowbit import native
from lowbit.stages.write import allocate

_TILE = 128
_HEADS = 8  # that are computed together: their scores stay in the cache


@final
class Memory:
    """What is known of one block from earlier passes, by place in it and batch of windows.

    Args:
        folder: for the files, one for each place and size; they serve one block after the other.
        windows: that there are in all.

    Nothing but numbers is kept in the process: small things that stay, made between large ones that go, would leave a
    heap of holes as large as all that is kept.
    """

    def __init__(self, folder: Path, windows: int) -> None:
        self._folder, self._windows = folder, windows
        self._rooms = dict[tuple[str, int, torch.dtype], Tensor]()
        self._known = dict[tuple[str, int], tuple[torch.Size, torch.dtype, torch.device]]()

    def get(self, place: str, batch: slice) -> Tensor | None:
        """What was kept, where it was."""
        known = self._known.get((place, batch.start))
        return known and self._room(place, batch, *known[:2]).to(known[2])

    def keep(self, place: str, batch: slice, value: Tensor) -> Tensor:
        """Keep a result; returns it, from the processor as it is kept, which is no memory of the process's own.

        Raises:
            ResourceError: the disk is full.
        """
        kept = self._room(place, batch, value.shape, value.dtype).copy_(value)
        self._known[place, batch.start] = value.shape, value.dtype, value.device
        return kept if kept.device == value.device else value

    def forget(self) -> None:
        """What is known is not true any more."""
        self._known = {}

    def _room(self, place: str, batch: slice, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        each = shape.numel() // (batch.stop - batch.start)
        key = place, each, dtype
        if key not in self._rooms:
            self._folder.mkdir(parents=True, exist_ok=True)
            path, size = self._folder / f"{place}-{each}-{dtype.itemsize}", each * self._windows
            with path.open("a+b") as file:  # another worker may be at it too
                allocate(file.fileno(), size * dtype.itemsize, path)
            self._rooms.setdefault(key, torch.from_file(str(path), True, size, dtype=dtype))
        return self._rooms[key][batch.start * each : batch.stop * each].view(shape)


@final
class Remembered(TorchFunctionMode):
    """One pass over a batch: while it is entered, attention is taken from memory, or computed in tiles and kept.

    Args:
        memory: of the block.
        stream: names what the pass reads.
        batch: the windows.
        final: whether what was computed so far will be the same in later passes.
    """

    def __init__(self, memory: Memory, stream: str, batch: slice, final: Callable[[], bool]) -> None:
        super().__init__()
        self._memory, self._stream, self._batch, self._final = memory, stream, batch, final
        self._calls, self._kept_outside = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self._kept_outside:
            return attend(*args, **(kwargs or {}))
        self._calls += 1
        known = self.known(str(self._calls))
        if known is None:
            known = self.keep(str(self._calls), attend(*args, **(kwargs or {})))
        return known

    def known(self, place: str) -> Tensor | None:
        """What was kept there of this batch."""
        return self._memory.get(f"{self._stream}-{place}", self._batch)

    def keep(self, place: str, value: Tensor) -> Tensor:
        """Keep it for later passes, if it will be the same there; returns it, see `Memory`."""
        return self._memory.keep(f"{self._stream}-{place}", self._batch, value) if self._final() else value

    @contextmanager
    def kept_outside(self) -> Iterator[None]:
        """Meanwhile attention is not kept: something that is made of it is."""
        self._kept_outside = True
        try:
            yield
        finally:
            self._kept_outside = False


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
