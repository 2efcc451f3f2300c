"""Small checkpoints that the owners of the formats made (`make.py`), read and written again to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit import plugins
from lowbit.formats import Format
from lowbit.inspect import inspect
from lowbit.stages.checkpoint import open_checkpoint
from tests.golden.make import MAKERS
from tests.interop.models import bits_of, recognised, unpacked

HERE = Path(__file__).parent


def cases_of(name: str) -> list[Any]:
    found = json.loads((HERE / f"{name}.json").read_text())["cases"]
    return [pytest.param(name, each, id=f"{name}-{number}") for number, each in enumerate(found)]


CASES = [each for name in MAKERS if name != "onnx" for each in cases_of(name)]
# Layouts that are read and never written: they have another that says the same.
READ_ONLY = {
    "awq-1",
    "fp8-1",
    "bitnet-1",
    "mxfp4-0",
    *(f"torchao-{i}" for i in range(4)),
    *(f"quanto-{i}" for i in range(4)),
}


def tensors_of(dumped: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(bytearray.fromhex(data), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape, data) in dumped.items()
    }


def format_of(case: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Format, dict[str, Any]]:
    """The one format that takes the checkpoint for its own, and its weights."""
    forms: list[Format] = [plugins.load("formats", name) for name in plugins.names("formats")]
    found = [(form, weights) for form in forms if (weights := recognised(form, case["config"], tensors)) is not None]
    ((form, weights),) = found
    return form, weights


@pytest.mark.parametrize(("name", "case"), CASES)
def test_means_what_the_owner_says(name: str, case: dict[str, Any]) -> None:
    tensors, wanted = tensors_of(case["tensors"]), tensors_of(case["weights"])
    form, weights = format_of(case, tensors)
    assert weights.keys() == wanted.keys()
    for key, weight in weights.items():
        found = unpacked(form, weight, tensors).dequantize(wanted[key].dtype)
        assert torch.equal(found, wanted[key]), key


@pytest.mark.parametrize(("name", "case"), [case for case in CASES if case.values[0] == "modelopt"])
def test_is_declared_as_its_owner_does(name: str, case: dict[str, Any]) -> None:
    form, weights = format_of(case, tensors_of(case["tensors"]))
    made = form.config(list(weights.values()), {})["config.json"]["quantization_config"]
    told = [{key: part for key, part in each.items() if key not in ("ignore", "producer")}
            for each in (made, case["config"]["quantization_config"])]  # fmt: skip
    assert told[0] == told[1]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_is_told(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    """`lowbit inspect` names the format and finds nothing wrong."""
    save_file(tensors_of(case["tensors"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    found = inspect(tmp_path)
    assert found.sound, found.findings
    assert (found.format, found.declared) == (name, case["config"].get("quantization_config"))
    assert {facts.name for facts in found.tensors if facts.scheme} == case["weights"].keys()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_is_written_to_the_byte(name: str, case: dict[str, Any], request: pytest.FixtureRequest) -> None:
    tensors = tensors_of(case["tensors"])
    form, weights = format_of(case, tensors)
    if request.node.callspec.id in READ_ONLY:
        return
    again: dict[str, Tensor] = {}
    for weight in weights.values():
        into = {key: torch.empty(spec.shape, dtype=spec.dtype) for key, spec in form.layout(weight).items()}
        form.pack(weight, unpacked(form, weight, tensors), into)
        again |= into
    assert {key: bits_of(tensor).tolist() for key, tensor in again.items()} == {
        key: bits_of(tensor).tolist() for key, tensor in tensors.items()
    }


@pytest.mark.parametrize(("name", "case"), cases_of("onnx"))
def test_graphs_mean_what_their_owner_computes(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(bytes.fromhex(case["graph"]))
    told = inspect(tmp_path / "model.onnx")
    assert (told.format, told.sound) == (name, True), told.findings
    checkpoint = open_checkpoint(tmp_path / "model.onnx")
    for key, meant in tensors_of(case["weights"]).items():
        assert checkpoint.weights[key].scheme is not None
        assert torch.allclose(checkpoint.dequantized(key, torch.float32), meant, rtol=1e-5, atol=1e-6)
