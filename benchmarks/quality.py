"""Calibrated quantization beside other packages: same model, same windows of tokens, same bits, same evaluator.

    python benchmarks/quality.py --work DIR --model DIR --calibration FILE --text FILE --python llmcompressor=PATH ...
        [--seeds 0 1 2] [--only REGEX] [--threads 2] [--dtype auto] [--again] [--summary] [--json]

Every run is a process of its own, one at a time; its seconds, its perplexity and its mean loss per window are kept in
DIR/results.jsonl, so that the benchmark goes on where it was and repeats nothing. Those of the README's table are in
benchmarks/results/quality. `--again` repeats runs that were timed beside other work, `--summary` runs nothing. `--only`
selects runs by name, as `gptq:int4-g128`, `^lowbit:`. Options of our methods follow after `@`, as in `--ours autoround
gptq+tune@tune.target=text`. `--device cuda` runs ours, llm-compressor and auto-round there. `--dtype float32` (or
float16, which the AWQ of gptqmodel wants) has peers load the model so, for processors without units for bfloat16: torch
takes a hundred times as long there (ours looks for them). Packages need not share an interpreter: `--python NAME=PATH`
names each one's; those of this interpreter are found without it, others are left out.

Seconds are those of calibrating and quantizing alone, the whole process is given apart. Perplexity is that of
`lowbit evaluate`: peers' weights are written as they compute with them, in float32. Intervals are of the mean over
seeds of the change in log-perplexity, by the paired block bootstrap of `lowbit evaluate`. The divergence KL(original ||
quantized), a sharper judge near the original, is in millinats per token, of the text's first 65,536.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from math import exp, nan
from pathlib import Path
from statistics import median
from typing import Any, final

import numpy as np
import torch
from torch import nn

from lowbit.metrics import Score
from lowbit.metrics._blocks import make_blocks
from lowbit.stages._model import open_blueprint
from lowbit.stages._windows import Windows, cut, encode, read_text
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.evaluate import _score
from lowbit.stages.samples import read_samples

Record = dict[str, Any]
# Bits, group, and whether zero is in the middle of the grid.
CELLS = {
    "int4-g128": (4, 128, True),
    "int3-g128": (3, 128, True),
    "int4-g64": (4, 64, True),
    "int2-g64": (2, 64, False),
}
# Methods whose packages take other zero points than the cell's by default: whole ones for AWQ, fractions for HQQ.
ZEROS = {"awq": "-asym", "hqq": "-fzero"}
PEERS = {
    "gptq": ("llmcompressor", "gptqmodel"),
    "awq": ("llmcompressor", "gptqmodel", "auto-round"),
    "autoround": ("auto-round",),
    "hqq": ("hqq",),
}
MODULES = {"llmcompressor": "llmcompressor", "gptqmodel": "gptqmodel", "auto-round": "auto_round", "hqq": "hqq"}
OURS = ("rtn", "mse", "hqq", "gptq", "awq", "awq+gptq", "rotate+gptq", "gptaq", "autoround", "awq+autoround")
FREE = ("rtn", "mse", "hqq")  # of data
DIVERGENCE = 2**16  # tokens
QUIET = 0.05  # share of all cores that others, the hypervisor among them, may have had for a time to count


@final
@dataclass(frozen=True)
class Run:
    """One quantization."""

    tool: str
    method: str
    cell: str
    seed: int

    def __str__(self) -> str:
        return f"{self.tool}:{self.method}:{self.cell}:{self.seed}"

    @property
    def name(self) -> str:
        """All of it but the seed."""
        return f"{self.tool}:{self.method}"

    @property
    def scheme(self) -> str:
        """As lowbit spells it."""
        symmetric = CELLS[self.cell][2]
        return self.cell + ZEROS.get(self.method.split("+")[0], "" if symmetric else "-asym")


@final
@dataclass(frozen=True)
class Bench:
    """Where everything is."""

    options: argparse.Namespace

    @cached_property
    def work(self) -> Path:
        """Folder of results."""
        path: Path = self.options.work
        path.mkdir(parents=True, exist_ok=True)
        return path.resolve()

    @cached_property
    def interpreters(self) -> dict[str, str]:
        """Python of each peer that is there."""
        here = {name: sys.executable for name, module in MODULES.items() if find_spec(module)}
        return here | dict(pair.split("=", 1) for pair in self.options.python)

    @cached_property
    def done(self) -> dict[str, Record]:
        """Results by run, the last of each."""
        path = self.work / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {record["run"]: record for record in map(json.loads, lines)}

    def keep(self, record: Record) -> None:
        """Append a result."""
        self.done[record["run"]] = record
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def runs(self) -> Iterator[Run]:
        """Those asked for, with peers that are there."""
        for seed in self.options.seeds:
            for cell in CELLS:
                names = [(tool, method) for method, tools in PEERS.items() for tool in tools]
                names = [pair for pair in names if pair[0] in self.interpreters]
                for tool, method in names + [("lowbit", method) for method in self.options.ours]:
                    run = Run(tool, method, cell, seed)
                    if re.search(self.options.only, str(run)) and (seed == min(self.options.seeds) or not _free(run)):
                        yield run

    def windows(self, seed: int) -> Path:
        """Tokens to calibrate on, the same that `lowbit quantize --seed` takes."""
        path = self.work / f"windows-{seed}.npy"
        if not path.exists():
            source, count, length = self.options.calibration, self.options.samples, self.options.length
            found = read_samples(source, open_checkpoint(self.options.model), samples=count, length=length, seed=seed)
            np.save(path, found.ids.numpy())
        return path

    @cached_property
    def original(self) -> nn.Module:
        """The model itself, float32."""
        return open_blueprint(open_checkpoint(self.options.model), torch.float32).resident()

    def _text(self, tokens: int | None) -> Windows:
        text = read_text(self.options.text)
        encoded = encode([open_checkpoint(self.options.model)], text, tokens, None)
        return cut(text, encoded, self.options.context, None)

    @cached_property
    def texts(self) -> dict[str, Windows]:
        """What is scored: for the loss, and for the divergence."""
        tokens = self.options.tokens
        return {"nll": self._text(tokens), "kl": self._text(min(tokens or DIVERGENCE, DIVERGENCE))}

    def change(self, ours: Sequence[str], theirs: Sequence[str], kind: str) -> Score:
        """Mean over runs of paired differences."""
        means = [np.array([self.done[run]["windows"][kind] for run in runs]) for runs in (ours, theirs)]
        counts = self.texts[kind].counts
        return make_blocks(counts).change(np.repeat((means[0] - means[1]).mean(0), counts))


def _free(run: Run) -> bool:
    return run.method in FREE


def command(bench: Bench, run: Run, out: Path) -> list[str]:
    """What to start."""
    options, (bits, group, symmetric) = bench.options, CELLS[run.cell]
    if run.tool == "lowbit":
        method, *more = run.method.split("@")
        line = ["-m", "lowbit", "quantize", options.model, out, "--scheme", run.scheme, "--method", method]
        text = ["--calibration", options.calibration, "--samples", options.samples, "--sequence-length", options.length]
        line += ["--format", "hqq"] if run.scheme.endswith("fzero") else []
        line += ["--option", f"iterations={options.iterations}"] if "autoround" in method and not more else []
        line += [part for option in more for part in ("--option", option)]
        line += [] if _free(run) else [*text, "--seed", run.seed]
        line += [] if _free(run) else ["--device", options.device]
        return [sys.executable, *map(str, line), "--threads", str(options.threads)]
    job = {
        "tool": run.tool, "method": run.method, "model": str(options.model), "windows": str(bench.windows(run.seed)),
        "out": str(out), "bits": bits, "group": group, "sym": symmetric and run.method not in ZEROS, "batch": 8,
        "iterations": options.iterations, "threads": options.threads, "seed": run.seed,
        "device": options.device, "dtype": options.dtype,
    }  # fmt: skip
    # -P: a folder beside the script is no place for its imports.
    return [bench.interpreters[run.tool], "-P", str(Path(__file__).with_name("_peers.py")), json.dumps(job)]


def execute(bench: Bench, run: Run) -> Record:
    """Quantize in another process, then score."""
    out = bench.work / "weights" / str(run).replace(":", "_")
    remove(out)
    out.parent.mkdir(exist_ok=True)
    threads = str(bench.options.threads)
    # gptqmodel's pool of workers must not be smaller than one of its parts, which on two cores it is by default.
    more = {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    others, start = others_time(), time.perf_counter()
    done = subprocess.run(command(bench, run, out), env=os.environ | more, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    others = (others_time() - others) / (wall * (os.cpu_count() or 1))
    record = {"run": str(run), **asdict(run), "wall": wall, "threads": int(threads), "device": bench.options.device}
    record |= {"dtype": bench.options.dtype, "others": others, "quiet": others < QUIET}
    (bench.work / "logs").mkdir(exist_ok=True)
    (bench.work / "logs" / f"{out.name}.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        return record | {"error": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:300]}
    if run.tool == "lowbit":
        shutil.copy(out / "report.json", bench.work / "logs" / f"{out.name}.json")
        stages = json.loads((out / "report.json").read_text())["seconds"]
        record |= {"seconds": stages, "quantize": stages.get("calibrate", 0.0) + stages["quantize"]}
    else:
        facts = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"'))
        record |= facts | {"quantize": facts["seconds"]["quantize"]}
    record |= score(bench, out)
    remove(out)
    return record


def others_time() -> float:
    """Seconds of cores, since the machine started, that neither idled nor worked for this benchmark. Linux."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
    idle, waiting = fields[3:5]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def remove(out: Path) -> None:
    """Weights, ours or as a package saved them: what they score is kept, and they would fill the disk."""
    for path in (out, Path(f"{out}.own")):
        shutil.rmtree(path, ignore_errors=True)


