"""The methods without data beside the packages they come from: error and speed on the same weights, in one run.

    python benchmarks/methods.py [--model DIR] [--rounds 7]

Weights are the matrices of a model (by default the embedded one) and random ones with heavy tails (Student's t).
`hqq` as published (`ranges=1`) is compared with the hqq package in the L1 norm that it watches and in the L0.7 norm
that it minimises, `rtn` with compressed-tensors and bitsandbytes, `mse` with `rtn`. Times are processor time of one
thread, medians over rounds in which the two sides take turns. Prints tables, and one line of JSON. Needs the extra
`test`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bitsandbytes import functional
from compressed_tensors.quantization import QuantizationArgs, quantize  # type: ignore[import-untyped]
from compressed_tensors.quantization.utils import calculate_qparams  # type: ignore[import-untyped]
from hqq.core.quantize import Quantizer  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

import lowbit
from lowbit import native
from lowbit.methods import NoOptions, hqq, mse, rtn
from lowbit.schemes import parse

EMBEDDED = Path(lowbit.__file__).parent / "data" / "wiki-8m"
SEARCHED = ("int4-g128", "int4-g128-asym", "int4-g64-fzero", "int3-g128", "nf4-g64", "fp8-e4m3", "mxfp4", "nvfp4")


@dataclass(frozen=True)
class Quality:
    """Errors of both sides on one weight, as sums over its elements; `ratio` is ours over theirs."""

    claim: str
    weight: str
    norm: str
    ours: float
    theirs: float
    ratio: float


@dataclass(frozen=True)
class Speed:
    """Input bytes per second of both sides, and ours in milliseconds per million weights."""

    claim: str
    ours: float
    theirs: float | None
    milliseconds: float


def weights(model: Path) -> Iterator[tuple[str, Tensor]]:
    """Matrices of the model, then random ones, float32."""
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                if tensor.dim() == 2 and tensor.shape[1] % 64 == 0:
                    yield name, tensor.float()
    dice = torch.Generator().manual_seed(0)
    for freedom in (2, 3, 5):
        for size in (0.02, 1.0):
            square = torch.randn(freedom, 1024, 1024, generator=dice).square().mean(0)
            yield f"random t{freedom} x {size}", torch.randn(1024, 1024, generator=dice) / square.sqrt() * size


def errors(weight: Tensor, decoded: Tensor, p: float) -> float:
    """Sum of |w - w^|**p in float64."""
    return float((decoded.double() - weight.double()).abs().pow(p).sum())


def hqq_package(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What the package's 4-bit group-64 result decodes to once scale and zero point are stored in `dtype`."""
    codes, meta = Quantizer.quantize(
        weight, nbits=4, group_size=64, round_zero=True, axis=1, device="cpu", bitpack=False
    )
    scale, zero = (meta[part].to(dtype).float() for part in ("scale", "zero"))
    decoded: Tensor = ((codes.float() - zero) * scale).reshape(weight.shape)
    return decoded


def hqq_quality(name: str, weight: Tensor) -> Iterator[Quality]:
    """Ours against the package, parameters stored in float16 and unrounded."""
    for kind, dtype in (("f16", torch.float16), ("f32", torch.float32)):
        ours = hqq.quantize(weight, {}, parse(f"int4-g64-fzero-{kind}"), hqq.Options(ranges=1)).dequantize()
        theirs = hqq_package(weight, dtype)
        for p in (1.0, 0.7):
            pair = errors(weight, ours, p), errors(weight, theirs, p)
            yield Quality(f"hqq int4-g64 {kind} / hqq package", name, f"L{p:g}", *pair, pair[0] / pair[1])


def mse_quality(name: str, weight: Tensor) -> Iterator[Quality]:
    """The search against round-to-nearest, squared error."""
    for scheme in map(parse, SEARCHED):
        ours = mse.quantize(weight, {}, scheme, mse.Options()).dequantize()
        theirs = rtn.quantize(weight, {}, scheme, NoOptions()).dequantize()
        pair = errors(weight, ours, 2), errors(weight, theirs, 2)
        yield Quality(f"mse {scheme} / rtn", name, "L2", *pair, pair[0] / pair[1] if pair[1] else 1.0)


