"""Kill a run at random moments, resume it, and compare every file with an uninterrupted run's.

    python benchmarks/resume.py --kills 200 [--model DIR] [--scheme int4-g128] [--json]
    python benchmarks/resume.py --kills 20 --method gptaq --calibration TEXT --samples 8      hidden states included
    python benchmarks/resume.py --kills 20 --format gptq --convert compressed-tensors         kills a conversion

A child process quantizes; the parent sends SIGKILL after a random time, at most the time of a whole run. One child
in two is killed again while it resumes. Children are forked after the imports, so that kills fall into the work and
not into the interpreter's start. Prints how many kills hit a running child, and whether all results are identical.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from lowbit.pipeline import Request, run, run_conversion
from lowbit.stages._changes import Goal
from lowbit.stages.plan import Calibration, Rules

EXCLUDED = ("report.", ".lowbit")  # times and machine differ from run to run


@dataclass(frozen=True)
class Conversion:
    """Of a quantized checkpoint into a format."""

    model: str
    out: Path
    format: str


def child(request: Request | Conversion) -> int:
    """Start the run in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if isinstance(request, Request):
            run(request)
        else:
            run_conversion(request.model, request.out, Goal(request.format, lossy=True), threads=2, shard_bytes=2**20)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def files_of(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a result that must be reproducible."""
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    names = {str(file.relative_to(path)): file for file in found}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in names.items()
        if not name.startswith(EXCLUDED)
    }


def finish(request: Request | Conversion) -> float:
    """Run to the end; returns seconds.

    Raises:
        SystemExit: the run failed.
    """
    start = time.perf_counter()
    _, status = os.waitpid(child(request), 0)
    if status:
        raise SystemExit(f"a run over {request.out} ended with status {status}")
    return time.perf_counter() - start


def interrupt(request: Request | Conversion, longest: float, chance: random.Random) -> bool:
    """Start a run and kill it after a random time; returns whether it was still running."""
    pid = child(request)
    time.sleep(chance.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main() -> int:
    """Run the experiment; exit code 1 if any result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    embedded = Path(__file__).parents[1] / "src/lowbit/data/wiki-8m"
    parser.add_argument("--model", type=Path, default=embedded)
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--calibration")
    parser.add_argument("--convert", metavar="F", help="quantize once, and kill its conversion into this format")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="lowbit-resume-"))
    text = Calibration((args.calibration,), args.samples, 128) if args.calibration else None
    rules = Rules(args.scheme, args.method, args.format, calibration=text)

    def request(name: str) -> Request | Conversion:
        if args.convert and name != "quantized":
            return Conversion(str(root / "quantized"), root / name, args.convert)
        return Request(str(args.model), root / name, rules, threads=2, shard_bytes=2**20)

    if args.convert:
        finish(request("quantized"))
    longest = finish(request("whole"))
    wanted = files_of(root / "whole")
    hits, runs, differing = 0, 0, []
    while hits < args.kills:
        runs += 1
        again = True
        while again and hits < args.kills:
            hits += interrupt(request("killed"), longest, chance)
            again = chance.random() < 0.5
        finish(request("killed"))
        found = files_of(root / "killed")
        differing += [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        shutil.rmtree(root / "killed")
    shutil.rmtree(root)
    result = {"kills": hits, "runs": runs, "files": len(wanted), "differing": differing, "whole_seconds": longest}
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 1 if differing or len(wanted) < 3 else 0


if __name__ == "__main__":
    sys.exit(main())
