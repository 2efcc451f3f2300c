"""Hostile checkpoints of the formats that pack integers and tables for GPUs, in the words of `cases.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.schemes import DOUBLE, parse
from tests.hostile.cases import INF, NAN, SHARD, Case, _directory
from tests.hostile.layouts import Build, checkpoint

F16 = torch.float16


def _hqq(**changes: Tensor | None) -> Build:
    """HQQ of [16, 64], 4 bits in groups of 64."""
    parts: dict[str, Tensor | None] = {
        "W_q": torch.zeros(8, 64, dtype=torch.uint8),
        "scale": torch.ones(16, 1, dtype=F16),
        "zero": torch.ones(16, 1, dtype=F16),
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
        "shape": torch.tensor([16, 64]),
        "nbits": torch.tensor(4),
        "group_size": torch.tensor(64),
        "axis": torch.tensor(1),
    }
    return checkpoint({"quant_method": "hqq"}, {**parts, **changes})


Damage = tuple[str, dict[str, Tensor | None], tuple[str, ...]]
_HQQ: list[Damage] = [
    ("scale nan", {"scale": torch.full((16, 1), NAN, dtype=F16)}, (SHARD, "m.scale", "nan")),
    ("zero infinite", {"zero": torch.full((16, 1), INF, dtype=F16)}, (SHARD, "m.zero", "inf")),
    ("scales too few", {"scale": torch.ones(15, 1, dtype=F16)}, (SHARD, "m.scale has 30 bytes", "32")),
    ("zeros of one axis", {"zero": torch.ones(16, dtype=F16)}, (SHARD, "m.zero", "[16]")),
    ("zeros of another dtype", {"zero": torch.ones(16, 1)}, (SHARD, "m.zero", "float32")),
    ("codes too few", {"W_q": torch.zeros(7, 64, dtype=torch.uint8)}, (SHARD, "m.W_q has 448 bytes", "512")),
    ("codes words", {"W_q": torch.zeros(8, 16, dtype=torch.int32)}, (SHARD, "m.W_q", "int32")),
    ("without codes", {"W_q": None}, ("m.W_q is missing",)),
    ("without zeros", {"zero": None}, ("m.zero is missing",)),
    ("without a shape", {"shape": None}, ("m.shape is missing",)),
    ("shape huge", {"shape": torch.tensor([2**40, 2**40])}, (SHARD, "m.W_q has 512 bytes")),
    ("shape and groups huge", {"shape": torch.tensor([2**40, 16]), "group_size": torch.tensor(2**40)}, ("m.W_q",)),
    ("shape negative", {"shape": torch.tensor([-16, -64])}, ("m: ", "[-16, -64]")),
    ("shape of three sides", {"shape": torch.tensor([2, 8, 64])}, ("m: ", "[2, 8, 64]")),
    ("shape nan", {"shape": torch.tensor([NAN, 64.0])}, ("m.shape", "nan")),
    ("bits 7", {"nbits": torch.tensor(7)}, ("m: ", "7 bits")),
    ("bits nan", {"nbits": torch.tensor(NAN)}, (SHARD, "m.nbits is nan")),
    ("bits two", {"nbits": torch.tensor([4, 4])}, (SHARD, "m.nbits is [4, 4]")),
    ("groups of 0", {"group_size": torch.tensor(0)}, ("m: ", "groups of 0")),
    ("groups negative", {"group_size": torch.tensor(-64)}, ("m: ", "groups of -64")),
    ("groups of 48", {"group_size": torch.tensor(48)}, ("m: ", "groups of 48 do not divide")),
    ("along columns", {"axis": torch.tensor(0)}, ("m: ", "axis 0")),
    ("packed otherwise", {"packing": torch.tensor(list(b"8bit_u8"), dtype=torch.uint8)}, ("m.packing",)),
]  # fmt: skip
HQQ = [Case(f"hqq {what}", _hqq(**changes), says, "hqq") for what, changes, says in _HQQ]


def _gptq(version: str, declared: Mapping[str, Any] | None = None, /, **changes: Tensor | None) -> Build:
    """GPTQ of [32, 64], 4 bits in groups of 32."""
    parts: dict[str, Tensor | None] = {
        "qweight": torch.zeros(8, 32, dtype=torch.int32),
        "qzeros": torch.full((2, 4), 0x77777777 if version == "gptq" else -0x77777778, dtype=torch.int32),
        "scales": torch.ones(2, 32, dtype=F16),
        "g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }
    usual = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    return checkpoint({**usual, "checkpoint_format": version, **(declared or {})}, {**parts, **changes})


def _group(value: int) -> dict[str, Tensor | None]:
    return {"g_idx": torch.full((64,), value, dtype=torch.int32)}


def _gptq_cases(version: str) -> list[Case]:
    """The same damage to both of GPTQ's formats."""
    tensors: list[Damage] = [
        ("scale nan", {"scales": torch.full((2, 32), NAN, dtype=F16)}, (SHARD, "m.scales", "nan")),
        ("scale infinite", {"scales": torch.full((2, 32), INF, dtype=F16)}, (SHARD, "m.scales", "inf")),
        ("scales integers", {"scales": torch.ones(2, 32).int()}, (SHARD, "m.scales", "int32")),
        ("scales of one group", {"scales": torch.ones(1, 32, dtype=F16)}, (SHARD, "m.scales", "[1, 32]")),
        ("without scales", {"scales": None}, ("m.scales is missing",)),
        ("without zero points", {"qzeros": None}, ("m.qzeros is missing",)),
        ("without codes", {"qweight": None}, ("m.qzeros", "missing")),
        ("zero points no middle", {"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, (SHARD, "m.qzeros", "row 0")),
        ("zero points too few", {"qzeros": torch.zeros(1, 4, dtype=torch.int32)}, (SHARD, "m.qzeros", "[1, 4]")),
        ("codes of 64 bits", {"qweight": torch.zeros(8, 32, dtype=torch.int64)}, (SHARD, "m.qweight", "int64")),
        ("codes of one axis", {"qweight": torch.zeros(256, dtype=torch.int32)}, (SHARD, "m.qweight has 1 axes")),
        ("codes too few", {"qweight": torch.zeros(7, 32, dtype=torch.int32)}, (SHARD, "m.qweight has 7 rows")),
        ("group beyond the last", _group(2), (SHARD, "m.g_idx", "group 2")),
        ("group negative", _group(-1), (SHARD, "m.g_idx", "group -1")),
        ("groups of 64 bits", {"g_idx": torch.zeros(64, dtype=torch.int64)}, (SHARD, "m.g_idx", "int64")),
    ]
    says: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"bits": 5}, ("5 bits",)),
        ({"bits": "four"}, ("'four' bits",)),
        ({"bits": 10**9}, ("1000000000 bits",)),
        ({"group_size": 0}, ("group_size 0",)),
        ({"group_size": -7}, ("group_size -7",)),
        ({"group_size": 32.0}, ("group_size 32.0",)),
        ({"group_size": 10**30}, (SHARD, "m.qzeros", "[2, 4]")),
        ({"dynamic": {"(": {"bits": 8}}}, ("'('", "no regular expression")),
        ({"dynamic": ["m"]}, ("dynamic", "['m']")),
    ]
    return [
        *(Case(f"{version} {what}", _gptq(version, **changes), words, version) for what, changes, words in tensors),
        *(Case(f"{version} says {fields}", _gptq(version, fields), words, version) for fields, words in says),
    ]


