"""ONNX models: onnxruntime computes what is meant; and what its own quantizers wrote is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic  # type: ignore[import-untyped]
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # type: ignore[import-untyped]
from torch import Tensor

from lowbit.budget import MemoryWatch
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.pipeline import run_conversion
from lowbit.stages._changes import Goal
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Rules, as_planned, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.verify import verify
from lowbit.stages.write import open_output
from lowbit.tensors import QTensor
from tests.reference.models import save_tiny
from tests.unit.test_onnx import OPSETS, session

# Where these packages are installed, transformers and torch.onnx import them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

IDS = torch.arange(3, 35).reshape(2, 16)


def written(folder: Path, kind: str, form: str, scheme: str, dtype: torch.dtype, **rules: Any) -> Checkpoint:
    """A tiny model, the matrices of its blocks rounded to nearest, verified."""
    save_tiny(kind, folder / "model", dtype)
    source = open_checkpoint(folder / "model")
    plan = make_plan(source, Rules(scheme, "rtn", form, **rules))
    source, way = as_planned(source, plan), estimate_memory(plan, None, 1)
    with open_output(folder / form, source, plan) as output:
        quantize(source, plan, output, way, MemoryWatch(None))
        output.finish(source)
        verify(source, output, way)
    return open_checkpoint(folder / form)


def check_logits(checkpoint: Checkpoint) -> None:
    """With a padded line, and another length than the model was exported with."""
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    file = str(checkpoint.path / "model.onnx")
    (found,) = session(file).run(None, {"input_ids": IDS.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        model = open_blueprint(checkpoint, torch.float32).resident()
        wanted = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    seen = mask.bool()
    torch.testing.assert_close(torch.from_numpy(found)[seen], wanted[seen], rtol=1e-4, atol=1e-4)


def schemes_of(checkpoint: Checkpoint) -> list[str]:
    return [str(weight.scheme) for weight in checkpoint.weights.values() if weight.scheme]


def test_a_gpt2_of_two_operators_in_onnxruntime(tmp_path: Path) -> None:
    """Layers that the model holds transposed, with biases, and a tied output."""
    checkpoint = written(tmp_path, "gpt2", "onnx", "int8-row", torch.float16, sets=[(r"mlp.*weight", "int2-g16-asym")])
    assert checkpoint.format == "onnx"
    assert sorted(schemes_of(checkpoint)) == ["int2-g16-asym"] * 4 + ["int8-row"] * 4
    text = (checkpoint.path / "model.onnx").read_bytes()
    assert b".py" not in text and str(Path(torch.__file__).parent).encode() not in text, "traces of this machine"
    check_logits(checkpoint)


def test_a_llama_from_compressed_tensors_and_back(tmp_path: Path) -> None:
    """The same logits in onnxruntime, and the same bytes after the way back; without a config.json; cut off."""
    written(tmp_path, "llama", "compressed-tensors", "int4-g16-asym", torch.bfloat16)
    assert run_conversion(str(tmp_path / "compressed-tensors"), tmp_path / "onnx", Goal("onnx")).lossless
    checkpoint = open_checkpoint(tmp_path / "onnx")
    assert schemes_of(checkpoint) == ["int4-g16-asym-bf16"] * 14
    check_logits(checkpoint)
    assert run_conversion(str(tmp_path / "onnx"), tmp_path / "back", Goal("compressed-tensors")).lossless
    first, back = (tmp_path / name / "model.safetensors" for name in ("compressed-tensors", "back"))
    assert first.read_bytes() == back.read_bytes()
    (tmp_path / "onnx" / "config.json").unlink()  # then the graph is still what is opened, not its data
    assert schemes_of(open_checkpoint(tmp_path / "onnx")) == schemes_of(checkpoint)
    data = tmp_path / "onnx" / "model.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ends at byte .* of 'model\.safetensors'"):
        open_checkpoint(tmp_path / "onnx")


@pytest.mark.parametrize("kind", ["phi3", "gemma"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    """Merged layers; norms that add 1, a scale of the embedding and another GELU."""
    checkpoint = written(tmp_path, kind, "onnx", "int4-g16-asym", torch.bfloat16, blocks=(0, 1))
    assert set(schemes_of(checkpoint)) == {"int4-g16-asym"}
    check_logits(checkpoint)


def test_what_has_no_graph_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    plan = make_plan(source, Rules("int4-g16", "rtn", "onnx"))
    with pytest.raises(UnsupportedError, match="stacked experts"), open_output(tmp_path / "out", source, plan):
        pass
    assert not (tmp_path / "out").exists()


WIDE = 80


def float_model(path: Path, wide: int = WIDE) -> dict[str, Tensor]:
    """Three products with initializers `[inputs, outputs]`, two named by the node alone; returns the weights."""
    dice = np.random.default_rng(0)
    layers = {
        "/model/layers.0/mlp/up_proj/MatMul": "onnx::MatMul_7",
        "/model/layers.0/mlp/down_proj/MatMul": "model.layers.0.mlp.down_proj.MatMul.weight",
        "/lm_head/MatMul": "onnx::MatMul_8",
    }
    arrays = {name: dice.standard_normal((wide, wide), np.float32) / 8 for name in layers.values()}
    names = ["x", "a", "b", "y"]
    nodes = [
        helper.make_node("MatMul", [names[i], stored], [names[i + 1]], name=node)
        for i, (node, stored) in enumerate(layers.items())
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", wide]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    onnx.save(model, path)
    modules = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head")
    return {
        f"{module}.weight": torch.from_numpy(array.T.copy())
        for module, array in zip(modules, arrays.values(), strict=True)
    }


def outputs_of(path: Path, wide: int = WIDE) -> dict[str, Any]:
    """The weight of each product of a model, as onnxruntime has it: its products with the unit vectors."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("a", "b"))
    found = session(model).run(["a", "b", "y"], {"x": np.eye(wide, dtype=np.float32)})
    return dict(zip(("a", "b", "y"), found, strict=True))


