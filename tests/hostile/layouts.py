"""Hostile checkpoints of further formats, in the words of `cases.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.hostile.cases import INF, NAN, SHARD, Case, _directory

Build = Callable[[Path], Path]
F16 = torch.float16


def checkpoint(declared: Mapping[str, Any], parts: Mapping[str, Tensor | None]) -> Build:
    """One module `m` with these tensors (None: left out), and a configuration that declares its format."""
    tensors = {f"m.{name}": tensor for name, tensor in parts.items() if tensor is not None}
    return _directory({SHARD: tensors}, config={"quantization_config": declared})


def _awq(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """AWQ of [16, 64], groups of 32."""
    parts = {
        "qweight": torch.zeros(64, 2, dtype=torch.int32),
        "qzeros": torch.full((2, 2), -0x77777778, dtype=torch.int32),
        "scales": torch.ones(2, 16, dtype=F16),
    }
    usual = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False, "version": "gemm"}
    return checkpoint(usual | dict(declared or {}), {**parts, **changes})


def _lies(fields: Mapping[str, Any], *says: str) -> Case:
    return Case("awq says " + ", ".join(f"{k} {v}" for k, v in fields.items()), _awq(fields), says, "awq")


AWQ = [
    Case("awq scale nan", _awq(scales=torch.full((2, 16), NAN, dtype=F16)), (SHARD, "m.scales", "nan"), "awq"),
    Case("awq scale infinite", _awq(scales=torch.full((2, 16), INF, dtype=F16)), (SHARD, "m.scales", "inf"), "awq"),
    Case("awq without scales", _awq(scales=None), ("m.scales", "missing"), "awq"),
    Case("awq without zero points", _awq(qzeros=None), (SHARD, "m.qzeros is missing"), "awq"),
    Case("awq scales integers", _awq(scales=torch.ones(2, 16, dtype=torch.int32)), ("m.scales", "int32"), "awq"),
    Case("awq scales of one group", _awq(scales=torch.ones(1, 16, dtype=F16)), (SHARD, "m.scales", "[1, 16]"), "awq"),
    Case("awq zero points of other words", _awq(qzeros=torch.zeros(2, 1, dtype=torch.int32)), ("m.qzeros",), "awq"),
    Case("awq zero points no middle", _awq(qzeros=torch.zeros(2, 2, dtype=torch.int32)), ("row 0, group 0",), "awq"),
    Case("awq codes bytes", _awq(qweight=torch.zeros(64, 2, dtype=torch.uint8)), (SHARD, "m.qweight", "uint8"), "awq"),
    Case("awq codes of one axis", _awq(qweight=torch.zeros(128, dtype=torch.int32)), ("m.qweight", "1 axes"), "awq"),
    Case("awq codes empty", _awq(qweight=torch.zeros(0, 2, dtype=torch.int32)), (SHARD, "m.qzeros"), "awq"),
    _lies({"bits": 3}, "3 bits"),
    _lies({"bits": "4"}, "'4' bits"),
    _lies({"group_size": 0}, "group_size 0"),
    _lies({"group_size": 2**40}, "1099511627776", "64"),
    _lies({"group_size": None}, "group_size None"),
    _lies({"version": "gemv_fast"}, "gemv_fast"),
    _lies({"version": ["gemm"]}, "version"),
    _lies({"version": "gemv"}, "groups of 32 do not divide rows of 16"),
]

CASES = AWQ
