"""Rows that tokens look up, as a checkpoint has them: what is not looked up is never made a float."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import final

from jaxtyping import Float, Int64
from torch import Tensor

from lowbit.formats._ggml import BLOCKS, BlockType, unpack
from lowbit.native import ggml_floats
from lowbit.tensors import level_table


@final
@dataclass(frozen=True, eq=False)
class Table:
    """An embedding.

    Attributes:
        values: floats `[rows, width]`; or uint8 `[rows, row_bytes]`, blocks of ggml.
        blocks: name of the type of these, else empty.
    """

    values: Tensor
    blocks: str = ""

    def rows(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, "tokens width"]:
        """Some rows in float32; LookupError where there is no such row."""
        found = self.values[ids]
        if not self.blocks:
            return found.float()
        kind = BLOCKS[self.blocks]
        values = _floats(kind, found)
        if values is None or not isfinite(values.sum().item()):  # what is wrong is told by the way that takes longer
            values = unpack(kind.name, found, (len(ids), found.shape[1] // kind.bytes * kind.weights)).dequantize()
        return values

    def stored_as(self, rows: int, width: int) -> tuple[int, int]:
        """Shape of `values` for so many rows of this width."""
        return rows, BLOCKS[self.blocks].row_bytes(width) if self.blocks else width


def _floats(kind: BlockType, stored: Tensor) -> Tensor | None:
    """Rows of blocks natively, at once; None of the types whose scales are no float16."""
    if kind.scheme.scale in ("e8m0", "e4m3"):
        return None
    return ggml_floats(kind.id, stored, *_levels(kind.name), kind.scheme.block.cols)


@cache
def _levels(name: str) -> tuple[Tensor, Tensor | None]:
    """What codes stand for, and those of nested scales."""
    scheme = BLOCKS[name].scheme
    return level_table(scheme.grid), None if scheme.nested is None else level_table(scheme.nested.grid)
