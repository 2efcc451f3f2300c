"""Files of the format `hqq`, opened by the `hqq` package, and its own read by us.

hqq computes `(code - zero) * scale` in its own compute dtype, rounding twice; a `QTensor` is computed in float32 and
rounded once. The two are equal in float32, and elsewhere the package's arithmetic is what the files must lead to.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.formats import Weight
from lowbit.formats.hqq import FORMAT
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.interop.models import at_random, bits_of, read, recognised, stored, tiny_llama, unpacked, write

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # the import compiles a function, at which torch warns of itself
    quantize = pytest.importorskip("hqq.core.quantize")
BaseQuantizeConfig, HQQLinear = quantize.BaseQuantizeConfig, quantize.HQQLinear

MODULE = "model.layers.0.mlp.up_proj"
F32 = torch.float32
DTYPES = [torch.bfloat16, torch.float16, F32]
BITS = (1, 2, 3, 4, 8)
SCHEMES = [f"int{bits}-{block}" for bits in BITS for block in ("g16", "g64", "row", "flat96")]


def planned(scheme: str, dtype: torch.dtype, shape: tuple[int, int] = (48, 128)) -> Weight:
    weight = Weight(f"{MODULE}.weight", shape, dtype)
    return replace(weight, scheme=FORMAT.fit(parse(scheme), weight))


def loaded(tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The package's module with the stored tensors in it."""
    module = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
    module.load_state_dict({name.removeprefix(f"{MODULE}."): tensor.clone() for name, tensor in tensors.items()})
    return module


def in_their_arithmetic(q: QTensor, dtype: torch.dtype) -> Tensor:
    """The definition, step by step in the given dtype."""
    assert isinstance(q.scales, Tensor) and q.zeros is not None
    codes = q.codes.reshape(q.scales.numel(), -1).to(dtype)
    values = (codes - q.zeros.reshape(-1, 1).to(dtype)) * q.scales.reshape(-1, 1).to(dtype)
    return values.reshape(q.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loads_the_same_weights(scheme: str, dtype: torch.dtype) -> None:
    weight = planned(scheme, dtype)
    q = at_random(weight, 1)
    tensors = stored(FORMAT, weight, q)
    found = loaded(tensors, dtype).dequantize()
    assert torch.equal(bits_of(found), bits_of(in_their_arithmetic(q, dtype)))
    assert torch.equal(loaded(tensors, F32).dequantize(), q.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if "flat" not in scheme])
def test_reads_what_the_package_makes(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    bits, size = parse(scheme).grid.bits, parse(scheme).block.cols or 128
    options = BaseQuantizeConfig(nbits=bits, group_size=size)
    module = HQQLinear(torch.nn.Linear(128, 48).to(dtype), options, compute_dtype=dtype, device="cpu")
    tensors = {f"{MODULE}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    found = recognised(FORMAT, {"quantization_config": {"quant_method": "hqq"}}, tensors)
    assert found is not None
    weight = found[f"{MODULE}.weight"]
    assert weight.scheme == planned(scheme, dtype).scheme
    q = unpacked(FORMAT, weight, tensors)
    assert torch.equal(bits_of(module.dequantize()), bits_of(in_their_arithmetic(q, dtype)))
    owned = set(FORMAT.owns(weight))
    assert set(tensors) - owned == {f"{MODULE}.bias"}
    same = stored(FORMAT, weight, q)
    flags = {f"{MODULE}.{name}" for name in ("optimize", "round_zero")}  # how it was made, which bytes cannot tell
    assert {name: bits_of(same[name]).tolist() for name in owned - flags} == {
        name: bits_of(tensors[name]).tolist() for name in owned - flags
    }


@pytest.mark.parametrize("bits", [5, 6])
def test_reads_odd_bits_that_the_package_stores_in_bytes(bits: int) -> None:
    torch.manual_seed(3)
    options = BaseQuantizeConfig(nbits=bits, group_size=64)
    module = HQQLinear(torch.nn.Linear(128, 48, bias=False), options, compute_dtype=F32, device="cpu")
    tensors = {f"{MODULE}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    found = recognised(FORMAT, {}, tensors)
    assert found is not None
    weight = found[f"{MODULE}.weight"]
    assert weight.scheme == parse(f"int{bits}-g64-fzero-f32")
    assert torch.equal(unpacked(FORMAT, weight, tensors).dequantize(), module.dequantize())


def test_reads_codes_that_are_stored_as_floats() -> None:
    torch.manual_seed(4)
    options = BaseQuantizeConfig(nbits=4, group_size=64, view_as_float=True)
    module = HQQLinear(torch.nn.Linear(128, 48, bias=False), options, compute_dtype=torch.float16, device="cpu")
    tensors = {f"{MODULE}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    found = recognised(FORMAT, {"quantization_config": {"quant_method": "hqq"}}, tensors)
    assert found is not None and tensors[f"{MODULE}.W_q"].dtype == torch.float16
    q = unpacked(FORMAT, found[f"{MODULE}.weight"], tensors)
    assert torch.equal(in_their_arithmetic(q, torch.float16), module.dequantize())


def test_a_whole_model_loads_into_the_packages_modules(tmp_path: Path) -> None:
    """As the package loads safetensors: a `HQQLinear` for each module that has `W_q`, then the model's state."""
    schemes = {"0.self_attn": "int8-row", "1.mlp": "int4-g32", "layers.0": "int3-g64", "1.self_attn.q": "int2-g64"}
    meant = write(FORMAT, tmp_path, schemes, F32)
    model, tensors = tiny_llama(F32), load_file(tmp_path / "model.safetensors")
    for name in meant:
        module = name.removesuffix(".weight")
        model.set_submodule(module, HQQLinear(None, None, compute_dtype=F32, device="cpu"))
    model.load_state_dict(tensors, strict=False)
    for name, q in meant.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).dequantize(), q.dequantize()), name
    assert model(torch.arange(16)[None]).logits.isfinite().all()


def test_reads_a_whole_model_that_the_package_saved(tmp_path: Path) -> None:
    model = tiny_llama(F32)
    options = BaseQuantizeConfig(nbits=4, group_size=32)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, HQQLinear(module, options, compute_dtype=F32, device="cpu"))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = read(FORMAT, tmp_path)
    assert len(found) == 14
    for weight, q in found.values():
        assert str(weight.scheme) == "int4-g32-fzero-f32"
        assert torch.equal(q.dequantize(), model.get_submodule(weight.module).dequantize())


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) >= 5, reason="transformers 5 no longer loads hqq files")
def test_transformers_loads_the_same_weights(tmp_path: Path) -> None:
    schemes = {"0.self_attn": "int8-row", "1.mlp": "int4-g32", "layers.0": "int3-g64", "lm_head": "int2-g64"}
    meant = write(FORMAT, tmp_path, schemes, F32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F32)
    found = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    assert found.keys() == meant.keys()
    for name, module in found.items():
        assert torch.equal(module.dequantize(), meant[name].dequantize()), name
    for name, value in tiny_llama(F32).state_dict().items():
        assert name in meant or torch.equal(model.state_dict()[name], value), name
