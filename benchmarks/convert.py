"""Convert a synthetic checkpoint beside a plain copy of its files in the same run.

    python benchmarks/convert.py [--layers 12] [--from gptq] [--to compressed-tensors] [--scheme int4-g128] [--runs 3]
                                 [--lossy] [--threads 1,2] [--folder DIR]
                                 [--hidden 4096 --mlp 11008 --kv-heads 32]      the shapes of 7 billion
                                 [--pairs gptq:int4-g128:compressed-tensors,gguf:q8_0:float] [--inputs DIR]

For each number of threads, of whole conversions (every weight tried before anything is written, then packed, written,
synced, read back, compared): megabytes of input a second, milliseconds of processor time for each megabyte, and of the
clock that trying took. Beside them `cp` with the files synced. The input is read once before, so that it lies in the
page cache; conversions and copies alternate, medians are printed. A `--folder` in memory leaves the disk out.

`--pairs` measures several, FROM:SCHEME:TO each, and prints a line of a table for each: what is not lossless goes with
`--lossy`, and is marked. `--inputs` keeps what is converted there for the next run.
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


def make(root: Path, args: argparse.Namespace, source: str, scheme: str) -> Path:
    """A Llama-shaped checkpoint in the format to convert from."""
    out, plain = root / f"{source}-{scheme}", root / "float"
    if out.exists():
        return out
    if not plain.exists():
        sizes = ["--layers", str(args.layers), "--vocab", "512", "--distinct", "2", "--hidden", str(args.hidden)]
        sizes += ["--mlp", str(args.mlp), "--kv-heads", str(args.kv_heads)]
        script = Path(__file__).with_name("synthetic.py")
        subprocess.run([sys.executable, str(script), str(plain), *sizes], check=True)
    lowbit.quantize(plain, out, scheme=scheme, format=source, threads=2)
    return out


def weights(path: Path) -> list[Path]:
    """Weight files of a checkpoint."""
    return sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))


def copy(source: Path, out: Path) -> float:
    """Seconds to copy the weight files and sync them."""
    out.mkdir()
    start = time.perf_counter()
    for file in weights(source):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    return time.perf_counter() - start


def convert(source: Path, out: Path, target: str, lossy: bool, threads: int) -> dict[str, float]:
    """One conversion: seconds by the clock, of the processor, and of the clock while weights were tried; its size."""
    start = time.process_time()
    done = lowbit.convert(source, out, format=target, threads=threads, lossy=lossy)
    processor = time.process_time() - start
    size = sum(file.stat().st_size for file in weights(out)) / 1e6
    shutil.rmtree(out)
    if not (done.lossless or lossy) or done.seconds is None:
        raise SystemExit(f"{source} to {target} is not lossless")
    lost = float(not done.lossless)
    seconds = {"all": sum(done.seconds.values()), "processor": processor, "check": done.seconds["check"]}
    return {**seconds, "output": size, "lost": lost}


def measure(root: Path, source: Path, target: str, args: argparse.Namespace) -> dict[str, float]:
    """Figures by name; those of conversions have the number of threads behind."""
    threads = [int(number) for number in args.threads.split(",")]
    size = sum(len(file.read_bytes()) for file in weights(source)) / 1e6
    first = convert(source, root / "out", target, args.lossy, threads[-1])  # imports, pages of the input
    seconds: dict[str, list[float]] = {}
    for _ in range(args.runs):
        for number in threads:
            for name, each in convert(source, root / "out", target, args.lossy, number).items():
                seconds.setdefault(f"{name}_{number}", []).append(each)
        seconds.setdefault("copy", []).append(copy(source, root / "copied"))
        shutil.rmtree(root / "copied")
    found = {name: statistics.median(each) for name, each in seconds.items()}
    result = {"input_mb": size, "output_mb": first["output"], "lost": first["lost"], "copy_mb_s": size / found["copy"]}
    for number in threads:
        result[f"convert_mb_s_{number}"] = size / found[f"all_{number}"]
        result[f"processor_ms_per_mb_{number}"] = 1e3 * found[f"processor_{number}"] / size
        result[f"check_ms_per_mb_{number}"] = 1e3 * found[f"check_{number}"] / size
    return result


def table(root: Path, inputs: Path, args: argparse.Namespace) -> None:
    """A line for each pair: MB of input a second, and of output, by number of threads."""
    args.lossy, threads = True, args.threads.split(",")
    print("| from, to | input | " + " | ".join(f"{n} threads | output" for n in threads) + " | tried before | `cp` |")
    print("|---" * (4 + 2 * len(threads)) + "|")
    for source, scheme, target in (pair.split(":") for pair in args.pairs.split(",")):
        found = measure(root, make(inputs, args, source, scheme), target, args)
        ratio, lossy = found["output_mb"] / found["input_mb"], " `--lossy`" if found["lost"] else ""
        speeds = [found[f"convert_mb_s_{number}"] for number in threads]
        rates = " | ".join(f"{speed:.0f} | {speed * ratio:.0f}" for speed in speeds)
        tried = f"{found[f'check_ms_per_mb_{threads[0]}'] * speeds[0] / 10:.0f}%"
        name = f"{source} `{scheme}`, {target}{lossy}"
        print(f"| {name} | {found['input_mb']:.0f} | {rates} | {tried} | {found['copy_mb_s']:.0f} |", flush=True)


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--from", dest="source", default="gptq")
    parser.add_argument("--to", dest="target", default="compressed-tensors")
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--lossy", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", default="1,2", help="numbers of them, each is measured")
    parser.add_argument("--folder", type=Path, help="where files are made; the system's temporary folder")
    parser.add_argument("--pairs", help="FROM:SCHEME:TO, several of them with commas between")
    parser.add_argument("--inputs", type=Path, help="where what is converted is made, and stays")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowbit-convert-", dir=args.folder) as folder:
        root, inputs = Path(folder), args.inputs or Path(folder)
        if args.pairs:
            table(root, inputs, args)
        else:
            found = measure(root, make(inputs, args, args.source, args.scheme), args.target, args)
            lines = "\n".join(f"{key:>24}: {value:.4g}" for key, value in found.items())
            print(json.dumps(found) if args.json else lines)


if __name__ == "__main__":
    main()
