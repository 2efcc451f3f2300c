"""An embedding by frequency of its tokens beside one scheme for all of it, at the same bytes.

    python benchmarks/rows.py --calibration FILE --text FILE [--model DIR] [--samples 128] [--sequence-length 512]
        [--tokens 8192] [--context 256]

The embedding alone is quantized, as `lowbit quantize --format onnx --policy rules.toml` does it, by round to nearest.
Tokens are counted on the calibration windows. Printed are the bytes of the embedding with scales and places of rows,
the divergence KL(original || quantized) in nats per token with its 95% interval, and that less the divergence of the
uniform embedding above it, paired by token.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.metrics import Score, Values
from lowbit.metrics._blocks import make_blocks
from lowbit.stages._model import open_blueprint
from lowbit.stages._rows import joined
from lowbit.stages._windows import Windows, cut, encode, read_text
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.frequency import rank_tokens
from lowbit.stages.plan import Rules, in_rows, make_plan
from lowbit.stages.quantize import make
from lowbit.stages.samples import read_samples
from lowbit.tensors import QTensor

# The scheme of a uniform embedding; then tokens, their scheme and that of the rest, at about as many bytes.
CASES = [
    ("int8-g16", [("most 10%", "keep", "int8-row"), ("least 10%", "keep", "int8-row")]),
    ("int8-row", [("most 30%", "keep", "int4-g32"), ("least 30%", "keep", "int4-g32")]),
    ("int4-g16", [("most 10%", "int8-row", "int4-g32"), ("least 10%", "int8-row", "int4-g32")]),
    ("int4-g32", [("most 3%", "int8-row", "int4-g64"), ("most 1%", "keep", "int4-g64")]),
]
PIECE = 1 << 20


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    source: Checkpoint
    original: nn.Module
    changed: nn.Module
    windows: Windows
    ranks: tuple[int, ...]

    def rules(self, policy: str) -> Rules:
        """For the embedding alone."""
        return Rules(None, "rtn", "onnx", skip=("layers", "lm_head"), policy=policy, tokens=self.ranks)

    def embedding(self, policy: str) -> tuple[Tensor, int]:
        """What it becomes, and its bytes."""
        view = in_rows(self.source, self.rules(policy))
        plan = make_plan(view, self.rules(policy))
        entries = [entry for entry in plan.entries if "embed_tokens" in entry.weight.name]
        made = [make(view, plan, entry, PIECE) for entry in entries if entry.weight.dtype != torch.int32]
        values = [each.dequantize() if isinstance(each, QTensor) else each.float() for each in made]
        runs = [entry.weight.rows for entry in entries if entry.weight.rows]
        return joined(values, runs) if runs else values[0], sum(map(plan.stored_bytes, entries))

    @torch.inference_mode()
    def divergences(self, embeddings: list[Tensor], batch: int = 4) -> list[Values]:
        """Divergence of every scored token with each embedding; the original runs once."""
        place = self.changed.get_submodule("model.embed_tokens").weight
        assert isinstance(place, Tensor)
        found: list[list[Tensor]] = [[] for _ in embeddings]
        for start in range(0, len(self.windows.ids), batch):
            ids = self.windows.ids[start : start + batch]
            at = self.windows.positions(start, start + len(ids))
            logits = self.original(input_ids=ids, use_cache=False).logits.flatten(0, 1)[at]
            meant = logits.log_softmax(1, dtype=torch.float64)
            for embedding, values in zip(embeddings, found, strict=True):
                place.copy_(embedding)
                logits = self.changed(input_ids=ids, use_cache=False).logits.flatten(0, 1)[at]
                made = logits.log_softmax(1, dtype=torch.float64)
                values.append((meant.exp() * (meant - made)).sum(1))
        return [torch.cat(values).numpy() for values in found]


def policy(folder: Path, rules: list[tuple[str, str]]) -> str:
    """A file with a rule for each pair of tokens and scheme."""
    named = [(f'tokens = "{tokens}"\n' if tokens else "", scheme) for tokens, scheme in rules if scheme]
    text = [f'[[rule]]\nrole = "embedding"\n{tokens}scheme = "{scheme}"\n' for tokens, scheme in named]
    (folder / "rules.toml").write_text("".join(text))
    return str(folder / "rules.toml")


def show(name: str, size: int, score: Score, change: Score | None) -> None:
    """One line."""
    ends = f"{score.value:.3g} [{score.low or 0:.3g}, {score.high or 0:.3g}]"
    less = f"{change.value:+.2g} [{change.low or 0:+.2g}, {change.high or 0:+.2g}]" if change else ""
    print(f"{name:<36} {size:>9,}  {ends}  {less}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(lowbit.__file__).parent / "data" / "wiki-8m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True, help="to score on")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    """Measure all cases."""
    options = arguments()
    source, text = open_checkpoint(options.model), read_text(options.text)
    ids = read_samples(
        (options.calibration,), source, samples=options.samples, length=options.sequence_length, seed=0,
        sampling="random",
    ).ids  # fmt: skip
    blueprint = open_blueprint(source, torch.float32)
    windows = cut(text, encode([source], text, options.tokens, None), options.context, None)
    bench = Bench(source, blueprint.resident(), blueprint.resident(), windows, rank_tokens(source, ids))
    rules = [(uniform, each) for uniform, others in CASES for each in [("", uniform, ""), *others]]
    with tempfile.TemporaryDirectory() as folder:
        made = [
            bench.embedding(policy(Path(folder), [(tokens, scheme), ("", rest)])) for _, (tokens, scheme, rest) in rules
        ]
    first: dict[str, Values] = {}
    found, blocks = bench.divergences([value for value, _ in made]), make_blocks(windows.counts)
    for (uniform, (tokens, scheme, rest)), values, (_, size) in zip(rules, found, made, strict=True):
        change = blocks.change(values - first[uniform]) if tokens else None
        first.setdefault(uniform, values)
        show(f"  {tokens} {scheme}, rest {rest}" if tokens else uniform, size, blocks.mean(values), change)


if __name__ == "__main__":
    main()
