"""What calibrated runs take, beside what was estimated before they began.

    python benchmarks/estimates.py MODEL --text FILE [--only REGEX]

Each run is a process of its own: `lowbit quantize` at int4-g64. Memory is anonymous memory at the peak, time that of
all that comes after the estimate was said, as the report has them; beside it that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

RUNS = (
    "--method gptq --threads 2 --samples 128 --sequence-length 512",
    "--method gptq --threads 1 --samples 128 --sequence-length 512",
    "--method gptq --threads 2 --samples 128 --sequence-length 512 --ram 540MiB",
    "--method gptq --threads 1 --samples 16 --sequence-length 256",
    "--method gptaq --threads 2 --samples 32 --sequence-length 512",
    "--method rotate+gptq --threads 2 --samples 32 --sequence-length 512",
    "--method autoround --threads 2 --samples 128 --sequence-length 512 --option iterations=6",
    "--method autoround --threads 1 --samples 128 --sequence-length 512 --option iterations=6",
    "--method autoround --threads 2 --samples 32 --sequence-length 128 --option iterations=20",
    "--method autoround --threads 2 --samples 8 --sequence-length 1024 --option iterations=3",
    "--method omniquant --threads 2 --samples 16 --sequence-length 512 --option epochs=1",
)


def row(model: Path, text: Path, run: str) -> str:
    """A line of the table."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        scheme = ("--scheme", "int4-g64", "--calibration", text)
        command = [sys.executable, "-m", "lowbit", "quantize", model, out, *scheme, *run.split()]
        begin = time.perf_counter()
        done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
        took = time.perf_counter() - begin
        if done.returncode:
            return f"| `{run}` | {done.stderr.splitlines()[-1]} | | | | | |"
        report = json.loads((out / "report.json").read_text())
    memory, seconds = report["memory"], report["seconds"]
    after = sum(seconds.values()) - seconds["plan"]
    said = re.search(r"memory: at most .*; about (.*)", done.stderr)
    estimate, peak = (memory[each] / 2**20 for each in ("estimate", "peak"))
    times = f"{said[1] if said else ''} | {after:.0f} s | {took:.0f} s"
    return f"| `{run}` | {estimate:.0f} | {peak:.0f} | {estimate / peak:.2f} | {times} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", default="", help="Runs whose arguments match.")
    args = parser.parse_args()
    print("| run | MiB estimated | at the peak | ratio | time estimated | taken | whole process |")
    print("|---" * 7 + "|")
    for run in RUNS:
        if re.search(args.only, run):
            print(row(args.model, args.text, run), flush=True)


if __name__ == "__main__":
    main()
