"""Checkpoints that auto-round saves in formats of its own name, read as the layouts that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowbit.formats import Format, awq, compressed_tensors, gptq, gptq_v2
from tests.interop.models import read, tiny_llama
from tests.interop.test_gptq import applied, loaded_by_auto_round, quantized_modules, small_tokenizer

transformers = pytest.importorskip("transformers")
auto_round = pytest.importorskip("auto_round")


def exported(path: Path, packing: str, **options: Any) -> Path:
    """A tiny model, rounded to nearest and saved by auto-round; where its config.json lies."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer())
    tuner = auto_round.AutoRound(tiny_llama(torch.float32), tokenizer, iters=0, disable_opt_rtn=True, **options)
    tuner.quantize_and_save(str(path), format=packing)
    return next(path.rglob("config.json")).parent


INTEGERS: list[tuple[str, Format, dict[str, Any], str]] = [
    ("auto_round:auto_gptq", gptq.FORMAT, {"bits": 4, "sym": True}, "int4-g32"),
    ("auto_round", gptq_v2.FORMAT, {"bits": 4, "sym": False}, "int4-g32-asym"),
    ("auto_round", gptq.FORMAT, {"bits": 8, "sym": True}, "int8-g32"),
]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(("packing", "form", "options", "scheme"), INTEGERS)
def test_integers_are_read_as_auto_round_loads_them(
    packing: str, form: Format, options: dict[str, Any], scheme: str, tmp_path: Path
) -> None:
    some = {"model.layers.1.mlp.up_proj": {"bits": 2, "group_size": 16}, "model.layers.0.mlp.up_proj": {"bits": 16}}
    path = exported(tmp_path, packing, group_size=32, layer_config=some, **options)
    found, modules = read(form, path), quantized_modules(loaded_by_auto_round(path))
    assert found.keys() == modules.keys() and len(found) == 13
    for name, (weight, q) in found.items():
        other = scheme.replace("int4-g32", "int2-g16").replace("int8-g32", "int2-g16")
        assert str(weight.scheme) == (other if "1.mlp.up" in name else scheme)
        assert torch.equal(q.dequantize(torch.float16).float(), applied(modules[name], weight.shape[1])), name


@pytest.mark.parametrize("sym", [True, False])
def test_awq_is_read(sym: bool, tmp_path: Path) -> None:
    path = exported(tmp_path, "auto_round:auto_awq", bits=4, group_size=32, sym=sym)
    utils = pytest.importorskip("auto_round.export.export_to_awq.utils")
    tensors, found = load_file(path / "model.safetensors"), read(awq.FORMAT, path)
    assert len(found) == 14
    for weight, q in found.values():
        assert str(weight.scheme) == ("int4-g32" if sym else "int4-g32-asym")
        parts = [tensors[f"{weight.module}.{part}"] for part in ("qweight", "qzeros", "scales")]
        assert torch.equal(q.dequantize(torch.float16), utils.dequantize_gemm(*parts, 4, 32).T)


@pytest.mark.parametrize(("kind", "scheme"), [("MXFP4", "mxfp4"), ("MXFP8", "mxfp8")])
def test_small_floats_are_read(kind: str, scheme: str, tmp_path: Path) -> None:
    path = exported(tmp_path, "auto_round", scheme=kind)
    found, original = read(compressed_tensors.FORMAT, path), tiny_llama(torch.float32).state_dict()
    assert len(found) == 14
    for name, (weight, q) in found.items():
        assert str(weight.scheme) == str(weight.activations) == scheme
        error = (q.dequantize() - original[name]).square().sum() / original[name].square().sum()
        assert error < {"mxfp4": 0.025, "mxfp8": 0.002}[scheme], name
