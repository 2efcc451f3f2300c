"""Speed of the native kernels on one core, as bytes per second and as a share of a plain copy in the same run.

    python benchmarks/packing.py [--rows 4096] [--cols 4096] [--rounds 21]

Kernels, copies and peers (torch's own operators, compressed-tensors where installed) take turns, round by round; what
is printed are medians over the rounds, in processor time of the thread. LOWBIT_ISA=scalar|avx2|avx512|avx512_vnni|
neon|neon_dotprod measures another instruction set.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from math import nan
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowbit import native

GROUP = 128
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]


@dataclass(frozen=True)
class Case:
    """One thing to time: `bytes` is what its speed counts, named by `side`."""

    name: str
    side: str
    bytes: int
    run: Callable[[], object]


@dataclass(frozen=True)
class Result:
    """Medians over the rounds: bytes per second, and the time of copying the same bytes over the time of the case."""

    name: str
    side: str
    gigabytes_per_second: float
    share_of_copy: float


def table_of(levels: Tensor) -> Tensor:
    """256 entries, NaN beyond the levels."""
    return torch.cat([levels, torch.full((256 - len(levels),), nan)])


def read_cases(weight: Tensor, scale: Tensor, group: int) -> Iterator[Case]:
    """Kernels that read a weight; speed counts its bytes."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    levels, order = torch.tensor(NF4), torch.arange(16).byte()
    wide = torch.linspace(-1, 1, 256)
    name = str(weight.dtype).removeprefix("torch.") + f" g{group}"

    def case(what: str, run: Callable[[], object]) -> Case:
        return Case(f"{what} {name}", "in", weight.nbytes, run)

    yield case("block_range", lambda: native.block_range(weight, 1, group))
    yield case("quantize_affine", lambda: native.quantize_affine(weight, scale, None, 8, 15, 1, group, out=codes))
    yield case("quantize_levels 16", lambda: native.quantize_levels(weight, scale, levels, order, 1, group, out=codes))
    yield case(
        "quantize_levels 256",
        lambda: native.quantize_levels(weight, scale, wide, torch.arange(256).byte(), 1, group, out=codes),
    )
    yield case("quantize_fp8", lambda: native.quantize_fp8(weight, scale, "e4m3fn", 1, group, out=codes))
    quantized = native.quantize_affine(weight, scale, None, 8, 15, 1, group)
    for grid, table in {"int4": table_of(torch.arange(16) - 8.0), "nf4": table_of(levels), "fp8": wide}.items():
        yield case(f"error {grid}", partial(native.error, weight, quantized, scale, None, table, 1, group))


def write_cases(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Case]:
    """Dequantizing; speed counts the bytes written."""
    out = torch.empty(codes.shape, dtype=dtype)
    tables = {
        "int4": table_of(torch.arange(16) - 8.0),
        "nf4": table_of(torch.tensor(NF4)),
        "fp8": torch.linspace(-1, 1, 256),
    }
    for grid, table in tables.items():
        yield Case(
            f"dequantize {grid} {str(dtype).removeprefix('torch.')}",
            "out",
            out.nbytes,
            partial(native.dequantize, codes, scale, None, table, 1, GROUP, out=out),
        )
    yield Case(
        f"dequantize zeros {str(dtype).removeprefix('torch.')}",
        "out",
        out.nbytes,
        lambda: native.dequantize(codes, scale, scale, None, 1, GROUP, out=out),
    )


def pack_cases(codes: Tensor, bits: int) -> Iterator[Case]:
    """Packing counts packed bytes, unpacking counts codes: both what they write."""
    words, columns = native.pack_bits(codes, bits), native.pack_bits_transposed(codes, bits)
    back, cols = torch.empty_like(codes), codes.shape[1]
    size, count = words.nbytes, codes.nbytes
    yield Case(f"pack_bits {bits}", "out", size, lambda: native.pack_bits(codes, bits, out=words))
    yield Case(f"unpack_bits {bits}", "out", count, lambda: native.unpack_bits(words, bits, cols, out=back))
    yield Case(
        f"pack_bits_transposed {bits}", "out", size, lambda: native.pack_bits_transposed(codes, bits, out=columns)
    )
    yield Case(
        f"unpack_bits_transposed {bits}",
        "out",
        count,
        lambda: native.unpack_bits_transposed(columns, bits, cols, out=back),
    )


