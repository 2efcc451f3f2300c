"""Convert a synthetic checkpoint, lossless, beside a plain copy of its files in the same run.

    python benchmarks/convert.py [--layers 12] [--from gptq] [--to compressed-tensors] [--scheme int4-g128] [--runs 3]

Prints megabytes of input a second: of the whole conversion (every weight tried before anything is written, then packed,
written, synced, read back, compared), of its part that tries, and of `cp` with the files synced. The input is read once
before, so that it lies in the page cache; conversion and copy alternate, medians are printed.
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

import lowbit


def make(root: Path, args: argparse.Namespace) -> Path:
    """A Llama-shaped checkpoint in the format to convert from."""
    sizes = ["--layers", str(args.layers), "--vocab", "512", "--distinct", "2", "--hidden", str(args.hidden)]
    script = Path(__file__).with_name("synthetic.py")
    subprocess.run([sys.executable, str(script), str(root / "float"), *sizes], check=True)
    lowbit.quantize(root / "float", root / "in", scheme=args.scheme, format=args.source, threads=args.threads)
    shutil.rmtree(root / "float")
    return root / "in"


def weights(path: Path) -> list[Path]:
    """Weight files of a checkpoint."""
    return sorted(path.glob("*.safetensors"))


def copy(source: Path, out: Path) -> float:
    """Seconds to copy the weight files and sync them."""
    out.mkdir()
    start = time.perf_counter()
    for file in weights(source):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    return time.perf_counter() - start


def measure(root: Path, args: argparse.Namespace) -> dict[str, float]:
    """Rates in MB/s, and their ratio."""
    source = make(root, args)
    size = sum(len(file.read_bytes()) for file in weights(source))
    seconds: dict[str, list[float]] = {"convert": [], "check": [], "copy": []}
    for _ in range(args.runs):
        done = lowbit.convert(source, root / "out", format=args.target, threads=args.threads)
        if not done.lossless or done.seconds is None:
            raise SystemExit(f"{args.source} to {args.target} is not lossless")
        seconds["convert"].append(sum(done.seconds.values()))
        seconds["check"].append(done.seconds["check"])
        seconds["copy"].append(copy(source, root / "copied"))
        shutil.rmtree(root / "out")
        shutil.rmtree(root / "copied")
    rates = {name: size / 1e6 / statistics.median(each) for name, each in seconds.items()}
    return {"input_mb": size / 1e6, **rates, "convert_over_copy": rates["convert"] / rates["copy"]}


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--from", dest="source", default="gptq")
    parser.add_argument("--to", dest="target", default="compressed-tensors")
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where files are made; the system's temporary folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowbit-convert-", dir=args.folder) as folder:
        result = measure(Path(folder), args)
    print(json.dumps(result) if args.json else "\n".join(f"{key:>18}: {value:.4g}" for key, value in result.items()))


if __name__ == "__main__":
    main()
