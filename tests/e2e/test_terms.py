"""Four bits for weights and activations: the part of each weight that stays in 16 bits is worth its bytes."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

import lowbit
from lowbit.cli import group
from lowbit.pipeline import Request, run
from lowbit.stages.plan import Calibration, Rules

TEXT = Path(lowbit.__file__).parent / "data" / "evaluation.txt"


def divergence(folder: Path, model: Path, method: str, options: dict[str, object]) -> float:
    """Of the embedded model with one quantized block, as the line itself evaluates it."""
    text = TEXT.read_text()
    for name, part in (("learn", text[: len(text) // 2]), ("judge", text[len(text) // 2 :])):
        (folder / f"{name}.txt").write_text(part)
    calibration = Calibration((str(folder / "learn.txt"),), samples=8, length=128)
    rules = Rules("nvfp4", method, options=options, calibration=calibration, blocks=(0, 1), activations="nvfp4")
    out = folder / method
    run(Request(str(model), out, rules, text=folder / "judge.txt", context=128, tokens=1500))
    found = json.loads((out / "report.json").read_text())
    assert (found["adapter"] is not None) == ("svdquant" in method) == (out / "adapter").is_dir()
    value: float = found["evaluation"]["scores"]["kl_mean"]["value"]
    return value


def test_a_term_that_is_taken_out_first_lessens_the_error(tmp_path: Path, wiki_8m: Path) -> None:
    options: dict[str, object] = {"smoothquant.strengths": 3, "smoothquant.windows": 2}
    plain = divergence(tmp_path, wiki_8m, "smoothquant+rtn", options)
    found = divergence(tmp_path, wiki_8m, "smoothquant+rtn+svdquant", {**options, "svdquant.rank": 32})
    assert found < 0.8 * plain
    out = tmp_path / "smoothquant+rtn+svdquant"
    arguments = ["evaluate", str(out), "--text", str(tmp_path / "judge.txt"), "--context", "128", "--tokens", "1500"]
    again = CliRunner().invoke(group, [*arguments, "--adapter", str(out / "adapter"), "--json"])
    document = json.loads(again.stdout)
    reported = json.loads((out / "report.json").read_text())["evaluation"]
    assert document["scores"]["perplexity"] == reported["scores"]["perplexity"]
    alone = CliRunner().invoke(group, arguments)
    said = f"without the low-rank terms that lie in it; with them: --adapter {out / 'adapter'}"
    assert said in alone.stderr and said in alone.stdout and said not in again.stderr
    assert f"low-rank terms lie in {out / 'adapter'}" in CliRunner().invoke(group, ["inspect", str(out)]).stdout
