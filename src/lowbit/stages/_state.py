"""What a calibrated run knows: what stays the same from block to block, and the state of the block in work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.corrections import Correction, Term
from lowbit.errors import UnsupportedError
from lowbit.methods import Method
from lowbit.stages._activations import input_scale
from lowbit.stages._adapter import Terms
from lowbit.stages._attention import Memory
from lowbit.stages._blocks import Call, Entrance, LiveBlock
from lowbit.stages._cost import Cost
from lowbit.stages._model import Blueprint
from lowbit.stages._observe import UNREACHED, Seen, Windows
from lowbit.stages._recipe import Recipe, step_options
from lowbit.stages._sites import Site
from lowbit.stages._store import Value, store
from lowbit.stages._streams import Kind, Streams
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Entry, Plan
from lowbit.stages.quantize import join, tensor_stats
from lowbit.stages.write import Output
from lowbit.tensors import QTensor
from lowbit.transforms import Transform

ABSMAX = "absmax"


@final
@dataclass(frozen=True)
class Calibration:
    """Everything that stays the same from block to block.

    The same workers do all: each has a heap of its own, which keeps what was freed. `information`: where that at the
    output of each block is, `[1, width, width]`, if a step asks for it.
    """

    source: Checkpoint
    plan: Plan
    recipe: Recipe
    output: Output
    way: Cost
    blueprint: Blueprint
    windows: Windows
    streams: Streams
    information: Streams | None
    entrance: Entrance
    terms: Terms
    memory: Memory
    pool: ThreadPoolExecutor

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        assert self.plan.calibration is not None
        return torch.device(self.plan.calibration.device)

    @property
    def inputs(self) -> Kind:
        """What reaches a block that is calibrated."""
        assert self.plan.calibration is not None
        return "float" if self.plan.calibration.inputs == "float" else "quantized"

    def call(self, path: str, windows: int) -> Call:
        """How the model calls a block with so many windows."""
        return self.entrance.calls(self.windows.ids[:windows])[path]

    def options(self, record: Method | Transform | Correction, name: str) -> Any:
        """The options of one step of the recipe."""
        return step_options(record, name, self.plan.options)


@final
class State:
    """The block in work: its weights as they are by now, and what was made of them."""

    def __init__(self, work: Calibration, path: str) -> None:
        inside = work.blueprint.blocks[path]
        own = {e.weight.name: e for e in work.plan.entries if e.weight.name in inside and not e.tied}
        self.entries = {name: without_factors(entry) for name, entry in own.items()}
        self.room = frozenset(name for name, entry in own.items() if entry != self.entries[name])
        matrices = [name for name, entry in self.entries.items() if len(entry.weight.shape) == 2]
        self.live = LiveBlock(work.blueprint, path, matrices, work.device)
        self.floats: dict[str, Tensor] = {}  # weights that a transform changed, float32
        self.factors: dict[str, Tensor] = {}  # of inputs, stored beside a weight; `floats` are divided by them
        self.made: set[str] = set()
        self.lost: dict[str, str] = {}  # weights that cannot be learned with the block, and why
        self.scales: dict[str, float | None] = {}  # of activations, where they are stored
        self.terms: dict[str, dict[str, Term]] = {}  # beside weights, by step of the recipe
        self._work = work

    def targets(self, names: Sequence[str]) -> list[str]:
        """Those of the weights that are quantized and not done yet."""
        return [name for name in names if self.entries[name].weight.scheme and name not in self.made]

    def rounds(self, site: Site) -> bool:
        """Whether inputs of a site will be rounded."""
        return any(self.entries[name].weight.activations for name in self.targets(site))

    def width(self, site: Site) -> int:
        """Number of inputs of a site."""
        return self.live.weight(site[0]).shape[1]

    def owner(self, parameter: str) -> str | None:
        """The weight of the checkpoint that is this parameter; None where it is made of several."""
        sources = self._work.blueprint.sources(self.live.path)[parameter]
        return next(iter(sources)) if len(sources) == 1 else None

    def kept(self, name: str) -> Tensor:
        """A weight as the transforms left it, in the type in which it is kept, `[outputs, inputs]`."""
        if name in self.floats:
            return self.floats[name]
        tensor, place = self._work.source.tensor(name), self.live.places.get(name)
        turned = place is not None and place.swapped and not self.entries[name].weight.swapped
        return tensor.T.contiguous() if turned else tensor

    def weight(self, name: str) -> Tensor:
        """The same in float32."""
        return self.kept(name).float().contiguous()

    def nearest(self, name: str, weight: Tensor) -> QTensor:
        """Round-to-nearest under the plan's scheme."""
        rtn: Method = plugins.load("methods", "rtn")
        return self.made_by(rtn, rtn.options(), name, weight)

    def made_by(self, method: Method, options: Any, name: str, weight: Tensor) -> QTensor:
        """What a method that needs no statistics makes under the plan's scheme."""
        scheme = self.entries[name].weight.scheme
        assert scheme is not None
        stats = tensor_stats(weight, scheme, self._work.way.piece)
        return self.stored(name, method.quantize(weight, stats, scheme, options))

    def stored(self, name: str, made: QTensor) -> QTensor:
        """What a method made of a whole weight, its scales quantized where the scheme says so."""
        return join(self.entries[name].weight, made.codes, [(made.scales, made.shifts)])

    def scale_input(self, name: str, seen: Seen) -> None:
        """Find the scale by which a weight's inputs are rounded, where it is stored.

        Raises:
            UnsupportedError: nothing tells how large they are.
        """
        scheme = self.entries[name].weight.activations
        if scheme and ABSMAX in seen.stats:
            self.scales[name] = input_scale(float(seen.stats[ABSMAX].max()), scheme)
        elif scheme and input_scale(1.0, scheme) is not None:
            raise UnsupportedError(
                f"{name}: {seen.useless or UNREACHED}, so that no scale of its inputs ({scheme}) can be found; leave "
                "it as it is with --skip, or take --activations with a scale per token, as int8-row"
            )

    def meant(self, name: str, weight: Tensor) -> Tensor:
        """What a weight that is multiplied by the factors of its inputs means to these as they come."""
        return weight * self.factors[name].to(weight.device) if name in self.factors else weight

    def put(self, name: str, weight: Tensor, rows: slice = slice(None)) -> None:
        """Let the block compute with what was made of a weight, or of some of its rows."""
        place = self.live.weight(name)[rows]
        place.copy_(self.meant(name, weight.view_as(place)))

    def settle(self, entry: Entry, value: Value, facts: Mapping[str, Any]) -> None:
        """Store a result, unless it is there from an earlier run; read back in mapped files, which cost no memory."""
        name, output = entry.weight.name, self._work.output
        self.made.add(name)
        if name not in output.records:
            entry = replace(entry, weight=replace(entry.weight, input_scale=self.scales.get(name)))
            if name in self.room and isinstance(value, QTensor):
                entry, value = self._with_factors(entry, value)
            facts = {**facts, "folded": name in self.floats}
            store(output, entry, value, self._work.source.tensor(name), facts, scratch=True)

    def _with_factors(self, entry: Entry, value: QTensor) -> tuple[Entry, QTensor]:
        """The same with the factors that were chosen; ones where none were, or where they were folded."""
        factors = self.factors.get(entry.weight.name, torch.ones(value.shape[1]))
        scheme = replace(value.scheme, smooth=True)
        planned = replace(entry, weight=replace(entry.weight, scheme=scheme))
        return planned, replace(value, scheme=scheme, factors=factors)

    def settle_rest(self) -> None:
        """Store what is not quantized, changed by a transform or not."""
        for name, entry in self.entries.items():
            if not entry.weight.scheme:
                value = self.floats.get(name, self._work.source.tensor(name))
                facts = {"method": None, "seconds": 0.0}
                self.settle(entry, value.to(entry.weight.dtype).contiguous(), facts)


def without_factors(entry: Entry) -> Entry:
    """The entry of a weight as methods see it: its inputs are what its factors made of them."""
    scheme = entry.weight.scheme
    return replace(entry, weight=replace(entry.weight, scheme=scheme and replace(scheme, smooth=False)))
