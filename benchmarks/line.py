"""Quantize a synthetic 1.1B-parameter checkpoint under 1 GiB, beside llama.cpp's Q4_0 on the same tensors.

    python benchmarks/synthetic.py /tmp/llama-1b
    python benchmarks/line.py /tmp/llama-1b [--runs 5] [--llama-python PYTHON] [--json]

Each run is a process of its own; the two tools alternate; medians and their ratio are printed. Input files are read
once before, so both find them in the page cache, and free memory is touched. Rates are bytes of the quantized matrices
over seconds and threads.
`--llama-python` is an interpreter with `llama-cpp-python` and `gguf`; without it only lowbit is measured.
Anonymous memory of lowbit's process is sampled from outside.

llama.cpp reads a BF16 GGUF file of the same tensors, keeps embedding and output as they are, and uses as many
threads. lowbit is measured from the plan to the synced, named shards (`verified`), as a whole process with interpreter
start and report (`process`), and without reading back and comparing every weight (`stage`). Each worker does that to a
weight as soon as it is stored; the seconds that they all spend on it are summed and divided by the number of workers,
which is the report's `verified.seconds` when the stage `verify` at the end is added. `stage` is `verified` less that.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_CONVERT = """
import json, sys
from pathlib import Path
import gguf, numpy as np
from safetensors import safe_open
source, target = Path(sys.argv[1]), sys.argv[2]
config = json.loads((source / "config.json").read_text())
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
writer = gguf.GGUFWriter(target, "llama")
writer.add_block_count(config["num_hidden_layers"]); writer.add_context_length(2048)
writer.add_embedding_length(config["hidden_size"]); writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"]); writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(1e-5); writer.add_vocab_size(config["vocab_size"]); writer.add_file_type(32)
import torch
for shard in sorted(source.glob("*.safetensors")):
    with safe_open(shard, "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            new = names.get_name(name, (".weight",))
            if tensor.ndim == 1:
                writer.add_tensor(new, tensor.float().numpy())
            else:
                data = tensor.view(torch.uint8).numpy()
                writer.add_tensor(new, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""

_LLAMA = """
import ctypes, json, sys, time
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = int(sys.argv[3]), llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
params.quantize_output_tensor = False
params.token_embedding_type = 30  # GGML_TYPE_BF16
params.output_tensor_type = 30
start = time.perf_counter()
status = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params))
print(json.dumps({"status": status, "seconds": time.perf_counter() - start}))
"""


def warm(path: Path) -> None:
    """Read every file once, so that the page cache has it."""
    for file in sorted(path.glob("*")) if path.is_dir() else [path]:
        with file.open("rb") as handle:
            while handle.read(2**24):
                pass


def touch_memory(size: int = 3 * 2**30) -> None:
    """Use and free memory, so that a virtual machine has it at hand.

    The first use of a page that its host took back costs more than what is measured here, and would fall on whichever
    tool comes first.
    """
    used = bytearray(b"1") * size
    del used


def run_lowbit(model: Path, out: Path, threads: int, ram: str) -> dict[str, Any]:
    """One run; seconds of the stages and the process, peak anonymous bytes seen from outside, and the report."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "lowbit", "quantize", str(model), str(out), "--scheme", "int4-g128"]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [*command, "--ram", ram, "--threads", str(threads)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.01)
        if process.returncode:
            raise SystemExit(f"lowbit ended with {process.returncode}")
    seconds = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text())
    stages = report["seconds"]
    matrices = sum(row["before"] for row in report["rows"] if row["scheme"])
    verified, verify = stages["quantize"] + stages["verify"], report["verified"]["seconds"]
    return {
        "stage": verified - verify, "verified": verified, "verify": verify,
        "process": seconds, "peak": peak, "matrices": matrices,
    }  # fmt: skip


def run_llama(python: str, gguf: Path, out: Path, threads: int) -> float:
    """Seconds of one `llama_model_quantize` call in a process of its own."""
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [python, "-c", _LLAMA, str(gguf), str(out), str(threads)], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    if result["status"]:
        raise SystemExit(f"llama_model_quantize ended with {result['status']}: {done.stderr[-500:]}")
    return float(result["seconds"])


def summary(runs: list[dict[str, Any]], llama: list[float], threads: int) -> dict[str, Any]:
    """Medians, rates and the ratio."""
    median = {key: statistics.median(run[key] for run in runs) for key in ("stage", "verified", "verify", "process")}
    matrices = runs[0]["matrices"]
    result: dict[str, Any] = {f"{key}_seconds": value for key, value in median.items()}
    result |= {
        "matrices_gb": matrices / 1e9,
        "stage_gb_per_second_per_core": matrices / 1e9 / median["stage"] / threads,
        "verify_share": median["verify"] / median["verified"],
        "verify_share_of_process": median["verify"] / median["process"],
        "peak_anonymous_mib": max(run["peak"] for run in runs) / 2**20,
    }
    if llama:
        result["llama_seconds"] = statistics.median(llama)
        result["llama_over_stage"] = result["llama_seconds"] / median["stage"]
        result["llama_over_verified"] = result["llama_seconds"] / median["verified"]
    return result


def main() -> None:
    """Alternate the two and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ram", default="1GiB")
    parser.add_argument("--llama-python")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowbit-line-", dir=args.model.parent) as folder:
        root = Path(folder)
        warm(args.model)
        if args.llama_python:
            subprocess.run([args.llama_python, "-c", _CONVERT, str(args.model), str(root / "in.gguf")], check=True)
        runs, llama = [], []
        for _ in range(args.runs):
            touch_memory()
            runs.append(run_lowbit(args.model, root / "out", args.threads, args.ram))
            if args.llama_python:
                warm(root / "in.gguf")
                touch_memory()
                llama.append(run_llama(args.llama_python, root / "in.gguf", root / "out.gguf", args.threads))
                warm(args.model)
    result = summary(runs, llama, args.threads)
    print(json.dumps(result) if args.json else "\n".join(f"{key:>32}: {value:.4g}" for key, value in result.items()))


if __name__ == "__main__":
    main()
