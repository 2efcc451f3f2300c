"""ONNX models that are damaged, lie about their data, or lead out of their directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from tests.hostile.cases import Case

MODEL, DATA = "model.onnx", "data.bin"
_BYTES = {"a.weight": 9 * 2 * 16, "a.scales": 9 * 2 * 4, "a.zero_points": 9}
_TENSORS = {
    "a.weight": (TensorProto.UINT8, (9, 2, 16)),
    "a.scales": (TensorProto.FLOAT, (9, 2)),
    "a.zero_points": (TensorProto.UINT8, (9, 1)),
}
_PLACES = {"a.weight": (0, 288), "a.scales": (288, 72), "a.zero_points": (360, 9)}


def model(
    node: Mapping[str, Any] | None = None,
    inputs: tuple[str, ...] = ("x", *_TENSORS),
    tensors: Mapping[str, tuple[int, tuple[int, ...]]] | None = None,
    kind: str = "MatMulNBits",
    **facts: Any,
) -> bytes:
    """A model with one product, its weight beside it, right unless told otherwise; `facts` are of the codes' place."""
    stored = []
    for name, (dtype, shape) in {**_TENSORS, **(tensors or {})}.items():
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        start, size = _PLACES[name]
        place: dict[str, Any] = {"location": DATA, "offset": start, "length": size}
        place |= facts if name == "a.weight" else {}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        stored.append(tensor)
    attributes: dict[str, Any] = {"K": 40, "N": 9, "bits": 4, "block_size": 32, **(node or {})}
    made = helper.make_node(kind, list(inputs), ["y"], domain="com.microsoft", **attributes)
    return bytes(helper.make_model(helper.make_graph([made], "g", [], [], stored)).SerializeToString())


_HALVES = {"a.weight": (22, (18, 32)), "a.scales": (1, (18, 1)), "a.zero_points": (22, (18, 1))}


def _blocks(
    node: Mapping[str, Any] | None = None, count: int = 3, data: bytes = bytes(369), length: int = 288, **tensors: Any
) -> Callable[[Path], Path]:
    """A matrix of INT4 in blocks of 32 in a `DequantizeLinear`, right unless told otherwise."""
    found = _HALVES | {f"a.{name}": value for name, value in tensors.items()}
    facts = {"axis": 1, "block_size": 32} | dict(node or {})
    return _build(model(facts, tuple(_TENSORS)[:count], found, "DequantizeLinear", length=length), data)


def _build(content: bytes, data: bytes = bytes(369), at: str = DATA) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        (root / "m").mkdir()
        (root / "m" / MODEL).write_bytes(content)
        (root / "m" / at).write_bytes(data)
        return root / "m"

    return build


def _linked(root: Path) -> Path:
    """The data are a link to a file of somebody else."""
    _build(model())(root)
    (root / "secret").write_bytes(bytes(369))
    (root / "m" / DATA).unlink()
    os.symlink(root / "secret", root / "m" / DATA)
    return root / "m"


def _piped(root: Path) -> Path:
    """The data are a pipe, which would block for ever."""
    _build(model())(root)
    (root / "m" / DATA).unlink()
    os.mkfifo(root / "m" / DATA)
    return root / "m"


def _raw(nbytes: int) -> bytes:
    made = helper.make_node("MatMul", ["x", "w"], ["y"])
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(2, 3), raw_data=bytes(nbytes))
    return bytes(helper.make_model(helper.make_graph([made], "g", [], [], [tensor])).SerializeToString())


def _twice() -> bytes:
    made = helper.make_node("MatMul", ["x", "w"], ["y"])
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(1,), raw_data=bytes(4))
    return bytes(helper.make_model(helper.make_graph([made], "g", [], [], [tensor, tensor])).SerializeToString())


