"""Rows of an embedding against `gguf`'s own reading of the same blocks."""

from __future__ import annotations

import re

import gguf
import gguf.quants
import pytest
import torch

from lowbit import native
from lowbit.errors import FormatError
from lowbit.formats._ggml import BLOCKS, unpack
from lowbit.runtime.table import Table

# No pair of them is a half that is not finite, and their fields of two bits are codes of every type.
TAME = torch.tensor([0x00, 0x15, 0x29, 0x06, 0x12, 0x21, 0x2A, 0x9A], dtype=torch.uint8)


def some_rows(name: str) -> torch.Tensor:
    return TAME[torch.randint(0, 8, (5, BLOCKS[name].row_bytes(768)), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "nvfp4"])
def test_rows_are_those_of_gguf(name: str) -> None:
    stored, ids = some_rows(name), torch.tensor([4, 0, 4])
    found = Table(stored, name).opened()(ids.tolist())
    assert found is not None
    want = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType(BLOCKS[name].id))[ids.numpy()]
    assert torch.equal(found, torch.from_numpy(want))
    assert torch.equal(found, unpack(name, stored[ids], (3, 768)).dequantize())


@pytest.mark.parametrize(
    ("name", "byte", "said"), [("q4_0", 0xFF, "must be finite"), ("q4_k", 0xFF, "finite"), ("tq2_0", 0x03, "code 3")]
)
def test_rows_that_hold_no_numbers_are_refused(name: str, byte: int, said: str) -> None:
    stored = some_rows(name)
    stored[2] = byte
    table = Table(stored, name)
    rows = table.opened()
    assert rows([1, 2]) is None and isinstance(table.refusal([1, 2]), FormatError)
    assert re.search(said, str(table.refusal([1, 2])))
    found = rows([1])
    assert found is not None and found.isfinite().all()
    for wrong in (5, -1):
        with pytest.raises(LookupError):
            rows([wrong])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_floats(dtype: torch.dtype) -> None:
    """All halves that are finite, subnormal ones too."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    stored = torch.where(halves.isfinite(), halves, 0).to(dtype).view(64, 1024)
    ids = torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(found_in(stored, ids), stored[ids].float())
    stored[3, 5] = torch.nan
    assert Table(stored).opened()([3]) is None and "[1, 3] is not finite" in str(Table(stored).refusal([3, 1]))


def found_in(stored: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    found = Table(stored).opened()(ids.tolist())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "scales", "step", "width"),
    [(2, False, 32, 35), (2, False, 16, 36), (2, False, 0, 36), (2, True, 32, 36), (12, False, 32, 144),
     (40, False, 16, 36), (99, False, 32, 36)],
)  # fmt: skip
def test_blocks_that_do_not_fit_are_refused(kind: int, scales: bool, step: int, width: int) -> None:
    levels, stored = torch.zeros(256), torch.zeros(2, width, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"type {kind}|scales is"):
        native.Table(stored, kind, levels, levels if scales else None, step)
