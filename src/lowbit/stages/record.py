"""Record: gather what happened in a run into the plain facts that the report is made of."""

from __future__ import annotations

import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit import __version__
from lowbit.budget import PIECE, Estimate, MemoryWatch
from lowbit.stages._adapter import Adapter
from lowbit.stages._experts import UNREAD, unread
from lowbit.stages._gguf_limits import limits
from lowbit.stages._readers import unread as not_read
from lowbit.stages._records import (
    Count,
    Histogram,
    Machine,
    Memory,
    Outcome,
    Result,
    Row,
    RunRecord,
    Source,
    Starved,
    TermsRecord,
    Verification,
)
from lowbit.stages.checkpoint import AHEAD, LEFT, Checkpoint, open_checkpoint
from lowbit.stages.plan import Entry, Plan
from lowbit.stages.quantize import pieces_of
from lowbit.stages.verify import Verified
from lowbit.stages.write import Output
from lowbit.tensors import QTensor, block_size

_EXPERT = re.compile(r"(.+?)\.experts\.(\d+)\.")
WORST = 4
BINS = 120


@final
class Clock:
    """Seconds of each stage, in order."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def make_record(
    command: str,
    source: Checkpoint,
    output: Output,
    way: Estimate,
    other_memory: int,
    watch: MemoryWatch,
    verified: Verified,
    evaluation: dict[str, Any] | None,
    seconds: dict[str, float],
    calibration: dict[str, Any] | None = None,
    adapter: Adapter | None = None,
    decided: tuple[str, ...] = (),
    unscored: str | None = None,
    warnings: tuple[str, ...] = (),
) -> RunRecord:
    """Everything the report says about a finished run; `other_memory`: bytes planned for calibration or evaluation."""
    plan = output.plan
    rows = tuple(_row(plan, entry, output) for entry in plan.entries)
    return RunRecord(
        command=command,
        lowbit=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        source=_source(source, plan),
        result=_result(output),
        rows=rows,
        seconds=seconds,
        memory=Memory(watch.peak, max(way.total, other_memory), watch.limit),
        verified=Verification(verified.tensors, 0, verified.seconds),
        evaluation=evaluation,
        histograms=tuple(histograms(source, output, rows, way.scratch)),
        counts=(
            *_counts(plan),
            *_fallbacks(output),
            *_left(source),
            *_apart(source, plan),
            *_again(source),
            *limits(source, plan.format),
        ),
        resumed=output.resumed,
        calibration=calibration and {**calibration, "folded": _folded(output)},
        adapter=_terms(plan, adapter) if adapter else None,
        decided=decided,
        unscored=unscored,
        recipe=plan.recipe,
        starved=_starved(output),
        warnings=warnings,
    )


def _terms(plan: Plan, adapter: Adapter) -> TermsRecord:
    count = sum(prod(entry.weight.shape) for entry in plan.entries if entry.weight.scheme)
    return TermsRecord(str(adapter.path), adapter.nbytes, 8 * adapter.nbytes / count, adapter.ranks)


def machine() -> Machine:
    """The machine that this process runs on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = names[0] if names else platform.processor() or platform.machine()
    return Machine(cpu, cores, memory, platform.platform(), platform.python_version(), torch.__version__)


def _source(source: Checkpoint, plan: Plan) -> Source:
    stored = [entry for entry in plan.entries if not entry.tied]
    dtypes = Counter({"float32": 0})
    for entry in stored:
        dtypes[_name(entry.weight.dtype)] += prod(entry.weight.shape)
    parameters = sum(prod(entry.weight.shape) for entry in stored)
    nbytes = sum(entry.source_bytes for entry in stored)
    return Source(str(source.path), nbytes, parameters, dtypes.most_common(1)[0][0])


def _result(output: Output) -> Result:
    plan = output.plan
    written = sum(plan.stored_bytes(entry) for entry in plan.entries)
    return Result(str(output.path), plan.format, written, *plan.bits_per_weight())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(plan: Plan, entry: Entry, output: Output) -> Row:
    weight, outcome = entry.weight, None
    if weight.scheme:
        facts = output.records[weight.name].facts
        outcome = Outcome(facts["method"], facts["relative_error"], facts["largest_error"], facts["seconds"],
                          facts.get("against_rtn"))  # fmt: skip
    return Row(
        name=weight.name,
        shape=weight.shape,
        dtype=_name(weight.dtype),
        scheme=str(weight.scheme) if weight.scheme else None,
        method=entry.method,
        reason=entry.why,
        before=entry.source_bytes,
        after=plan.stored_bytes(entry),
        outcome=outcome,
    )


def _counts(plan: Plan) -> tuple[Count, ...]:
    """Weights that were not quantized, by reason."""
    kinds = Counter((_kind(entry), entry.reason) for entry in plan.entries if not entry.weight.scheme)
    return tuple(Count(kind, reason, number) for (kind, reason), number in kinds.items())


def _fallbacks(output: Output) -> tuple[Count, ...]:
    """Weights that another method made than the recipe's, or on other data, by reason."""
    facts = [record.facts for record in output.records.values()]
    reasons = Counter(f"{entry.method}: {why}" for entry in output.plan.entries if (why := entry.instead))
    reasons += Counter(f"{each['method']}: {each['fallback']}" for each in facts if each.get("fallback"))
    few = sum(each.get("starved") is not None for each in facts)
    if few:
        reasons["weights of experts that saw fewer tokens than they have inputs were calibrated on all tokens"] = few
    return tuple(Count("fallback", reason, number) for reason, number in reasons.items())


