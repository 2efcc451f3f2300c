"""What calibrated runs take, beside what was estimated before they began.

    python benchmarks/estimates.py MODEL --text FILE [--only REGEX | --run "--method gptq --ram 6GiB --blocks 0:4"]

Each run is a process of its own: `lowbit quantize` at int4-g64. Memory is anonymous memory at the peak, time that of
all that comes after the estimate was said, as the report has them; beside it that of the whole process. With `--run`
below the table also the peak of each part of calibrating, between two lines of progress: block by block where these
take longer than the five seconds between lines.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
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


def watched(command: Sequence[object]) -> tuple[int, list[str], list[str]]:
    """Exit code of a command, its lines on stderr, and MiB at the peak before each of calibrating."""
    process = subprocess.Popen(
        [str(each) for each in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines, peaks, most, over = list[str](), list[str](), [0], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            with suppress(OSError):  # it has ended
                found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                most[0] = max(most[0], int(found[1]) if found else 0)

    watcher = threading.Thread(target=look)
    watcher.start()
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip())
        share = re.match(r"calibrate: (\d+%)", line)
        if share:
            peaks.append(f"{share[1]} {most[0] // 1024}")
            most[0] = 0
    over.set()
    watcher.join()
    return process.wait(), lines, peaks


def row(model: Path, text: Path, run: str) -> tuple[str, list[str]]:
    """A line of the table, and the peaks of its parts."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        scheme = ("--scheme", "int4-g64", "--calibration", text)
        command = [sys.executable, "-m", "lowbit", "quantize", model, out, *scheme, *run.split()]
        begin = time.perf_counter()
        code, lines, peaks = watched(command)
        took = time.perf_counter() - begin
        if code:
            return f"| `{run}` | {lines[-1]} | | | | | |", peaks
        report = json.loads((out / "report.json").read_text())
    memory, seconds = report["memory"], report["seconds"]
    after = sum(seconds.values()) - seconds["plan"]
    said = re.search(r"memory: at most .*; about (.*)", "\n".join(lines))
    estimate, peak = (memory[each] / 2**20 for each in ("estimate", "peak"))
    times = f"{said[1] if said else ''} | {after:.0f} s | {took:.0f} s"
    return f"| `{run}` | {estimate:.0f} | {peak:.0f} | {estimate / peak:.2f} | {times} |", peaks


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", default="", help="Runs whose arguments match.")
    parser.add_argument("--run", help="Arguments of `lowbit quantize`, in place of those runs.")
    args = parser.parse_args()
    print("| run | MiB estimated | at the peak | ratio | time estimated | taken | whole process |")
    print("|---" * 7 + "|")
    for run in [args.run] if args.run else [run for run in RUNS if re.search(args.only, run)]:
        line, peaks = row(args.model, args.text, run)
        print(line, flush=True)
        if args.run:
            print("MiB at the peak of each part:", ", ".join(peaks))


if __name__ == "__main__":
    main()