_NAN = bytes(288) + b"\0\0\xc0\x7f" + bytes(77)
_MODELS = [
    Case("onnx empty", _build(b""), (MODEL, "no graph")),
    Case("onnx no protobuf", _build(b"\xff" * 64), (MODEL, "no ONNX model")),
    Case("onnx cut", _build(model()[:-40]), (MODEL, "no ONNX model")),
    Case("onnx data outside", _build(model(location="../secret")), (MODEL, "a.weight", "../secret")),
    Case("onnx data absolute", _build(model(location="/etc/passwd")), (MODEL, "a.weight", "/etc/passwd")),
    Case("onnx data behind a link", _linked, ("data.bin", "links out")),
    Case("onnx data in a pipe", _piped, (MODEL, "a.weight", "not there")),
    Case("onnx data missing", _build(model(location="gone")), (MODEL, "a.weight", "gone")),
    Case("onnx location without a name", _build(model(location="")), (MODEL, "a.weight", "no file")),
    Case("onnx data beyond the file", _build(model(offset=200)), (MODEL, "a.weight", "488", "369")),
    Case("onnx offset far beyond", _build(model(offset=2**62)), (MODEL, "a.weight", "no numbers of bytes")),
    Case("onnx offset negative", _build(model(offset=-8)), (MODEL, "a.weight", "-8")),
    Case("onnx offset no number", _build(model(offset="1e3")), (MODEL, "a.weight", "1e3")),
    Case("onnx length of another shape", _build(model(length=287)), (MODEL, "a.weight", "287", "288")),
    Case("onnx truncated data", _build(model(), bytes(300)), (MODEL, "a.scales", "300")),
    Case("onnx shape overflows", _build(model(tensors={"a.weight": (2, (2**40, 2**40, 16))})), (MODEL, "a.weight")),
    Case("onnx shape negative", _build(model(tensors={"a.weight": (2, (-9, 2, 16))})), (MODEL, "a.weight", "-9")),
    Case("onnx 3 bits", _build(model({"bits": 3})), (MODEL, "3 bits", "not read")),
    Case("onnx blocks of 24", _build(model({"block_size": 24})), (MODEL, "block_size 24")),
    Case("onnx blocks of 0", _build(model({"block_size": 0})), (MODEL, "block_size 0")),
    Case("onnx other K", _build(model({"K": 4096})), (MODEL, "a.weight")),
    Case("onnx huge N", _build(model({"N": 2**60})), (MODEL, "a.weight")),
    Case("onnx negative N", _build(model({"N": -9})), (MODEL, "N -9")),
    Case("onnx 8 bits in bytes of 4", _build(model({"bits": 8})), (MODEL, "a.weight", "[9, 2, 32]")),
    Case("onnx prepacked", _build(model({"weight_prepacked": 1})), (MODEL, "prepacked")),
    Case("onnx codes that are computed", _build(model(inputs=("x", "x", "a.scales"))), (MODEL, "codes", "'x'")),
    Case("onnx no scales", _build(model(inputs=("x", "a.weight"))), (MODEL, "scales", "''")),
    Case("onnx scales of integers", _build(model(tensors={"a.scales": (6, (9, 2))})), (MODEL, "int32")),
    Case("onnx scale not finite", _build(model(), _NAN), ("a.scales", "nan"), "onnx"),
    Case("onnx tensor twice", _build(_twice()), (MODEL, "'w'", "twice")),
    Case("onnx raw data too short", _build(_raw(23)), (MODEL, "'w'", "23")),
    Case("onnx blocks along rows", _blocks({"axis": 0}), (MODEL, "axis 0")),
    Case("onnx 24 in a block", _blocks({"block_size": 24}), (MODEL, "blocks of 24")),
    Case("onnx negative block", _blocks({"block_size": -32}), (MODEL, "blocks of -32")),
    Case("onnx block beyond the row", _blocks({"block_size": 2**40}), (MODEL, "blocks of 1099511627776")),
    Case("onnx 4 bits without blocks", _blocks({"block_size": 0}), (MODEL, "4 bits", "no blocks")),
    Case("onnx codes from 0 on", _blocks(count=2, weight=(21, (18, 32))), (MODEL, "without any")),
    Case("onnx zero points of another type", _blocks(zero_points=(21, (18, 1))), (MODEL, "another type")),
    Case("onnx zero points of another shape", _blocks(zero_points=(22, (9, 2))), (MODEL, "each of [18, 1]")),
    Case("onnx scales of another shape", _blocks(scales=(1, (9, 2))), (MODEL, "each of [18, 1]")),
    Case("onnx one block with a zero point", _blocks(weight=(21, (18, 32)), zero_points=(21, (18, 1))), ("1 blocks",)),
    Case("onnx blocks under integers", _blocks(scales=(6, (18, 1))), (MODEL, "not read")),
    Case("onnx huge 4 bits", _blocks(weight=(22, (2**40, 2**40))), (MODEL, "a.weight")),
    Case("onnx half of the 4 bits", _blocks(length=144), (MODEL, "a.weight", "144", "288")),
    Case("onnx scale of a block not finite", _blocks(data=_NAN), ("a.scales", "nan"), "onnx"),
    Case("onnx two in a directory", _build(model(), model(), "other.onnx"), ("2 ONNX files", "other.onnx")),
]  # fmt: skip
CASES = [replace(case, format="onnx") for case in _MODELS]
