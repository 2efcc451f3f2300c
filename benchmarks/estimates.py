"""What calibrated runs take, beside what was estimated before they began.

    python benchmarks/estimates.py MODEL --text FILE [--only REGEX]

Each run is a process of its own: `lowbit quantize` at int4-g64. Memory is anonymous memory at the peak, as the
report has it; time is that of the whole process, of which the estimate leaves out its start and its end.
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
        command = [
            sys.executable,
            "-m",
            "lowbit",
            "quantize",
            model,
            out,
            "--scheme",
            "int4-g64",
            "--calibration",
            text,
        ]
        begin = time.perf_counter()
        done = subprocess.run(
            [*map(str, command), "--calibration", str(text), *run.split()], capture_output=True, text=True, check=False
        )
        took = time.perf_counter() - begin
        if done.returncode:
            return f"| `{run}` | {done.stderr.splitlines()[-1]} | | |"
        memory = json.loads((out / "report.json").read_text())["memory"]
    said = re.search(r"memory: at most .*; about (.*)", done.stderr)
    estimate, peak = (memory[each] / 2**20 for each in ("estimate", "peak"))
    return (
        f"| `{run}` | {estimate:.0f} | {peak:.0f} | {estimate / peak:.2f} | {said[1] if said else ''} | {took:.0f} s |"
    )


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", default="", help="Runs whose arguments match.")
    args = parser.parse_args()
    print("| run | MiB estimated | at the peak | ratio | time estimated | taken |\n|---|---|---|---|---|---|")
    for run in RUNS:
        if re.search(args.only, run):
            print(row(args.model, args.text, run), flush=True)


if __name__ == "__main__":
    main()