def word_cases(codes: Tensor) -> Iterator[Case]:
    """Words from one layout of 4 bits into another, without codes."""
    rows = native.pack_bits(codes, 4)
    turned, back = native.transpose_words(rows), torch.empty_like(rows)
    eights, lines = native.lines_to_awq(turned), torch.empty_like(turned)
    yield Case("transpose_words", "out", rows.nbytes, lambda: native.transpose_words(rows, out=turned))
    yield Case("lines_to_awq", "out", rows.nbytes, lambda: native.lines_to_awq(turned, out=eights))
    yield Case("awq_to_lines", "out", rows.nbytes, lambda: native.awq_to_lines(eights, out=lines))
    yield Case("awq_to_rows", "out", rows.nbytes, lambda: native.awq_to_rows(eights, out=back))


def nibble_cases(codes: Tensor) -> Iterator[Case]:
    """Bitsandbytes' order of nibbles."""
    flat = codes.view(-1)
    packed, back = native.pack_nibbles_high_first(flat), torch.empty_like(flat)
    yield Case("pack_nibbles", "out", packed.nbytes, lambda: native.pack_nibbles_high_first(flat, out=packed))
    yield Case(
        "unpack_nibbles", "out", flat.nbytes, lambda: native.unpack_nibbles_high_first(packed, len(flat), out=back)
    )


def peer_cases(weight: Tensor, scale: Tensor, codes: Tensor) -> Iterator[Case]:
    """The same work by torch's operators, and by compressed-tensors' packer."""
    groups, words = weight.view(-1, GROUP), native.pack_bits(codes, 4)
    flat = scale.view(-1, 1)
    yield Case("(torch) aminmax", "in", weight.nbytes, lambda: groups.aminmax(dim=1))
    yield Case(
        "(torch) quantize",
        "in",
        weight.nbytes,
        lambda: (groups / flat).round_().add_(8).clamp_(0, 15).to(torch.uint8),
    )
    if find_spec("compressed_tensors") is None:
        return
    from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
        pack_to_int32,
        unpack_from_int32,
    )

    signed = (codes.to(torch.int8) - 8).contiguous()
    yield Case("(compressed-tensors) pack 4", "out", words.nbytes, lambda: pack_to_int32(signed, 4))
    yield Case("(compressed-tensors) unpack 4", "out", codes.nbytes, lambda: unpack_from_int32(words, 4, codes.shape))


def measure(cases: list[Case], rounds: int) -> list[Result]:
    """Every case once per round, each right after a copy of the bytes that it counts."""
    copies: list[list[float]] = [[] for _ in cases]
    times: list[list[float]] = [[] for _ in cases]
    source = torch.ones(max(case.bytes for case in cases), dtype=torch.uint8)
    target = torch.ones_like(source)
    for _ in range(rounds):
        for i, case in enumerate(cases):
            copies[i].append(seconds(partial(target[: case.bytes].copy_, source[: case.bytes])))
            times[i].append(seconds(case.run))
    return [
        Result(
            case.name,
            case.side,
            round(case.bytes / median(times[i]) / 1e9, 2),
            round(median(copy / time for copy, time in zip(copies[i], times[i], strict=True)), 3),
        )
        for i, case in enumerate(cases)
    ]


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call on this thread: what others do on the machine counts less than by the clock."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def all_cases(rows: int, cols: int) -> list[Case]:
    """A weight of this size in each way that counts."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=rng)
    scale = torch.rand(rows, cols // GROUP, generator=rng) / 4 + 0.1
    codes = native.quantize_affine(weight, scale, None, 8, 15, 1, GROUP)
    cases = [*read_cases(weight.bfloat16(), scale, GROUP), *read_cases(weight, scale, GROUP)]
    cases += read_cases(weight.bfloat16(), torch.rand(rows, cols // 16, generator=rng) + 0.1, 16)
    cases += [*write_cases(codes, scale, torch.bfloat16), *write_cases(codes, scale, torch.float32)]
    for bits in (2, 3, 4, 8):
        cases += pack_cases(codes & (2**bits - 1), bits)
    return [*cases, *word_cases(codes), *nibble_cases(codes), *peer_cases(weight.bfloat16(), scale, codes)]


def cpu_name() -> str:
    """The processor as Linux names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Measure, then print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 4096), ("cols", 4096), ("rounds", 21)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(all_cases(options.rows, options.cols), options.rounds)
    table = Table("kernel", "counts", "GB/s", "of copy", title=f"{cpu_name()}, {native.isa()}, one core")
    for result in results:
        table.add_row(result.name, result.side, str(result.gigabytes_per_second), str(result.share_of_copy))
    Console().print(table)
    print(json.dumps({"cpu": cpu_name(), "isa": native.isa(), "results": [asdict(each) for each in results]}))


if __name__ == "__main__":
    main()
