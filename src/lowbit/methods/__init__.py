"""Methods: each file turns a float weight and its statistics into a `QTensor`.

A method is a frozen record of pure functions, `METHOD = Method(...)`. It knows nothing of formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from jaxtyping import Float, UInt8
from torch import Tensor

from lowbit.blocks import Block
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor

Stats = Mapping[str, Tensor]


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none."""


@final
@dataclass(frozen=True)
class Learned:
    """What a method made of all weights of a block.

    Attributes:
        weights: as they are after the last step.
        start: as they were before the first.
        stopped: why steps were left out; None where all were taken.
    """

    weights: Mapping[str, QTensor]
    start: Mapping[str, QTensor]
    stopped: str | None = None


@dataclass(frozen=True)
class Method:
    """One way to choose codes and scales.

    Attributes:
        about: one line for `--help`.
        quantize: `(weight, stats, scheme, options) -> QTensor`. `weight` is `[rows, cols]`, f32, f16 or bf16: a whole
            weight or a run of its rows that starts and ends on block borders. The result's shape is the weight's.
            `stats["range"]` (two float32: smallest and largest value of the WHOLE tensor) is given whenever the scheme
            has a scale that all rows share (per-tensor blocks, NVFP4's global scale); everything else is row-local.
            Double quantization with an offset (`scheme.nested.offset`) is left to `_scales.nest`, applied once to all
            scales of the tensor by the caller: the result then has plain float32 scales and `scheme.nested` unset.
        options: frozen dataclass of the method's own options; the command line's flags are made from it.
        needs: names of calibration statistics (files in `stats/`) that `quantize` reads.
        workspace: bytes of temporary memory per weight element, for the memory estimate.
        prepare: `(stats, scheme, options) -> stats`: work on the statistics that is done once for all weights and
            pieces which share them (a factorization), before `quantize`.
        anywhere: whether `prepare` and `quantize` compute on the device where the statistics are; weights come from
            the processor, and what `quantize` gives is there, in any case.
        learn: for methods that see a whole block: `(block, options) -> Learned`, with every weight of `block.weights`;
            whoever calls it judges what was learned. `quantize` then serves weights outside of the blocks. None for
            methods that see one weight.
        prepared: `cols -> ` most bytes that `prepare` holds, what it was given included.
        work: `(rows, cols, scheme) -> ` floating-point operations of `prepare` and `quantize` on one weight, for the
            estimate of time; 0 where they do not count beside the passes over the block.
        windows: `(options, windows) -> ` windows that `learn` runs through a block, of so many, in units of a forward
            pass.
        batch: `options -> ` windows that go back through the block at once, for the estimate of memory.
        into: `quantize` with one more argument, memory for the codes of the result; for methods so fast that copying
            codes counts.
        outside: name of the method for weights of which no statistics are taken, where this one needs some.
        beside: name of the method that makes from statistics what this one does not: embeddings and output layers, and
            schemes in blocks that it cannot use; None where that is left to `outside`, and to the format's encoder.
        supports: `scheme -> None`, or the reason why this method cannot use the scheme.
        act_order: `options -> ` whether it leaves columns in groups of an order of their own, which few formats store.
        informed: `options -> ` whether it wants the information at the output of a block, for its loss.
        tables: whether it chooses runs of codes, as grids with a `table` need; `objection` refuses the others.
    """

    about: str
    quantize: Callable[[Float[Tensor, "rows cols"], Stats, Scheme, Any], QTensor]
    options: type = NoOptions
    needs: frozenset[str] = field(default_factory=frozenset)
    workspace: float = 16.0
    outside: str = "mse"
    beside: str | None = None
    supports: Callable[[Scheme], str | None] = lambda scheme: None
    prepare: Callable[[Stats, Scheme, Any], Stats] = lambda stats, scheme, options: stats
    anywhere: bool = False
    learn: Callable[[Block, Any], Learned] | None = None
    prepared: Callable[[int], int] = lambda cols: 0
    work: Callable[[int, int, Scheme], float] = lambda rows, cols, scheme: 0.0
    windows: Callable[[Any, int], int] = lambda options, windows: 0
    batch: Callable[[Any], int] = lambda options: 0
    into: Callable[[Float[Tensor, "rows cols"], Stats, Scheme, Any, UInt8[Tensor, "rows cols"]], QTensor] | None = None
    informed: Callable[[Any], bool] = lambda options: False
    tables: bool = False
    act_order: Callable[[Any], bool] = lambda options: False

    def objection(self, scheme: Scheme) -> str | None:
        """The reason why this method cannot use a scheme; None where it can."""
        if scheme.grid.table and not self.tables:
            return (
                "it rounds weight by weight, and this scheme has runs of codes from a table; use ggml-fit, or with "
                "--calibration gptq"
            )
        if scheme.smooth:
            return "it makes no factors of inputs; a transform before it does, as awq, without corrections after it"
        return self.supports(scheme)