GPTQ = [
    *_gptq_cases("gptq"),
    *_gptq_cases("gptq_v2"),
    Case(
        "gptq zero point beyond the last",
        _gptq("gptq", {"sym": False}, qzeros=torch.full((2, 4), -1, dtype=torch.int32)),
        (SHARD, "m.qzeros stores 15", "16"),
        "gptq",
    ),
]


def _nf4(state: Mapping[str, Any] | None = None, /, **changes: Tensor | None) -> Build:
    """bitsandbytes' NF4 of [32, 32] in blocks of 64."""
    usual = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 32]} | dict(state or {})
    parts: dict[str, Tensor | None] = {
        "weight": torch.zeros(512, 1, dtype=torch.uint8),
        "absmax": torch.ones(16),
        "quant_map": torch.tensor(parse("nf4").grid.levels),
        "quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(usual).encode()), dtype=torch.uint8),
    }
    named = {n if n == "weight" else f"weight.{n}": tensor for n, tensor in {**parts, **changes}.items()}
    return checkpoint({"quant_method": "bitsandbytes", "load_in_4bit": True}, named)


def _double(state: Mapping[str, Any] | None = None, /, **changes: Tensor | None) -> Build:
    """The same with double-quantized scales."""
    parts: dict[str, Tensor | None] = {
        "absmax": torch.zeros(16, dtype=torch.uint8),
        "nested_absmax": torch.ones(1),
        "nested_quant_map": torch.tensor(DOUBLE.grid.levels),
    }
    return _nf4({"nested_blocksize": 256, "nested_offset": 0.5, **(state or {})}, **{**parts, **changes})


