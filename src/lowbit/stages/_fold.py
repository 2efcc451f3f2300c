"""Folding: a factor per channel goes into what makes an input and, inverse, into the weights that read it.

What can take a factor is found by running the block, not by names: a norm, or a linear layer whose outputs reach the
input channel by channel, is changed by powers of two (exact in floating point), the readers by the inverse; if the
block's output stays, it can. Where queries share values in groups, several inputs of attention's output layer are made
of one value; they take one factor together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lowbit.stages._blocks import LiveBlock

# Share of what the block adds to its input by which its output may differ in the proof; a wrong producer changes it by
# about one. Norms that store their weight minus one, in bfloat16, lose up to a few thousandths.
_TOLERANCE = 0.02
_LEAST_HEAD = 4  # channels of a head


@final
@dataclass(frozen=True)
class Producer:
    """What makes an input: parameters whose first axis is its channels.

    Attributes:
        parameters: names in the block.
        offset: what the module adds to its weight before it multiplies (Gemma's norms: 1).
        made_of: for each input the producer's channel that it is made of; None where they are one and the same.
    """

    parameters: tuple[str, ...]
    offset: float = 0.0
    made_of: Int64[Tensor, "inputs"] | None = None

    def divided(self, value: Tensor, factors: Float[Tensor, "inputs"], dtype: torch.dtype) -> Tensor:
        """A parameter that makes the input divided by factors, as it is stored in `dtype`.

        Inputs made of one channel must have one factor (`Site.tied`).
        """
        own = factors
        if self.made_of is not None:
            own = torch.ones(len(value)).index_put((self.made_of,), factors)
        shaped = own.to(value.device).view(-1, *[1] * (value.dim() - 1))
        return ((value.float() + self.offset) / shaped - self.offset).to(dtype)


def find_producer(
    live: LiveBlock, readers: Sequence[str], run: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
) -> Producer | None:
    """What a factor on the readers' input can be taken from; None where nothing can take it.

    Args:
        live: the block.
        readers: every weight that reads the input, quantized or not.
        run: `(weights, parameters) -> ` what the block adds to its input, with these in the place of its own.
    """
    channels = live.weight(readers[0]).shape[1]
    dice = torch.Generator().manual_seed(0)
    drawn = 2.0 ** torch.randint(-1, 2, (channels,), generator=dice)
    before = run({}, {}).float()
    own = {live.places[name].parameter for name in readers}
    for producer in _candidates(live.module, channels):
        if own.isdisjoint(producer.parameters):
            factors = drawn if producer.made_of is None else drawn[producer.made_of]
            scaled = {name: live.weight(name).float() * factors.to(live.device) for name in readers}
            changed = {
                name: producer.divided(live.tensor(name), factors, live.tensor(name).dtype)
                for name in producer.parameters
            }
            gap = run(scaled, changed).float() - before
            if gap.norm() <= _TOLERANCE * before.norm():
                return producer
    return None


def _candidates(block: nn.Module, channels: int) -> Iterator[Producer]:
    """Norms first, then linear layers, those that store an offset, last those whose channels are used repeatedly."""
    norms: list[tuple[str, ...]] = []
    linears: list[tuple[str, ...]] = []
    shared: list[tuple[tuple[str, ...], int]] = []
    for path, module in block.named_modules():
        own = {f"{path}.{name}": tensor for name, tensor in module.named_parameters(recurse=False)}
        if own and all(tensor.shape[0] == channels for tensor in own.values()):
            vectors = all(tensor.dim() == 1 for tensor in own.values())
            (norms if vectors else linears).append(tuple(own))
        elif own and isinstance(module, nn.Linear) and module.out_features < channels:
            shared += [(tuple(own), module.out_features)] if channels % module.out_features == 0 else []
    yield from (Producer(names) for names in norms)
    yield from (Producer(names) for names in linears)
    yield from (Producer(names, 1.0) for names in norms if len(names) == 1)
    yield from (Producer(names, made_of=made) for names, outputs in shared for made in _groups(outputs, channels))


def _groups(outputs: int, channels: int) -> Iterator[Int64[Tensor, "inputs"]]:
    """Ways in which heads of values can be handed to groups of queries, by the width of a head, widest first."""
    for width in range(outputs, _LEAST_HEAD - 1, -1):
        if outputs % width == 0:
            yield torch.arange(outputs).view(-1, width).repeat_interleave(channels // outputs, 0).flatten()


def effective(
    producer: Producer, value: Tensor, stored: Tensor, factors: Float[Tensor, "channels"]
) -> Float[Tensor, "channels"]:
    """The factors that a stored vector really divides by, after it was rounded: the readers take exactly these."""
    if value.dim() > 1:
        return factors
    real = (value.float() + producer.offset) / (stored.float() + producer.offset)
    return torch.where(real.isfinite() & (real > 0), real, factors)
