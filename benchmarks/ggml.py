"""llama.cpp's encoders: ours beside `ggml_quantize_chunk` on the same weights, in one run, on one thread.

    python benchmarks/ggml.py [--types q4_k,iq4_xs] [--rows 256] [--cols 4096] [--rounds 7] [--fitted] [--json]

Random weights with somewhat heavy tails (Student's t, 5 degrees of freedom), with and without an importance matrix.
Ours is timed as a run calls the method, to a `QTensor` with codes in memory that is there; packing it is timed apart
and added, as theirs does both at once.
The sides take turns; times are processor time of the thread, medians over rounds after one that warms up. The bytes of
both must be equal; with `--fitted` ours are `ggml_fit` and `imatrix_fit`, whose bytes differ. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowbit import native
from lowbit.formats._ggml import BLOCKS, BlockType, pack
from lowbit.methods import NoOptions, ggml, ggml_fit, imatrix, imatrix_fit
from lowbit.tensors import QTensor


@dataclass(frozen=True)
class Speed:
    """Million weights per second of both sides, what packing takes of ours, and how many times as fast ours is."""

    type: str
    importance: bool
    ours: float
    theirs: float
    packing: float
    ratio: float


def library() -> ctypes.CDLL:
    """The library of llama-cpp-python that has the encoders."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("this compares with llama-cpp-python: pip install 'lowbit[test]'")
    loaded = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return loaded


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call on this thread."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def timed(
    kind: BlockType, weight: Tensor, importance: Tensor | None, loaded: ctypes.CDLL, rounds: int, fitted: bool
) -> Speed:
    """Both sides in turns; theirs on an eighth of the rows, since it takes so much longer."""
    room = torch.empty(weight.shape[0], kind.row_bytes(weight.shape[1]), dtype=torch.uint8)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    part = weight[: max(weight.shape[0] // 8, 1)]
    other = torch.empty_like(room[: len(part)])
    at = None if importance is None else importance.data_ptr()

    def ours() -> QTensor:
        if importance is None:
            plain = ggml_fit.quantize if fitted else ggml.quantize
            return plain(weight, {}, kind.scheme, NoOptions(), codes)
        learned = imatrix_fit.quantize if fitted else imatrix.quantize
        return learned(weight, {"mean_square": importance}, kind.scheme, NoOptions(), codes)

    def theirs() -> None:
        loaded.ggml_quantize_chunk(kind.id, part.data_ptr(), other.data_ptr(), 0, *part.shape, at)

    q = ours()
    runs = [(seconds(ours), seconds(theirs), seconds(lambda: pack(q, kind.name, room))) for _ in range(rounds + 1)][1:]
    if not fitted and not torch.equal(room[: len(part)], other):
        raise SystemExit(f"{kind.name}: the bytes differ")
    mine, their, packing = (median(side) for side in zip(*runs, strict=True))
    speed, peer = weight.numel() / (mine + packing) / 1e6, part.numel() / their / 1e6
    return Speed(kind.name, importance is not None, speed, peer, weight.numel() / packing / 1e6, speed / peer)


def speeds(types: list[str], shape: tuple[int, int], rounds: int, fitted: bool) -> Iterator[Speed]:
    """Every type without and with importance."""
    dice, loaded = torch.Generator().manual_seed(0), library()
    size = torch.randn(5, *shape, generator=dice).square().mean(0).sqrt()
    weight = torch.randn(shape, generator=dice) / size * 0.02
    importance = torch.rand(shape[1], generator=dice).log().neg()
    for name in types:
        for given in (None, importance):
            if given is None and ggml.METHOD.objection(BLOCKS[name].scheme):
                continue  # llama.cpp needs importances
            yield timed(BLOCKS[name], weight, given, loaded, rounds, fitted)


def show(results: list[Speed]) -> Table:
    """One line per type and kind of data."""
    table = Table("type", "importance", "ours M/s", "llama.cpp M/s", "times as fast", "packing alone M/s")
    for row in results:
        words = (f"{row.ours:.1f}", f"{row.theirs:.1f}", f"{row.ratio:.1f}", f"{row.packing:.0f}")
        table.add_row(row.type, "yes" if row.importance else "no", *words)
    return table


def main() -> None:
    """Measure, then print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(BLOCKS))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fitted", action="store_true", help="time the encoders that leave less error")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = list(speeds(options.types.split(","), (options.rows, options.cols), options.rounds, options.fitted))
    if not options.json:
        Console(width=100).print(show(results))
    machine = {"processor": platform.processor() or platform.machine(), "isa": native.isa()}
    print(json.dumps({"machine": machine, "million_weights_per_second": [asdict(row) for row in results]}))


if __name__ == "__main__":
    main()
