"""The whole line from the command line, on the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.stages.checkpoint import open_checkpoint
from lowbit.tensors import QTensor
from tests.e2e.command import CommandLine

MODEL = Path(__file__).parents[2] / "src/lowbit/data/wiki-8m"


def relative_error(out: Path) -> float:
    """Largest relative squared error over the quantized matrices, computed with torch alone from what was read back."""
    original, worst = load_file(MODEL / "model.safetensors"), 0.0
    with open_checkpoint(out) as checkpoint:
        for name, weight in checkpoint.weights.items():
            found, wanted = checkpoint.dequantized(name).float(), original[name].float()
            if weight.scheme is None:
                assert torch.equal(found, wanted)
            else:
                worst = max(worst, float((found - wanted).square().sum() / wanted.square().sum()))
    return worst


# Largest relative squared error allowed per scheme: what the grid can do on a bell-shaped weight, and a third more.
LINES = [
    ("compressed-tensors", "int4-g128", "rtn", 0.02),
    ("compressed-tensors", "int8-row", "rtn", 2e-4),
    ("compressed-tensors", "int3-g64-asym", "mse", 0.06),
    ("compressed-tensors", "fp8-e4m3-128x128", "rtn", 1e-3),
    ("compressed-tensors", "nvfp4", "rtn", 0.012),
    ("compressed-tensors", "mxfp4", "rtn", 0.02),
    ("compressed-tensors", "mxfp8", "rtn", 1e-3),
    ("gptq", "int4-g128", "mse", 0.02),
    ("gptq_v2", "int4-g64-asym", "rtn", 0.015),
    ("bitsandbytes", "nf4-dq", "rtn", 0.012),
    ("bitsandbytes", "int8-row", "rtn", 2e-4),
    ("hqq", "int4-g64-fzero", "hqq", 0.015),
    ("awq", "int4-g128-asym", "rtn", 0.015),
    ("fp8", "fp8-e4m3-128x128", "rtn", 1e-3),
    ("fbgemm_fp8", "fp8-e4m3-row", "rtn", 1e-3),
    ("mlx", "int4-g64-min", "rtn", 0.015),
    ("modelopt", "nvfp4", "rtn", 0.012),
]


@pytest.mark.parametrize(("form", "scheme", "method", "bound"), LINES, ids=["-".join(line[:3]) for line in LINES])
def test_every_format_holds_what_was_meant(
    lowbit: CommandLine, tmp_path: Path, form: str, scheme: str, method: str, bound: float
) -> None:
    out = tmp_path / "out"
    code, told, err = lowbit("quantize", MODEL, out, "--format", form, "--scheme", scheme, "--method", method, "--json")
    assert code == 0, err
    report = json.loads(told)
    assert report["verified"]["tensors"] == 75 and report["verified"]["mismatches"] == 0
    with open_checkpoint(out) as checkpoint:
        kinds = [isinstance(checkpoint.load(name), QTensor) for name in checkpoint.weights]
        assert checkpoint.format is not None and sum(kinds) == 8 * 7
    assert relative_error(out) < bound
    assert (out / "report.html").stat().st_size < 2_000_000
    assert (out / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_an_edited_plan_is_carried_out(tmp_path: Path) -> None:
    """In processes of their own, as a user does it."""

    def lowbit(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lowbit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    saved = lowbit("plan", MODEL, "--scheme", "int4-g128", "--out", tmp_path / "plan.json")
    assert saved.returncode == 0 and "times smaller" in saved.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    chosen = next(row for row in plan["tensors"] if row["scheme"])
    chosen["scheme"] = "int8-g64"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = lowbit("quantize", MODEL, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    with open_checkpoint(tmp_path / "out") as checkpoint:
        schemes = {name: str(weight.scheme) for name, weight in checkpoint.weights.items() if weight.scheme}
    assert schemes.pop(chosen["name"]).startswith("int8-g64")
    assert {scheme[:9] for scheme in schemes.values()} == {"int4-g128"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("quantize", MODEL, "OUT", "--scheme", "int99"), 2, "no scheme is called"),
        (("quantize", MODEL, "OUT", "--scheme", "W4A16"), 2, "write --scheme int4-g128"),
        (("quantize", MODEL, "OUT", "--scheme", "q4_k_m"), 2, "for --format gguf"),
        (("quantize", MODEL, "OUT", "--format", "vLLM"), 2, "formats are compressed-tensors"),
        (("convert", MODEL, "OUT", "--format", "ollama"), 2, "formats are gguf"),
        (("convert", MODEL, "OUT", "--format", "Q4_K_M"), 2, "--format gguf --scheme q4_k_m"),
        (("convert", MODEL, "OUT", "--format", "gguf", "--scheme", "q4_k_m"), 2, "`lowbit quantize` gives it a scheme"),
        (("quantize", "/no/such/model", "OUT"), 2, "/no/such/model"),
        (("quantize", MODEL, "OUT", "--ram", "much"), 2, "not a size"),
        (("quantize", MODEL, "OUT", "--ram", "1MiB"), 1, "at least"),
        (("quantize", MODEL, "OUT", "--set", "nonsense"), 2, "REGEX=SCHEME"),
        (("quantize", MODEL, "OUT", "--plan", MODEL / "config.json"), 2, "is not a plan"),
        (("quantize", MODEL, "OUT", "--evaluate", "/no/such/text"), 2, "/no/such/text"),
        (("quantize",), 2, "Missing argument"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    lowbit: CommandLine, tmp_path: Path, arguments: tuple[str | Path, ...], code: int, words: str
) -> None:
    ended, _, err = lowbit(*[tmp_path / "out" if argument == "OUT" else argument for argument in arguments])
    assert ended == code, err
    assert words in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ram", ["400MiB", "300MiB"])
def test_the_memory_limit_is_kept(tmp_path: Path, ram: str) -> None:
    """Anonymous memory is sampled from outside while a model with large matrices goes through."""
    from safetensors.torch import save_file

    model = tmp_path / "m"
    model.mkdir()
    save_file({f"layers.{i}.weight": torch.randn(8192, 8192).bfloat16() for i in range(3)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    command = [sys.executable, "-m", "lowbit", "quantize", str(model), str(tmp_path / "out"), "--scheme", "int4-g128"]
    peak = 0
    with subprocess.Popen([*command, "--ram", ram, "--threads", "2"], stderr=subprocess.PIPE, text=True) as run:
        status = Path(f"/proc/{run.pid}/status")
        while run.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.002)
        assert run.returncode == 0, run.stderr and run.stderr.read()
    assert 50 * 2**20 < peak < int(ram[:3]) * 2**20


@pytest.mark.parametrize(("samples", "length", "informed"), [(8, 128, False), (8, 1024, False), (8, 1024, True)])
def test_the_estimate_of_learning_is_near_what_it_takes(
    samples: int, length: int, informed: bool, tmp_path: Path
) -> None:
    """In a process of its own: what it holds before is part of both."""
    text, out = MODEL.parent / "evaluation.txt", tmp_path / "out"
    command = [sys.executable, "-m", "lowbit", "quantize", str(MODEL), str(out), "--calibration", str(text)]
    command += ["--samples", str(samples), "--sequence-length", str(length), "--blocks", "0:1", "--threads", "1"]
    command += ["--scheme", "int3-g128", "--method", "autoround", "--option", "iterations=2"]
    command += ["--option", f"information={informed}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory = json.loads((out / "report.json").read_text())["memory"]
    assert memory["peak"] <= memory["estimate"] <= 1.5 * memory["peak"]


def test_kills_at_random_moments_leave_identical_results(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks/resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--model", str(MODEL), "--kills", "6", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= 6 and not result["differing"]


def test_a_text_that_cannot_be_evaluated_is_refused_before_the_work(lowbit: CommandLine, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    code, _, err = lowbit("quantize", MODEL, tmp_path / "out", "--evaluate", text)
    assert code == 2 and "fewer than one window of 512" in err
    assert not (tmp_path / "out").exists()


def test_an_evaluation_that_gives_no_numbers_leaves_the_result_and_its_report(
    lowbit: CommandLine, tmp_path: Path
) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    tensors = load_file(MODEL / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    out, text = tmp_path / "out", MODEL.parent / "evaluation.txt"
    code, _, err = lowbit("quantize", tmp_path / "model", out, "--evaluate", text, "--tokens", "1024", "--threads", "1")
    assert code == 1 and "the reference computes values that are not finite" in err
    assert err.strip().endswith(f"{out} is quantized, and its report has no scores")
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation"] is None and report["unscored"].startswith("the reference computes")
    assert "The evaluation failed: the reference computes" in (out / "report.md").read_text()
    assert lowbit("inspect", out)[0] == 1, "what it was made of is not sound"


def test_what_is_wrong_with_the_calibration_text_is_said_before_the_work(lowbit: CommandLine, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    few = ("--method", "gptq", "--calibration", text, "--samples", "1", "--sequence-length", "16", "--blocks", "0:1")
    code, _, err = lowbit("quantize", MODEL, tmp_path / "out", *map(str, few))
    assert code == 0, err
    before = err.split("calibrate:")[0]
    assert "warning: there is one window, and none to judge by" in before
    assert "warning: the calibration sample is small" in before
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["warnings"]) == 2 and report["calibration"]["likeness"]["excess"] is None
    assert "The calibration sample is small" in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out/.lowbit/hidden").exists(), "hidden states are of no use any more"


def test_an_importance_matrix_is_used_without_naming_a_method(lowbit: CommandLine, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    sizes = ("--samples", "2", "--sequence-length", "32")
    code, _, err = lowbit("imatrix", MODEL, tmp_path / "im.gguf", "--calibration", text, *sizes)
    assert code == 0, err
    line = ("--format", "gguf", "--scheme", "q4_k_m", "--imatrix", tmp_path / "im.gguf")
    code, _, err = lowbit("quantize", MODEL, tmp_path / "out", *line)
    assert code == 0, err
    plan = json.loads((tmp_path / "out" / "lowbit-plan.json").read_text())
    methods = {row["name"]: row["method"] for row in plan["tensors"]}
    assert methods["model.layers.0.mlp.up_proj.weight"] == "imatrix_fit"
    code, _, err = lowbit("quantize", MODEL, tmp_path / "other", "--imatrix", tmp_path / "im.gguf")
    assert code == 2 and "rtn is none" in err  # another format's default looks at no importance


def test_a_text_that_nothing_learns_from_is_said_to_be_unused(lowbit: CommandLine, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    code, _, err = lowbit("quantize", MODEL, tmp_path / "out", "--method", "rtn", "--calibration", text)
    assert code == 0 and "warning: the text of --calibration is not used: rtn learns from none" in err
    assert "The text of --calibration is not used" in (tmp_path / "out" / "report.md").read_text()
    code, _, err = lowbit(
        "quantize", MODEL, tmp_path / "other", "--method", "rtn", "--evaluate", text, "--context", "32"
    )
    assert code == 0 and "not used" not in err
    peak = next(line for line in (tmp_path / "other" / "report.md").read_text().splitlines() if "peak memory" in line)
    estimate = re.search(r"estimate, (\S+ \S+)\)", peak)
    assert estimate and f"memory: at most {estimate[1]}" in err