def chain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    up, down, head = weights.values()
    return {"a": up.T, "b": up.T @ down.T, "y": up.T @ down.T @ head.T}


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False), (2, True)])
def test_reads_what_onnxruntime_quantized(bits: int, symmetric: bool, tmp_path: Path) -> None:
    wanted = float_model(tmp_path / "float.onnx")
    quantizer = MatMulNBitsQuantizer(
        str(tmp_path / "float.onnx"), bits, 32, symmetric, nodes_to_exclude=["/lm_head/MatMul"]
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "model.onnx"), use_external_data_format=bits == 8)
    checkpoint = open_checkpoint(tmp_path / "model.onnx")
    assert set(checkpoint.weights) == set(wanted)
    schemes = {str(weight.scheme) for weight in checkpoint.weights.values()}
    assert schemes == {"None", f"int{bits}-g32{'' if symmetric else '-asym'}-f32"}
    found = {name: checkpoint.dequantized(name) for name in wanted}
    assert torch.equal(found["lm_head.weight"], wanted["lm_head.weight"])
    for name, value in chain(found).items():
        np.testing.assert_allclose(outputs_of(tmp_path / "model.onnx")[name], value, rtol=1e-4, atol=1e-5)
    assert run_conversion(str(tmp_path / "model.onnx"), tmp_path / "float", Goal("float")).error == 0


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False), (8, True)])
def test_reads_dequantize_linear_in_blocks(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """As onnxruntime writes it: `[inputs, outputs]`, signed where zero is in the middle; it has 4 bits alone."""
    wanted = float_model(tmp_path / "float.onnx", 96)
    quantizer = MatMulNBitsQuantizer(
        str(tmp_path / "float.onnx"),
        4,
        16,
        symmetric,
        nodes_to_exclude=["/lm_head/MatMul"],
        quant_format=QuantFormat.QDQ,
    )
    quantizer.process()
    model = quantizer.model.model
    for tensor in model.graph.initializer if bits == 8 else ():
        if tensor.data_type in (TensorProto.UINT4, TensorProto.INT4):
            kind = np.uint8 if tensor.data_type == TensorProto.UINT4 else np.int8
            values = numpy_helper.to_array(tensor).astype(kind)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=symmetric, size_threshold=0)
    checkpoint = open_checkpoint(tmp_path / "model.onnx")
    assert set(checkpoint.weights) == set(wanted)
    schemes = {str(weight.scheme) for weight in checkpoint.weights.values()}
    assert schemes == {"None", f"int{bits}-g16{'' if symmetric else '-asym'}-f32"}
    found = {name: checkpoint.dequantized(name) for name in wanted}
    for name, value in chain(found).items():
        np.testing.assert_allclose(outputs_of(tmp_path / "model.onnx", 96)[name], value, rtol=1e-4, atol=1e-5)
    assert run_conversion(str(tmp_path / "model.onnx"), tmp_path / "out", Goal("compressed-tensors")).lossless


@pytest.mark.parametrize(("kind", "by_row"), [("QInt8", True), ("QUInt8", False), ("QInt8", False)])
def test_reads_dynamic_quantization(kind: str, by_row: bool, tmp_path: Path) -> None:
    wanted = float_model(tmp_path / "float.onnx")
    quantize_dynamic(
        tmp_path / "float.onnx", tmp_path / "model.onnx", weight_type=getattr(QuantType, kind), per_channel=by_row
    )
    checkpoint = open_checkpoint(tmp_path / "model.onnx")
    assert set(checkpoint.weights) == set(wanted)
    for name, value in wanted.items():
        loaded = checkpoint.load(name)
        assert isinstance(loaded, QTensor)
        scheme = f"int8-{'row' if by_row else 'tensor'}{'-asym' if kind == 'QUInt8' else ''}-f32"
        assert str(loaded.scheme) == scheme
        step = loaded.scale_values().max()
        assert (loaded.dequantize() - value).abs().max() <= 0.51 * step
    # unit vectors are exact in 8 bits; what the first product gives is not, so that one alone is compared
    found = outputs_of(tmp_path / "model.onnx")["a"].T
    first = checkpoint.dequantized("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_allclose(found, first, rtol=1e-5, atol=1e-5)
