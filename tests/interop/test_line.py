"""The embedded model through the whole line, opened by the program that owns the format: the same weights to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit import api
from lowbit.stages.checkpoint import open_checkpoint


def with_awq(path: Path) -> dict[str, Tensor]:
    """auto-round's dequantization, in float16."""
    utils = pytest.importorskip("auto_round.export.export_to_awq.utils")
    tensors = load_file(path / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = {each: [tensors[f"{each}.{part}"] for part in ("qweight", "qzeros", "scales")] for each in modules}
    return {f"{each}.weight": utils.dequantize_gemm(*parts[each], 4, 128).T for each in modules}


READERS: dict[str, tuple[str, Callable[[Path], dict[str, Tensor]]]] = {
    "awq": ("int4-g128-asym", with_awq),
}


@pytest.mark.parametrize("name", READERS)
def test_the_owner_opens_what_the_line_wrote(name: str, tmp_path: Path, wiki_8m: Path) -> None:
    scheme, read = READERS[name]
    api.quantize(wiki_8m, tmp_path / "out", format=name, scheme=scheme)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        quantized = [each for each, weight in checkpoint.weights.items() if weight.scheme]
        found = read(tmp_path / "out")
        assert quantized and set(quantized) <= found.keys()
        for each in quantized:
            meant = checkpoint.dequantized(each, found[each].dtype)
            assert torch.equal(found[each], meant), each
