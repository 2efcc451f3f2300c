"""Decode and prefill beside llama.cpp on the same GGUF files, and the kernels beside a plain read of memory.

    python benchmarks/synthetic.py BIG
    python benchmarks/runtime.py BIG --work DIR [--schemes q4_0 q8_0 q4_k ...] [--threads 2] [--prompt 256]
        [--tokens 32] [--runs 5] [--busy 1] [--opening] [--cpu]

Per scheme the checkpoint is quantized into DIR once (method `ggml`: llama.cpp's own bytes). Then both runtimes read
the same tokens in turn: a prompt (prefill), then token by token (decode). Medians over the runs; a ratio above 1 says
that ours is faster. `share` is the bytes of weights that a token needs, over its time, as a share of what summing an
array of int64 by torch reads (a median over the same runs); `ceiling` is what the ratio of decoding would be at a share
of 1: what reads its weights once, no faster than that loop, cannot be above it. With `--busy N`, the speed of decoding
that is left where another process computes on each of the first N cores, as a share of that without: `kept` and
`kept_by_llama.cpp`.
With `--cpu`, prompts and tokens are timed by the processor time of this process: for one thread of both, on a machine
that others use (with more, who waits for others by looking counts as computing).
With `--opening`, how long it takes to open a file over reading it once (from memory), and the seconds from a second
start with `--cache` to the first token of an answer, modules being imported; then the seconds of a whole process of
each, in turn: from the start of Python to the end of a text of one token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lowbit
from lowbit.runtime.bench import read_rate, seconds
from lowbit.runtime.runner import open_runner

LLAMA = """
import sys, llama_cpp
llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=int(sys.argv[2]), verbose=False)("hello", max_tokens=1)
"""
COMPUTE = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


def made(big: Path, work: Path, scheme: str) -> Path:
    """The GGUF file of a scheme, every matrix in it."""
    out = work / scheme
    if not (out / "lowbit-plan.json").exists() and not list(out.glob("*.gguf")):
        lowbit.quantize(big, out, scheme=scheme, format="gguf", method="ggml", threads=2)
    return next(out.glob("*.gguf"))


class Ours:
    """The native decoder."""

    def __init__(self, file: Path, threads: int, capacity: int) -> None:
        begin = time.perf_counter()
        runner = open_runner(file.parent, threads=threads, context=capacity)
        self.load = time.perf_counter() - begin
        assert runner.engine
        self.engine, self.capacity = runner.engine, capacity
        self.nbytes = sum(packed.panels.nbytes for packed in self.engine.native.matrices.values())

    def prefill(self, ids: list[int]) -> None:
        """A new text."""
        self.session = self.engine.start(self.capacity, "float16")
        self.session.read(torch.tensor(ids))

    def decode(self, token: int) -> None:
        """One more token, and the likeliest after it."""
        self.session.likeliest(token)


class Theirs:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, file: Path, threads: int, capacity: int) -> None:
        import llama_cpp

        begin = time.perf_counter()
        self.model = llama_cpp.Llama(
            str(file), n_ctx=capacity, n_batch=capacity, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.load = time.perf_counter() - begin

    def prefill(self, ids: list[int]) -> None:
        """A new text."""
        self.model.reset()  # type: ignore[no-untyped-call]
        self.model.eval(ids)

    def decode(self, token: int) -> None:
        """One more token, and the likeliest after it."""
        self.model.eval([token])


@contextmanager
def computing(cores: int) -> Iterator[None]:
    """Other processes that never wait, one on each of the first cores."""
    others = [subprocess.Popen([sys.executable, "-c", COMPUTE, str(core)]) for core in range(cores)]
    try:
        time.sleep(0.5 if others else 0)  # they start
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def kept(sides: Mapping[str, Ours | Theirs], busy: int, tokens: int, runs: int) -> dict[str, float]:
    """Share of the decoding speed that is left beside computing processes: of sums, since waits are rare and long."""
    spent = {name: [0.0, 0.0] for name in sides}
    for _ in range(runs):
        for place, cores in enumerate((0, busy)):
            with computing(cores):
                for name, side in sides.items():
                    side.prefill([7])
                    spent[name][place] += sum(seconds(partial(side.decode, 9)) for _ in range(tokens))
    return {name: quiet / beside for name, (quiet, beside) in spent.items()}


def opening(file: Path, threads: int, runs: int) -> dict[str, float]:
    """Medians of the times that it takes to open a file."""
    torch.set_num_threads(threads)

    def start(cache: Path | None) -> None:
        engine = open_runner(file.parent, threads=threads, context=64, cache=cache).engine
        assert engine
        engine.start(64, "float16").read(torch.tensor([7]))

    start(None)  # imports, and the file in memory
    with TemporaryDirectory() as folder:
        start(Path(folder))
        timed: dict[str, Callable[[], object]]
        timed = {"read": file.read_bytes, "fresh": partial(start, None), "second": partial(start, Path(folder))}
        times = [{name: seconds(work) for name, work in timed.items()} for _ in range(runs)]
    read, fresh, second = (statistics.median(each[name] for each in times) for name in timed)
    return {"opening_over_reading": fresh / read, "opening_seconds": fresh, "second_start_seconds": second}


def processes(file: Path, threads: int, runs: int) -> dict[str, float]:
    """Medians of the times from the start of a process to the end of a text of one token."""
    words = ["-m", "lowbit", "generate", str(file.parent), "--prompt", "hello", "--max-tokens", "1"]
    commands = {"process": [*words, "--threads", str(threads)], "llama.cpp": ["-c", LLAMA, str(file), str(threads)]}

    def work(name: str) -> None:
        subprocess.run([sys.executable, *commands[name]], check=True, capture_output=True)

    times = [{name: seconds(partial(work, name)) for name in commands} for _ in range(runs + 1)][1:]
    ours, theirs = (statistics.median(each[name] for each in times) for name in commands)
    return {"process_seconds": ours, "process_seconds_of_llama.cpp": theirs}


def spent(work: Callable[[], object]) -> float:
    """Seconds of processor time of one call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(file: Path, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both, in turn."""
    prompt, tokens, runs, busy = args.prompt, args.tokens, args.runs, args.busy
    timed = spent if args.cpu else seconds
    torch.set_num_threads(threads)
    capacity = prompt + tokens + 8
    sides: dict[str, Ours | Theirs] = {
        "ours": Ours(file, threads, capacity),
        "llama.cpp": Theirs(file, threads, capacity),
    }
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in sides}
    reads = []
    for _ in range(runs):
        reads.append(read_rate())
        for name, side in sides.items():
            found[name]["prefill"].append(timed(partial(side.prefill, [7] * prompt)))
            found[name]["decode"] += [timed(partial(side.decode, 9)) for _ in range(tokens)]
    medians = {name: {what: statistics.median(times) for what, times in each.items()} for name, each in found.items()}
    ours, theirs = medians["ours"], medians["llama.cpp"]
    mine = sides["ours"]
    assert isinstance(mine, Ours)
    left = kept(sides, busy, tokens, runs) if busy else {}
    limit = mine.nbytes / statistics.median(reads)  # seconds of a token
    return {
        "decode_tokens_per_second": 1 / ours["decode"], "decode_ratio": theirs["decode"] / ours["decode"],
        "prefill_tokens_per_second": prompt / ours["prefill"], "prefill_ratio": theirs["prefill"] / ours["prefill"],
        "share": limit / ours["decode"], "ceiling": theirs["decode"] / limit,
        "read_gb_per_second": mine.nbytes / limit / 1e9, "load_seconds": mine.load,
        **{"kept" if name == "ours" else f"kept_by_{name}": value for name, value in left.items()},
    }  # fmt: skip


def main() -> None:
    """Print a line per scheme and number of threads, and all of it as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("big", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=["q4_0", "q8_0", "q4_k", "q6_k", "q2_k", "q3_k", "iq4_xs"])
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--opening", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    results = {}
    for scheme in args.schemes:
        file = made(args.big, args.work, scheme)
        for threads in args.threads:
            found = measure(file, threads, args)
            if args.opening:
                found |= opening(file, threads, args.runs) | processes(file, threads, args.runs)
            results[f"{scheme}:{threads}"] = found
            shown = "  ".join(f"{name} {value:.3g}" for name, value in found.items())
            print(f"{scheme:8} {threads} threads  {shown}", flush=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
