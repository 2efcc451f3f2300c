"""What a run will need and may use: sizes, memory limit, estimate before the start, watch while it runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lowbit.errors import ResourceError, UsageError

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")} | {p: 1024 ** (i + 1) for i, p in enumerate("KMGT")}

_STATUS, _ANONYMOUS = Path("/proc/self/status"), re.compile(rb"RssAnon:\s+(\d+) kB")


def parse_size(text: str) -> int:
    """Bytes that `4GiB`, `500MB`, `1.5G` (binary) or `1048576` stand for.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write it like 4GiB, 500MB or 1048576")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(count: int | float) -> str:
    """Bytes in the binary unit that keeps the number below 1,024: `1.25 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def format_sum(parts: Mapping[str, int]) -> str:
    """Named sizes, added up: `process 1 GiB + block 2 MiB`."""
    return " + ".join(f"{name} {format_size(size)}" for name, size in parts.items())


def anonymous_bytes() -> int:
    """Anonymous memory (pages backed by no file) that this process holds now; 0 where the system does not tell."""
    try:
        with _STATUS.open("rb", buffering=0) as file:  # read a hundred times a second, beside the work
            match = _ANONYMOUS.search(file.read())
    except FileNotFoundError:
        return 0
    return int(match[1]) * 1024 if match else 0


@final
class MemoryWatch:
    """Samples anonymous memory in the background; `peak` is the largest value seen, in bytes.

    It is a guard, not the means: the work is sized by `Estimate`. Where the limit is passed nevertheless, `check`
    (called between tensors) stops the run in a state from which it resumes.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def check(self) -> None:
        """Raise `ResourceError` if the limit was passed."""
        if self.limit and self.peak > self.limit:
            raise ResourceError(
                f"the process held {format_size(self.peak)} of anonymous memory, over --ram {format_size(self.limit)}; "
                "what is finished is kept: the same command with a larger --ram or fewer --threads goes on"
            )

    @contextmanager
    def running(self) -> Iterator[MemoryWatch]:
        """Sample while the block runs."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()


@dataclass(frozen=True)
class Estimate:
    """Anonymous memory that a run will hold at most, in bytes, and how it must work to stay there.

    Attributes:
        base: what the process holds before it starts (interpreter and libraries), and what all workers share.
        workspace: temporaries of one worker on one piece of a tensor.
        buffers: codes, scales and packed parts of the largest tensor, per worker; 0 where they live in a scratch file.
        threads: workers.
        scratch: codes are kept in a memory-mapped scratch file instead of anonymous memory.
        piece: weight elements that a worker takes at a time.
    """

    base: int
    workspace: int
    buffers: int
    threads: int
    scratch: bool
    piece: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.base + self.threads * (self.workspace + self.buffers)

    def __str__(self) -> str:
        where = "in a scratch file" if self.scratch else format_size(self.threads * self.buffers)
        return (
            f"{format_size(self.total)} = process {format_size(self.base)} + {self.threads} x "
            f"{format_size(self.workspace)} working memory + tensor buffers {where}"
        )


# Allocator slack, thread stacks and the growth of lazily loaded libraries: measured below 24 MiB, doubled.
MARGIN = 48 * 2**20
PIECE = 1 << 21


def plan_memory(
    *, limit: int | None, threads: int, element_bytes: float, buffers: int, fixed: int, shared: int = 0
) -> Estimate:
    """The fastest way of working that fits the limit: fewer threads, then codes in a scratch file, then smaller pieces.

    Args:
        limit: bytes of anonymous memory allowed; None for no limit.
        threads: workers wanted.
        element_bytes: temporaries per weight element of a piece, largest over the methods of the plan.
        buffers: bytes of codes of the largest tensor.
        fixed: bytes that one worker holds of its tensor in any case (its scales).
        shared: bytes that are held once beside all workers.

    Raises:
        ResourceError: nothing fits; the text names the least limit that works.
    """
    base = anonymous_bytes() + MARGIN + shared

    def estimate(workers: int, scratch: bool, piece: int) -> Estimate:
        held = fixed + (0 if scratch else buffers)
        return Estimate(base, int(element_bytes * piece), held, workers, scratch, piece)

    ways = [estimate(n, s, PIECE) for s in (False, True) for n in dict.fromkeys((threads, 1))]
    ways += [estimate(1, True, PIECE >> shift) for shift in (2, 4)]
    for way in ways:
        if limit is None or way.total <= limit:
            return way
    raise ResourceError(
        f"--ram {format_size(limit or 0)} is too little: this plan needs at least {format_size(ways[-1].total)} "
        f"({ways[-1]})"
    )
