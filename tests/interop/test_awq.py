"""Files of the format `awq`, opened by auto-round, gptqmodel and transformers, and theirs by ours.

auto-round's module computes on CPUs and runs wherever the tests do, the others where gptqmodel is there.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Weight
from lowbit.formats.awq import FORMAT
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.interop.models import at_random, read, recognised, stored, tiny_llama, unpacked, write
from tests.interop.test_gptq import small_tokenizer
from tests.reference.models import save_tiny

transformers = pytest.importorskip("transformers")

MODULE = "model.layers.0.mlp.up_proj"
F16 = torch.float16
SCHEMES = [f"int4-{block}{zero}" for block in ("g32", "g64", "row") for zero in ("", "-asym")]


def planned(scheme: str, shape: tuple[int, int] = (96, 128)) -> Weight:
    weight = Weight(f"{MODULE}.weight", shape, F16)
    return replace(weight, scheme=FORMAT.fit(parse(scheme), weight))


def parts_of(q: QTensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points as packers take them, `[rows, groups]`."""
    assert isinstance(q.scales, Tensor)
    return q.scales, torch.full(q.scales.shape, 8.0) if q.zeros is None else q.zeros.float()


def auto_round_weight(tensors: dict[str, Tensor], size: int) -> Tensor:
    utils = pytest.importorskip("auto_round.export.export_to_awq.utils")
    qweight, qzeros, scales = (tensors[f"{MODULE}.{name}"] for name in ("qweight", "qzeros", "scales"))
    found: Tensor = utils.dequantize_gemm(qweight, qzeros, scales, 4, size).T
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_auto_round_dequantizes_to_the_same_weights(scheme: str) -> None:
    weight = planned(scheme)
    q = at_random(weight, 1)
    found = auto_round_weight(stored(FORMAT, weight, q), parse(scheme).block.cols or 128)
    assert torch.equal(found, q.dequantize(F16))


def declaration(scheme: str, **more: Any) -> dict[str, Any]:
    parsed = parse(scheme)
    declared = {"quant_method": "awq", "bits": 4, "group_size": parsed.block.cols or -1, "version": "gemm"}
    return {"quantization_config": declared | {"zero_point": parsed.zero == "int"} | more}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("package", ["auto_round", "gptqmodel"])
def test_reads_what_packages_pack(package: str, scheme: str) -> None:
    weight = planned(scheme)
    q = at_random(weight, 2)
    linear = torch.nn.Linear(128, 96, bias=False)
    linear.weight.data = q.dequantize()
    module = {"auto_round": packed_by_auto_round, "gptqmodel": packed_by_gptqmodel}[package](linear, q)
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in module.named_buffers()}
    known = recognised(FORMAT, declaration(scheme), tensors)
    assert known is not None and known[weight.name].scheme == weight.scheme
    found = unpacked(FORMAT, known[weight.name], tensors)
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.dequantize(), q.dequantize())


def packed_by_auto_round(linear: Any, q: QTensor) -> Any:
    utils = pytest.importorskip("auto_round.export.export_to_awq.utils")
    scales, zeros = (part.T.contiguous() for part in parts_of(q))
    return utils.WQLinear_GEMM.from_linear(linear, 4, q.scheme.block.cols or 128, scales=scales, zeros=zeros)


def gptqmodel_module(q: QTensor) -> Any:
    return pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear(
        bits=4,
        group_size=q.scheme.block.cols or -1,
        sym=q.scheme.zero == "none",
        desc_act=False,
        in_features=q.shape[1],
        out_features=q.shape[0],
        register_buffers=True,
    )


def packed_by_gptqmodel(linear: Any, q: QTensor) -> Any:
    module = gptqmodel_module(q)
    module.pack(linear, *(part.half() for part in parts_of(q)))
    return module


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptqmodel_computes_with_the_same_weights(scheme: str) -> None:
    weight = planned(scheme)
    q = at_random(weight, 3)
    module = gptqmodel_module(q)
    module.load_state_dict({k.removeprefix(f"{MODULE}."): t for k, t in stored(FORMAT, weight, q).items()})
    module.post_init()
    found = module.eval()(torch.eye(128, dtype=F16)).T
    assert torch.equal(found, q.dequantize(F16))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gptqmodel leaves a directory