def _rows(**changes: Tensor | None) -> Build:
    """bitsandbytes' int8 of [32, 64]."""
    parts: dict[str, Tensor | None] = {"weight": torch.zeros(32, 64, dtype=torch.int8), "SCB": torch.ones(32)}
    return checkpoint({"quant_method": "bitsandbytes", "load_in_8bit": True}, {**parts, **changes})


_STATE = "quant_state.bitsandbytes__nf4"
_OFF = torch.tensor(parse("nf4").grid.levels) + 0.01
BITSANDBYTES = [
    Case(f"bitsandbytes {what}", build, says, "bitsandbytes")
    for what, build, says in [
        ("scale infinite", _nf4(absmax=torch.full((16,), INF)), (SHARD, "m.weight.absmax", "inf")),
        ("scale nan", _nf4(absmax=torch.full((16,), NAN)), (SHARD, "m.weight.absmax", "nan")),
        ("state not json", _nf4(**{_STATE: torch.ones(9, dtype=torch.uint8)}), ("m.weight.quant_state",)),
        ("scales too few", _nf4(absmax=torch.ones(15)), (SHARD, "m.weight.absmax", "[15]")),
        ("scales halves", _nf4(absmax=torch.ones(16).half()), (SHARD, "m.weight.absmax", "float16")),
        ("without scales", _nf4(absmax=None), ("m.weight.absmax is missing",)),
        ("without its table", _nf4(quant_map=None), ("m.weight.quant_map is missing",)),
        ("with another table", _nf4(quant_map=_OFF), (SHARD, "m.weight.quant_map", "nf4")),
        ("without codes", _nf4(weight=None), ("m.weight has 0 bytes",)),
        ("without a state", _nf4(**{_STATE: None}), ("m.weight", "missing")),
        ("codes too few", _nf4(weight=torch.zeros(511, 1).byte()), (SHARD, "m.weight has 511 bytes", "512")),
        ("shape huge", _nf4({"shape": [2**40, 2**40]}), (SHARD, "m.weight has 512 bytes")),
        ("shape negative", _nf4({"shape": [-32, -32]}), ("m.weight.quant_state", "[-32, -32]")),
        ("shape of texts", _nf4({"shape": ["32", "32"]}), ("m.weight.quant_state", '["32", "32"]')),
        ("shape of fractions", _nf4({"shape": [32.5, 32]}), ("m.weight.quant_state", "[32.5, 32]")),
        ("shape infinite", _nf4({"shape": [INF, 32]}), ("m.weight.quant_state",)),
        ("shape a number", _nf4({"shape": 1024}), ("m.weight.quant_state",)),
        ("blocks of 0", _nf4({"blocksize": 0}), ("m.weight.quant_state", '"blocksize": 0')),
        ("blocks true", _nf4({"blocksize": True}), ("m.weight.quant_state", '"blocksize": true')),
        ("blocks huge", _nf4({"blocksize": 2**70}), (SHARD, "m.weight.absmax", "[16]")),
        ("dtype unknown", _nf4({"dtype": "int4"}), ("m.weight.quant_state", '"int4"')),
        ("double scale nan", _double(nested_absmax=torch.full((1,), NAN)), (SHARD, "nested_absmax", "nan")),
        ("double offset nan", _double({"nested_offset": NAN}), ("m.weight.quant_state", "NaN")),
        ("double offset a text", _double({"nested_offset": "0"}), ("m.weight.quant_state",)),
        ("double blocks negative", _double({"nested_blocksize": -256}), ("m.weight.quant_state", "-256")),
        ("double blocks a fraction", _double({"nested_blocksize": 0.5}), ("m.weight.quant_state", "0.5")),
        ("double without its table", _double(nested_quant_map=None), ("m.weight", "missing")),
        ("double table nan", _double(nested_quant_map=torch.full((256,), NAN)), ("nested_quant_map", "nan")),
        ("double table short", _double(nested_quant_map=torch.ones(7)), ("nested_quant_map", "[7]")),
        ("double codes floats", _double(absmax=torch.ones(16)), (SHARD, "m.weight.absmax", "float32")),
        ("rows scale nan", _rows(SCB=torch.full((32,), NAN)), (SHARD, "m.SCB", "nan")),
        ("rows scales too few", _rows(SCB=torch.ones(31)), (SHARD, "m.SCB", "[31]")),
        ("rows without scales", _rows(SCB=None), ("m.weight", "missing")),
        ("rows without codes", _rows(weight=None), ("m.weight is missing",)),
        ("rows unsigned", _rows(weight=torch.zeros(32, 64).byte()), (SHARD, "m.weight", "uint8")),
        ("rows of three axes", _rows(weight=torch.zeros(2, 16, 64).char()), (SHARD, "m.weight is [2, 16, 64]")),
        ("rows for another GPU", _rows(weight_format=torch.tensor(1, dtype=torch.uint8)), ("m.weight_format is 1",)),
    ]
]  # fmt: skip


