"""How fast a checkpoint runs on this machine, and where the time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from lowbit.budget import anonymous_bytes
from lowbit.errors import UnsupportedError
from lowbit.native import isa
from lowbit.runtime.decoder import Native
from lowbit.runtime.runner import open_runner

_READ = 2**28  # bytes of the array that is read to see how fast memory is


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
        bytes: of weights that a token reads.
        read: bytes a second of a plain read loop.
        share: of `read` that decoding reached, by the bytes of its weights.
        kernels: of the products by kind.
        others: weights that the kernels do not multiply.
        kept: bytes of keys and values at the end.
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


def bench(
    path: str | Path,
    prompt: int = 256,
    tokens: int = 64,
    threads: int | None = None,
    keep: str = "float16",
    cache: Path | None = None,
) -> Bench:
    """Read a prompt and decode some tokens with the native decoder, and multiply each kind of weight alone.

    Raises:
        UnsupportedError: the native decoder does not run this model.
        LowbitError: see `lowbit.errors`.
    """
    count = threads or torch.get_num_threads()
    begin = time.perf_counter()
    runner = open_runner(path, threads=count, context=prompt + tokens, keep=keep, cache=cache)
    load = time.perf_counter() - begin
    if runner.engine is None:
        raise UnsupportedError(runner.decoder)
    native = runner.engine.native
    ids = torch.randint(
        len(native.vectors["embedding"]), (prompt + tokens,), generator=torch.Generator().manual_seed(0)
    )
    session = runner.engine.start(prompt + tokens, keep)
    first = seconds(lambda: session.read(ids[:prompt]))
    steps = [seconds(partial(session.likeliest, token)) for token in ids[prompt:].tolist()]
    step, read = statistics.median(steps), read_rate()
    size = sum(packed.panels.nbytes for packed in native.matrices.values())
    return Bench(
        isa=isa(), threads=count, prompt=prompt, tokens=tokens, load=load, first=first, prefill=prompt / first,
        decode=1 / step, memory=anonymous_bytes(), bytes=size, read=read, share=size / step / read,
        kernels=_kernels(native, count, read), others=len(runner.others), kept=session.cache.nbytes,
    )  # fmt: skip


def _kernels(native: Native, threads: int, read: float) -> tuple[Kernel, ...]:
    """Each kind of product, by itself."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for packed in native.matrices.values():
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


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
