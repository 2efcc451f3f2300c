"""Bytes that compressed-tensors 0.20.0 makes of given codes, scales and zero points, one small weight a layout.

`compressed_tensors.json` was made with its compressors from weights that lie on the grid exactly. A difference here
means that files written before can no longer be read, or that readers elsewhere get other weights.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Weight
from lowbit.formats.compressed_tensors import FORMAT
from lowbit.schemes import parse
from lowbit.tensors import QTensor

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("compressed_tensors.json").read_text())
MODULE = "model.layers.0.mlp.up_proj"


def weight_of(case: dict[str, Any]) -> Weight:
    return Weight(f"{MODULE}.weight", tuple(case["shape"]), getattr(torch, case["dtype"]), parse(case["scheme"]))


def qtensor_of(case: dict[str, Any]) -> QTensor:
    scheme, parts = parse(case["scheme"]), case["parts"]
    scales: Tensor | QTensor = torch.tensor(parts.get("scales", 0.0))
    if scheme.nested:
        codes = torch.tensor(parts["scales.codes"], dtype=torch.uint8)
        scales = QTensor(scheme.nested, tuple(codes.shape), codes, torch.tensor(parts["scales.scales"]))
    zeros = torch.tensor(parts["zeros"], dtype=torch.uint8) if "zeros" in parts else None
    return QTensor(scheme, tuple(case["shape"]), torch.tensor(parts["codes"], dtype=torch.uint8), scales, zeros)


def stored(case: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{MODULE}.{name}": torch.frombuffer(bytearray.fromhex(data), dtype=getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape, data) in case["stored"].items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["scheme"]))
def test_pack_makes_these_bytes(case: dict[str, Any]) -> None:
    weight = weight_of(case)
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(weight).items()}
    FORMAT.pack(weight, qtensor_of(case), into)
    for name, (dtype, shape, data) in case["stored"].items():
        tensor = into.pop(f"{MODULE}.{name}")
        assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape)
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes().hex() == data
    assert not into


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["scheme"]))
def test_unpack_reads_these_bytes(case: dict[str, Any]) -> None:
    found, wanted = FORMAT.unpack(weight_of(case), stored(case), None), qtensor_of(case)
    parts = dict(wanted.parts())
    assert {name: part.tolist() for name, part in found.parts()} == {
        name: part.tolist() for name, part in parts.items()
    }


def test_a_group_index_is_read_and_not_written() -> None:
    """Checkpoints of before 0.20 may have `weight_g_idx`: the group of each column. Nothing reads it any more."""
    weight = Weight(f"{MODULE}.weight", (2, 16), torch.bfloat16, parse("int4-g8-bf16"))
    case = next(case for case in CASES if case["scheme"] == str(weight.scheme))
    index = torch.tensor([0, 1] * 8, dtype=torch.int32)
    found = FORMAT.unpack(weight, {**stored(case), f"{MODULE}.weight_g_idx": index}, None)
    q = qtensor_of(case)
    assert found.group_index is not None and torch.equal(found.group_index, index)
    assert torch.equal(found.dequantize(), (q.codes.float() - 8) * q.scale_values()[:, index.long()])
    consecutive = torch.tensor([0] * 8 + [1] * 8, dtype=torch.int32)
    assert FORMAT.unpack(weight, {**stored(case), f"{MODULE}.weight_g_idx": consecutive}, None).group_index is None
    into = stored(case)
    with pytest.raises(FormatError, match="gptq"):
        FORMAT.pack(weight, replace(q, group_index=index), into)
