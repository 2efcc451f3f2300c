"""ONNX: what is packed means to onnxruntime what the slow definition says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.formats import Weight, onnx
from lowbit.schemes import parse
from tests.reference.qtensors import random_qtensor, slow_dequantize

_TYPES = {
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def session(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    # Else it rounds inputs to 8 bits where it makes a MatMulNBits of a blocked DequantizeLinear.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(model if isinstance(model, str) else model.SerializeToString(), options)


def initializer(name: str, tensor: Tensor) -> Any:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, _TYPES[tensor.dtype], list(tensor.shape), data, raw=True)


def node_of(weight: Weight, tensors: dict[str, Tensor]) -> Any:
    """A model of one product with the stored tensors of a weight, every value as it is in them."""
    rows, cols = weight.shape
    scheme = weight.scheme
    assert scheme is not None
    stored = [initializer(f"{name}.raw", t) for name, t in tensors.items()]
    nodes = [
        helper.make_node("Cast", [f"{name}.raw"], [name], to=TensorProto.FLOAT)
        if t.dtype.is_floating_point
        else helper.make_node("Identity", [f"{name}.raw"], [name])
        for name, t in tensors.items()
    ]
    if scheme.grid.bits == 8 and scheme.block.cols == 0:
        nodes.append(helper.make_node("DequantizeLinear", list(tensors), ["w"], axis=0))
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", "t"], ["y"]))
    else:
        facts: dict[str, Any] = {"K": cols, "N": rows, "bits": scheme.grid.bits, "block_size": scheme.block.cols}
        nodes.append(helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", **facts))
    sizes = (("x", cols), ("y", rows))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", size]) for name, size in sizes]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


@pytest.mark.parametrize(
    "scheme",
    [
        "int2-g16", "int2-g64-asym", "int2-g32-fzero", "int4-g16-asym", "int4-g32", "int4-g64-fzero", "int4-row-asym",
        "int8-g32", "int8-g128-asym", "int8-row", "int8-row-asym", "int8-tensor", "int8-tensor-asym",
    ],
)  # fmt: skip
def test_product_of_onnxruntime(scheme: str) -> None:
    # 80 columns leave the last block of 32 half empty, 5 blocks of 16 leave bits of the zero points empty
    for cols, dtype in ((80, "f16"), (128, "f32"), (20, "bf16")):
        weight = Weight("m.weight", (9, cols), torch.float32)
        named = parse(scheme if dtype == "f16" else f"{scheme}-{dtype}")
        weight = Weight(weight.name, weight.shape, weight.dtype, onnx.fit(named, weight))
        assert weight.scheme is not None
        q = random_qtensor(weight.scheme, weight.shape)
        tensors = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in onnx.layout(weight).items()}
        onnx.pack(weight, q, tensors)
        x = np.eye(cols, dtype=np.float32)
        (y,) = session(node_of(weight, tensors)).run(None, {"x": x})
        meant = slow_dequantize(q)
        np.testing.assert_allclose(y.T, meant, rtol=2e-6, atol=1e-6 * float(abs(meant).max()))


@pytest.mark.parametrize(
    "scheme",
    ["int3-g32", "int4-g48", "int4-g8", "int2-g512", "int4-g32-min", "int8-g32-fzero", "nf4-g64", "int4-16x16"],
)
def test_refuses_what_onnxruntime_has_not(scheme: str) -> None:
    with pytest.raises(UnsupportedError, match="onnx cannot hold"):
        onnx.fit(parse(scheme), Weight("m.weight", (64, 1024), torch.float32))
