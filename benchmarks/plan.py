"""Plans for a budget beside the best uniform scheme and auto-round's AutoScheme: divergence from the original.

    python benchmarks/plan.py --calibration FILE --text FILE [--model DIR] [--bits 3.0 3.5 4.25 5.0] [--samples 16]
        [--sequence-length 512] [--tokens 16384] [--context 512] [--plans 30] [--gguf q4_k_m q3_k_m]
        [--gguf-method gptq] [--auto-scheme] [--schemes int2-g64-asym,...]
        [--measures fisher,output,hessian,kl] [--measured-plans 24] [--quality 0.01] [--threads 2] [--work DIR]

Sensitivities are measured once, by `lowbit plan`. The model is quantized once in every scheme by `--method gptq
--inputs float`, with which a weight does not depend on the schemes of others, so that the weights of any plan are taken
from these. Each row is the divergence KL(original || quantized) in nats per token with its 95% interval, and the found
plan's less that, paired by token. Uniform schemes are the three largest of `UNIFORM` within the budget, the best of
which is shown; AutoScheme chooses among the schemes of the plan on the same text, counts scales as we do, and its
choice is quantized in the same way.

Then: divergence that was predicted and measured for random plans (rank correlation), and files of GGUF of the size
of llama.cpp's mixtures beside these, each made by the command line. With `--measures` losses of each kind beside the
true divergence of random plans by `rtn`, in one process; with `--quality` the plan for so much of an increase of the
perplexity by `rtn`, and the next smaller ones that the same predictions give, each measured as a whole on the text.
With `--work` a run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import nn

import lowbit
from lowbit.budget import MemoryWatch
from lowbit.metrics import Blocks, Values
from lowbit.metrics._blocks import make_blocks
from lowbit.schemes import parse
from lowbit.stages._model import open_blueprint
from lowbit.stages._windows import Windows, cut, encode, read_text
from lowbit.stages.budgets.allocate import make_problem, undecided
from lowbit.stages.budgets.check import divergences
from lowbit.stages.budgets.measures import measure
from lowbit.stages.budgets.sensitivity import opened
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.evaluate import _score
from lowbit.stages.plan import Rules, make_offers
from lowbit.stages.samples import read_samples
from lowbit.tensors import scheme_bytes

DATA = Path(lowbit.__file__).parent / "data"
SCHEMES = "int2-g64-asym,int3-g128,int4-g128,int8-g128"
UNIFORM = (
    "int2-g64-asym", "int2-g32-asym", "int2-g16", "int3-g128", "int3-g64-asym", "int3-g32", "int4-g128", "int4-g64",
    "int4-g32-asym", "int4-g16",
)  # fmt: skip


def command(*words: object) -> None:
    """One run of the command line.

    Raises:
        SystemExit: it failed, with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}")


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    options: argparse.Namespace
    work: Path
    source: Checkpoint
    original: nn.Module
    windows: Windows
    blocks: Blocks

    @property
    def text(self) -> list[object]:
        """Options of the command line."""
        options = self.options
        return ["--calibration", options.calibration, "--samples", options.samples, "--threads", options.threads,
                "--sequence-length", options.sequence_length]  # fmt: skip

    def uniform(self, scheme: str) -> Checkpoint:
        """The model quantized in one scheme."""
        out = self.work / f"uniform-{scheme}"
        if not (out / "report.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            command("quantize", self.options.model, out, "--scheme", scheme, "--method", "gptq", "--inputs", "float",
                    *self.text)  # fmt: skip
        return open_checkpoint(out)

    def plan(self, *budget: object) -> Path:
        """The plan for a budget."""
        out = self.work / f"plan{'-'.join(map(str, budget))}.json"
        if not out.exists():
            command("plan", self.options.model, *budget, "--method", "gptq", "--schemes", self.options.schemes,
                    "--unfused", "--sensitivity", self.work / "sensitivity.json", "--out", out, *self.text)  # fmt: skip
        return out

    def bits(self, chosen: Mapping[str, str]) -> float:
        """Per weight, scales included."""
        shapes = {name: self.source.weights[name].shape for name in chosen}
        total = sum(scheme_bytes(parse(scheme), shapes[name]) for name, scheme in chosen.items())
        return 8 * total / sum(map(prod, shapes.values()))

    @torch.inference_mode()
    def divergence(self, chosen: Mapping[str, str], windows: Windows | None = None) -> Values:
        """KL for every scored token of the model with these schemes."""
        edits = {
            name: (lambda _, name=name, scheme=scheme: self.uniform(scheme).dequantized(name))
            for name, scheme in chosen.items()
        }
        model = open_blueprint(replace(self.source, edits=edits), torch.float32).resident()
        return _score([self.original, model], windows or self.windows, 4, lambda *_: None)["kl"]