def _starved(output: Output) -> tuple[Starved, ...]:
    """Experts that saw fewer tokens than they have inputs; the least of what their weights saw."""
    found: dict[tuple[str, int], int] = {}
    for entry in output.plan.entries:
        place, record = _EXPERT.match(entry.weight.name), output.records.get(entry.weight.name)
        facts = record.facts if record else {}
        seen = facts.get("rows") if facts.get("starved") is None else facts["starved"]
        if place and seen is not None and seen < entry.weight.shape[-1]:
            key = place[1], int(place[2])
            found[key] = min(found.get(key, seen), seen)
    blocks = list(dict.fromkeys(block for block, _ in found))
    order = sorted(found, key=lambda key: (blocks.index(key[0]), key[1]))
    return tuple(Starved(*key, found[key]) for key in order)


def _left(source: Checkpoint) -> tuple[Count, ...]:
    view = source.view
    counts = (Count("left out", why, len(names or ())) for why, names in ((LEFT, view.left), (AHEAD, view.ahead)))
    return tuple(count for count in counts if count.tensors)


def _apart(source: Checkpoint, plan: Plan) -> tuple[Count, ...]:
    """Tensors that the model's class wants and that `transformers` will not find, and weights that it does not read."""
    count = len(unread(source, plan.format))
    found = not_read(plan.format, source.config, (entry.weight for entry in plan.entries))
    others = (Count("apart", reason, len(names)) for reason, names in found.items())
    return (*((Count("apart", UNREAD, count),) if count else ()), *others)


def _again(source: Checkpoint) -> tuple[Count, ...]:
    """Weights that were quantized already, by how."""
    return tuple(Count("quantized again", kind, number) for kind, number in Counter(source.view.was.values()).items())


def _folded(output: Output) -> int:
    """Tensors that a transform changed."""
    return sum(bool(record.facts.get("folded")) for record in output.records.values())


def _kind(entry: Entry) -> Any:
    if entry.tied:
        return "tied"
    return "skipped" if entry.reason.startswith(("--skip", "--set")) else "kept"


def histograms(source: Checkpoint, output: Output, rows: Iterable[Row], scratch: bool) -> Iterable[Histogram]:
    """Float weights against the grid's levels, for the tensors with the largest relative error, worst first."""
    folded = {name for name, record in output.records.items() if record.facts.get("folded")}  # not as in the source
    made = [(row.outcome.error, row.name) for row in rows if row.outcome and row.name not in folded]
    weights = {entry.weight.name: entry.weight for entry in output.plan.entries}
    written = open_checkpoint(output.path)
    for _, name in sorted(made, reverse=True)[:WORST]:
        with output.codes(weights[name], scratch) as codes:
            qtensor = written.load(name, codes)
            assert isinstance(qtensor, QTensor)
            yield histogram(name, source.tensor(name), qtensor)


_AXIS = {
    "none": "weight ÷ scale",
    "int": "weight ÷ scale + zero point",
    "float": "weight ÷ scale + zero point",
    "min": "(weight + minimum) ÷ scale",
}


def histogram(name: str, weight: Tensor, qtensor: QTensor) -> Histogram:
    """Bins of the weights on the axis of the codes: `w / scale`, plus the zero point where there is one."""
    scheme = qtensor.scheme
    axis = scheme.grid.levels if scheme.zero == "none" else range(2**scheme.grid.bits)
    levels = torch.tensor([float(level) for level in axis])
    finite = levels[levels.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    margin = (high - low) / 20
    counts, codes = torch.zeros(BINS, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    view = weight.reshape(qtensor.codes.shape)
    for rows, cols in pieces_of(qtensor.shape, scheme.block, PIECE // 4):
        counts += _binned(_units(view, qtensor, rows, cols), low - margin, high + margin)
        codes += torch.bincount(qtensor.codes[rows, cols].reshape(-1), minlength=256)
    edges = torch.linspace(low - margin, high + margin, BINS + 1)
    order = [code for code in levels.argsort().tolist() if levels[code].isfinite()]
    return Histogram(
        name,
        tuple(edges.tolist()),
        tuple(counts.tolist()),
        tuple(float(levels[code]) for code in order),
        tuple(int(codes[code]) for code in order),
        _AXIS[scheme.zero],
    )


def _binned(values: Tensor, first: float, last: float) -> Int64[Tensor, "bins"]:
    """How many values are in each of `BINS` bins, the outer ones with all that is beyond; NaN is in none.

    `torch.histc` takes three times as long.
    """
    places = (values - first).mul_(BINS / (last - first)).clamp_(0, BINS - 1).nan_to_num_(nan=BINS)
    return torch.bincount(places.to(torch.int32).reshape(-1), minlength=BINS + 1)[:BINS]


def _units(view: Tensor, qtensor: QTensor, rows: slice, cols: slice) -> Tensor:
    """A piece of the weight in units of its blocks' scales, on the axis of the codes."""
    high, wide = block_size(qtensor.shape, qtensor.scheme.block)
    across = slice(cols.start // wide, -(-cols.stop // wide))
    down = torch.arange(rows.start, rows.stop) // high

    def spread(blocks: Tensor) -> Tensor:
        """What each block has, for each weight."""
        begin = cols.start % wide
        return blocks[down, across].repeat_interleave(wide, 1)[:, begin : begin + cols.stop - cols.start]

    scales, zeros = spread(qtensor.scale_values()), qtensor.zero_values()
    if zeros is None:
        return view[rows, cols].float() / scales
    zeros = spread(zeros)
    if qtensor.scheme.zero == "min":
        return (view[rows, cols].float() + zeros) / scales
    return view[rows, cols].float() / scales + zeros