def _zero(value: int) -> Tensor:
    return torch.full((16, 1), value, dtype=torch.int8)


def _ct(weights: Mapping[str, Any] | None = None, form: Any = "pack-quantized", **changes: Tensor | None) -> Build:
    """compressed-tensors of [16, 64], 4 bits in one group a row."""
    parts: dict[str, Tensor | None] = {
        "weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        "weight_scale": torch.ones(16, 1, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([16, 64]),
    }
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": False}
    group = {"targets": ["Linear"], "weights": usual | dict(weights or {}), "format": form}
    declared = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return checkpoint(declared, {**parts, **changes})


def _int8(**changes: Tensor | None) -> Build:
    """Integers as they are, of 4 bits in a byte each, with zero points."""
    parts: dict[str, Tensor | None] = {"weight": torch.zeros(16, 64).char(), "weight_zero_point": _zero(0)}
    gone = {"weight_packed": None, "weight_shape": None}
    return _ct({"symmetric": False}, "int-quantized", **{**gone, **parts, **changes})


_SAYS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"num_bits": 9}, ("9-bit int",)),
    ({"num_bits": -4}, ("-4-bit int",)),
    ({"num_bits": "4"}, ("4-bit int",)),
    ({"num_bits": 10**9}, ("1000000000-bit int",)),
    ({"group_size": 0}, ("group_size 0",)),
    ({"group_size": -64}, ("group_size -64",)),
    ({"strategy": "magic"}, ("'magic'",)),
    ({"strategy": ["group"]}, ("['group']",)),
    ({"strategy": "block", "block_structure": [0, 64]}, ("[0, 64]",)),
    ({"type": "complex"}, ("complex",)),
]
COMPRESSED = [
    *(Case(f"compressed says {fields}", _ct(fields), words, "compressed_tensors") for fields, words in _SAYS),
    *(
        Case(f"compressed {what}", build, says, "compressed_tensors")
        for what, build, says in [
            ("without scales", _ct(weight_scale=None), ("m.weight_scale is missing",)),
            ("without codes", _ct(weight_packed=None), ("m.weight_packed", "missing")),
            ("without a shape", _ct(weight_shape=None), ("m.weight_shape is missing",)),
            ("shape negative", _ct(weight_shape=torch.tensor([16, -64])), ("m.weight_shape says [16, -64]",)),
            ("shape of floats", _ct(weight_shape=torch.tensor([16.0, 64.0])), ("m.weight_shape",)),
            ("codes of one axis", _ct(weight_packed=torch.zeros(128).int()), (SHARD, "m.weight_packed is [128]")),
            ("codes of 64 bits", _ct(weight_packed=torch.zeros(16, 8).long()), (SHARD, "m.weight_packed", "int64")),
            ("scales integers", _ct(weight_scale=torch.ones(16, 1).int()), ("scales of int32",)),
            ("stored by nobody", _ct(form="magic-quantized"), ("'magic-quantized'",)),
            ("order beyond", _ct(weight_g_idx=torch.full((64,), 7, dtype=torch.int32)), ("m.weight_g_idx",)),
            ("order negative", _ct(weight_g_idx=torch.full((64,), -1, dtype=torch.int32)), ("m.weight_g_idx",)),
            ("without zero points", _int8(weight_zero_point=None), ("m.weight_zero_point is missing",)),
            ("zero point beyond", _int8(weight_zero_point=_zero(8)), (SHARD, "m.weight_zero_point", "code 16")),
            ("code beyond", _int8(weight=torch.full((16, 64), -9).char()), (SHARD, "m.weight", "code 255")),
            ("codes floats", _int8(weight=torch.zeros(16, 64)), (SHARD, "m.weight", "float32")),
        ]
    ),
]  # fmt: skip


