"""Rows that tokens look up, as a checkpoint has them: what is not looked up is never made a float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError
from lowbit.formats._ggml import BLOCKS, unpack
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

    def opened(self) -> native.Table:
        """What looks its rows up; ValueError where it is none of the above."""
        if not self.blocks:
            return native.Table(self.values.contiguous())
        kind = BLOCKS[self.blocks]
        scheme, nested = kind.scheme, kind.scheme.nested
        upper = None if nested is None else level_table(nested.grid)
        return native.Table(self.values, kind.id, level_table(scheme.grid), upper, scheme.block.cols)

    def refusal(self, ids: Sequence[int]) -> FormatError:
        """What is wrong with some rows that are not finite."""
        stored = self.values[list(ids)]
        if self.blocks:
            kind = BLOCKS[self.blocks]
            try:
                unpack(kind.name, stored, (len(stored), stored.shape[1] // kind.bytes * kind.weights))
            except FormatError as error:
                return error
        return FormatError(f"the embedding of one of the tokens {sorted(set(ids))} is not finite")
