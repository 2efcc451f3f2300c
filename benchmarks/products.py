"""Products beside those of PyTorch's own int4, int8 and float8 kernels and of bitsandbytes, on one processor.

    python benchmarks/products.py [--threads 1 2] [--tokens 1 256] [--rounds 5]

Shapes are those of a Llama of 1.1B parameters. Sides take turns, round by round, with a rest before each; printed are
ratios of medians: ours is faster above 1. A weight is there so many times that no cache holds all of them: one token is
multiplied by each, more tokens by one. Every peer gets float32 and bfloat16 inputs, and the faster of the two counts;
ours are float32. Peers compute with inputs as they are (bitsandbytes int8: rounded to int8 by row, `_scaled_mm`: to
float8); ours rounds them to int8, beside FP8 not at all (one token) or to 16 bits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
from torch import Tensor

from lowbit.native import isa
from lowbit.runtime.bench import seconds
from lowbit.runtime.panels import pack_noise
from lowbit.schemes import parse

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
ALL = 2**27  # bytes of weights that one token is multiplied by in turn, at least
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
GROUP = 64
Work = Callable[..., object]


@final
@dataclass(frozen=True)
class Case:
    """Tokens that are multiplied at once, and threads."""

    tokens: int
    threads: int


def torch_int4(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """`_weight_int4pack_mm_for_cpu`: codes of 4 bits, a scale and a zero point for each group."""
    codes = torch.randint(0, 16, shape, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(shape[1] // GROUP, shape[0], 2, dtype=dtype)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def torch_int8(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """`_weight_int8pack_mm`: a scale for each row."""
    codes, scales = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0], dtype=dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scales)


def torch_fp8(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """Made floats for each product, a scale for each row: what is left where a processor has no kernel for float8."""
    codes, scales = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(shape[0], 1, dtype=dtype)
    return lambda x: x @ (codes.to(dtype) * scales).T


def torch_scaled(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """`_scaled_mm`: both sides in float8, a scale for each row of the weight and each token."""
    codes, scales = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(1, shape[0])

    def multiply(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[0], 1)
        return torch._scaled_mm(x.to(codes.dtype), codes.T, scale_a=ones, scale_b=scales, out_dtype=dtype)

    return multiply


def bitsandbytes_nf4(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """What `Linear4bit` calls; where there is no AVX-512, it dequantizes and multiplies floats."""
    library: Any = import_module("bitsandbytes")
    packed, state = library.functional.quantize_4bit(torch.randn(shape, dtype=dtype), blocksize=GROUP, quant_type="nf4")
    return lambda x: library.matmul_4bit(x, packed, state)


def bitsandbytes_int8(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """What `Linear8bitLt` calls; where there is no AVX-512, it multiplies integers as float32."""
    library: Any = import_module("bitsandbytes")
    layer = library.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, device="cpu")
    layer.weight.data = torch.randn(shape)
    made: Work = layer.to("cpu").eval()
    return made


PEERS: dict[str, tuple[str, Callable[[tuple[int, int], torch.dtype], Work]]] = {
    "torch int4pack": ("int4-g64-asym", torch_int4),
    "torch int8pack": ("int8-row", torch_int8),
    "torch fp8": ("fp8-e4m3-row", torch_fp8),
    "torch _scaled_mm": ("fp8-e4m3-row", torch_scaled),
    "bitsandbytes nf4": ("nf4-g64", bitsandbytes_nf4),
    "bitsandbytes int8": ("int8-row", bitsandbytes_int8),
}


def beyond_caches() -> int:
    """Bytes that no cache holds; of a shared one a virtual machine may be told all (Linux: sizes in KiB)."""
    sizes = [int(file.read_text().strip().removesuffix("K")) * 1024 for file in CACHES.glob("index*/size")]
    return max([ALL, *(2 * size for size in sizes)])


def sides(peer: str, shape: tuple[int, int], alone: bool) -> dict[str, tuple[torch.dtype, list[Work]]]:
    """Of ours, and of the peer with either dtype of inputs: `alone` as many weights as no cache holds, else one."""
    scheme, make = PEERS[peer]
    count = beyond_caches() * 8 // (shape[0] * shape[1] * parse(scheme).grid.bits) if alone else 1
    found: dict[str, tuple[torch.dtype, list[Work]]] = {}
    found["ours"] = torch.float32, [pack_noise(parse(scheme), shape).matrix() for _ in range(count)]
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = dtype, [make(shape, dtype) for _ in range(count)]
    return found


def multiply_all(weights: list[Work], x: Tensor, more: dict[str, int]) -> None:
    """Each by the same inputs."""
    for weight in weights:
        weight(x, **more)


def rested(run: Callable[[], object]) -> float:
    """Its seconds, after a rest: PyTorch's threads look for work for milliseconds after they worked."""
    time.sleep(0.05)
    return seconds(run)


def ratio(works: dict[str, tuple[torch.dtype, list[Work]]], shape: tuple[int, int], case: Case, rounds: int) -> float:
    """The peer's time over ours."""
    torch.set_num_threads(case.threads)
    runs: dict[str, Callable[[], object]] = {}
    for name, (dtype, weights) in works.items():
        used = weights if case.tokens == 1 else weights[:1]
        x = torch.randn(case.tokens, shape[1]).to(dtype)
        runs[name] = partial(multiply_all, used, x, {"threads": case.threads} if name == "ours" else {})
    with torch.inference_mode():
        for run in runs.values():
            run()
        times = [{name: rested(run) for name, run in runs.items()} for _ in range(rounds)]
    ours, *theirs = (median(each[name] for each in times) for name in runs)
    return min(theirs) / ours


def main() -> None:
    """Print a line per peer, tokens and threads, and all of it as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    for name, default in (("threads", [1, 2]), ("tokens", [1, 256])):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cases = [Case(tokens, threads) for tokens in args.tokens for threads in args.threads]
    results = {}
    for peer in args.peers:
        found = {shape: sides(peer, shape, 1 in args.tokens) for shape in SHAPES}
        for case in cases:
            ratios = [ratio(found[shape], shape, case, args.rounds) for shape in SHAPES]
            results[f"{peer}:{case.tokens}:{case.threads}"] = ratios
            shown = "  ".join(f"{each:.2f}" for each in ratios)
            print(f"{peer:22} {case.tokens:4} tokens  {case.threads} threads  {shown}", flush=True)
    print(json.dumps({"isa": isa(), "torch": torch.__version__, "shapes": SHAPES, "ratios": results}))


if __name__ == "__main__":
    main()