def nf4_quality(name: str, weight: Tensor) -> Iterator[Quality]:
    """Round-to-nearest against bitsandbytes, which must be the same."""
    ours = rtn.quantize(weight.view(1, -1), {}, parse("nf4-flat64"), NoOptions()).dequantize().view_as(weight)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    pair = errors(weight, ours, 2), errors(weight, theirs, 2)
    yield Quality("rtn nf4-flat64 / bitsandbytes", name, "L2", *pair, pair[0] / pair[1])


def compressed_tensors_rtn(weight: Tensor) -> Tensor:
    """Symmetric 4-bit, group 128: ranges, scales and codes with the package's own functions."""
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=128)
    groups = weight.view(weight.shape[0], -1, 128)
    scale, _zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes: Tensor = quantize(weight, scale, None, args, dtype=torch.int8)
    return codes


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call on this thread, on which all of it runs: others on the machine count for little."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def timed(
    claim: str, weight: Tensor, ours: Callable[[], object], theirs: Callable[[], object] | None, rounds: int
) -> Speed:
    """Both sides in turns; the first round warms up."""
    pairs = [(seconds(ours), seconds(theirs) if theirs else 0.0) for _ in range(rounds + 1)][1:]
    mine, other = (median(side) for side in zip(*pairs, strict=True))
    size = weight.numel() * weight.element_size() / 1e9
    return Speed(claim, size / mine, size / other if theirs else None, mine * 1e9 / weight.numel())


def speeds(rounds: int) -> Iterator[Speed]:
    """One matrix of 4096 x 1024 in bfloat16, as a checkpoint has it."""
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    flat = weight.view(1, -1)

    def ours(method: Any, scheme: str, view: Tensor = weight) -> Callable[[], object]:
        return lambda: method.quantize(view, {}, parse(scheme), method.METHOD.options())

    yield timed(
        "rtn int4-g128 / compressed-tensors",
        weight,
        ours(rtn, "int4-g128"),
        lambda: compressed_tensors_rtn(weight),
        rounds,
    )
    bnb = lambda: functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    yield timed("rtn nf4-flat64 / bitsandbytes", weight, ours(rtn, "nf4-flat64", flat), bnb, rounds)
    for scheme in ("int4-g128-asym", "int8", "fp8-e4m3", "mxfp4", "nvfp4"):
        yield timed(f"rtn {scheme}", weight, ours(rtn, scheme), None, rounds)
    part = weight[:1024]
    package = lambda: hqq_package(part, torch.float16)
    yield timed("hqq int4-g64 / hqq package", part, ours(hqq, "int4-g64-fzero", part), package, min(rounds, 3))
    for scheme in SEARCHED:
        yield timed(f"mse {scheme}", part, ours(mse, scheme, part), None, 1)


def worst_of(claims: list[Quality]) -> Table:
    """For each claim and norm: the weights, and the mean and the largest ratio with the weight that has it."""
    table = Table("claim", "norm", "weights", "mean ratio", "largest ratio", "on", title="error, ours over theirs")
    groups: dict[tuple[str, str], list[Quality]] = {}
    for claim in claims:
        groups.setdefault((claim.claim, claim.norm), []).append(claim)
    for (name, norm), members in groups.items():
        worst = max(members, key=lambda member: member.ratio)
        mean = sum(member.ratio for member in members) / len(members)
        table.add_row(name, norm, str(len(members)), f"{mean:.5f}", f"{worst.ratio:.5f}", worst.weight)
    return table


def speed_table(results: list[Speed]) -> Table:
    """Bytes of input per second, and time per million weights."""
    table = Table("claim", "ours GB/s", "theirs GB/s", "times as fast", "ms per million", title="4096 x 1024, bfloat16")
    for row in results:
        theirs = ("", "") if row.theirs is None else (f"{row.theirs:.3f}", f"{row.ours / row.theirs:.2f}")
        table.add_row(row.claim, f"{row.ours:.3f}", *theirs, f"{row.milliseconds:.2f}")
    return table


def main() -> None:
    """Measure, then print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides = (hqq_quality, mse_quality, nf4_quality)
    quality = [row for name, weight in weights(options.model) for side in sides for row in side(name, weight)]
    speed = list(speeds(options.rounds))
    console = Console(width=140)
    console.print(worst_of(quality))
    console.print(speed_table(speed))
    machine = {"processor": platform.processor() or platform.machine(), "isa": native.isa(), "torch": torch.__version__}
    print(json.dumps({"machine": machine, "errors": [asdict(q) for q in quality], "speed": [asdict(s) for s in speed]}))


if __name__ == "__main__":
    main()
