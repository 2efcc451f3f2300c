"""Bytes of HQQ checkpoints, worked out by hand: what was written must stay readable, here and elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.formats import Weight
from lowbit.formats.hqq import FORMAT
from lowbit.schemes import parse
from lowbit.tensors import QTensor

MODULE = "model.layers.0.mlp.up_proj"
# 16 groups of 2 codes: group g holds g and g + 1, modulo the grid. Runs of groups share elements, the first on top.
ELEMENTS = {
    1: [[0b00000000, 0b11111111], [0b11111111, 0b00000000]],
    2: [[0x00, 0x55], [0x55, 0xAA], [0xAA, 0xFF], [0xFF, 0x00]],
    3: [[0o0246024600, 0o1357135700], [0o1357135700, 0o2460246000]],  # 10 runs, the last two of padding
    4: [[group << 4 | group + 8, group + 1 << 4 | (group + 9) % 16] for group in range(8)],
    8: [[group, group + 1] for group in range(16)],
}
META = {
    "shape": [8, 4],
    "axis": 1,
    "group_size": 2,
    "channel_wise": 1,
    "optimize": 1,
    "round_zero": 0,
    "view_as_float": 0,
    "quant_scale": 0,
    "quant_zero": 0,
    "offload_meta": 0,
    "stores_quant_config": 1,
    "encoded_state_dict": 1,
    "compute_dtype": list(b"torch.bfloat16"),
}
PACKINGS = {1: b"1bit_u8", 2: b"2bit_u8", 3: b"3bit_32", 4: b"4bit_u8", 8: b"8bit_u8"}


def example(bits: int) -> tuple[Weight, QTensor]:
    weight = Weight(f"{MODULE}.weight", (8, 4), torch.bfloat16, parse(f"int{bits}-g2-fzero-bf16"))
    assert weight.scheme is not None
    groups = torch.arange(16)
    codes = (torch.stack([groups, groups + 1], 1) % 2**bits).to(torch.uint8).reshape(8, 4)
    scales = (2.0 ** -(groups % 5)).reshape(8, 2)
    return weight, QTensor(weight.scheme, weight.shape, codes, scales, (groups / 4).reshape(8, 2))


def packed(bits: int) -> dict[str, Tensor]:
    weight, q = example(bits)
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(weight).items()}
    FORMAT.pack(weight, q, into)
    return {name.removeprefix(f"{MODULE}."): tensor for name, tensor in into.items()}


@pytest.mark.parametrize("bits", ELEMENTS)
def test_elements_hold_codes_of_distant_groups(bits: int) -> None:
    stored = packed(bits)
    assert stored["W_q"].dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert stored["W_q"].tolist() == ELEMENTS[bits]
    weight, q = example(bits)
    found = FORMAT.unpack(weight, {f"{MODULE}.{name}": tensor for name, tensor in stored.items()}, None)
    assert torch.equal(found.codes, q.codes)


@pytest.mark.parametrize("bits", ELEMENTS)
def test_metadata(bits: int) -> None:
    stored = packed(bits)
    assert stored.pop("scale").tolist() == [[2.0 ** -(group % 5)] for group in range(16)]
    assert stored.pop("zero").tolist() == [[group / 4] for group in range(16)]
    del stored["W_q"]
    view = b"torch.int32" if bits == 3 else b"torch.uint8"
    mine = {"nbits": bits, "packing": list(PACKINGS[bits]), "unpack_view_dtype": list(view)}
    assert {name: tensor.tolist() for name, tensor in stored.items()} == META | mine
