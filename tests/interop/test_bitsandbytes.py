"""Files of the format `bitsandbytes`, opened by the package itself and by `transformers`, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.formats import Weight
from lowbit.formats.bitsandbytes import FORMAT
from lowbit.schemes import parse
from tests.interop.models import at_random, bits_of, read, recognised, stored, tiny_llama, unpacked, write

bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

from bitsandbytes import functional
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

NAME = "model.layers.0.mlp.up_proj.weight"
BF16 = torch.bfloat16
DTYPES = [torch.float32, torch.float16, BF16]
TABLES = [f"{table}-g{size}{dq}" for table in ("nf4", "fp4") for size in (32, 64, 256) for dq in ("", "-dq")]


def theirs(weight: Weight, tensors: dict[str, Tensor]) -> Tensor:
    """What the package makes of the stored tensors of a 4-bit weight."""
    parts = {name.removeprefix(f"{weight.name}."): tensor for name, tensor in tensors.items() if name != weight.name}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    found: Tensor = functional.dequantize_4bit(tensors[weight.name], state)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", TABLES)
def test_tables_dequantize_to_the_same_bits(scheme: str, dtype: torch.dtype) -> None:
    for shape in [(3, 256), (64, 512), (5, 1000)]:
        weight = Weight(NAME, shape, dtype)
        weight = replace(weight, scheme=FORMAT.fit(parse(scheme), weight))
        q = at_random(weight, 1)
        found = theirs(weight, stored(FORMAT, weight, q))
        assert found.dtype == dtype
        assert torch.equal(found, q.dequantize(dtype)), shape


def test_rows_dequantize_to_the_same_bits() -> None:
    """The package multiplies by a rounded 1/127; scales of few bits come out exact all the same."""
    weight = Weight(NAME, (512, 64), BF16)
    weight = replace(weight, scheme=FORMAT.fit(parse("int8-row"), weight))
    for seed in range(5):
        q = at_random(weight, seed)
        tensors = stored(FORMAT, weight, q)
        scb = tensors["model.layers.0.mlp.up_proj.SCB"]
        found = functional.int8_vectorwise_dequant(tensors[NAME], scb)
        assert torch.equal(found, q.dequantize())


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the kernel in question is AVX-512's")
def test_blocks_across_rows_are_refused_because_the_package_reads_them_wrongly() -> None:
    """When this fails, the package is mended, and the refusal in `fit` can go."""
    weight = Weight(NAME, (64, 96), torch.float32, parse("nf4-flat64"))
    q = at_random(weight, 0)
    assert not torch.equal(theirs(weight, stored(FORMAT, weight, q)), q.dequantize())


MODELS = {
    "nf4": {"layers": "nf4-g32"},
    "nf4 dq": {"layers": "nf4-g32-dq"},
    "fp4": {"layers": "fp4-g32"},
    "int8": {"layers": "int8-row"},
    "several": {"layers.0.mlp": "fp4-g32", "layers.0": "nf4-g32-dq", "layers.1.self_attn": "nf4", "lm_head": "nf4"},
}


@pytest.mark.parametrize("schemes", MODELS.values(), ids=MODELS)
def test_transformers_loads_the_same_weights(schemes: dict[str, str], tmp_path: Path) -> None:
    meant = write(FORMAT, tmp_path, schemes, BF16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, kinds)}
    assert found.keys() == meant.keys()
    for name, module in found.items():
        weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
        assert torch.equal(weight, meant[name].dequantize(weight.dtype)), name
    for name, value in tiny_llama(BF16).state_dict().items():
        assert name in meant or torch.equal(model.state_dict()[name], value), name
    assert model(torch.arange(16)[None]).logits.isfinite().all()


OPTIONS: dict[str, dict[str, Any]] = {
    "nf4-flat64": {"bnb_4bit_quant_type": "nf4"},
    "nf4-flat64-dq": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-flat64": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
}


def saved_by_transformers(path: Path, options: dict[str, Any]) -> Any:
    """A tiny Llama, saved, quantized as it is loaded, saved again; returns the quantized model."""
    tiny_llama(BF16).save_pretrained(path / "float")
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(path / "float", quantization_config=config)
    model.save_pretrained(path / "quantized")
    return model


@pytest.mark.parametrize("scheme", OPTIONS)
def test_reads_tables_that_transformers_wrote(scheme: str, tmp_path: Path) -> None:
    """Rows of 96 values here, which the package's own AVX-512 kernel reads wrongly: its portable one is the oracle."""
    model = saved_by_transformers(tmp_path, {"load_in_4bit": True} | OPTIONS[scheme])
    found = read(FORMAT, tmp_path / "quantized")
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert found.keys() == modules.keys() and len(found) == 14
    for name, (weight, q) in found.items():
        whole = weight.shape[1] % 64 == 0  # blocks that end with rows
        assert (str(weight.scheme), weight.dtype) == (scheme.replace("flat", "g") if whole else scheme, BF16)
        assert torch.equal(q.dequantize(BF16), portable(modules[name].weight)), name


def portable(weight: Any) -> Tensor:
    """Dequantized with the package's own functions for scales and codes, by the definition."""
    state, packed = weight.quant_state, weight.data.view(torch.uint8).reshape(-1)
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()
    values = state.code[codes] * absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    found: Tensor = values.reshape(state.shape).to(state.dtype)
    return found


def test_reads_rows_that_transformers_wrote(tmp_path: Path) -> None:
    """Any float32 may be a row's maximum here, so that rounding of 1/127 shows: less than a bit of 16-bit floats."""
    model = saved_by_transformers(tmp_path, {"load_in_8bit": True})
    found = read(FORMAT, tmp_path / "quantized")
    assert len(found) == 14
    for name, (weight, q) in found.items():
        module = model.get_submodule(weight.module)
        assert str(weight.scheme) == "int8-row-f32"
        scb = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        expected = functional.int8_vectorwise_dequant(module.weight.data, scb)
        torch.testing.assert_close(q.dequantize(), expected, rtol=2**-22, atol=0, msg=name)


def test_a_map_of_scales_that_is_not_the_usual_one_is_honoured() -> None:
    """Readers use the map in the file; an older package wrote maps that differ in their last bits."""
    weight = Weight(NAME, (64, 128), torch.float32)
    weight = replace(weight, scheme=FORMAT.fit(parse("nf4-dq"), weight))
    tensors = stored(FORMAT, weight, at_random(weight, 0))
    tensors[f"{NAME}.nested_quant_map"] *= 0.75
    found = recognised(FORMAT, {"quantization_config": {"quant_method": "bitsandbytes"}}, tensors)
    assert found is not None
    again = unpacked(FORMAT, found[NAME], tensors)
    assert torch.equal(again.dequantize(), theirs(weight, tensors))
    assert {name: bits_of(t).tolist() for name, t in stored(FORMAT, found[NAME], again).items()} == {
        name: bits_of(t).tolist() for name, t in tensors.items()
    }
