"""Rooms: memory that a thread uses again for each weight, anonymous or pages of a file without a name."""

from __future__ import annotations

import mmap
import tempfile
import threading
from math import prod
from pathlib import Path
from typing import final

import torch
from jaxtyping import UInt8
from torch import Tensor

from lowbit.schemes import Scheme
from lowbit.stages.write import allocate
from lowbit.tensors import Shape, view_shape


@final
class Rooms:
    """Named buffers of each thread, which grow to the largest that was asked for; what was in one is gone then.

    Where the limit is small they are files in `folder`, which have no name there, so that a kill leaves nothing.
    """

    def __init__(self, folder: Path, scratch: bool) -> None:
        self._folder, self._scratch, self._local = folder, scratch, threading.local()

    def get(self, name: str, count: int) -> UInt8[Tensor, "count"]:
        """Room for `count` bytes.

        Raises:
            ResourceError: the disk is full.
        """
        held: dict[str, Tensor] = self._local.__dict__
        if name not in held or held[name].numel() < count:
            held.pop(name, None)  # before the larger one is made, so that both never exist at once
            held[name] = self._mapped(count) if self._scratch and count else torch.empty(count, dtype=torch.uint8)
        return held[name][:count]

    def codes(self, name: str, shape: Shape, scheme: Scheme) -> UInt8[Tensor, "rows cols"]:
        """Room for the codes of a quantized weight, in the order of a `QTensor`; raises as `get`."""
        return self.get(name, prod(shape)).view(view_shape(shape, scheme.block))

    def _mapped(self, count: int) -> Tensor:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            allocate(file.fileno(), count, self._folder)
            return torch.frombuffer(mmap.mmap(file.fileno(), count), dtype=torch.uint8)
