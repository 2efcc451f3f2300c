"""SignRound by definition: float64, autograd straight through `rint`, one group at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.tensors import QTensor


def rint(x: Tensor) -> Tensor:
    """Rounds forward, does nothing backward."""
    return x + (x.round() - x).detach()


def as_half(x: Tensor) -> Tensor:
    return x + (x.half().double() - x).detach()


@dataclass
class Weight:
    """One weight with what is learned of it: a shift per element, two factors per group."""

    weight: Tensor
    bits: int
    group: int
    asymmetric: bool
    signed: bool = False

    def __post_init__(self) -> None:
        self.weight = self.weight.double()
        rows, cols = self.weight.shape
        groups = -(-cols // self.group)
        self.shift = torch.zeros(rows, cols, dtype=torch.float64, requires_grad=True)
        self.lower = torch.ones(rows, groups, dtype=torch.float64, requires_grad=True)
        self.upper = torch.ones(rows, groups, dtype=torch.float64, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        return [self.shift, self.lower, self.upper] if self.asymmetric else [self.shift, self.upper]

    def codes_and_value(self) -> tuple[Tensor, Tensor]:
        """Codes from 0, and the weight that they stand for."""
        pairs = [
            [self._group(row, start) for start in range(0, self.weight.shape[1], self.group)]
            for row in range(self.weight.shape[0])
        ]
        codes, values = ([torch.cat([pair[i] for pair in row]) for row in pairs] for i in range(2))
        return torch.stack(codes), torch.stack(values)

    def _group(self, row: int, start: int) -> tuple[Tensor, Tensor]:
        at = (row, slice(start, start + self.group))
        weight, shift = self.weight[at], self.shift[at]
        lower, upper = self.lower[row, start // self.group], self.upper[row, start // self.group]
        top = 2**self.bits - 1
        if self.asymmetric:
            low, high = weight.min().clamp(max=0) * lower, weight.max().clamp(min=0) * upper
            scale = as_half((high - low) / top)
            zero = rint(-low / scale)
        elif self.signed:
            largest = weight[weight.abs().argmax()]
            scale = as_half(-largest * upper / 2 ** (self.bits - 1))
            zero = torch.tensor(2.0 ** (self.bits - 1), dtype=torch.float64)
        else:
            scale = as_half(weight.abs().max() * upper / (top / 2))
            zero = torch.tensor(2.0 ** (self.bits - 1), dtype=torch.float64)
        code = torch.clamp(rint(weight / scale + shift) + zero, 0, top)
        return code.detach(), scale * (code - zero)


@dataclass
class Fixed:
    """One weight under the scales and minima of a tensor, with a shift per element."""

    weight: Tensor
    under: QTensor

    def __post_init__(self) -> None:
        wide, cols = self.under.scheme.block.cols, self.weight.shape[1]
        minima = self.under.zero_values()
        self.scales = self.under.scale_values().double().repeat_interleave(wide, 1)[:, :cols]
        half = 2.0 ** (self.under.scheme.grid.bits - 1)
        self.minima = -half if minima is None else minima.double().repeat_interleave(wide, 1)[:, :cols]
        self.shift = torch.zeros_like(self.weight, dtype=torch.float64)

    def codes_and_value(self) -> tuple[Tensor, Tensor]:
        """Codes from 0, and the weight that they stand for, whose derivative is that by the codes times the scale."""
        zero = -self.minima if isinstance(self.minima, float) else self.minima / self.scales
        codes = (self.weight.double() / self.scales + zero + self.shift).round()
        self.inside = (codes >= 0) & (codes < 2**self.under.scheme.grid.bits)
        codes = codes.clamp(0, 2**self.under.scheme.grid.bits - 1)
        return codes, (self.scales * (codes - zero)).requires_grad_()

    def step(self, grad: Tensor, rate: float) -> None:
        """Against the sign of the derivative by the shift, which is 0 where the code is clipped."""
        self.shift -= rate * (grad * self.scales * self.inside).sign()


def learn(
    weights: Mapping[str, Weight],
    run: Callable[[dict[str, Tensor]], Tensor],
    target: Tensor,
    iterations: int,
    rate: float,
) -> None:
    """Steps of sign descent on the squared error."""
    for step in range(iterations):
        loss = (run({name: each.codes_and_value()[1] for name, each in weights.items()}) - target).square().sum()
        parameters = [parameter for each in weights.values() for parameter in each.parameters()]
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= rate * (1 - step / iterations) * grad.sign()
        for each in weights.values():
            each.shift.data.clamp_(-0.5, 0.5)
            each.lower.data.clamp_(0, 2)
            each.upper.data.clamp_(0, 2)
