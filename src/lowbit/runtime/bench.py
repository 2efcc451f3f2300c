"""How fast a checkpoint runs on this machine, and where the time goes."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from lowbit.budget import anonymous_bytes
from lowbit.native import isa
from lowbit.runtime.linear import Linear
from lowbit.runtime.panels import Packed
from lowbit.runtime.runner import Runner, open_runner

_READ = 2**28  # bytes of the array that is read to see how fast memory is
_ABOVE = 1.1  # share of that speed which memory does not give


@final
@dataclass(frozen=True)
class Kernel:
    """Products of one kind: how many weights, their bytes, seconds to multiply all of them by one token, and the rates.

    `share` is the bytes a second as a share of what a plain loop reads.
    """

    way: str
    bits: int
    weights: int
    bytes: int
    seconds: float
    share: float


@final
@dataclass(frozen=True)
class Bench:
    """What was measured; medians where there are several.

    Attributes:
        isa: instruction set of the kernels.
        threads: that shared each product.
        load: seconds to open the checkpoint and put its weights in order.
        first: seconds from a prompt of `prompt` tokens to the logits after it.
        prefill: tokens of the prompt a second.
        decode: tokens a second, one by one.
        memory: anonymous bytes that the process held at the end.
        bytes: of weights that a token reads; beside the class of transformers, of those on the kernels.
        read: bytes a second of a plain read loop.
        share: of `read` that decoding reached, by the bytes of its weights.
        kernels: of the products by kind.
        others: weights that the kernels do not multiply.
        kept: bytes of keys and values at the end.
        decoder: what ran the blocks: `native`, or why it was the class of transformers.
        near: bytes of the processor's last cache, 0 where it does not tell.
    """

    isa: str
    threads: int
    prompt: int
    tokens: int
    load: float
    first: float
    prefill: float
    decode: float
    memory: int
    bytes: int
    read: float
    share: float
    kernels: tuple[Kernel, ...]
    others: int
    kept: int
    decoder: str
    near: int

    @property
    def cached(self) -> bool:
        """Whether weights come from the processor's cache, so that memory's speed is no bound."""
        return self.bytes <= self.near or self.share > _ABOVE


def bench(
    path: str | Path,
    prompt: int = 256,
    tokens: int = 64,
    threads: int | None = None,
    keep: str = "float16",
    cache: Path | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Bench:
    """Read a prompt and decode some tokens as `generate` does, and multiply each kind of weight on the kernels alone.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    count = threads or torch.get_num_threads()
    begin = time.perf_counter()
    runner = open_runner(path, threads=count, context=prompt + tokens, keep=keep, cache=cache, note=note)
    load = time.perf_counter() - begin
    reader, (packed, words) = runner.reader, _parts(runner)
    ids = torch.randint(words, (prompt + tokens,), generator=torch.Generator().manual_seed(0))
    if runner.engine is None:
        reader.follow(ids[:1])  # transformers imports what it first needs
    first = seconds(lambda: reader.follow(ids[:prompt]))
    steps = [seconds(partial(reader.likeliest, token)) for token in ids[prompt:].tolist()]
    step, read = statistics.median(steps), read_rate()
    size = sum(each.panels.nbytes for each in packed)
    return Bench(
        isa=isa(), threads=count, prompt=prompt, tokens=tokens, load=load, first=first, prefill=prompt / first,
        decode=1 / step, memory=anonymous_bytes(), bytes=size, read=read, share=size / step / read,
        kernels=_kernels(packed, count, read), others=len(runner.others), kept=reader.nbytes, decoder=runner.decoder,
        near=cache_bytes(),
    )  # fmt: skip


def _parts(runner: Runner) -> tuple[list[Packed], int]:
    """Matrices that the kernels multiply, and the number of tokens that there are."""
    if runner.engine:
        native = runner.engine.native
        return list(native.matrices.values()), len(native.vectors["embedding"])
    model: Any = runner.model
    layers = (layer for layer in model.modules() if isinstance(layer, Linear))
    return [layer.packed for layer in layers if layer.packed], int(model.config.get_text_config().vocab_size)


def _kernels(matrices: Sequence[Packed], threads: int, read: float) -> tuple[Kernel, ...]:
    """Each kind of product, by itself."""
    groups: dict[tuple[str, int], list[Packed]] = {}
    for packed in matrices:
        groups.setdefault((packed.panels.way, packed.panels.bits), []).append(packed)
    found = []
    for (way, bits), members in sorted(groups.items()):
        pairs = [(packed.matrix(), torch.randn(1, packed.inputs)) for packed in members]
        took = statistics.median(seconds(lambda: [matrix(x, threads) for matrix, x in pairs]) for _ in range(5))  # noqa: B023
        size = sum(packed.panels.nbytes for packed in members)
        found.append(Kernel(way, bits, len(members), size, took, size / took / read))
    return tuple(found)


def read_rate() -> float:
    """Bytes a second that summing an array by torch reaches: the best of five."""
    array = torch.ones(_READ // 8, dtype=torch.int64)
    return _READ / min(seconds(array.sum) for _ in range(5))


def cache_bytes() -> int:
    """Of the processor's last cache, 0 where the system does not tell."""
    names = [name for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if name in os.sysconf_names]
    return next((size for name in names if (size := os.sysconf(name)) > 0), 0)


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