def auto_scheme(bench: Bench, bits: float) -> dict[str, str]:
    """What auto-round's AutoScheme chooses at so many bits, on the calibration text, on the processor."""
    out = bench.work / f"auto-scheme-{bits:g}.json"
    if not out.exists():
        job = {**vars(bench.options), "bits": bits, "out": str(out), "work": str(bench.work)}
        subprocess.run([sys.executable, __file__, "--peer", json.dumps(job, default=str)], check=True)
    found: dict[str, str] = json.loads(out.read_text())
    return found


def peer(job: Mapping[str, Any]) -> None:
    """Let AutoScheme choose; it writes its choice, as names of schemes."""
    torch.set_num_threads(int(job["threads"]))
    lib, schemes = import_module("auto_round"), import_module("auto_round.schemes")
    transformers: Any = import_module("transformers")
    text, step = Path(job["calibration"]).read_text(), 8 * int(job["sequence_length"])
    rows = [{"text": text[at : at + step]} for at in range(0, len(text) - step, step)]
    data = Path(job["work"]) / "calibration.json"
    data.write_text(json.dumps(rows))
    named = {_named(name): name for name in job["schemes"].split(",")}
    options = [schemes.QuantizationScheme(bits=b, group_size=g, sym=s, data_type="int") for b, g, s in named]
    size = {"nsamples": int(job["samples"]), "seqlen": int(job["sequence_length"]), "dataset": str(data)}
    wanted = lib.AutoScheme(avg_bits=job["bits"], options=options, low_gpu_mem_usage=False,
                            enable_torch_compile=False, **size)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    rounder = lib.AutoRound(model, tokenizer, scheme=wanted, iters=0, disable_opt_rtn=True, device_map="cpu",
                            enable_torch_compile=False, **size)  # fmt: skip
    _, layers = rounder.quantize()
    found = {
        f"{name}.weight": named[row["bits"], row["group_size"], row["sym"]]
        for name, row in layers.items()
        if row["bits"] <= 8
    }
    Path(job["out"]).write_text(json.dumps(found))


def _named(name: str) -> tuple[int, int, bool]:
    scheme = parse(name)
    return scheme.grid.bits, scheme.block.cols, scheme.zero == "none"


def chosen_by(plan: Path) -> dict[str, str]:
    """Weight to scheme of a saved plan, of those that it quantizes."""
    return {
        row["name"]: row["scheme"].removesuffix("-bf16")
        for row in json.loads(plan.read_text())["tensors"]
        if row["scheme"]
    }


def show(bench: Bench, name: str, bits: float, values: Values, ours: Values | None) -> dict[str, Any]:
    """Print a row: divergence, and what it has more than the found plan."""
    score, line = bench.blocks.mean(values), f"  {name:<28} {bits:.4f} bits  KL {values.mean():.5f}"
    row: dict[str, Any] = {"name": name, "bits": bits, "kl": asdict(score)}
    line += f" [{score.low:.5f}, {score.high:.5f}]"
    if ours is not None:
        gap = bench.blocks.change(values - ours)
        row["more"] = asdict(gap)
        line += f"  plan less this {-gap.value:+.5f} [{-(gap.high or 0):+.5f}, {-(gap.low or 0):+.5f}]"
    print(line, flush=True)
    return row


def compare(bench: Bench, bits: float) -> list[dict[str, Any]]:
    """The plan, the best uniform scheme that is no larger, and AutoScheme's choice."""
    print(f"{bits:g} bits per weight")
    chosen = chosen_by(bench.plan("--bits-per-weight", bits))
    ours = bench.divergence(chosen)
    rows = [show(bench, "plan", bench.bits(chosen), ours, None)]
    found = {scheme: dict.fromkeys(chosen, scheme) for scheme in UNIFORM}
    fitting = sorted((s for s in found if bench.bits(found[s]) <= bits), key=lambda s: -bench.bits(found[s]))[:3]
    scores = {scheme: bench.divergence(found[scheme]) for scheme in fitting}
    best = min(scores, key=lambda scheme: float(scores[scheme].mean()))
    rows.append(show(bench, f"uniform {best}", bench.bits(found[best]), scores[best], ours))
    if bench.options.auto_scheme:
        theirs = auto_scheme(bench, bits)
        rows.append(show(bench, "AutoScheme", bench.bits(theirs), bench.divergence(theirs), ours))
    return rows


