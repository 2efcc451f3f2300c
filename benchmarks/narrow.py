"""What rounding inputs of layers, keys and values is predicted to cost beside what it costs, of a Llama.

    python benchmarks/narrow.py --calibration FILE --text FILE [--model DIR] [--schemes int8-row,int4-g32,...]
        [--samples 32] [--sequence-length 512] [--tokens 2048] [--context 512] [--threads 2] [--work DIR]

Predictions are those of `lowbit plan --narrow`. Measured is KL(original || rounded) in nats per token on another text,
by transformers in float32: hooks before the layers round what these read, a cache rounds what it is given. First each
thing alone: quartiles of measured over predicted, and rank correlation; then the same thing in all blocks at once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import lowbit
from lowbit.schemes import Scheme, parse
from lowbit.stages._activations import rounded

DATA = Path(lowbit.__file__).parent / "data"
READERS = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}


class Rounding(DynamicCache):
    """A cache that rounds keys or values of some layers."""

    def __init__(self, layers: Sequence[int], side: str, scheme: Scheme) -> None:
        super().__init__()
        self.rounded, self.side, self.scheme = layers, side, scheme

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keep what is new, rounded."""
        if layer_idx in self.rounded and self.side == "keys":
            key_states = rounded(key_states, self.scheme)
        elif layer_idx in self.rounded:
            value_states = rounded(value_states, self.scheme)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@dataclass(frozen=True)
class Bench:
    """The model, and what it says of the text."""

    model: Any
    ids: Tensor
    before: Tensor

    @torch.inference_mode()
    def cost(self, names: Sequence[str], scheme: Scheme) -> float:
        """KL with these inputs, or these keys or values, rounded."""
        side, cache = names[0].partition(" ")[2], None
        with ExitStack() as stack:
            if side:
                cache = Rounding([int(re.findall(r"\d+", name)[0]) for name in names], side, scheme)
            for path in [] if side else [name.removesuffix(".weight") for name in names]:
                parent, _, leaf = path.rpartition(".")
                for reader in READERS.get(leaf, (leaf,)):
                    module = self.model.get_submodule(f"{parent}.{reader}")
                    hook = module.register_forward_pre_hook(lambda _, args: (rounded(args[0], scheme),))
                    stack.callback(hook.remove)
            after = self.model(self.ids, past_key_values=cache, use_cache=cache is not None).logits.log_softmax(-1)
        return float((self.before.exp() * (self.before - after)).sum(-1, dtype=torch.float64).mean())


@torch.inference_mode()
def opened(options: argparse.Namespace) -> Bench:
    """The first tokens of the text, in windows."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(options.model, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"][: options.tokens]
    ids = torch.tensor(tokens[: len(tokens) // options.context * options.context]).view(-1, options.context)
    return Bench(model, ids, model(ids).logits.log_softmax(-1))


def predicted(options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Losses by name and scheme, by the command line."""
    saved = work / "narrow.json"
    if not saved.exists():
        words = ["plan", options.model, "--narrow", options.schemes, "--calibration", options.calibration, "--samples",
                 options.samples, "--sequence-length", options.sequence_length, "--threads", options.threads,
                 "--method", "rtn", "--sensitivity", saved]  # fmt: skip
        subprocess.run([sys.executable, "-m", "lowbit", *map(str, words)], check=True)
    found: dict[str, dict[str, float]] = json.loads(saved.read_text())["narrow"]
    return found


def alone(bench: Bench, losses: dict[str, dict[str, float]], scheme: str) -> dict[str, Any]:
    """Each thing rounded alone."""
    pairs = [(row[scheme], bench.cost([name], parse(scheme))) for name, row in losses.items()]
    low, middle, high = np.quantile([measured / loss for loss, measured in pairs], [0.25, 0.5, 0.75])
    ranks = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    print(
        f"{scheme}: measured over predicted {low:.2f}, {middle:.2f}, {high:.2f} (quartiles of {len(pairs)}), rank "
        f"correlation {ranks:.3f}",
        flush=True,
    )
    return {"ratios": [low, middle, high], "rank_correlation": ranks, "pairs": pairs}


def together(bench: Bench, losses: dict[str, dict[str, float]], scheme: str) -> dict[str, Any]:
    """The same thing in all blocks."""
    kinds: dict[str, list[str]] = {}
    for name in losses:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    found = {}
    for kind, names in kinds.items():
        sums = sum(losses[name][scheme] for name in names), bench.cost(names, parse(scheme))
        print(f"  {kind} in {scheme}: predicted {sums[0]:.3g}, measured {sums[1]:.3g}", flush=True)
        found[kind] = sums
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "wiki-8m")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--schemes", default="int8-row,fp8-e4m3-row,int4-g32")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print, end with a line of JSON."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        losses, bench = predicted(options, work), opened(options)
    found = {}
    for scheme in options.schemes.split(","):
        found[scheme] = {"alone": alone(bench, losses, scheme), "together": together(bench, losses, scheme)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