def score(bench: Bench, path: Path) -> Record:
    """Perplexity, and mean divergence from the original; both means of each window too.

    The evaluator's own loop: its result has no values per token.
    """
    model = open_blueprint(open_checkpoint(path), torch.float32).resident()
    means, windows = {}, {}
    for kind, models in (("nll", [model]), ("kl", [bench.original, model])):
        text = bench.texts[kind]
        with torch.inference_mode():
            values = _score(models, text, 4, lambda *_: None)[kind]
        means[kind] = float(values.mean())
        parts = np.split(values, np.cumsum(text.counts)[:-1])
        windows[kind] = [round(float(part.mean()), 6) for part in parts]
    return {"perplexity": exp(means["nll"]), "kl": means["kl"], "windows": windows}


def summarise(bench: Bench) -> Record:
    """By cell: the median of each tool and method over seeds, and our best against the best of the others."""
    found: Record = {"original": bench.done["original"]["perplexity"], "cells": {}}
    good = [record for record in bench.done.values() if "perplexity" in record and "cell" in record]
    for cell in CELLS:
        rows: dict[str, Record] = {}
        for name in sorted({f"{r['tool']}:{r['method']}" for r in good if r["cell"] == cell}):
            mine = [r for r in good if r["cell"] == cell and f"{r['tool']}:{r['method']}" == name]
            timed = [r for r in mine if conditions(r)[::2] == ("cpu", "auto")] or mine
            quiet = [r for r in timed if r["quiet"]]
            rows[name] = {
                "perplexity": median(r["perplexity"] for r in mine), "seeds": [r["seed"] for r in mine],
                "kl": median(r["kl"] for r in mine),
                "quantize": median(r["quantize"] for r in quiet or timed), "quiet": bool(quiet),
                "wall": median(r["wall"] for r in quiet or timed),
            }  # fmt: skip
        found["cells"][cell] = {"rows": rows, "comparisons": list(compare(bench, cell, rows))}
    found["errors"] = {r["run"]: r["error"] for r in bench.done.values() if "error" in r}
    return found


