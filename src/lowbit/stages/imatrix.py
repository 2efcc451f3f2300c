"""An importance matrix as `llama-imatrix` makes it: text through the float model, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit import plugins
from lowbit.budget import MARGIN, MemoryWatch, anonymous_bytes, format_size
from lowbit.errors import ResourceError, UnsupportedError
from lowbit.formats._gguf import Arch, arch_of, file_columns
from lowbit.stages._blocks import Entrance, LiveBlock
from lowbit.stages._cost import BESIDE, Cost, rate
from lowbit.stages._imatrix import imatrix_bytes
from lowbit.stages._model import Blueprint, open_blueprint
from lowbit.stages._products import Product
from lowbit.stages._streams import Kind, Streams
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.quantize import MEAN_SQUARE, Progress, silent
from lowbit.stats import State, Statistic

_TOKENS = (4096, 2048, 1024, 512)  # that run through a block together
_KIND: Kind = "float"


@final
class _Sums:
    """A watch that sums the squares of what each weight reads."""

    def __init__(self) -> None:
        self._statistic: Statistic = plugins.load("stats", MEAN_SQUARE)
        self.states: dict[str, State] = {}

    def __call__(self, product: Product) -> None:
        """See a product."""
        for name in product.names:
            state = self.states.setdefault(name, self._statistic.start(product.rows.shape[1], 0))
            self._statistic.update(state, product.rows, None)


def estimate(source: Checkpoint, windows: tuple[int, int], limit: int | None) -> Cost:
    """What `measure` will take for this number of windows and tokens of each: the fastest way that fits the limit.

    Raises:
        ResourceError: nothing fits; the text names the least limit that works.
        UnsupportedError, CheckpointError: like `measure`.
    """
    blueprint = open_blueprint(source, torch.float32)
    ways = [_cost(blueprint, windows, tokens) for tokens in dict.fromkeys(max(each, windows[1]) for each in _TOKENS)]
    found = next((way for way in ways if limit is None or way.total <= limit), None)
    if found is None:
        least = ways[-1]
        raise ResourceError(
            f"--ram {format_size(limit or 0)} is too little: this needs at least {format_size(least.total)} ({least}); "
            "windows of fewer tokens need less (--sequence-length)"
        )
    return found


def _cost(blueprint: Blueprint, windows: tuple[int, int], tokens: int) -> Cost:
    """Of batches of that many tokens. Sums of all blocks are held in float64, at last as they are and as a file."""
    inside = [blueprint.checkpoint.weights[name] for names in blueprint.blocks.values() for name in names]
    weights = [weight for weight in inside if len(weight.shape) == 2]
    sums = sum(8 * weight.shape[-1] for weight in weights)
    widest = max((weight.shape[-1] for weight in weights), default=0)
    squares = 4 * tokens * widest  # of a batch's inputs
    hidden = prod(windows) * blueprint.width * blueprint.dtype.itemsize
    products = 2 * sum(prod(weight.shape) for weight in weights) * prod(windows)
    return Cost(
        base=anonymous_bytes() + MARGIN,
        block=blueprint.block_bytes,
        activations=tokens * blueprint.token_bytes(windows[1]) + squares,
        statistics=3 * sums,
        workspace=0,
        disk=2 * hidden,
        seconds=BESIDE * products / rate(blueprint.dtype),
        tokens=tokens,
        piece=0,
        threads=1,
        sites=1,
    )


def measure(
    source: Checkpoint,
    ids: Int64[Tensor, "windows tokens"],
    texts: list[str],
    folder: Path,
    tokens: int,
    watch: MemoryWatch,
    progress: Progress = silent,
) -> bytes:
    """The file for these windows; hidden states between blocks are in a temporary folder under `folder`.

    Args:
        tokens: that run through a block together, `Cost.tokens`.

    Raises:
        UnsupportedError: llama.cpp has no names for this model, or its blocks cannot be run on their own.
        CheckpointError: it is no causal language model, or cannot be run.
    """
    arch = arch_of(source.config)
    if arch is None:
        raise UnsupportedError(
            f"llama.cpp's names are not known for models of type {source.config.get('model_type')!r}"
        )
    seen = _Sums()
    run_through(source, ids, folder, tokens, seen, watch, lambda done, total: progress("imatrix", done, total))
    sums, counts = _stacked(source, arch, seen.states)
    return imatrix_bytes(sums, counts, texts, ids.shape[0], ids.shape[1])


@torch.no_grad()
def run_through(
    source: Checkpoint,
    ids: Int64[Tensor, "windows tokens"],
    folder: Path,
    tokens: int,
    seen: Callable[[Product], None],
    watch: MemoryWatch,
    progress: Callable[[int, int], None],
) -> None:
    """Run windows through the blocks of the float model, one in memory at a time; `seen` sees every product.

    Arguments and errors as `measure`.
    """
    blueprint = open_blueprint(source, torch.float32)
    with TemporaryDirectory(dir=folder, prefix=".imatrix-") as place:
        shape = (*ids.shape, blueprint.width)
        streams = Streams(Path(place), (shape[0], shape[1], shape[2]), blueprint.dtype, (_KIND,))
        entrance, batches = Entrance(blueprint, torch.device("cpu")), _batches(ids, tokens)
        with streams.writing(_KIND, 0) as hidden:
            for batch in batches:
                hidden[batch] = entrance.hidden(ids[batch])
        for index, path in enumerate(blueprint.blocks):
            progress(index, len(blueprint.blocks))
            watch.check()
            _block(blueprint, path, index, ids, batches, streams, entrance, seen)
            streams.forget(index + 1)
        progress(len(blueprint.blocks), len(blueprint.blocks))


def _batches(ids: Tensor, tokens: int) -> list[slice]:
    step = max(tokens // ids.shape[1], 1)
    return [slice(at, min(at + step, len(ids))) for at in range(0, len(ids), step)]


def _block(
    blueprint: Blueprint,
    path: str,
    index: int,
    ids: Tensor,
    batches: list[slice],
    streams: Streams,
    entrance: Entrance,
    seen: Callable[[Product], None],
) -> None:
    """Run all windows through one block."""
    names = [name for name in blueprint.blocks[path] if len(blueprint.checkpoint.weights[name].shape) == 2]
    live, inputs = LiveBlock(blueprint, path, names, torch.device("cpu")), streams.read(_KIND, index)
    with streams.writing(_KIND, index + 1) as outputs:
        for batch in batches:
            call = entrance.calls(ids[batch])[path]
            outputs[batch] = live.run(call, inputs[batch], watch=seen)


def _stacked(
    source: Checkpoint, arch: Arch, states: Mapping[str, State]
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Sums and counts under llama.cpp's names; an expert that no token reached has zeros."""
    members: dict[str, dict[int, State]] = {}
    for name, state in states.items():
        found = arch.place(name)
        if found is not None:
            columns = file_columns(arch.arranged(source.weights[name], source.config))
            told = state if columns is None else {**state, "sum": state["sum"][columns]}
            members.setdefault(found.name, {})[found.expert or 0] = told
    sizes: dict[str, int] = {}
    for name in source.weights:
        found = arch.place(name)
        if found is not None:
            sizes[found.name] = max(sizes.get(found.name, 0), (found.expert or 0) + 1)
    sums, counts = dict[str, Tensor](), dict[str, list[float]]()
    for name, parts in members.items():
        empty = torch.zeros_like(next(iter(parts.values()))["sum"])
        experts = range(sizes[name])
        sums[name] = torch.stack([parts[expert]["sum"] if expert in parts else empty for expert in experts])
        counts[name] = [float(parts[expert]["count"]) if expert in parts else 0.0 for expert in experts]
    return sums, counts
