"""Rows that tokens look up, as a checkpoint has them: what is not looked up is never made a float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int64
from torch import Tensor

from lowbit.formats._ggml import BLOCKS, unpack


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
        return unpack(kind.name, found, (len(ids), found.shape[1] // kind.bytes * kind.weights)).dequantize()

    def stored_as(self, rows: int, width: int) -> tuple[int, int]:
        """Shape of `values` for so many rows of this width."""
        return rows, BLOCKS[self.blocks].row_bytes(width) if self.blocks else width
