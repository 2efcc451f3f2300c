"""Bytes of bitsandbytes checkpoints, worked out by hand: what was written must stay readable, here and elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.formats import Weight
from lowbit.formats.bitsandbytes import FORMAT
from lowbit.schemes import DOUBLE, parse
from lowbit.tensors import QTensor

NAME = "model.layers.0.mlp.up_proj.weight"
PLAIN = b'{"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [5, 8]}'
NESTED = (
    b'{"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [5, 8], "nested_blocksize": 256, '
    b'"nested_dtype": "float32", "nested_offset": 0.10000000149011612}        '
)


def packed(weight: Weight, q: QTensor) -> dict[str, Tensor]:
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(weight).items()}
    FORMAT.pack(weight, q, into)
    return into


def counting(scheme: str, scales: Tensor | QTensor) -> tuple[Weight, QTensor]:
    """40 codes 0, 1, 2, ... modulo 16, in blocks of 32 over the flattened weight."""
    weight = Weight(NAME, (5, 8), torch.bfloat16, parse(scheme))
    assert weight.scheme is not None
    codes = (torch.arange(40) % 16).to(torch.uint8).reshape(1, -1)
    return weight, QTensor(weight.scheme, weight.shape, codes, scales)


def test_blocks_of_a_table() -> None:
    weight, q = counting("nf4-flat32", torch.tensor([[0.5, 2.0]]))
    stored = packed(weight, q)
    assert bytes(stored[NAME].flatten().tolist()).hex() == "0123456789abcdef" * 2 + "01234567"
    assert stored[NAME].shape == (20, 1)
    assert stored[f"{NAME}.absmax"].tolist() == [0.5, 2.0]
    assert stored[f"{NAME}.quant_map"].tolist()[:8] == pytest.approx(
        [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0], abs=1e-8
    )
    assert bytes(stored[f"{NAME}.quant_state.bitsandbytes__nf4"].tolist()) == PLAIN
    assert len(stored) == 4
    assert FORMAT.unpack(weight, stored, None).dequantize()[4, :2].tolist() == [-2.0, pytest.approx(-1.3923856)]


def test_scales_that_are_quantized_themselves() -> None:
    """The state is padded with blanks to a length that does not depend on the offset in it."""
    codes = torch.tensor([[255, 0]], dtype=torch.uint8)
    scales = QTensor(DOUBLE, (1, 2), codes, torch.tensor([[0.25]]), offset=torch.tensor(0.1))
    weight, q = counting("nf4-flat32-dq", scales)
    stored = packed(weight, q)
    assert stored[f"{NAME}.absmax"].tolist() == [255, 0]
    assert stored[f"{NAME}.nested_absmax"].tolist() == [0.25]
    assert stored[f"{NAME}.nested_quant_map"].tolist()[255] == 1.0
    assert bytes(stored[f"{NAME}.quant_state.bitsandbytes__nf4"].tolist()) == NESTED
    assert len(stored) == 6
    found = FORMAT.unpack(weight, stored, None)
    assert found.scale_values()[0, 0].item() == torch.tensor(0.25).add(torch.tensor(0.1)).item()
    longest = QTensor(DOUBLE, (1, 2), codes, torch.tensor([[0.25]]), offset=torch.tensor(-1.1754943508222875e-38))
    assert packed(*counting("nf4-flat32-dq", longest)).keys() == stored.keys()


def test_the_states_of_other_files_need_no_padding() -> None:
    weight, q = counting("nf4-flat32", torch.tensor([[0.5, 2.0]]))
    stored = packed(weight, q)
    state = b'{"shape":[5,8],"dtype":"bfloat16","blocksize":32,"quant_type":"nf4"}'
    stored[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    assert torch.equal(FORMAT.unpack(weight, stored, None).dequantize(), q.dequantize())


def test_rows_of_integers() -> None:
    weight = Weight(NAME, (2, 3), torch.float16, parse("int8-row-bf16"))
    assert weight.scheme is not None
    codes = torch.tensor([[0, 128, 255], [1, 129, 64]], dtype=torch.uint8)
    q = QTensor(weight.scheme, weight.shape, codes, torch.tensor([[0.0078125], [3.0]]))
    stored = packed(weight, q)
    assert stored[NAME].tolist() == [[-128, 0, 127], [-127, 1, -64]]
    assert stored["model.layers.0.mlp.up_proj.SCB"].tolist() == [0.9921875, 381.0]
    assert stored["model.layers.0.mlp.up_proj.weight_format"].item() == 0
    assert FORMAT.unpack(weight, stored, None).dequantize().tolist() == [[-1.0, 0.0, 0.9921875], [-381.0, 3.0, -192.0]]
