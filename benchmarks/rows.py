"""An embedding by frequency of its tokens beside one scheme for all of it, at the same bytes.

    python benchmarks/rows.py --calibration FILE --text FILE [--model DIR] [--samples 128] [--sequence-length 512]
        [--tokens 16384] [--context 256]

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
from lowbit.stages.evaluate import _score
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
    def score(self, policy: str) -> tuple[Values, int]:
        """Divergence of every token, and bytes."""
        value, size = self.embedding(policy)
        self.changed.get_submodule("model.embed_tokens").weight.copy_(value)  # type: ignore[operator]
        return _score([self.original, self.changed], self.windows, 4, lambda *_: None)["kl"], size


def policy(folder: Path, rules: list[tuple[str, str]]) -> str:
    """A file with a rule for each pair of tokens and scheme."""
    said = [f'tokens = "{tokens}"\n' if tokens else "" for tokens, _ in rules]
    text = [f'[[rule]]\nrole = "embedding"\n{s}scheme = "{r[1]}"\n' for s, r in zip(said, rules, strict=True)]
    (folder / "rules.toml").write_text("".join(text))
    return str(folder / "rules.toml")


def show(name: str, size: int, score: Score, change: Score | None) -> None:
    """One line."""
    ends = f"{score.value:.5f} [{score.low or 0:.5f}, {score.high or 0:.5f}]"
    less = f"{change.value:+.5f} [{change.low or 0:+.5f}, {change.high or 0:+.5f}]" if change else ""
    print(f"{name:<36} {size:>9,}  {ends}  {less}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(lowbit.__file__).parent / "data" / "wiki-8m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True, help="to score on")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16_384)
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
    blocks = make_blocks(windows.counts)
    with tempfile.TemporaryDirectory() as folder:
        for uniform, others in CASES:
            first, size = bench.score(policy(Path(folder), [("", uniform)]))
            show(uniform, size, blocks.mean(first), None)
            for tokens, scheme, rest in others:
                found, size = bench.score(policy(Path(folder), [(tokens, scheme), ("", rest)]))
                name = f"  {tokens} {scheme}, rest {rest}"
                show(name, size, blocks.mean(found), blocks.change(found - first))


if __name__ == "__main__":
    main()
