"""The loop over columns for llama.cpp's types with tables: eight columns at once, as their codes come in runs.

With all other columns as they are, the error of a run is a quadratic form around the values where it would be least. In
the first pass these and the form are those of the columns that are not done yet, given that each makes up for those
before it; later they are those of the second moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from lowbit import native
from lowbit.schemes import GGML_TYPES, Scheme
from lowbit.tensors import level_table

WIDTH = 8
_EVEN = ("iq2_xxs", "iq2_xs", "iq3_xxs")  # whose eight signs have an even number of minuses
_NEAREST = 16  # entries that are looked at with columns together, as by the kernel (which takes the best of every 16th)


def order(diagonal: Float[Tensor, "cols"]) -> Int64[Tensor, "cols"]:
    """Columns so that runs stay together, those of the largest inputs first; an incomplete one comes last."""
    whole = len(diagonal) // WIDTH * WIDTH
    runs = torch.arange(whole, device=diagonal.device).view(-1, WIDTH)
    first = diagonal[:whole].view(-1, WIDTH).sum(1).argsort(descending=True, stable=True)
    return torch.cat([runs[first].flatten(), torch.arange(whole, len(diagonal), device=diagonal.device)])


@final
@dataclass(frozen=True)
class Sweep:
    """As `native.sweep_runs`, but for the entries that it looks at, on any device and for any number of lanes.

    Attributes:
        scheme: one with a table.
        device: of what it is called with.
    """

    scheme: Scheme
    device: torch.device

    def __call__(
        self,
        target: Float[Tensor, "cols lanes"],
        weight: Float[Tensor, "cols lanes"],
        error: Float[Tensor, "cols lanes"],
        coupling: Float[Tensor, "cols cols"],
        scale: Float[Tensor, "cols lanes"],
        solve: Float[Tensor, "runs 8 8"],
        metric: Float[Tensor, "runs 8 8"],
        *,
        first: bool,
        out: UInt8[Tensor, "cols lanes"],
    ) -> None:
        for number, at in enumerate(range(0, len(target), WIDTH)):
            run = slice(at, at + WIDTH)
            count = len(target[run])
            now = weight[run] - error[run]
            best = torch.zeros(WIDTH, target.shape[1], device=target.device)
            best[:count] = (now + solve[number, :count, :count] @ (target[run] - now)) / scale[run]
            codes = self._search(best.T, metric[number], out[run].T.long(), first)[:, :count].T
            kept = weight[run] - self._levels[codes] * scale[run]
            target[at + WIDTH :] += coupling[run, at + WIDTH :].T @ (kept - error[run])
            error[run], out[run] = kept, codes.to(torch.uint8)

    def _search(
        self,
        best: Float[Tensor, "lanes 8"],
        metric: Float[Tensor, "8 8"],
        now: Int64[Tensor, "lanes count"],
        first: bool,
    ) -> Int64[Tensor, "lanes 8"]:
        """The codes of the least error among those near, or those that are one step of low bits away."""
        name = self.scheme.grid.name
        signs, none = (best < 0).long(), torch.zeros_like(best[:, 0], dtype=torch.bool)
        if name == "iq1_m":
            tried = [self._near(best, metric, torch.full_like(signs, bit), none) for bit in (0, 1)]
        elif name == "iq1_s":
            tried = [self._near(best, metric, (now[:, :1] & 1).expand_as(signs), none)]
        else:
            tried = [self._near(best, metric, signs, signs.sum(1) % 2 == 1 if name in _EVEN else none)]
        codes = self._best(best, metric, torch.cat(tried, 1))
        if not name.startswith("iq1"):
            codes = self._best(best, metric, codes[:, None] ^ self._turns)
        if first or now.shape[1] < WIDTH:
            return codes
        return self._best(best, metric, torch.stack([now, codes], 1))

    def _best(self, best: Tensor, metric: Tensor, codes: Int64[Tensor, "lanes tried 8"]) -> Int64[Tensor, "lanes 8"]:
        """Those of the least error with columns together, the first of equals."""
        away = self._levels[codes] - best[:, None]
        errors = ((away @ metric) * away).sum(2)
        found: Tensor = codes[torch.arange(len(codes), device=codes.device), errors.argmin(1)]
        return found

    def _near(
        self, best: Tensor, metric: Tensor, low: Int64[Tensor, "lanes 8"], odd: Bool[Tensor, "lanes"]
    ) -> Int64[Tensor, "lanes tried 8"]:
        """Entries near in each part of a run, columns taken apart; where it is `odd`, with one low bit turned."""
        size, even = self._table.shape[1], self.scheme.grid.name in _EVEN
        found = []
        for turn in (False, True) if size < WIDTH and even else (False,):
            parts = []
            for at in range(0, WIDTH, size):
                last = at + size == WIDTH
                turned = odd ^ turn if last else torch.full_like(odd, turn)
                part = slice(at, at + size)
                parts.append(self._near_part(best[:, part], metric.diagonal()[part], low[:, part], turned))
            found.append(_pairs(parts))
        return torch.cat(found, 1)

    def _near_part(
        self, best: Tensor, weights: Tensor, low: Tensor, turned: Tensor
    ) -> Int64[Tensor, "lanes tried part"]:
        table, size = self._table, self._table.shape[1]
        digits = 2 * torch.arange(int(table.max()) + 1, device=best.device)
        costs, turns = (
            (self._levels[digits + bits[..., None]] - best[..., None]).square() * weights[:, None]
            for bits in (low, 1 - low)
        )
        columns = torch.arange(size, device=best.device)
        errors = costs[:, columns, table].sum(2)
        more = (turns - costs)[:, columns, table]
        errors += torch.where(turned[:, None], more.amin(2), 0.0)
        nearest = errors.topk(_NEAREST * size // WIDTH, largest=False).indices
        at = more.gather(1, nearest[..., None].expand(-1, -1, size)).argmin(2)
        bits = low[:, None] ^ (nn.functional.one_hot(at, size) * turned[:, None, None])
        return 2 * table[nearest] + bits

    @cached_property
    def _turns(self) -> Int64[Tensor, "turns 8"]:
        """Low bits that may be turned together, none first."""
        single = torch.eye(WIDTH, dtype=torch.long, device=self.device)
        turns = (single[:, None] ^ single).view(-1, WIDTH) if self.scheme.grid.name in _EVEN else single
        return torch.cat([torch.zeros_like(single[:1]), turns])

    @cached_property
    def _levels(self) -> Float[Tensor, "256"]:
        return level_table(self.scheme.grid).to(self.device)

    @cached_property
    def _table(self) -> Int64[Tensor, "entries group"]:
        return native.ggml_runs(GGML_TYPES[self.scheme.grid.name]).long().to(self.device)


def forms(
    factors: Float[Tensor, "cols cols"], curve: Float[Tensor, "cols"], first: bool
) -> tuple[Float[Tensor, "runs 8 8"], Float[Tensor, "runs 8 8"]]:
    """For each run, how far its best values are from those it has, over target minus these; and the form around them.

    `factors[k, i]` is what a change of the error of column i adds to the target of k, with `near` added 1 to the
    diagonal: of those before it alone in the `first` pass, whose error is the sum of squares of target minus value,
    times `curve`; of all later, where `near` times `curve` is the second moment.
    """
    at = torch.arange(-(-len(curve) // WIDTH) * WIDTH, device=curve.device).view(-1, WIDTH)
    there, at = at < len(curve), at.clamp(max=len(curve) - 1)
    near = factors[at[:, :, None], at[:, None]].float() * (there[:, :, None] & there[:, None])
    near = (near.tril(-1) if first else near) + torch.eye(WIDTH, device=curve.device)
    form = (curve[at] * there)[..., None] * near
    metric = near.mT @ form if first else (form + form.mT) / 2
    return torch.linalg.inv(near).contiguous(), metric.contiguous()


def _pairs(parts: list[Tensor]) -> Int64[Tensor, "lanes tried 8"]:
    """Each of one part with each of the other."""
    if len(parts) == 1:
        return parts[0]
    one, two = parts
    return torch.cat([one.repeat_interleave(two.shape[1], 1), two.repeat(1, one.shape[1], 1)], 2)
