"""`lowbit evaluate` against `transformers` on a trained model: as it is, and quantized, read by the format's owner."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from lowbit.stages.evaluate import evaluate
from lowbit.stages.plan import Rules

transformers = pytest.importorskip("transformers")

CONTEXT = 512
TOKENS = 8 * CONTEXT


@pytest.fixture(scope="module")
def text(shared: Path) -> Path:
    return shared / "data" / "wikitext2_test.txt"


@pytest.fixture(scope="module")
def original(shared: Path) -> Path:
    return shared / "models" / "wiki-8m"


def log_perplexity(path: Path, text: Path) -> float:
    """Windows without overlap, the mean over predictions inside of windows: GPTQ's protocol."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(path)(text.read_text(), verbose=False)["input_ids"]
    losses = []
    for window in torch.tensor(ids[:TOKENS]).view(-1, CONTEXT):
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].float()
        losses.append(float(cross_entropy(logits[:-1], window[1:])))
    return sum(losses) / len(losses)


def quantized(original: Path, out: Path, scheme: str, form: str) -> Path:
    from lowbit.pipeline import Request, run

    run(Request(str(original), out, Rules(scheme, format=form)))
    return out


def test_perplexity_of_a_trained_model(original: Path, text: Path) -> None:
    found = evaluate(original, text, tokens=TOKENS).scores["perplexity"].value
    assert log(found) == pytest.approx(log_perplexity(original, text), abs=1e-6)
    assert found < 60, "it was trained on such text"


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(
    ("scheme", "form", "owner", "within"),
    # bitsandbytes multiplies in bfloat16, whatever the model is loaded in.
    [("int4-g128", "compressed-tensors", "compressed_tensors", 5e-4), ("nf4", "bitsandbytes", "bitsandbytes", 5e-3)],
)
def test_perplexity_of_a_quantized_model(
    original: Path, text: Path, tmp_path: Path, scheme: str, form: str, owner: str, within: float
) -> None:
    pytest.importorskip(owner)
    path = quantized(original, tmp_path / "out", scheme, form)
    found = evaluate(path, text, reference=original, tokens=TOKENS)
    assert log(found.scores["perplexity"].value) == pytest.approx(log_perplexity(path, text), abs=within)
    assert 0.001 < found.scores["kl_mean"].value < 0.3
    change = found.scores["log_perplexity_change"]
    assert change.low is not None and change.high is not None and change.low < change.value < change.high
    assert change.value > 0.001
