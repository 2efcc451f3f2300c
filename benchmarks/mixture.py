"""A mixture of llama.cpp's types, Q4_K_M, of a synthetic checkpoint: all of our command beside `llama_model_quantize`.

    python benchmarks/mixture.py [--layers 22] [--threads 2] [--runs 3] [--methods ggml,ggml_fit] [--folder DIR]

The checkpoint has the shapes of 1.1 billion parameters, in bfloat16; fewer `--layers` keep embedding and output.
llama.cpp reads a float16 GGUF file of the same tensors, without an importance matrix, and only its call is timed. Of
ours the `process` is timed, from the start of the interpreter to the verified file and the report, its stages
`quantize` and `verify` (`stages`), and what comes before and after them (`around`: imports, plan, report). Its modules
are compiled, as those of an installation are: the run that warms up leaves their bytecode. `ggml` finds the codes that
llama.cpp finds, `ggml_fit`, the default, others of less error. All take turns after one run each that warms up; medians
and their ratios are printed. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lowbit

_LLAMA = """
import ctypes, json, sys, time
import llama_cpp
given = llama_cpp.llama_model_quantize_default_params()
given.nthread, given.ftype = int(sys.argv[3]), llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
start = time.perf_counter()
status = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(given))
print(json.dumps({"status": status, "seconds": time.perf_counter() - start}))
"""


def make(root: Path, layers: int, threads: int) -> tuple[Path, Path]:
    """The checkpoint, and a GGUF file of it in float16."""
    script = Path(__file__).with_name("synthetic.py")
    subprocess.run(
        [sys.executable, str(script), str(root / "in"), "--layers", str(layers), "--distinct", "2"], check=True
    )
    lowbit.quantize(root / "in", root / "f16", format="gguf", sets={".": "f16"}, threads=threads)
    return root / "in", next((root / "f16").glob("*.gguf"))


def ours(model: Path, out: Path, method: str, threads: int) -> dict[str, float]:
    """Seconds of one command, and of its stages."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "lowbit",
        "quantize",
        str(model),
        str(out),
        "--format",
        "gguf",
        "--scheme",
        "q4_k_m",
    ]
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command += ["--method", method, "--threads", str(threads)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True, env=compiled)
    seconds, each = time.perf_counter() - start, json.loads((out / "report.json").read_text())["seconds"]
    stages = each["quantize"] + each["verify"]
    return {"process": seconds, "stages": stages, "around": seconds - stages}


def theirs(source: Path, out: Path, threads: int) -> float:
    """Seconds of one call of llama.cpp, in a process of its own."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", _LLAMA, str(source), str(out), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    if result["status"]:
        raise SystemExit(f"llama_model_quantize ended with {result['status']}: {done.stderr[-500:]}")
    return float(result["seconds"])


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians by name, and how many times as long llama.cpp takes."""
    model, source = make(root, args.layers, args.threads)
    seconds: dict[str, list[float]] = {}
    for _ in range(args.runs + 1):
        for method in args.methods.split(","):
            for name, each in ours(model, root / "out", method, args.threads).items():
                seconds.setdefault(f"{method}_{name}", []).append(each)
        seconds.setdefault("llama", []).append(theirs(source, root / "out.gguf", args.threads))
    median = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    compared = {name: each for name, each in median.items() if name != "llama" and not name.endswith("around")}
    ratios = {f"llama_over_{name}": median["llama"] / each for name, each in compared.items()}
    return {"layers": args.layers, "threads": args.threads, **median, **ratios}


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", default="ggml,ggml_fit")
    parser.add_argument("--folder", type=Path, help="where files are made; the system's temporary folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowbit-mixture-", dir=args.folder) as folder:
        result = measure(Path(folder), args)
    print(json.dumps(result) if args.json else "\n".join(f"{key:>28}: {value:.4g}" for key, value in result.items()))


if __name__ == "__main__":
    main()
