"""Slopes: how a float model's predictions move with what enters each block, one block in memory at a time.

Forward through all blocks, whose inputs are kept in files; then backward. What goes back is the gradient of the log
probability of a token that is drawn from the model's own prediction: the second moment of these gradients is the Fisher
information (Amari 1998, doi:10.1162/089976698300017746).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit.stages._blocks import Entrance, Exit, LiveBlock, Read
from lowbit.stages._model import Blueprint
from lowbit.stages._observe import Accumulator, Seen, Windows
from lowbit.stages._streams import Streams

Piece = tuple[int, slice]  # a window, and tokens of it
Tick = Callable[[int, int], None]
MOMENT = "second_moment"
# Added to the diagonal of the information, as a share of its mean: it is that of small errors in the float model, and
# where it sees nothing those of few bits, in a model whose blocks are quantized too, still count.
_FLOOR = 0.3


@final
class Information:
    """What slopes say of errors, while they come in: in the place of inputs, as of a weight.

    Args:
        needs: names of statistics.
        held: rows to judge by that may come.
    """

    def __init__(self, needs: Iterable[str], held: int) -> None:
        self._found, self._power = Accumulator(sorted(needs), 0, held), 0.0

    def slopes(self, rows: Float[Tensor, "*tokens width"], held: bool) -> None:
        """Gradients at what an embedding gives, or a block."""
        flat = rows.flatten(0, -2)
        self._power += 0.0 if held else float(flat.float().square().sum(dtype=torch.float64))
        self._found.take(flat, None, held)

    def read(self, rows: Float[Tensor, "tokens width"], held: bool) -> None:
        """Of one that is the output layer too: what it reads, times the length of the slope at what it makes."""
        self._found.take(rows, None, held)

    def finish(self) -> Seen:
        """All of it, as of inputs."""
        seen = self._found.finish()
        if MOMENT in seen.stats:
            diagonal = seen.stats[MOMENT].diagonal()
            diagonal.add_(_FLOOR * self._power / (seen.rows * len(diagonal)))
        return seen


@torch.no_grad()
def forward(blueprint: Blueprint, entrance: Entrance, windows: Windows, streams: Streams, tick: Tick) -> None:
    """Write the inputs of every block, and the last one's outputs; `tick`: called before each block."""
    ids, paths = windows.ids, list(blueprint.blocks)
    with streams.writing("float", 0) as hidden:
        for batch in windows.batches:
            hidden[batch] = entrance.hidden(ids[batch])
    for index, path in enumerate(paths):
        tick(index, len(paths))
        live, inputs = LiveBlock(blueprint, path, (), entrance.device), streams.read("float", index)
        with streams.writing("float", index + 1) as outputs:
            for batch in windows.batches:
                outputs[batch] = live.run(entrance.calls(ids[batch])[path], inputs[batch])
    tick(len(paths), len(paths))


def pieces_of(ids: Int64[Tensor, "windows tokens"], step: int) -> Iterator[Piece]:
    """Windows, so many tokens at a time."""
    return ((window, slice(at, at + step)) for window in range(len(ids)) for at in range(0, ids.shape[1], step))


@torch.enable_grad()
def last_slopes(
    way: Exit,
    ids: Int64[Tensor, "windows tokens"],
    hidden: Float[Tensor, "windows tokens width"],
    step: int,
    heads: Callable[[str, Tensor], None] | None = None,
) -> Float[Tensor, "windows tokens width"]:
    """Slopes at the last block's output, so many tokens at a time.

    `heads` is told what each layer after the blocks reads, `[tokens, inputs]`, times the length of the slope at what it
    makes: the second moment of these rows is the Fisher information of a row of its weight, summed over all rows.
    Where a prediction is no number, neither are its slopes.
    """
    slopes, dice = torch.empty_like(hidden), torch.Generator().manual_seed(0)
    for window, part in pieces_of(ids, step):
        state, read = hidden[window, part][None].clone().requires_grad_(), list[Read]()
        chances = way.logits(ids[window, part][None], state, read if heads else None)[0].float().log_softmax(-1)
        if not chances.isfinite().all():
            slopes[window, part] = torch.nan
            continue
        drawn = torch.multinomial(chances.detach().exp(), 1, generator=dice)
        found = torch.autograd.grad(chances.gather(1, drawn).sum(), [state, *(each.made for each in read)])
        slopes[window, part] = found[0][0]
        for each, slope in zip(read, found[1:], strict=True):
            if heads:
                heads(each.path, each.rows.detach().flatten(0, -2) * slope.flatten(0, -2).norm(dim=-1, keepdim=True))
    return slopes