@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int4-g32"])
def test_transformers_loads_the_same_model(scheme: str, tmp_path: Path) -> None:
    """Modules that stay are named, so that nothing else is replaced; the logits are those of the weights we meant."""
    pytest.importorskip("gptqmodel")
    meant = write(FORMAT, tmp_path, {"mlp": scheme}, F16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F16)
    found = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert found == meant.keys()
    plain = tiny_llama(F16)
    state = {name: meant[name].dequantize(F16) if name in meant else t for name, t in plain.state_dict().items()}
    plain.load_state_dict(state)
    ids = torch.arange(16)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0.02, atol=2e-3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["bloom", "falcon", "gpt_neox"])
def test_transformers_finds_the_factors_of_activations(kind: str, tmp_path: Path) -> None:
    """It divides by them for these models, and takes memory as it comes where there are none."""
    pytest.importorskip("gptqmodel")
    # The kernel that the package takes with AVX-512 wants outputs in 32s.
    save_tiny(kind, tmp_path / "model", F16, hidden_size=64, intermediate_size=128)
    lowbit.quantize(tmp_path / "model", tmp_path / "out", format="awq", scheme="int4-g32-asym")
    lowbit.convert(tmp_path / "out", tmp_path / "float", format="float", scheme="f32")
    auto, ids = transformers.AutoModelForCausalLM, torch.arange(3, 19)[None]
    found, wanted = (auto.from_pretrained(tmp_path / each, dtype=F16).eval() for each in ("out", "float"))
    factors = {
        name: tensor for name, tensor in found.named_parameters() if name.endswith(("act.scales", "impl.scales"))
    }
    assert len(factors) == 2
    logits = wanted(ids).logits
    assert (found(ids).logits - logits).abs().max() < 0.01 * logits.abs().max()


def test_layers_whose_activation_is_divided_are_not_kept(tmp_path: Path) -> None:
    save_tiny("gpt_neox", tmp_path / "model", F16, intermediate_size=128)
    with pytest.raises(UnsupportedError, match=r"mlp\.act\.scales, which are stored with .*dense_h_to_4h\.weight"):
        lowbit.quantize(
            tmp_path / "model", tmp_path / "out", format="awq", scheme="int4-g32-asym", skip=["1.mlp.dense_h"]
        )


def test_factors_that_change_something_are_not_read(tmp_path: Path) -> None:
    save_tiny("gpt_neox", tmp_path / "model", F16, intermediate_size=128)
    lowbit.quantize(tmp_path / "model", tmp_path / "out", format="awq", scheme="int4-g32-asym")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".act.scales"))
    save_file(tensors | {name: tensors[name] * 2}, file)
    with pytest.raises(FormatError, match=r"act\.scales are not all 1"):
        lowbit.convert(tmp_path / "out", tmp_path / "float", format="float", scheme="f32")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)  # as other writers leave it
    lowbit.convert(tmp_path / "out", tmp_path / "again", format="float", scheme="f32")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_gptqmodel_loads_a_model_with_the_same_weights(tmp_path: Path, wiki_8m: Path) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    meant = write(FORMAT, tmp_path, {"layers": "int4-g32-asym"}, F16)
    for file in wiki_8m.glob("token*"):
        shutil.copy(file, tmp_path)
    model = gptqmodel.GPTQModel.load(str(tmp_path), backend=gptqmodel.BACKEND.AWQ_TORCH, device="cpu", dtype=F16).model
    modules = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert modules.keys() == meant.keys()
    for name, module in modules.items():
        assert torch.equal(module(torch.eye(module.in_features, dtype=F16)).T, meant[name].dequantize(F16)), name


def test_reads_what_auto_round_exports(tmp_path: Path) -> None:
    """A whole model, rounded to nearest and saved by auto-round as AutoAWQ would."""
    auto_round = pytest.importorskip("auto_round")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer())
    tuner = auto_round.AutoRound(
        tiny_llama(torch.float32), tokenizer, bits=4, group_size=32, sym=False, iters=0, disable_opt_rtn=True
    )
    tuner.quantize_and_save(str(tmp_path), format="auto_awq")
    path = next(tmp_path.rglob("config.json")).parent
    found = read(FORMAT, path)
    assert len(found) == 14
    original = tiny_llama(torch.float32).state_dict()
    for name, (weight, q) in found.items():
        assert str(weight.scheme) == "int4-g32-asym"
        step = q.scale_values().repeat_interleave(32, 1)
        assert ((q.dequantize() - original[name]).abs() <= step).all(), name
