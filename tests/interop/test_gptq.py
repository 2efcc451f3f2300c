"""Files of the formats `gptq` and `gptq_v2`, opened by auto-round and gptqmodel, and theirs by ours.

auto-round needs no other torch and runs wherever the tests do. gptqmodel pins its own; its tests run where it is there.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.formats import Format, Weight, gptq, gptq_v2
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.interop.models import at_random, read, recognised, stored, tiny_llama, unpacked, write
from tests.reference.models import save_tiny
from tests.reference.qtensors import random_qtensor

transformers = pytest.importorskip("transformers")

MODULE = "model.layers.0.mlp.up_proj"
F16 = torch.float16
BITS = (2, 3, 4, 8)
SYMMETRIC = [f"int{bits}-{block}" for bits in BITS for block in ("g32", "row")]
ASYMMETRIC = [f"{scheme}-asym" for scheme in SYMMETRIC]
FORMATS: dict[str, tuple[Format, list[str]]] = {
    "gptq": (gptq.FORMAT, SYMMETRIC),
    "gptq_v2": (gptq_v2.FORMAT, SYMMETRIC + ASYMMETRIC),
}
CASES = [(name, scheme) for name, (_, schemes) in FORMATS.items() for scheme in schemes]


def planned(form: Format, scheme: str, shape: tuple[int, int] = (64, 96)) -> Weight:
    weight = Weight(f"{MODULE}.weight", shape, F16)
    return replace(weight, scheme=form.fit(parse(scheme), weight))


def filled(module: Any, tensors: dict[str, Tensor]) -> Any:
    """A reader's module with the stored tensors as its buffers; those it has no use for are left out."""
    buffers = dict(module.named_buffers())
    local = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in tensors.items()}
    assert {"qweight", "qzeros", "scales"} <= buffers.keys() & local.keys()
    module.load_state_dict({name: tensor for name, tensor in local.items() if name in buffers})
    return module


def auto_round_module(name: str, weight: Weight) -> Any:
    """auto-round's module for stored zero points less one (v1) or as they are (v2)."""
    assert weight.scheme is not None
    kind = {"gptq": "qlinear_torch_zp", "gptq_v2": "qlinear_torch"}[name]
    rows, cols = weight.shape
    return pytest.importorskip(f"auto_round_extension.torch.{kind}").QuantLinear(
        weight.scheme.grid.bits, weight.scheme.block.cols or -1, cols, rows, bias=False
    )


def applied(module: Any, cols: int) -> Tensor:
    """The weight that a module multiplies with: what it makes of the unit vectors, which is exact."""
    found: Tensor = module(torch.eye(cols)).T
    return found


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_auto_round_computes_with_the_same_weights(name: str, scheme: str) -> None:
    form = FORMATS[name][0]
    weight = planned(form, scheme)
    q = at_random(weight, 1)
    module = filled(auto_round_module(name, weight), stored(form, weight, q))
    assert torch.equal(applied(module, 96), q.dequantize(F16).float())


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_reads_what_auto_round_packs(name: str, scheme: str) -> None:
    form = FORMATS[name][0]
    weight = planned(form, scheme)
    q = at_random(weight, 2)
    assert isinstance(q.scales, Tensor) and weight.scheme is not None
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = q.dequantize()
    module, middle = auto_round_module(name, weight), 2 ** (weight.scheme.grid.bits - 1)
    module.device = "cpu"
    module.pack(linear, q.scales, middle if q.zeros is None else q.zeros.float())
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in module.named_buffers()}
    found = unpacked(form, weight, tensors)
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.dequantize(), q.dequantize())


def loaded_by_auto_round(path: Path) -> Any:
    pytest.importorskip("auto_round")
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=transformers.AutoRoundConfig(backend="torch")
    )


MODELS = {
    "one scheme": {"layers": "int4-g32"},
    "several": {"0.self_attn": "int8-row", "1.mlp": "int4-g16", "layers.0": "int3-g32", "lm_head": "int2-g32"},
}


def quantized_modules(model: Any) -> dict[str, Any]:
    return {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "qweight")}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("schemes", MODELS.values(), ids=MODELS)
def test_transformers_with_auto_round_loads_the_same_weights(schemes: dict[str, str], tmp_path: Path) -> None:
    meant = write(gptq.FORMAT, tmp_path, schemes, F16)
    model = loaded_by_auto_round(tmp_path)
    modules = quantized_modules(model)
    assert modules.keys() == meant.keys()
    for name, module in modules.items():
        assert torch.equal(applied(module, module.infeatures), meant[name].dequantize(F16).float()), name
    for name, value in tiny_llama(F16).state_dict().items():
        assert name in meant or torch.equal(model.state_dict()[name], value), name


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_reads_what_auto_round_exports(tmp_path: Path) -> None:
    """A whole model, rounded to nearest and saved by auto-round; what it loads again is what we read."""
    auto_round = pytest.importorskip("auto_round")
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer())
    tuner = auto_round.AutoRound(
        tiny_llama(torch.float32), tokenizer, bits=4, group_size=32, sym=True, iters=0, disable_opt_rtn=True
    )
    tuner.quantize_and_save(str(tmp_path), format="auto_gptq")
    path = next(tmp_path.rglob("config.json")).parent
    found = read(gptq.FORMAT, path)
    modules = quantized_modules(loaded_by_auto_round(path))
    assert found.keys() == modules.keys() and len(found) == 14
    for name, (weight, q) in found.items():
        assert str(weight.scheme) == "int4-g32"
        assert torch.equal(q.dequantize(F16).float(), applied(modules[name], weight.shape[1])), name


def small_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