def compare(bench: Bench, cell: str, rows: dict[str, Record]) -> Iterator[Record]:
    """Each of our methods with each peer that has it, and the best of both."""
    ours, peers = ([name for name in rows if name.startswith("lowbit:") == ours] for ours in (True, False))
    pairs = [(one, other) for one in ours for other in peers if one.split(":")[1] == other.split(":")[1]]
    if ours and peers:
        pairs.append((min(ours, key=lambda n: rows[n]["perplexity"]), min(peers, key=lambda n: rows[n]["perplexity"])))
    for one, other in pairs:
        seeds = sorted({*rows[one]["seeds"]} & {*rows[other]["seeds"]})
        if seeds:
            runs = [[f"{name}:{cell}:{seed}" for seed in seeds] for name in (one, other)]
            scores = {kind: bench.change(runs[0], runs[1], kind) for kind in bench.texts}
            change = {kind: asdict(score) for kind, score in scores.items()}
            yield {"ours": one, "peer": other, "seeds": seeds, "change": change, **times(bench, runs)}


def times(bench: Bench, runs: Sequence[Sequence[str]]) -> Record:
    """Median ratio of seconds over the seeds that both ran in the same way; of quiet ones, if there are any."""
    pairs = [(bench.done[one], bench.done[other]) for one, other in zip(*runs, strict=True)]
    pairs = [pair for pair in pairs if len({conditions(record) for record in pair}) == 1]
    quiet = [pair for pair in pairs if all(r["quiet"] for r in pair)]
    chosen = quiet or pairs
    ratios = {key: median(a[key] / b[key] for a, b in chosen) if chosen else nan for key in ("quantize", "wall")}
    return {"time": ratios, "quiet": bool(quiet), "device": chosen[0][0].get("device", "cpu") if chosen else None}


