"""`lowbit inspect` from the command line, on checkpoints of every format, sound and damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import plugins
from lowbit.formats import Format, Weight
from lowbit.schemes import parse
from tests.e2e.command import CommandLine
from tests.reference.qtensors import random_qtensor

NAMES = [f"model.layers.{i}.mlp.{part}.weight" for i in range(2) for part in ("up_proj", "down_proj")]
KEPT = {
    "model.embed_tokens.weight": torch.ones(96, 64, dtype=torch.float16),
    "model.norm.weight": torch.ones(64, dtype=torch.float16),
}
# Format, scheme asked for, bits of a code, of a scale, of a zero point, and weights in a block (0: a row).
KINDS = [
    ("compressed_tensors", "int4-g32", 4, 16, 0, 32),
    ("compressed_tensors", "int4-g32-asym", 4, 16, 4, 32),
    ("compressed_tensors", "int8-row", 8, 16, 0, 0),
    ("compressed_tensors", "fp8-e4m3-row", 8, 16, 0, 0),
    ("compressed_tensors", "mxfp4", 4, 8, 0, 32),
    ("compressed_tensors", "mxfp8", 8, 8, 0, 32),
    ("gptq", "int4-g32", 4, 16, 0, 32),
    ("gptq_v2", "int4-g32-asym", 4, 16, 4, 32),
    ("gptq_v2", "int8-g64", 8, 16, 0, 64),
    ("bitsandbytes", "nf4-g64", 4, 32, 0, 64),
    ("bitsandbytes", "fp4-g64", 4, 32, 0, 64),
    ("hqq", "int4-g64-fzero", 4, 16, 16, 64),
    ("awq", "int4-g32-asym", 4, 16, 4, 32),
    ("mlx", "int4-g32-min", 4, 16, 16, 32),
    ("modelopt", "nvfp4", 4, 8, 0, 16),
    ("fbgemm_fp8", "fp8-e4m3-row", 8, 32, 0, 0),
    ("bitnet", "levels[-1,0,1]-tensor", 2, 0, 0, 0),
]


def checkpoint(folder: Path, name: str, scheme: str) -> dict[str, Tensor]:
    """Two layers of random codes in a format, an embedding and a norm; the stored tensors."""
    form: Format = plugins.load("formats", name)
    weights, tensors = [], dict(KEPT)
    for seed, full in enumerate(NAMES):
        plain = Weight(
            full, (96, 64) if "up" in full else (64, 96 - 32 * ("gptq" in name or "g64" in scheme)), torch.float16
        )
        weight = Weight(full, plain.shape, plain.dtype, form.fit(parse(scheme), plain))
        assert weight.scheme
        into = {key: torch.empty(spec.shape, dtype=spec.dtype) for key, spec in form.layout(weight).items()}
        form.pack(weight, random_qtensor(weight.scheme, weight.shape, seed, lowest_zero=1), into)
        tensors |= into
        weights.append(weight)
    kept = [Weight(key, tuple(tensor.shape), tensor.dtype) for key, tensor in KEPT.items()]
    save(folder, tensors)
    for file, document in form.config([*weights, *kept], {"model_type": "llama", "vocab_size": 96}).items():
        (folder / file).write_text(json.dumps(document))
    return tensors


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("name", "scheme", "bits", "scale", "zero", "block"), KINDS)
def test_every_format_is_told(
    lowbit: CommandLine, tmp_path: Path, name: str, scheme: str, bits: int, scale: int, zero: int, block: int
) -> None:
    tensors = checkpoint(tmp_path / "model", name, scheme)
    found = lowbit.report(tmp_path / "model")
    assert found["format"] == name
    assert found["sound"] is True
    quantized = {row["name"]: row for row in found["tensors"] if row["scheme"]}
    assert sorted(quantized) == sorted(NAMES)
    for row in quantized.values():
        exact = bits + (scale + zero) / (block or row["shape"][1])
        assert row["bits_per_weight"] == pytest.approx(exact, abs=0.01)
    assert {row["name"]: row["kind"] for row in found["tensors"] if not row["scheme"]} == {
        "model.embed_tokens.weight": "embedding",
        "model.norm.weight": "normalisation",
    }
    assert found["totals"]["stored_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def plant(folder: Path, suffix: str, index: tuple[int, ...], value: float) -> None:
    """Change one element of the first stored tensor with this ending."""
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(tensors) if key.endswith(suffix))
    tensors[name][index] = value
    save(folder, tensors)


@pytest.mark.parametrize(
    ("name", "scheme", "suffix", "index", "value", "words"),
    [
        ("compressed_tensors", "int4-g32", "weight_scale", (3, 1), float("nan"), "weight_scale"),
        ("compressed_tensors", "int4-g32", "weight_scale", (3, 1), 0.0, "scales are zero, the first at [3, 1]"),
        ("gptq_v2", "int4-g32-asym", "scales", (1, 3), float("inf"), "scales"),
        ("gptq", "int4-g32", "scales", (1, 3), 0.0, "scales are zero, the first at [3, 1]"),
        ("bitsandbytes", "nf4-g64", "absmax", (5,), float("nan"), "absmax"),
        ("hqq", "int4-g64-fzero", "proj.scale", (7, 0), 0.0, "scales are zero"),
        ("compressed_tensors", "fp8-e4m3-row", "proj.weight", (2, 9), float("nan"), "[2, 9]"),
        (
            "compressed_tensors",
            "int4-g32",
            "model.norm.weight",
            (11,),
            float("nan"),
            "1 NaN and 0 Inf, the first at [11]",
        ),
    ],
)
def test_damage_is_found_and_named(
    lowbit: CommandLine,
    tmp_path: Path,
    name: str,
    scheme: str,
    suffix: str,
    index: tuple[int, ...],
    value: float,
    words: str,
) -> None:
    folder = tmp_path / "model"
    checkpoint(folder, name, scheme)
    plant(folder, suffix, index, value)
    found = lowbit.report(folder, code=1)
    assert found["sound"] is False
    (error,) = [finding for finding in found["findings"] if finding["level"] == "error"]
    assert words in error["fact"]
    assert error["tensor"] in {*NAMES, "model.norm.weight"}
    code, text, _ = lowbit("inspect", folder)
    assert code == 1
    assert "not sound: 1 error" in text
    assert error["tensor"] in text


def test_the_embedded_model_as_text_and_as_json(lowbit: CommandLine, wiki_8m: Path) -> None:
    code, text, _ = lowbit("inspect", wiki_8m)
    assert code == 0
    for words in ("LlamaForCausalLM", "safetensors, 1 file", "not quantized", "embedding", "16.0000", "sound:"):
        assert words in text
    found = lowbit.report(wiki_8m)
    with safe_open(wiki_8m / "model.safetensors", framework="pt") as opened:
        assert sorted(opened.keys()) == sorted(row["name"] for row in found["tensors"])
    assert found["totals"]["parameters"] == 8_392_960


def test_shards_and_pytorch_files(lowbit: CommandLine, tmp_path: Path) -> None:
    shards, torch_file = tmp_path / "shards", tmp_path / "torch"
    shards.mkdir()
    torch_file.mkdir()
    names = dict(zip(KEPT, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), strict=True))
    for name, file in names.items():
        save_file({name: KEPT[name]}, shards / file)
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(KEPT, torch_file / "pytorch_model.bin")
    found = lowbit.report(shards)
    assert (found["container"], len(found["files"])) == ("safetensors", 2)
    found = lowbit.report(torch_file)
    assert (found["container"], [row["name"] for row in found["tensors"]]) == ("pytorch", list(KEPT))


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = python("-m", "lowbit", "inspect", tmp_path / "nothing.safetensors")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nothing.safetensors" in done.stderr


def test_memory_stays_small(tmp_path: Path) -> None:
    """A 256 MB float matrix costs no anonymous memory near its size."""
    save_file({"w": torch.ones(64, 2**20)}, tmp_path / "large.safetensors")
    code = """
import sys
from lowbit.budget import MemoryWatch, anonymous_bytes
from lowbit.inspect import inspect
before = anonymous_bytes()
with MemoryWatch(None).running() as watch:
    inspect(sys.argv[1])
print(watch.peak - before)
"""
    done = python("-c", code, tmp_path / "large.safetensors")
    assert int(done.stdout) < 64 * 2**20


def test_a_name_of_nothing_is_read_and_fails(lowbit: CommandLine, tmp_path: Path) -> None:
    """A typo must not pass for a checkpoint: the command fails, and says that nothing was opened."""
    missing = tmp_path / "llama-2-7b-chat.q4_K_M.gguf"
    code, out, err = lowbit("inspect", missing)
    assert code == 2
    assert "nothing was opened" in err
    assert "type q4_k, mixture m" in out
    code, out, err = lowbit("inspect", missing, "--json")
    assert code == 2
    assert json.loads(out)["opened"] is False


def test_a_name_alone_on_request(lowbit: CommandLine) -> None:
    code, out, err = lowbit("inspect", "--name", "someone/phi-2-EETQ-W4A16")
    assert (code, err) == (0, "")
    assert "warning: EETQ with W4A16" in out
