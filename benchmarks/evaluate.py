"""Evaluate a model with lowbit and with a plain loop over `transformers`, on the same tokens, in one run.

    python benchmarks/evaluate.py [--model PATH] [--text FILE] [--tokens N] [--context N] [--runs 3] [--json]

Prints tokens per second of both, their ratio and the difference of log-perplexity; then lowbit against a reference
(the model itself: two passes and the divergence), and streamed under the least memory limit that it accepts. Every run
is a process of its own, the ways alternate, medians are printed. Anonymous memory is sampled inside of each process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import lowbit

_PLAIN = """
import json, math, sys, time
import torch, transformers
from lowbit.budget import MemoryWatch
path, text, tokens, context = sys.argv[1], open(sys.argv[2]).read(), int(sys.argv[3]), int(sys.argv[4])
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(path)(text, verbose=False)["input_ids"][:tokens])
windows, total = ids[: len(ids) // context * context].view(-1, context), 0.0
with MemoryWatch(None).running() as watch, torch.inference_mode():
    start = time.perf_counter()
    for batch in windows.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    seconds = time.perf_counter() - start
scored = len(windows) * (context - 1)
print(json.dumps({"tokens": windows.numel(), "seconds": seconds, "log_perplexity": total / scored, "peak": watch.peak}))
"""

_LOWBIT = """
import json, math, re, sys, time
from lowbit.budget import MemoryWatch, parse_size
from lowbit.errors import ResourceError
from lowbit.stages.evaluate import evaluate
path, text, tokens, context, way = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
times, ways = [], []
options = {"tokens": tokens, "context": context, "reference": path if way == "reference" else None,
           "progress": lambda *_: times.append(time.perf_counter()), "announce": ways.append}
with MemoryWatch(None).running() as watch:
    options["ram"] = 2**20 if way == "streamed" else None
    while True:
        try:
            result = evaluate(path, text, **options)
            break
        except ResourceError as error:
            least = re.search(r"(?:at least|up to) ([\\d.]+ \\w+)", str(error))
            options["ram"] = int(parse_size(least[1]) * 1.01)
print(json.dumps({
    "tokens": result.conditions.tokens, "seconds": times[-1] - times[0],
    "log_perplexity": math.log(result.scores["perplexity"].value), "peak": watch.peak, "estimate": ways[-1].total,
    "limit": options["ram"], "streamed": ways[-1].streamed,
}))
"""


def run(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process that evaluates in one way."""
    script = _PLAIN if way == "transformers" else _LOWBIT
    arguments = [options.model, options.text, options.tokens, options.context, way]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, print a table or JSON."""
    data = Path(lowbit.__file__).parent / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=data / "wiki-8m")
    parser.add_argument("--text", type=Path, default=data / "evaluation.txt")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ways = ("transformers", "lowbit", "reference", "streamed")
    runs = [{way: run(way, options) for way in ways} for _ in range(options.runs)]
    table = {way: dict(runs[0][way]) for way in ways}
    for way in ways:
        table[way]["seconds"] = statistics.median(each[way]["seconds"] for each in runs)
        table[way]["tokens_per_second"] = table[way]["tokens"] / table[way]["seconds"]
    plain, ours = table["transformers"], table["lowbit"]
    table["comparison"] = {
        "speed": ours["tokens_per_second"] / plain["tokens_per_second"],
        "log_perplexity_difference": ours["log_perplexity"] - plain["log_perplexity"],
    }
    if options.json:
        print(json.dumps(table, indent=2))
        return
    for way in ways:
        row = table[way]
        limit = f", limit {row['limit'] / 2**20:.0f} MiB" if row.get("limit") else ""
        print(f"{way:>12}: {row['tokens']:,} tokens, {row['tokens_per_second']:,.0f}/s, log-perplexity "
              f"{row['log_perplexity']:.7f}, peak {row['peak'] / 2**20:.0f} MiB{limit}")  # fmt: skip
    print(f"lowbit is {table['comparison']['speed']:.2f} times as fast as the plain loop; "
          f"log-perplexity differs by {table['comparison']['log_perplexity_difference']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