def correlate(bench: Bench, count: int) -> dict[str, Any]:
    """Predicted and measured divergence of random plans."""
    losses = json.loads((bench.work / "sensitivity.json").read_text())["losses"]
    dice, few = np.random.default_rng(0), replace(bench.windows, ids=bench.windows.ids[:8])
    pairs = []
    for _ in range(count):
        shares = dice.dirichlet(np.ones(len(bench.options.schemes.split(","))))
        chosen = {name: str(dice.choice(bench.options.schemes.split(","), p=shares)) for name in losses}
        predicted = sum(losses[name][scheme] for name, scheme in chosen.items())
        pairs.append((predicted, float(bench.divergence(chosen, few).mean())))
    ranks = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    print(f"predicted against measured divergence of {count} random plans: rank correlation {ranks:.3f}")
    print("  " + ", ".join(f"{a:.4f}:{b:.4f}" for a, b in sorted(pairs)), flush=True)
    return {"rank_correlation": ranks, "pairs": pairs}


def kinds(bench: Bench, names: list[str], count: int) -> dict[str, Any]:
    """Loss by each measure, and true divergence, of random plans by `rtn`, on the windows that judge.

    Half of the plans have each scheme about as often, so that their bits are about the same.
    """
    options, rules = bench.options, Rules(method="rtn")
    schemes, source, dice = options.schemes.split(","), bench.source, np.random.default_rng(0)
    offers = make_offers(source, rules, schemes)
    plans: list[dict[str, str]] = []
    for at in range(count):
        shares = dice.dirichlet(np.ones(len(schemes))) if at % 2 else np.full(len(schemes), 1 / len(schemes))
        plans.append({name: str(dice.choice(schemes, p=shares)) for name in offers})
    samples = read_samples((str(options.calibration),), source, samples=options.samples,
                           length=options.sequence_length, seed=0, sampling="random")  # fmt: skip
    found: dict[str, Any] = {}
    with (
        MemoryWatch(None).running() as watch,
        opened(source, undecided(source, rules, offers), offers, samples.ids, bench.work, None, options.threads, watch,
               whole=True) as run,
    ):  # fmt: skip
        measured = divergences(run, plans)
        for name in names:
            begin, losses = time.perf_counter(), measure(name, run).losses
            seconds = time.perf_counter() - begin
            predicted = [sum(losses[each][scheme] for each, scheme in chosen.items()) for chosen in plans]
            ranks = [float(spearmanr(predicted[::step], measured[::step]).statistic) for step in (1, 2)]
            print(
                f"{name}: {seconds:.1f} s; rank correlation with the divergence of {count} random plans "
                f"{ranks[0]:.3f}, of the {len(plans[::2])} of about the same bits {ranks[1]:.3f}",
                flush=True,
            )
            found[name] = {"seconds": seconds, "rank_correlation": ranks, "predicted": predicted, "measured": measured}
    return found


def passing(bench: Bench, share: float) -> dict[str, Any]:
    """The plan for an increase of the perplexity, and smaller ones of the same frontier, measured as a whole."""
    plan, saved = bench.work / f"plan-ppl-{share:g}.json", bench.work / "sensitivity-rtn.json"
    options = bench.options
    text = ["--evaluate", options.text, "--tokens", options.tokens, "--context", options.context]
    if not plan.exists():
        command("plan", options.model, "--max-ppl-increase", share, "--method", "rtn", "--schemes", options.schemes,
                "--sensitivity", saved, "--out", plan, *bench.text, *text)  # fmt: skip
    rules = Rules(method="rtn")
    offers = make_offers(bench.source, rules, options.schemes.split(","))
    losses = {name: dict(row) for name, row in json.loads(saved.read_text())["losses"].items()}
    problem = make_problem(bench.source, rules, offers, losses, True, undecided(bench.source, rules, offers))
    found = problem.allocation({name: next(iter(row["costs"])) for name, row in _rows(plan) if row.get("costs")})
    made, rows = [found], []
    for _ in range(2):
        made.append(problem.within_size(made[-1].size - 1))
    print(f"increase of the perplexity of at most {share:.2%}: the plan that was found, and the next smaller ones")
    for number, each in enumerate(made):
        out = bench.work / f"ppl-{share:g}-{number}"
        if not (out / "report.json").exists():
            (bench.work / "next.json").write_text(each.plan.to_json())
            command("quantize", options.model, out, "--plan", bench.work / "next.json", *text)
        score = json.loads((out / "report.json").read_text())["evaluation"]["scores"]["log_perplexity_change"]
        low, value, high = (float(np.expm1(score[key])) for key in ("low", "value", "high"))
        rows.append({"bytes": each.size, "loss": each.loss, "increase": [low, value, high]})
        print(f"  {each.size:,} bytes, predicted {each.loss:.5f}: {value:.3%} [{low:.3%}, {high:.3%}]", flush=True)
    return {"plans": rows}


