"""Verify: what was written is read back through the format's reader and compared with what was meant.

Reading goes another way than writing: the safetensors package must accept every file and find the planned tensors in
it, then the checkpoint is opened like any other, recognised by `config.json`, and unpacked by its format. Parts of
each `QTensor` are compared by their digests, which the journal took before packing; where one differs, the weight is
made again and the first differing element is named.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.budget import Estimate
from lowbit.errors import LowbitError, VerifyError
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Entry, Plan
from lowbit.stages.quantize import Progress, make, silent
from lowbit.stages.write import Output, digest
from lowbit.tensors import QTensor


@final
@dataclass(frozen=True)
class Verified:
    """Outcome: how many weights were compared, and how long it took in seconds."""

    tensors: int
    seconds: float


def verify(source: Checkpoint, output: Output, way: Estimate, progress: Progress = silent) -> Verified:
    """Read every weight of a finished output back and compare it with what was meant.

    Raises:
        VerifyError: a weight differs, naming tensor and element.
    """
    start = time.perf_counter()
    entries = [entry for entry in output.plan.entries if not entry.tied]
    with open_checkpoint(output.path) as written, ThreadPoolExecutor(way.threads, "verify") as pool:
        _check_names(output.plan, written)
        _check_headers(output)

        def compare(entry: Entry) -> None:
            with output.codes(entry.weight, way.scratch) as codes:
                _compare(source, written, output, entry, codes, way)

        for done, _ in enumerate(pool.map(compare, entries), 1):
            progress("verify", done, len(entries))
    return Verified(len(entries), time.perf_counter() - start)


def _check_names(plan: Plan, written: Checkpoint) -> None:
    wanted = {entry.weight.name for entry in plan.entries if not entry.tied}
    for name in sorted(wanted ^ set(written.weights)):
        where = "was meant and is not there" if name in wanted else "is there and was not meant"
        raise VerifyError(f"{written.path}: {name} {where}; the result cannot be trusted, delete it and run again")


def _check_headers(output: Output) -> None:
    """The owner of the container must read every header as it was meant."""
    for shard in output.shards:
        path = output.path / shard.file
        try:
            with safe_open(path, "np") as file:
                names = list(file.keys())  # this is no dict: it cannot be iterated over itself
                found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise VerifyError(f"{path}: the safetensors package refuses what was written: {error}") from error
        if found != {name: spec.shape for name, (_, spec) in shard.offsets.items()}:
            raise VerifyError(f"{path}: the safetensors package finds other tensors than were written")


def _compare(
    source: Checkpoint, written: Checkpoint, output: Output, entry: Entry, codes: Tensor | None, way: Estimate
) -> None:
    """Compare one weight's parts with the journal's digests; only a mismatch costs more than a read."""
    name = entry.weight.name
    try:
        found = _parts(written.load(name, codes))
    except LowbitError as error:
        raise VerifyError(f"{written.path}: {name} cannot be read back: {error}") from error
    meant = output.records[name].meant
    wrong = [part for part in meant if part not in found or digest(found[part].contiguous()) != meant[part]]
    if wrong and output.plan.calibration:  # what was meant is gone with the hidden states
        raise VerifyError(f"{written.path}: {name} differs from what was meant in its {wrong[0]}")
    if wrong:
        again = _parts(make(source, output.plan, entry, way.piece))
        raise VerifyError(f"{written.path}: {name} differs from what was meant in {_where(wrong[0], found, again)}")


def _parts(value: QTensor | Tensor) -> dict[str, Tensor]:
    return dict(value.parts()) if isinstance(value, QTensor) else {"weight": value}


def _where(part: str, found: dict[str, Tensor], again: dict[str, Tensor]) -> str:
    """The first differing element of one part, with both values."""
    if part not in found or found[part].numel() != again[part].numel():
        return f"its {part}: missing, or of another shape"
    left, right = found[part].reshape(-1), again[part].reshape(-1)
    index = int((left.view(torch.uint8) != right.view(torch.uint8)).nonzero()[0]) // left.element_size()
    return f"element {index} of its {part}: {left[index].item()} is stored, {right[index].item()} was meant"