def _plain(codes: Tensor, **more: Any) -> Build:
    """Codes that no config.json tells of."""
    return _directory({SHARD: {"m.weight": codes, "m.scales": torch.ones(16, 2, dtype=F16)}}, config={}, **more)


UNTOLD = [
    Case(f"untold {what}", build, (said, "nothing says how to read them"))
    for what, build, said in [
        ("words", _plain(torch.zeros(16, 8, dtype=torch.int32)), "'m.weight'"),
        ("bytes", _plain(torch.zeros(16, 32, dtype=torch.uint8)), "'m.weight'"),
        ("bytes of a graph", _plain(torch.zeros(16, 2, 16, dtype=torch.uint8), **{"model.onnx": b"?"}), "'m.weight'"),
        ("signed bytes of experts", _plain(torch.zeros(2, 16, 32, dtype=torch.int8)), "'m.weight'"),
        ("small floats of experts", _plain(torch.zeros(2, 16, 32).to(torch.float8_e4m3fn)), "'m.weight'"),
    ]
]
SOUND = {
    "hqq": _hqq(),
    "gptq": _gptq("gptq"),
    "gptq_v2": _gptq("gptq_v2"),
    "bitsandbytes nf4": _nf4(),
    "bitsandbytes nf4-dq": _double(),
    "bitsandbytes int8": _rows(),
    "compressed_tensors": _ct(),
    "compressed_tensors int8": _int8(),
}
CASES = [*HQQ, *GPTQ, *BITSANDBYTES, *COMPRESSED, *UNTOLD]
