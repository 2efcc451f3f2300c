"""Quantized activations: what `transformers` with `compressed-tensors` computes from our files, and what we do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.formats import Weight
from lowbit.formats.compressed_tensors import FORMAT
from lowbit.methods.rtn import METHOD as RTN
from lowbit.schemes import parse
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import open_checkpoint
from tests.interop.models import stored, tiny_llama

transformers = pytest.importorskip("transformers")
quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")

IDS = torch.arange(40).reshape(2, 20)
PAIRS = [
    ("int8-row", "int8-row"),
    ("int8-row", "int8-row-asym"),
    ("int8-row", "int8-tensor"),
    ("int8-row-asym", "int8-row"),
    ("int4-g32", "int8-row"),
    ("int4-row", "int4-row"),
    ("int3-g16", "int8-g32"),
    ("int4-g32", "fp8-e4m3-row"),
    ("fp8-e4m3-row", "fp8-e4m3-row"),
    ("fp8-e4m3-tensor", "fp8-e4m3-tensor"),
    ("fp8-e4m3-32x32", "fp8-e4m3-g32"),
    ("nvfp4", "nvfp4"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8"),
    ("mxfp8", "mxfp8"),
]
# What the largest input is taken for, where one scale is stored: so small that some inputs are beyond it.
LARGEST = {"int8-tensor": 1.3, "fp8-e4m3-tensor": 1.3, "nvfp4": 448 * 6 / 2**11}


def write(path: Path, scheme: str, activations: str, dtype: torch.dtype = torch.float32) -> list[Weight]:
    """A tiny Llama with every projection in these; the input scale is written as a user of the format would."""
    model, tensors, weights = tiny_llama(dtype), {}, []
    for name, value in model.state_dict().items():
        weight = Weight(name, tuple(value.shape), dtype)
        if "proj" not in name:
            tensors[name] = value.clone()
        else:
            fitted = FORMAT.fit(parse(scheme), weight)
            weight = replace(weight, scheme=fitted)
            kind = FORMAT.fit_activations(parse(activations), weight)
            scale = scale_for(activations)
            scale = scale if scale is None or kind.nested else float(torch.tensor(scale).to(dtype))
            weight = replace(weight, activations=kind, input_scale=scale)
            # In NVFP4 a global scale that is a power of two: the package decompresses to bfloat16, which is exact then.
            value = value * (448 * 6 / 2**12 / value.abs().max())
            tensors |= stored(FORMAT, weight, RTN.quantize(value, {}, fitted, RTN.options()))
        weights.append(weight)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    source = json.loads(model.config.to_json_string(use_diff=False))
    (path / "config.json").write_text(json.dumps(FORMAT.config(weights, source)["config.json"]))
    return weights


def scale_for(activations: str) -> float | None:
    largest = LARGEST.get(activations)
    if largest is None:
        return None
    return {"int8-tensor": largest / 127.5, "fp8-e4m3-tensor": largest / 448, "nvfp4": 448 * 6 / largest}[activations]


def theirs(path: Path) -> Any:
    """The model as `transformers` opens it, decompressed as it would at the first call, and then in float32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for hook in list(model._forward_pre_hooks.values()):
        hook(model, ())
    return torch.nn.Module.float(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("scheme", "activations"), PAIRS)
def test_logits_are_those_of_the_package(scheme: str, activations: str, tmp_path: Path) -> None:
    """In float32, so that what is compared is the rounding of inputs, not of products."""
    write(tmp_path, scheme, activations)
    model = theirs(tmp_path)
    wanted = logits(model)
    blueprint = open_blueprint(open_checkpoint(tmp_path), torch.float32)
    for ours in (blueprint.resident(), blueprint.streamed()):
        found = logits(ours)
        # An input within float32's error of a midpoint may go either way: one code of one input, now and then.
        assert (found - wanted).abs().median() < 1e-5 * wanted.std()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(wanted.std()))
    for module in model.modules():
        module.quantization_enabled = False
    assert (logits(model) - wanted).abs().max() > 0.01 * wanted.std(), "activations make no difference here"


# Presets of the package, the schemes that they stand for here, and what is stored for the inputs.
PRESETS = {
    "W8A8": ("int8-row-bf16", "int8-row-f32", None),
    "FP8": ("fp8-e4m3-tensor-bf16", "fp8-e4m3-tensor-bf16", 0.03125),
    "FP8_DYNAMIC": ("fp8-e4m3-row-bf16", "fp8-e4m3-row", None),
    "NVFP4": ("nvfp4", "nvfp4", 512.0),
    "MXFP4": ("mxfp4", "mxfp4", None),
    "MXFP8": ("mxfp8", "mxfp8", None),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_reads_what_the_package_writes(preset: str, tmp_path: Path) -> None:
    """Its own presets, saved by its own writer: the declared activations, and their scales where it stores some."""
    scheme, activations, scale = PRESETS[preset]
    model = tiny_llama(torch.bfloat16)
    group = quantization.preset_name_to_scheme(preset, ["Linear"])
    declared = quantization.QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, declared)
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(scale if "input" in name else 0.25)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    found = open_checkpoint(tmp_path).weights
    kinds = {(str(w.scheme), str(w.activations), w.input_scale) for w in found.values() if w.scheme}
    assert kinds == {(scheme, activations, scale)}
