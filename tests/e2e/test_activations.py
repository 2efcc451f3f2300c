"""Outliers in activations: plain static INT8 fails on them, smoothing them into the weights does not."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest

import lowbit
from benchmarks.activations import difference, plant
from lowbit.errors import CheckpointError
from lowbit.pipeline import Request, run
from lowbit.stages.evaluate import evaluate
from lowbit.stages.plan import Calibration, Rules
from tests.reference.models import save_tiny, save_words

TEXT = Path(lowbit.__file__).parent / "data" / "evaluation.txt"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """To learn from, and to be judged by."""
    folder, text = tmp_path_factory.mktemp("texts"), TEXT.read_text()
    learn, judge = folder / "learn.txt", folder / "judge.txt"
    learn.write_text(text[: len(text) // 2])
    judge.write_text(text[len(text) // 2 :])
    return learn, judge


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, wiki_8m: Path, texts: tuple[Path, Path]) -> Path:
    """The embedded model with outliers, which computes the same."""
    out = tmp_path_factory.mktemp("planted") / "model"
    plant(wiki_8m, out)
    assert difference(wiki_8m, out, texts[1]) < 1e-5
    return out


# Half of the blocks and little text, to be fast; `benchmarks/activations.py` is the same with all of both.
@pytest.mark.parametrize(("method", "least", "most"), [("rtn", log(1.1), 20.0), ("smoothquant", -0.01, 0.01)])
def test_planted_outliers(
    tmp_path: Path, wiki_8m: Path, planted: Path, texts: tuple[Path, Path], method: str, least: float, most: float
) -> None:
    options = {"smoothquant.strengths": 3, "smoothquant.windows": 2} if method == "smoothquant" else {}
    rules = Rules(
        "int8",
        method,
        activations="int8-tensor",
        options=options,
        calibration=Calibration((str(texts[0]),), samples=16, length=128),
        blocks=(0, 4),
    )
    run(Request(str(planted), tmp_path / "out", rules))
    scores = evaluate(tmp_path / "out", texts[1], reference=wiki_8m, context=256, tokens=4000).scores
    change = scores["log_perplexity_change"].value
    assert least < change < most


def test_a_model_of_experts_is_evaluated_with_its_inputs_rounded(tmp_path: Path) -> None:
    """Classes of transformers have the experts of a layer in one tensor, whose module reads the tokens of all."""
    save_tiny("mixtral", tmp_path / "model")
    words, found = save_words(tmp_path / "model"), []
    for inputs in (None, "int8-row"):
        rules, out = Rules("int8", activations=inputs), tmp_path / f"out-{inputs}"
        result = run(Request(str(tmp_path / "model"), out, rules, text=words, context=32))
        found += [result.evaluation["scores"]["kl_mean"]["value"]] if result.evaluation else []
    assert 0 < found[0] < found[1] < 0.05


def test_what_cannot_be_evaluated_has_its_report_all_the_same(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    words, out = save_words(tmp_path / "model"), tmp_path / "out"
    text = Calibration((str(words),), samples=8, length=32)
    rules = Rules("int8", "rtn+lqer", activations="int8-row", options={"lqer.rank": 2}, calibration=text)
    with pytest.raises(CheckpointError, match=r"cannot be evaluated.* its report has no scores"):
        run(Request(str(tmp_path / "model"), out, rules, text=words, context=32))
    assert "cannot be evaluated" in (out / "report.md").read_text()