def gptqmodel_module(name: str, weight: Weight, group_index: bool = False) -> Any:
    """gptqmodel's torch module; it computes with v2's zero points, into which it converts v1's."""
    assert weight.scheme is not None
    return pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear(
        bits=weight.scheme.grid.bits,
        group_size=weight.scheme.block.cols or -1,
        sym=weight.scheme.zero == "none",
        desc_act=group_index,
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        format=pytest.importorskip("gptqmodel.quantization").FORMAT(name),
    )


def gptqmodel_weight(name: str, module: Any) -> Tensor:
    if name == "gptq":
        model = pytest.importorskip("gptqmodel.utils.model")
        model.convert_gptq_v1_to_v2_format_module(module, bits=module.bits, pack_dtype=torch.int32)
    found: Tensor = module.eval().dequantize_weight().T
    return found


def scattered(q: QTensor) -> QTensor:
    """The same tensor with its columns' groups in no order, as GPTQ's act-order leaves them."""
    groups = torch.randperm(q.codes.shape[1], generator=torch.Generator().manual_seed(0)) % q.scales.shape[1]
    return replace(q, group_index=groups.int())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_gptqmodel_dequantizes_to_the_same_weights(name: str, scheme: str, act_order: bool) -> None:
    form = FORMATS[name][0]
    weight = planned(form, scheme)
    q = scattered(at_random(weight, 3)) if act_order else at_random(weight, 3)
    tensors = stored(form, weight, q)
    module = filled(gptqmodel_module(name, weight, act_order), tensors)
    assert torch.equal(gptqmodel_weight(name, module), q.dequantize(F16))
    again = unpacked(form, weight, tensors)
    assert torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves a directory to clean up
@pytest.mark.parametrize("name", FORMATS)
def test_gptqmodel_loads_a_model_with_the_same_weights(name: str, tmp_path: Path, wiki_8m: Path) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    schemes = {"0.self_attn": "int8-row", "1.mlp": "int4-g16", "layers.0": "int3-g32", "lm_head": "int2-g32"}
    schemes |= {"1.self_attn.q": "int4-g32-asym", "1.self_attn.k": "int3-g32-asym"} if name == "gptq_v2" else {}
    meant = write(FORMATS[name][0], tmp_path, schemes, F16)
    for file in wiki_8m.glob("token*"):
        shutil.copy(file, tmp_path)
    model = gptqmodel.GPTQModel.load(str(tmp_path), backend=gptqmodel.BACKEND.GPTQ_TORCH, device="cpu", dtype=F16).model
    modules = quantized_modules(model)
    assert modules.keys() == meant.keys()
    for weight, module in modules.items():
        assert torch.equal(module.dequantize_weight().T, meant[weight].dequantize(F16)), weight


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("name", "scheme"), [("gptq_v2", scheme) for scheme in SYMMETRIC + ASYMMETRIC])
def test_reads_what_gptqmodel_packs(name: str, scheme: str, act_order: bool) -> None:
    weight = planned(gptq_v2.FORMAT, scheme)
    assert weight.scheme is not None
    q = random_qtensor(weight.scheme, weight.shape, 4)
    q = scattered(q) if act_order else q
    assert isinstance(q.scales, Tensor)
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = q.dequantize()
    module = gptqmodel_module(name, weight, act_order)
    middle = torch.full(q.scales.shape, 2.0 ** (weight.scheme.grid.bits - 1))
    index = torch.arange(96) // (weight.scheme.block.cols or 96) if q.group_index is None else q.group_index
    module.pack(linear, q.scales, middle if q.zeros is None else q.zeros.float(), index.int())
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in module.named_buffers()}
    found = unpacked(gptq_v2.FORMAT, weight, tensors)
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.dequantize(), q.dequantize())


def test_v1_with_zero_points_is_read_where_readers_agree_on_it() -> None:
    """auto-round writes such files, clamping zero points of 0; we read, and do not write them."""
    pytest.importorskip("auto_round")
    weight = planned(gptq_v2.FORMAT, "int4-g32-asym")
    assert weight.scheme is not None
    q = random_qtensor(weight.scheme, weight.shape, 5, lowest_zero=1)
    assert isinstance(q.scales, Tensor) and q.zeros is not None
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = q.dequantize()
    module = auto_round_module("gptq", weight)
    module.pack(linear, q.scales, q.zeros.float())
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in module.named_buffers()}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    found = recognised(gptq.FORMAT, {"quantization_config": config}, tensors)
    assert found is not None and found[weight.name].scheme == weight.scheme
    again = unpacked(gptq.FORMAT, found[weight.name], tensors)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert torch.equal(applied(module, 96), q.dequantize(F16).float())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # optimum's
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("kind", "skip"), [("llama", r"0\.mlp\.down_proj"), ("llama", "down_proj"), ("mamba", r"0\.mixer\.in_proj")]
)
def test_transformers_finds_the_blocks_and_what_stays_in_them(kind: str, skip: str, tmp_path: Path) -> None:
    """optimum does not look at `dynamic`, and knows where the blocks are for some models alone."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    sizes |= {"time_step_rank": 16} if kind == "mamba" else {}
    save_tiny(kind, tmp_path / "model", **sizes)
    lowbit.quantize(tmp_path / "model", tmp_path / "out", format="gptq", scheme="int4-g32", skip=[skip])
    lowbit.convert(tmp_path / "out", tmp_path / "float", format="float", scheme="f32")
    auto, ids = transformers.AutoModelForCausalLM, torch.arange(3, 19)[None]
    found, wanted = (auto.from_pretrained(tmp_path / each, dtype=torch.float32).eval() for each in ("out", "float"))
    assert any(hasattr(module, "qweight") for module in found.modules())
    logits = wanted(ids).logits
    assert (found(ids).logits - logits).abs().max() < 0.02 * logits.abs().max()
