"""Hidden states between blocks: files beside the journal, mapped into memory, that appear whole or not at all.

Pages of a file are not anonymous memory: where there is room the system keeps them, where there is not it writes them
out. They are what a killed run goes on from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from lowbit.stages._recipe import Recipe
from lowbit.stages.write import allocate, sync

Kind = Literal["quantized", "float", "information"]


def stream_kinds(recipe: Recipe, inputs: str) -> tuple[Kind, ...]:
    """The float stream is kept where something compares with it, or learns from it alone."""
    if inputs == "float":
        return ("float",)
    return ("quantized", "float") if recipe.paired or recipe.learns or recipe.transforms else ("quantized",)


@final
@dataclass(frozen=True)
class Streams:
    """Hidden states before each block, or, of a shape of its own, what errors at each block's output cost.

    Attributes:
        folder: where the files are.
        shape: windows, tokens, width.
        dtype: of the values.
        kinds: which streams there are: what quantized blocks made of the windows, what the float model makes of them,
            or the information at outputs (`_information.py`).
    """

    folder: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype
    kinds: tuple[Kind, ...]

    def latest(self, most: int) -> int:
        """The last block, up to `most`, whose inputs are all there; 0 where none are."""
        return next((k for k in range(most, 0, -1) if all(self.there(kind, k) for kind in self.kinds)), 0)

    def there(self, kind: Kind, block: int) -> bool:
        """Whether those of a block are, in this type: another run may have found another faster."""
        path = self._path(kind, block)
        return path.exists() and path.stat().st_size == prod(self.shape) * self.dtype.itemsize

    def read(self, kind: Kind, block: int) -> Tensor:
        """Inputs of a block, `[windows, tokens, width]`."""
        return self._map(self._path(kind, block))

    @contextmanager
    def writing(self, kind: Kind, block: int) -> Iterator[Tensor]:
        """Room for the inputs of a block, which exist once all are written."""
        path = self._path(kind, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w+b") as file:
            allocate(file.fileno(), prod(self.shape) * self.dtype.itemsize, partial)
        yield self._map(partial)
        sync(partial)
        os.replace(partial, path)

    def forget(self, before: int) -> None:
        """Delete the inputs of blocks that are done."""
        for path in self.folder.glob("*.bin"):
            if int(path.stem.rpartition("-")[2]) < before:
                path.unlink()

    def _path(self, kind: Kind, block: int) -> Path:
        return self.folder / f"{kind}-{block}.bin"

    def _map(self, path: Path) -> Tensor:
        flat = torch.from_file(str(path), shared=True, size=prod(self.shape), dtype=self.dtype)
        return flat.view(self.shape)
