"""`lowbit convert` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from lowbit.stages.checkpoint import open_checkpoint
from tests.e2e.command import CommandLine
from tests.reference.checkpoints import NAMES, write_checkpoint

MODEL = Path(__file__).parents[2] / "src/lowbit/data/wiki-8m"


def test_lossless_is_said_before_and_zero_after(lowbit: CommandLine, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gptq", dict.fromkeys(NAMES, "int4-g64"))
    code, out, err = lowbit("convert", tmp_path / "in", tmp_path / "out", "--format", "compressed-tensors")
    assert code == 0, err
    assert "gptq -> compressed-tensors: lossless: every weight stays as it is, to the bit" in err
    assert "largest difference: 0\n" in out and "4.25 before, 4.25 after" in out
    with open_checkpoint(tmp_path / "in") as before, open_checkpoint(tmp_path / "out") as after:
        assert after.format == "compressed_tensors"
        assert all(torch.equal(before.dequantized(name), after.dequantized(name)) for name in before.weights)


def test_what_changes_is_refused_in_one_sentence_and_made_with_lossy(lowbit: CommandLine, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gptq", dict.fromkeys(NAMES, "int4-g64"))
    arguments = ("convert", tmp_path / "in", tmp_path / "out", "--format", "bitsandbytes")
    code, out, err = lowbit(*arguments)
    last = err.splitlines()[-1]
    assert code == 2 and not (tmp_path / "out").exists() and not out
    assert last.startswith("lowbit: model.layers.0.mlp.") and "and 1 more would not stay" in last
    assert "NOT lossless" in err and "--lossy" in last
    code, out, err = lowbit(*arguments, "--lossy", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert not result["lossless"] and result["verified"] == 4
    lost = [group for group in result["groups"] if not group["lossless"]]
    assert sum(group["tensors"] for group in lost) == 2 and 0 < result["error"] < 0.1
    assert f"{result['error']:.2g}"[:4] in last


def test_a_float_checkpoint_is_copied_with_a_hint(lowbit: CommandLine, tmp_path: Path) -> None:
    code, out, err = lowbit("convert", MODEL, tmp_path / "out", "--format", "GPTQ")
    assert code == 0 and "`lowbit quantize`" in out, err


def test_kills_at_random_moments_leave_identical_results(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks/resume.py"
    options = ["--model", str(MODEL), "--format", "gptq", "--convert", "compressed-tensors", "--kills", "4", "--json"]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= 4 and not result["differing"]
