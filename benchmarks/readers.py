"""What we write, scored by us and by the runtime that owns the format: perplexity and weights must agree.

    python benchmarks/readers.py [--model DIR] [--text FILE] [--tokens N] [--json]

`int4-g128` by `rtn` goes out as compressed-tensors; the result is scored by `lowbit evaluate`, and by `transformers`,
which loads the same files through the compressed-tensors package, in a plain loop over the same windows (context 512,
no overlap). `nf4` goes out as bitsandbytes, plain and double-quantized; every weight that `transformers` holds is
compared with ours. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit.stages.checkpoint import open_checkpoint

EMBEDDED = Path(lowbit.__file__).parent / "data"
CONTEXT = 512


def plain_perplexity(path: Path, text: Path, tokens: int | None) -> float:
    """Perplexity by `transformers` alone: full windows without overlap, the first token of each not scored."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(text.read_text(), return_tensors="pt")["input_ids"][0][:tokens]
    windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    total = 0.0
    with torch.inference_mode():
        for batch in windows.split(8):
            logits = model(batch).logits[:, :-1].double().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    return float(torch.tensor(total / (windows.shape[0] * (CONTEXT - 1))).exp())


def differing_weights(path: Path) -> tuple[int, int]:
    """Matrices that bitsandbytes dequantizes otherwise than we do, and how many there are."""
    from bitsandbytes.functional import dequantize_4bit

    model = AutoModelForCausalLM.from_pretrained(path)
    checkpoint = open_checkpoint(path)
    wrong = seen = 0
    for name, weight in checkpoint.weights.items():
        if weight.scheme is not None:
            parameter: Any = model.get_parameter(name)
            theirs = dequantize_4bit(parameter.data, parameter.quant_state)
            ours = checkpoint.dequantized(name, theirs.dtype)
            wrong += not torch.equal(theirs, ours)
            seen += 1
    return wrong, seen


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Write, load, compare."""
    out = root / "int4"
    lowbit.quantize(args.model, out, scheme="int4-g128", threads=2)
    ours = lowbit.evaluate(out, args.text, context=CONTEXT, tokens=args.tokens).scores["perplexity"].value
    theirs = plain_perplexity(out, args.text, args.tokens)
    original = lowbit.evaluate(args.model, args.text, context=CONTEXT, tokens=args.tokens).scores["perplexity"].value
    result: dict[str, Any] = {
        "perplexity_original": original,
        "perplexity_lowbit": ours,
        "perplexity_transformers": theirs,
        "relative_difference": abs(ours / theirs - 1),
    }
    for scheme in ("nf4", "nf4-dq"):
        lowbit.quantize(args.model, root / scheme, scheme=scheme, format="bitsandbytes", threads=2)
        wrong, seen = differing_weights(root / scheme)
        result[f"{scheme}_matrices"], result[f"{scheme}_differing"] = seen, wrong
    return result


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED / "wiki-8m")
    parser.add_argument("--text", type=Path, default=EMBEDDED / "evaluation.txt")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowbit-readers-") as folder:
        result = measure(args, Path(folder))
    print(json.dumps(result) if args.json else "\n".join(f"{key:>26}: {value:.6g}" for key, value in result.items()))


if __name__ == "__main__":
    main()
