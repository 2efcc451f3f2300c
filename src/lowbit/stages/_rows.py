"""Blocks of rows of one weight, as weights of their own: an embedding by frequency of its tokens, heads of attention.

Blocks of `m.weight` are `m.rows0.weight`, `m.rows1.weight` and so on; where these are not the rows in their order,
`m.rows` has the place of each row among all rows of the blocks. `_row_views.py` makes checkpoints with such weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Int32
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Weight

Runs = tuple[tuple[int, int], ...]
HOLDS = "onnx"  # the format whose graph joins blocks
_BLOCK = re.compile(r"(.+)\.rows(\d+)\.weight")
_PLACES = re.compile(r"(.+)\.rows")


def block_name(whole: str, number: int) -> str:
    """The name of a block of rows of a weight."""
    return f"{whole.removesuffix('.weight')}.rows{number}.weight"


def places_name(whole: str) -> str:
    """The name of the tensor that has the place of each row of a weight among those of its blocks."""
    return f"{whole.removesuffix('.weight')}.rows"


def whole_of(name: str) -> str | None:
    """The weight of which one of this name is a block of rows."""
    found = _BLOCK.fullmatch(name)
    return f"{found[1]}.weight" if found else None


def is_places(weight: Weight) -> bool:
    """Whether it is no weight, but has the places of rows."""
    return weight.dtype == torch.int32 and len(weight.shape) == 1 and _PLACES.fullmatch(weight.name) is not None


def blocks_of(weights: Mapping[str, Weight]) -> dict[str, list[Weight]]:
    """The blocks of each weight that is in blocks, in order."""
    found: dict[str, list[Weight]] = {}
    for weight in weights.values():
        if weight.rows:
            found.setdefault(str(whole_of(weight.name)), []).append(weight)
    return {whole: sorted(blocks, key=_number) for whole, blocks in found.items()}


def _number(weight: Weight) -> int:
    found = _BLOCK.fullmatch(weight.name)
    return int(found[2]) if found else 0


def runs_of(rows: Sequence[int]) -> Runs:
    """Rows, in order, as runs."""
    ends = [at for at, (one, other) in enumerate(pairwise(rows), 1) if other != one + 1]
    return tuple((rows[a], rows[b - 1] + 1) for a, b in pairwise([0, *ends, len(rows)]) if b)


def rows_of(runs: Runs) -> Int32[Tensor, "rows"]:
    """The numbers of the rows."""
    return torch.cat([torch.arange(first, last, dtype=torch.int32) for first, last in runs])


def said_rows(weight: Weight) -> str:
    """Which rows of the whole a block is, for a reason."""
    if len(weight.rows) == 1:
        return f"; rows {weight.rows[0][0]} to {weight.rows[0][1] - 1}"
    return f"; {weight.shape[0]} rows" if weight.rows else ""


def places(blocks: Sequence[Runs]) -> Int32[Tensor, "rows"] | None:
    """Of each row of the whole, its place among all rows of the blocks; None where each is at its own.

    Raises:
        FormatError: rows that are in no block, or in two.
    """
    rows = torch.cat([rows_of(runs) for runs in blocks])
    order = torch.arange(len(rows), dtype=torch.int32)
    if not torch.equal(rows.sort().values, order):
        raise FormatError("rows are in two blocks, or in none")
    found = torch.empty_like(rows)
    found[rows.long()] = order
    return None if torch.equal(rows, order) else found


def joined(blocks: Sequence[Tensor], runs: Sequence[Runs]) -> Tensor:
    """The whole weight."""
    found, order = torch.cat(tuple(blocks)), places(runs)
    return found if order is None else found.index_select(0, order.to(found.device))
