"""Recipes of `lowbit quantize` beside each other: how far each one's predictions are from the original's.

    python benchmarks/recipes.py --calibration FILE --text FILE [--model DIR] [--samples 16] [--sequence-length 256]
        [--tokens 12000] [--context 256] [--seeds 0] [--threads 1] [--schemes S...] [--json] RECIPE...

A recipe is what follows MODEL and OUT on the command line, in quotes: "--scheme int3-g64 --method gptq+eora". Each is
calibrated on the same windows (`--calibration`, `--samples`, `--sequence-length`, `--seed` are added), and scored
against the original on the same tokens. Recipes that quantize a part (`--blocks 0:2`) are scored so. With `--schemes`
all recipes are run with each of these, as

    python benchmarks/recipes.py --calibration FILE --text FILE --schemes q4_k_m q3_k_m q2_k iq4_xs -- \
        "--format gguf --method imatrix" "--format gguf" "--format gguf --method gptq"

which is llama.cpp's own encoder, the fitted one on the same importance and mixture, and GPTQ in the same types.

Printed are the divergence KL(original || quantized) in nats per token with its 95% interval, the change of log
perplexity, and both less those of the first recipe (of that scheme), paired by token; over seeds, the mean for each
token. And, of the weights quantized, the output error on calibration rows that were held out over that of `rtn`, the
geometric mean. The figures in docs/methods/ that name no other script are this one's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from torch import nn

import lowbit
from lowbit.metrics import Blocks, Score, Values
from lowbit.metrics._blocks import make_blocks
from lowbit.stages._adapter import ADAPTER
from lowbit.stages._model import open_blueprint
from lowbit.stages._windows import Windows, cut, encode, read_text
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.evaluate import _open, _score

DATA = Path(lowbit.__file__).parent / "data"


def quantize(options: argparse.Namespace, recipe: str, seed: int, out: Path) -> None:
    """One run of the command line.

    Raises:
        SystemExit: it failed, with what it said.
    """
    text = ["--calibration", options.calibration, "--samples", options.samples, "--seed", seed]
    text += ["--sequence-length", options.sequence_length, "--threads", options.threads]
    line = ["-m", "lowbit", "quantize", options.model, out, *shlex.split(recipe), *text]
    done = subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr.strip() or done.stdout.strip()}")


@torch.inference_mode()
def score(original: nn.Module, windows: Windows, out: Path) -> dict[str, Values]:
    """Divergence and change of the loss for every scored token."""
    (made,) = _open(out, None, out / ADAPTER if (out / ADAPTER).exists() else None)
    found = _score([original, open_blueprint(made, torch.float32).resident()], windows, 4, lambda *_: None)
    return {"kl": found["kl"], "change": found["nll"] - found["reference_nll"]}


def held_out(out: Path) -> list[float]:
    """Each weight's output error over that of `rtn`; nothing where no rows were held out."""
    outcomes = [row["outcome"] for row in json.loads((out / "report.json").read_text())["rows"] if row["outcome"]]
    return [each["against_rtn"] for each in outcomes if each.get("against_rtn")]


def measure(
    options: argparse.Namespace, original: nn.Module, windows: Windows, recipe: str
) -> tuple[dict[str, Values], list[float]]:
    """Values per token of one recipe, the mean over seeds, and output errors on rows held out."""
    found, errors = [], list[float]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            quantize(options, recipe, seed, Path(folder) / "out")
            found.append(score(original, windows, Path(folder) / "out"))
            errors += held_out(Path(folder) / "out")
            shutil.rmtree(Path(folder) / "out")
    return {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}, errors


def summarise(blocks: Blocks, found: dict[str, Values], first: dict[str, Values]) -> dict[str, Score]:
    """Means with their intervals, and those of the differences from the first recipe."""
    means = {name: blocks.mean(values) for name, values in found.items()}
    return means | {f"{name} - first": blocks.change(found[name] - first[name]) for name in found if found is not first}


def show(recipe: str, scores: dict[str, Score]) -> str:
    """A recipe and a line for each of its numbers."""
    lines = [f"  {name:<15} {each.value:+.5f}" for name, each in scores.items()]
    ends = ["" if each.low is None else f" [{each.low:+.5f}, {each.high:+.5f}]" for each in scores.values()]
    return "\n".join([recipe, *map("".join, zip(lines, ends, strict=True))])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--model", type=Path, default=DATA / "wiki-8m")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to score on")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--schemes", nargs="+", default=[], help="each is given to every recipe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure the recipes one after the other; print each as it is done, or JSON at the end."""
    options = arguments()
    torch.set_num_threads(options.threads)
    source, text = open_checkpoint(options.model), read_text(options.text)
    original = open_blueprint(source, torch.float32).resident()
    windows = cut(text, encode([source], text, options.tokens, None), options.context, None)
    blocks, first, rows = make_blocks(windows.counts), dict[str, dict[str, Values]](), []
    given = [(scheme, f"--scheme {scheme} {recipe}") for scheme in options.schemes for recipe in options.recipes]
    for scheme, recipe in given or [("", recipe) for recipe in options.recipes]:
        found, errors = measure(options, original, windows, recipe)
        scores = summarise(blocks, found, first.setdefault(scheme, found))
        scores |= {"held out / rtn": Score(geometric_mean(errors))} if errors else {}
        row: dict[str, Any] = {"recipe": recipe, "scores": {name: asdict(each) for name, each in scores.items()}}
        rows.append(row)
        print(show(recipe, scores), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps({"seeds": options.seeds, "tokens": int(blocks.tokens), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
