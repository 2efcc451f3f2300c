"""What the native decoder makes of each grid, beside everything dequantized and computed by `transformers`.

    python benchmarks/tokens.py --work DIR [--grids int4-g128 gguf:q4_k ...] [--tokens 200]

The embedded model is quantized to each grid once, into DIR. `tokens` says how many of the greedy tokens after a
prompt are those of the slow reference, inputs not rounded (`--exact`); all should be. `kl` is the divergence of the
default way, inputs rounded to int8, from that reference, in nats per token over 1,024 tokens; it should be below 1e-3.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div

import lowbit
from lowbit.runtime.decoder import Engine, native_of
from lowbit.runtime.generate import Sampling, generate
from lowbit.runtime.model import open_model
from lowbit.runtime.runner import open_runner

MODEL = Path(lowbit.__file__).parent / "data" / "wiki-8m"
GRIDS = [
    "int2-g64", "int3-g128", "int4-g128", "int4-g64-asym", "int8-g128", "int8-row", "fp8-e4m3-row", "mxfp4", "nvfp4",
    "bitsandbytes:nf4-flat64", "gguf:q4_0", "gguf:q8_0", "gguf:q2_k", "gguf:q3_k", "gguf:q4_k", "gguf:q5_k",
    "gguf:q6_k", "gguf:iq4_nl", "gguf:iq4_xs", "gguf:tq1_0", "gguf:tq2_0",
]  # fmt: skip
PROMPT = "The history of the city"


def made(work: Path, grid: str) -> Path:
    """The model on a grid, `[FORMAT:]SCHEME`."""
    form, _, scheme = grid.rpartition(":")
    out = work / grid.replace(":", "-")
    if not (out / "report.json").exists():
        lowbit.quantize(MODEL, out, scheme=scheme, format=form or "compressed-tensors", threads=2)
    return out


def same_tokens(path: Path, reference: Any, tokenizer: Any, count: int) -> int:
    """How many greedy tokens are those of the reference."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    ours = generate(open_runner(path, exact=True, keep="float32"), PROMPT, Sampling(tokens=count)).text
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
    got = tokenizer(ours, add_special_tokens=False).input_ids if ours else []
    text = tokenizer.decode(theirs, skip_special_tokens=True)
    want = tokenizer(text, add_special_tokens=False).input_ids
    first = next((i for i, (one, other) in enumerate(zip(got, want, strict=False)) if one != other), None)
    return len(theirs) if ours == text else first or 0


def divergence(path: Path, reference: Any, tokenizer: Any) -> float:
    """Of the default way from the reference."""
    text = (MODEL.parent / "evaluation.txt").read_text()[:8000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0, :1024]
    engine = Engine(native_of(open_model(path)))
    found = []
    with torch.no_grad():
        for part in ids.split(512):
            session = engine.start(512)
            got = torch.stack([session.read(token[None]) for token in part]).double().log_softmax(-1)
            want = reference(part[None]).logits[0].double().log_softmax(-1)
            found.append(float(kl_div(got, want, reduction="batchmean", log_target=True)))
    return sum(found) / len(found)


def main() -> None:
    """A line per grid, and all of it as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--grids", nargs="+", default=GRIDS)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for grid in args.grids:
        path = made(args.work, grid)
        loaded = open_model(path, reference=True)
        same = same_tokens(path, loaded.model, loaded.tokenizer, args.tokens)
        results[grid] = {"tokens": same, "kl": divergence(path, loaded.model, loaded.tokenizer)}
        print(f"{grid:24} {same:4} of {args.tokens} tokens  kl {results[grid]['kl']:.2e}", flush=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
