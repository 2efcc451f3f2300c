"""Verify: what was written is what was meant, and the finished result is read as it was written.

Each weight was read back and compared as soon as it was stored (`_store`). Here the safetensors package must accept
every file and find the planned tensors in it, then the checkpoint is opened like any other and recognised by
`config.json`. A weight that it declares as the plan does is one that was compared. Every other, and what the journal
does not say to have been compared, is read and compared now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lowbit.budget import Estimate
from lowbit.collector import paused
from lowbit.errors import VerifyError
from lowbit.formats import Spec
from lowbit.stages._gguf import read_gguf
from lowbit.stages._shard import Shard
from lowbit.stages._store import Value, compare
from lowbit.stages._weightfile import one_line
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Entry, Plan
from lowbit.stages.quantize import Progress, make, silent
from lowbit.stages.write import Output


@final
@dataclass(frozen=True)
class Verified:
    """Outcome: how many weights were compared, and seconds: of this stage, and of a worker's reading back before it."""

    tensors: int
    seconds: float


def verify(
    source: Checkpoint,
    output: Output,
    way: Estimate,
    progress: Progress = silent,
    remake: Callable[[Entry], Value] | None = None,
) -> Verified:
    """Open a finished output as any checkpoint and compare with what was meant what was not compared yet.

    `remake` makes a weight again, to name the first element that differs; None for what the plan's methods make.

    Raises:
        VerifyError: a weight differs, naming tensor and element, or a file is not read as it was written.
    """
    start, plan = time.perf_counter(), output.plan
    entries = [entry for entry in plan.entries if not entry.tied]
    with open_checkpoint(output.path) as written, ThreadPoolExecutor(way.threads, "verify") as pool:
        _check_names(plan, written)
        _check_headers(output, written)
        todo = [entry for entry in entries if not _compared(output, written, entry)]

        def made(entry: Entry) -> Value | None:
            if remake:
                return remake(entry)
            # what was learned is gone with the hidden states
            return None if plan.calibration else make(source, plan, entry, way.piece)

        def check(entry: Entry) -> None:
            name = entry.weight.name
            with output.codes(entry.weight, way.scratch, "check") as codes:
                again = lambda: made(entry)
                compare(output.path, name, output.records[name].meant, lambda: written.load(name, codes), again)

        for done, _ in enumerate(pool.map(check, todo), 1):
            progress("verify", done, len(todo))
    return Verified(len(entries), output.reading + time.perf_counter() - start)


def _compared(output: Output, written: Checkpoint, entry: Entry) -> bool:
    """Whether a weight was compared as the weight that the finished checkpoint declares.

    Some formats do not say of which float type it was; no part of it depends on that.
    """
    declared, meant = written.weights[entry.weight.name], entry.weight
    scale = declared.input_scale if meant.input_scale is not None else None  # a plan made before calibration has none
    return output.records[meant.name].verified and replace(declared, dtype=meant.dtype, input_scale=scale) == meant


def _check_names(plan: Plan, written: Checkpoint) -> None:
    wanted = {entry.weight.name for entry in plan.entries if not entry.tied}
    for name in sorted(wanted ^ set(written.weights)):
        where = "was meant and is not there" if name in wanted else "is there and was not meant"
        raise VerifyError(f"{written.path}: {name} {where}; the result cannot be trusted, delete it and run again")


def _check_headers(output: Output, written: Checkpoint) -> None:
    """The owner of the container must read every header as it was meant, and tensors lie where they were compared."""
    for shard in output.shards:
        path = output.path / shard.file
        if path.suffix == ".gguf":
            _check_gguf(path, shard, written)
            continue
        if path.suffix == ".onnx":
            _check_onnx(path)
            continue
        try:
            with safe_open(path, "np") as file:
                names = list(file.keys())  # this is no dict: it cannot be iterated over itself
                theirs = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise VerifyError(f"{path}: the safetensors package refuses what was written: {error}") from error
        if theirs != shard.tensors or _places(path, written) != shard.offsets:
            raise VerifyError(f"{path}: the safetensors package finds other tensors than were written")


def _places(path: Path, written: Checkpoint) -> dict[str, tuple[int, Spec]]:
    """Where what a checkpoint has in a file begins, and what it is."""
    own = {name: file for name, file in written.files.items() if file.path.name == path.name}
    return {name: (file.slots[name].start, written.specs[name]) for name, file in own.items()}


def _check_onnx(path: Path) -> None:
    """The `onnx` package must accept the graph and find its external data."""
    import onnx

    try:
        onnx.checker.check_model(path)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise VerifyError(f"{path}: the onnx package refuses what was written: {one_line(error)}") from error


@cache
def _typed(dtype: Any, order: Any) -> Any:
    return np.dtype(dtype).newbyteorder(order)


@final
class _Reader(GGUFReader):
    """The package's reader, which looks up each part of each token: views made in one step cost a third of its own."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: str | None = None) -> NDArray[Any]:
        return np.frombuffer(self.data, _typed(dtype, override_order or self.byte_order), int(count), int(offset))


def _check_gguf(path: Path, shard: Shard, written: Checkpoint) -> None:
    """The `gguf` package must find the tensors that this project's reader finds, at the same places."""
    try:
        with paused():  # it makes several objects for each token
            theirs = {
                str(tensor.name): (int(tensor.data_offset), int(tensor.n_bytes)) for tensor in _Reader(path).tensors
            }
    except (ValueError, KeyError, IndexError) as error:
        raise VerifyError(f"{path}: the gguf package refuses what was written: {error}") from error
    ours = {name: (tensor.start, tensor.nbytes) for name, tensor in read_gguf(path).tensors.items()}
    if ours != theirs or _places(path, written) != shard.offsets:
        raise VerifyError(f"{path}: the gguf package finds other tensors than were written")
