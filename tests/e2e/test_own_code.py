"""A checkpoint with a model class of its own: refused unless trusted, then calibrated like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "src/lowbit/data"
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The embedded model under a class that transformers does not have."""
    path = tmp_path / "model"
    shutil.copytree(DATA / "wiki-8m", path)
    (path / "own.py").write_text(CODE)
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((path / "config.json").read_text()) | {"model_type": "own-llama", "auto_map": auto}
    (path / "config.json").write_text(json.dumps(config))
    return path


def quantize(own: Path, *more: str) -> subprocess.CompletedProcess[str]:
    text = str(DATA / "evaluation.txt")
    line = ["quantize", str(own), str(own.parent / "out"), "--method", "gptq", "--blocks", "0:1", "--tokens", "1024"]
    line += ["--calibration", text, "--samples", "4", "--sequence-length", "64", "--evaluate", text, *more]
    environment = os.environ | {"HF_MODULES_CACHE": str(own.parent / "modules")}
    return subprocess.run(
        [sys.executable, "-m", "lowbit", *line], capture_output=True, text=True, check=False, env=environment
    )


def test_it_is_refused_unasked(own: Path) -> None:
    done = quantize(own)
    assert done.returncode == 2 and "read that code, then add --trust-remote-code" in done.stderr
    assert not (own.parent / "out").exists() and not (own.parent / "modules").exists()


def test_it_is_calibrated_evaluated_and_keeps_its_code_where_trusted(own: Path) -> None:
    done = quantize(own, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    report = json.loads((own.parent / "out" / "report.json").read_text())
    assert 0 < report["evaluation"]["scores"]["kl_mean"]["value"] < 0.01
    assert (own.parent / "out" / "own.py").read_text() == CODE