def _rows(plan: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row["name"], row) for row in json.loads(plan.read_text())["tensors"]]


def files(bench: Bench, mixture: str) -> list[dict[str, Any]]:
    """A file of GGUF no larger than a mixture's, beside it; both by the command line."""
    outs = [bench.work / f"{mixture}-{kind}" for kind in ("mixture", "plan")]
    form = ["--format", "gguf", "--method", bench.options.gguf_method]
    if not (outs[0] / "report.json").exists():
        command("quantize", bench.options.model, outs[0], *form, "--scheme", mixture, *bench.text)
    size = (outs[0] / "model.gguf").stat().st_size
    if not (outs[1] / "report.json").exists():
        command("quantize", bench.options.model, outs[1], *form, "--size", size,
                "--sensitivity", bench.work / "sensitivity-gguf.json", *bench.text)  # fmt: skip
    print(f"{mixture} of llama.cpp, and the plan of its size")
    with torch.inference_mode():
        models = [open_blueprint(open_checkpoint(out / "model.gguf"), torch.float32).resident() for out in outs]
        values = [_score([bench.original, each], bench.windows, 4, lambda *_: None)["kl"] for each in models]
    sizes = [(out / "model.gguf").stat().st_size for out in outs]
    weights = sum(prod(weight.shape) for weight in bench.source.weights.values())
    rows = [show(bench, "plan", 8 * sizes[1] / weights, values[1], None)]
    rows.append(show(bench, mixture, 8 * sizes[0] / weights, values[0], values[1]))
    print(f"  {sizes[1]:,} and {sizes[0]:,} bytes", flush=True)
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "wiki-8m")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to score on")
    parser.add_argument("--bits", nargs="*", type=float, default=[3.0, 3.5, 4.25, 5.0])
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--plans", type=int, default=30, help="random ones")
    parser.add_argument("--measures", default="", help="to compare, as fisher,output,hessian,kl")
    parser.add_argument("--measured-plans", type=int, default=24, help="random ones, for these")
    parser.add_argument("--quality", type=float, help="most relative increase of the perplexity, as 0.01")
    parser.add_argument("--gguf", nargs="*", default=["q4_k_m", "q3_k_m"])
    parser.add_argument("--gguf-method", default="gptq", help="that makes the weights of these")
    parser.add_argument("--auto-scheme", action="store_true", help="needs auto-round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    return parser.parse_args()


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All parts."""
    torch.set_num_threads(options.threads)
    source, text = open_checkpoint(options.model), read_text(options.text)
    windows = cut(text, encode([source], text, options.tokens, None), options.context, None)
    original = open_blueprint(source, torch.float32).resident()
    bench = Bench(options, work, source, original, windows, make_blocks(windows.counts))
    found: dict[str, Any] = {f"{bits:g} bits": compare(bench, bits) for bits in options.bits}
    if options.quality:
        found["quality"] = passing(bench, options.quality)
    if options.measures:
        found["measures"] = kinds(bench, options.measures.split(","), options.measured_plans)
    if options.plans:
        bench.plan("--bits-per-weight", 3.5)
        found["random plans"] = correlate(bench, options.plans)
    return found | {mixture: files(bench, mixture) for mixture in options.gguf}


def main() -> None:
    """Measure, print, end with a line of JSON."""
    if sys.argv[1:2] == ["--peer"]:
        peer(json.loads(sys.argv[2]))
        return
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        print(json.dumps(run(options, work)))


if __name__ == "__main__":
    main()
