"""Weights and activations quantized: a model beside a copy of it that has outliers planted in its activations.

    python benchmarks/activations.py --calibration FILE [--model DIR] [--text FILE] [--tokens N]
        [--samples 64] [--sequence-length 512] [--strengths 21] [--only REGEX] [--json]

In the copy six channels of every norm's output are 60 times as large, and the columns of the weights that read them 60
times as small: the same function, which is proved on the text first, and one that plain INT8 activations destroy. Every
line is quantized from both, calibrated alike, and scored against the original on the same tokens with its activations
rounded. Checkpoints are made in a temporary folder. The copy is float32, as 60 is no power of two.

The exit status is 1 where a claim does not hold: INT8 with smoothquant within 0.5% of the original's perplexity on both
models, and plain INT8 on the copy not.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import expm1
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file

import lowbit
from lowbit.pipeline import Request, run
from lowbit.stages._model import open_blueprint
from lowbit.stages._windows import encode, read_text
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.evaluate import evaluate
from lowbit.stages.plan import Calibration, Rules

DATA = Path(lowbit.__file__).parent / "data"
CHANNELS, TIMES = 6, 60.0
BOUND = 0.005  # of perplexity, relative
# What reads a norm's output, by the norm's name within a layer or the model; the family of Llama.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@final
@dataclass(frozen=True)
class Line:
    """One way to quantize."""

    label: str
    scheme: str
    activations: str
    method: str

    @property
    def claimed(self) -> bool:
        """Whether its perplexity is to be near the original's or, without smoothing, far from it on the copy."""
        return self.scheme == "int8"


LINES = tuple(
    Line(f"{label} {method}", scheme, activations, method)
    for label, scheme, activations in (
        ("W8A8-int8-dynamic", "int8", "int8-row"),
        ("W8A8-int8-static", "int8", "int8-tensor"),
        ("W8A8-fp8-dynamic", "fp8-e4m3-row", "fp8-e4m3-row"),
        ("W4A8-dynamic", "int4-g128", "int8-row"),
        ("W4A4-nvfp4", "nvfp4", "nvfp4"),
    )
    for method in ("rtn", "smoothquant")
)


def readers(names: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Every norm of the model with the weights that read it; the last norm where the output layer is its own."""
    for name in names:
        path, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in READERS:
            yield name, [f"{path}.{reader}.weight" for reader in READERS[kind]]
        elif name == "model.norm.weight" and "lm_head.weight" in names:
            yield name, ["lm_head.weight"]


def plant(model: Path, out: Path, seed: int = 0) -> None:
    """Write a copy of a Llama in float32 with outliers at random channels of every norm's output.

    Raises:
        ValueError: the model has no norm of a known name.
    """
    with open_checkpoint(model) as source:
        tensors = {name: source.tensor(name).float() for name in source.weights}
        config = {**source.config, "dtype": "float32"}
    norms = list(readers(tensors))
    if not norms:
        raise ValueError(f"{model} has no norm called {' or '.join(READERS)}")
    dice = torch.Generator().manual_seed(seed)
    for norm, weights in norms:
        at = torch.randperm(len(tensors[norm]), generator=dice)[:CHANNELS]
        tensors[norm][at] *= TIMES
        for weight in weights:
            tensors[weight][:, at] /= TIMES
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
def difference(model: Path, copy: Path, text: Path) -> float:
    """Norm of the difference of both models' float32 logits on the text's beginning, relative to the logits'."""
    with open_checkpoint(model) as first, open_checkpoint(copy) as second:
        ids = encode([first], read_text(text), 512, None)[0].view(1, -1)
        models = [open_blueprint(each, torch.float32).resident() for each in (first, second)]
        wanted, found = (each(input_ids=ids, use_cache=False).logits.double() for each in models)
    return float((found - wanted).norm() / wanted.norm())


def measure(name: str, model: Path, line: Line, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, score against the original, and remove what was made."""
    out, start = folder / "out", time.perf_counter()
    text = Calibration((str(options.calibration),), samples=options.samples, length=options.sequence_length)
    strengths = {"smoothquant.strengths": options.strengths} if line.method == "smoothquant" else {}
    rules = Rules(line.scheme, line.method, activations=line.activations, calibration=text, options=strengths)
    run(Request(str(model), out, rules, threads=options.threads))
    seconds = time.perf_counter() - start
    same = {"context": options.context, "tokens": options.tokens, "threads": options.threads}
    scores = evaluate(out, options.text, reference=options.model, **same).scores
    shutil.rmtree(out)
    change = scores["log_perplexity_change"]
    ends = [None if end is None else expm1(end) for end in (change.low, change.high)]
    return {
        "model": name, "line": line.label, "claimed": line.claimed, "method": line.method,
        "perplexity": scores["perplexity"].value, "original": scores["reference_perplexity"].value,
        "change": expm1(change.value), "low": ends[0], "high": ends[1],
        "kl": scores["kl_mean"].value, "top1": scores["top1_agreement"].value, "seconds": seconds,
    }  # fmt: skip


def broken(row: dict[str, Any]) -> str | None:
    """What a row has against the claims."""
    if row["claimed"] and row["method"] == "smoothquant" and abs(row["change"]) > BOUND:
        return f"{row['model']}, {row['line']}: perplexity {row['change']:+.3%}, allowed {BOUND:.1%}"
    if row["claimed"] and row["method"] == "rtn" and row["model"] == "planted" and row["change"] < 10 * BOUND:
        return f"{row['model']}, {row['line']}: perplexity {row['change']:+.3%}, so that the outliers show nothing"
    return None


def show(row: dict[str, Any]) -> str:
    """One row of the table."""
    ends = "" if row["low"] is None else f"[{row['low']:+9.3%}, {row['high']:+9.3%}]"
    return (
        f"{row['model']:<9} {row['line']:<30} {row['perplexity']:>10.3f} {row['change']:>+10.3%} {ends:<24} "
        f"{row['kl']:>9.5f} {row['top1']:>7.2%} {row['seconds']:>6.0f}s"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "wiki-8m")
    parser.add_argument("--text", type=Path, default=DATA / "evaluation.txt", help="to evaluate on")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--only", default="", help="lines to run: searched in 'MODEL LABEL METHOD'", metavar="REGEX")
    parser.add_argument("--tokens", type=int, help="evaluate on so many at most")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--strengths", type=int, default=21, help="that smoothquant tries")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure every line on both models, print a table or JSON, and fail where a claim does not hold."""
    options = arguments()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(options.model, folder / "planted")
        gap = difference(options.model, folder / "planted", options.text)
        if gap > 1e-4:
            sys.exit(f"the copy is another model: its logits differ by {gap:.2g}, relative to their norm")
        print(f"logits of the copy differ from the original's by {gap:.2g}, relative", file=sys.stderr)
        for kind, model in (("original", options.model), ("planted", folder / "planted")):
            for line in (line for line in LINES if re.search(options.only, f"{kind} {line.label}")):
                rows.append(measure(kind, model, line, folder, options))
                print(show(rows[-1]), file=sys.stderr, flush=True)
    failed = [reason for reason in map(broken, rows) if reason]
    if options.json:
        print(json.dumps({"gap": gap, "rows": rows, "failed": failed}, indent=2))
    else:
        print(f"{'model':<9} {'line':<30} {'perplexity':>10} {'change':>10} {'95%':<24} {'KL':>9} {'top-1':>7}")
        print("\n".join(map(show, rows)))
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
