"""Folding: a factor per channel goes into what makes an input and, inverse, into the weights that read it.

What can take a factor is found by running the block, not by names: a norm, or a linear layer whose outputs reach the
input channel by channel, is changed by powers of two (exact in floating point), the readers by the inverse; if the
block's output stays, it can. Where queries share values in groups, several inputs of attention's output layer are made
of one value; they take one factor together. Of a merged layer the values, or the half that is not gated, take them.
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
        made_of: for each input the producer's channel that it is made of; None where they are one and the same. The
            producer's other channels are left alone.
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
    drawn = 2.0 ** torch.randint(-1, 2, (3 * channels,), generator=dice)  # a merged layer has no more
    before = run({}, {}).float()
    own = {live.places[name].parameter for name in readers}
    for producer in _candidates(live.module, channels):
        if own.isdisjoint(producer.parameters):
            factors = drawn[:channels] if producer.made_of is None else drawn[producer.made_of]
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
    """Norms first, then linear layers, those that store an offset, last those with fewer or more channels."""
    norms: list[tuple[str, ...]] = []
    linears: list[tuple[str, ...]] = []
    others: list[tuple[tuple[str, ...], int]] = []
    for path, module in block.named_modules():
        own = {f"{path}.{name}": tensor for name, tensor in module.named_parameters(recurse=False)}
        if own and all(tensor.shape[0] == channels for tensor in own.values()):
            vectors = all(tensor.dim() == 1 for tensor in own.values())
            (norms if vectors else linears).append(tuple(own))
        elif own and isinstance(module, nn.Linear):
            others.append((tuple(own), module.out_features))
    yield from (Producer(names) for names in norms)
    yield from (Producer(names) for names in linears)
    yield from (Producer(names, 1.0) for names in norms if len(names) == 1)
    yield from (Producer(names, made_of=made) for names, outputs in others for made in _origins(outputs, channels))


def _origins(outputs: int, channels: int) -> Iterator[Int64[Tensor, "inputs"]]:
    """Ways in which inputs can be made of a layer's last channels: of heads of values, each for a group of queries.

    A layer of more channels than inputs has merged gate and up, or query, key and value, these head by head or not.
    """
    halves = [channels] if outputs == 2 * channels else []
    for values in [*halves, (outputs - channels) // 2 if outputs > channels else outputs]:
        for width in _widths(values) if values < channels else [values]:
            if values and channels % values == 0:
                yield outputs - values + _heads(values, width).repeat_interleave(channels // values, 0).flatten()
    for width in _widths(channels) if outputs == 3 * channels else ():
        heads = _heads(channels, width)
        yield (heads + 2 * width * torch.arange(1, len(heads) + 1)[:, None]).flatten()


def _heads(channels: int, width: int) -> Int64[Tensor, "heads width"]:
    return torch.arange(channels).view(-1, width)


def _widths(channels: int) -> list[int]:
    """Widths that a head may have, widest first."""
    return [width for width in range(channels, _LEAST_HEAD - 1, -1) if channels % width == 0]


def effective(
    producer: Producer, value: Tensor, stored: Tensor, factors: Float[Tensor, "channels"]
) -> Float[Tensor, "channels"]:
    """The factors that a stored vector really divides by, after it was rounded: the readers take exactly these."""
    if value.dim() > 1:
        return factors
    real = (value.float() + producer.offset) / (stored.float() + producer.offset)
    return torch.where(real.isfinite() & (real > 0), real, factors)
