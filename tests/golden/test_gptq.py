"""Words of GPTQ checkpoints, worked out by hand: what was written must stay readable, here and elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.formats import Format, Weight, gptq, gptq_v2
from lowbit.schemes import parse
from lowbit.tensors import QTensor

MODULE = "model.layers.0.mlp.up_proj"
# Zero points in the middle of the grid, of 32 rows in one group: v1 stores them less one.
MIDDLE = {
    ("gptq", 2): [0x55555555] * 2,
    ("gptq", 3): [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D],
    ("gptq", 4): [0x77777777] * 4,
    ("gptq", 8): [0x7F7F7F7F] * 8,
    ("gptq_v2", 2): [0xAAAAAAAA] * 2,
    ("gptq_v2", 3): [0x24924924, 0x49249249, 0x92492492],
    ("gptq_v2", 4): [0x88888888] * 4,
    ("gptq_v2", 8): [0x80808080] * 8,
}
# Column 0 holds 0, 1, 2, ... (modulo the grid) down its 32 codes, column 1 ones only, the others zeros.
COUNTING = {
    2: [0xE4E4E4E4, 0xE4E4E4E4],
    3: [0x88FAC688, 0xC688FAC6, 0xFAC688FA],
    4: [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98],
    8: [0x03020100 + 0x04040404 * word for word in range(8)],
}
ONES = {2: [0x55555555], 3: [0x49249249, 0x92492492, 0x24924924], 4: [0x11111111], 8: [0x01010101]}


def form_of(name: str) -> Format:
    return {"gptq": gptq.FORMAT, "gptq_v2": gptq_v2.FORMAT}[name]


def words(tensor: Tensor) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in tensor.flatten()]


def example(bits: int) -> tuple[Weight, QTensor]:
    weight = Weight(f"{MODULE}.weight", (32, 32), torch.float16, parse(f"int{bits}-row"))
    assert weight.scheme is not None
    codes = torch.zeros((32, 32), dtype=torch.uint8)
    codes[0], codes[1] = torch.arange(32) % 2**bits, 1
    return weight, QTensor(weight.scheme, weight.shape, codes, torch.arange(1, 33).reshape(-1, 1) / 64)


@pytest.mark.parametrize(("name", "bits"), MIDDLE)
def test_symmetric_rows(name: str, bits: int) -> None:
    form, (weight, q) = form_of(name), example(bits)
    into = {part: torch.empty(spec.shape, dtype=spec.dtype) for part, spec in form.layout(weight).items()}
    form.pack(weight, q, into)
    assert words(into[f"{MODULE}.qzeros"]) == MIDDLE[name, bits]
    assert words(into[f"{MODULE}.qweight"][:, 0]) == COUNTING[bits]
    assert words(into[f"{MODULE}.qweight"][:, 1]) == (ONES[bits] * 8)[: len(COUNTING[bits])]
    assert words(into[f"{MODULE}.qweight"][:, 2:]) == [0] * 30 * bits
    assert into[f"{MODULE}.scales"].tolist() == [[row / 64 for row in range(1, 33)]]
    assert into[f"{MODULE}.g_idx"].tolist() == [0] * 32
    found = form.unpack(weight, into, None)
    assert torch.equal(found.codes, q.codes) and found.group_index is None


def test_zero_points_and_an_index_of_groups() -> None:
    """4 rows in 2 groups: zero points run along the rows, groups down; columns name their group."""
    weight = Weight(f"{MODULE}.weight", (4, 32), torch.float16, parse("int8-g16-asym"))
    tensors = {
        "qweight": torch.full((8, 4), 0x05050505, dtype=torch.int32),
        "qzeros": torch.tensor([[0x04030201], [0x08070605]], dtype=torch.int32),
        "scales": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.float16),
        "g_idx": torch.tensor([0, 1] * 16, dtype=torch.int32),
    }
    stored = {f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}
    found = gptq_v2.FORMAT.unpack(weight, stored, None)
    assert found.zeros is not None and found.zeros.tolist() == [[1, 5], [2, 6], [3, 7], [4, 8]]
    assert found.dequantize()[:, :4].tolist() == [[4, 0] * 2, [6, -6] * 2, [6, -14] * 2, [4, -24] * 2]
    into = {name: torch.empty_like(tensor) for name, tensor in stored.items()}
    gptq_v2.FORMAT.pack(weight, found, into)
    assert {name: tensor.tolist() for name, tensor in into.items()} == {n: t.tolist() for n, t in stored.items()}
    shifted = gptq.FORMAT.unpack(weight, stored, None)
    assert shifted.zeros is not None and torch.equal(shifted.zeros, found.zeros + 1)