def conditions(record: Record) -> tuple[str, int, str]:
    """What times depend on: kind of device, threads, and the type in which peers loaded the model."""
    return record.get("device", "cpu"), record["threads"], record.get("dtype", "auto")


def show(found: Record) -> None:
    """Two tables per cell."""
    print(f"original {found['original']:.3f}")
    for cell, part in found["cells"].items():
        print(f"\n{cell:<28} {'perplexity':>10} {'KL/1000':>8} {'seeds':>6} {'quantize':>9} {'process':>9}")
        for name, row in sorted(part["rows"].items(), key=lambda item: item[1]["perplexity"]):
            noise = "" if row["quiet"] else "  (timed beside other work)"
            seconds = f"{row['quantize']:>8.1f}s {row['wall']:>8.1f}s{noise}"
            print(f"  {name:<26} {row['perplexity']:>10.3f} {1000 * row['kl']:>8.3f} {len(row['seeds']):>6} {seconds}")
        for row in part["comparisons"]:
            place = f" on {row['device']}" + ("" if row["quiet"] else " (noisy)")
            ratios = f"time x{row['time']['quantize']:.2f}, process x{row['time']['wall']:.2f}{place}"
            ratios = ratios if row["device"] else "not timed in the same way"
            print(f"  {row['ours']} - {row['peer']}: {verdict(row['change'])}, {len(row['seeds'])} seeds; {ratios}")
    for run, error in found["errors"].items():
        print(f"failed: {run}: {error}")


def verdict(change: Record) -> str:
    """Differences with their intervals, in thousandths."""
    words = {"nll": "log-perplexity", "kl": "KL"}
    parts = []
    for kind, row in change.items():
        low, high = (1000 * (nan if row[end] is None else row[end]) for end in ("low", "high"))
        parts.append(f"{words[kind]} {1000 * row['value']:+.2f} [{low:+.2f}, {high:+.2f}] / 1000")
    return "; ".join(parts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    for name in ("model", "calibration", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--ours", nargs="+", default=OURS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", default="")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float16", "float32"))
    for name in ("again", "summary", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then print the table."""
    bench = Bench(arguments())
    settings = {name: getattr(bench.options, name) for name in ("samples", "length", "context", "tokens", "iterations")}
    settings |= {name: Path(getattr(bench.options, name)).name for name in ("model", "calibration", "text")}
    kept = bench.done.get("settings", {}).get("settings", settings)
    if kept != settings:
        sys.exit(f"{bench.work} has results of other settings, {kept}; take another folder")
    torch.set_num_threads(bench.options.threads)
    if "original" not in bench.done:
        bench.keep({"run": "settings", "settings": settings})
        bench.keep({"run": "original", **score(bench, bench.options.model)})
    for run in bench.runs() if not bench.options.summary else ():
        before = bench.done.get(str(run))
        if before is None or (bench.options.again and ("error" in before or not before["quiet"])):
            print(f"{time.strftime('%H:%M:%S')} {run}", file=sys.stderr, flush=True)
            bench.keep(execute(bench, run))
    found = summarise(bench)
    print(json.dumps(found)) if bench.options.json else show(found)


if __name__ == "__main__":
    main()
