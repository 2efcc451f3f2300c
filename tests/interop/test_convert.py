"""Converted checkpoints, opened by the packages that own the formats: the weights are those that went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.formats import gptq
from tests.interop.models import bits_of, tiny_llama, write

transformers = pytest.importorskip("transformers")
F16 = torch.float16


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-row", "int8-row"])
def test_transformers_decompresses_to_what_gptq_stored(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    (tmp_path / "in").mkdir()
    meant = write(gptq.FORMAT, tmp_path / "in", {"layers": scheme}, F16)
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="compressed-tensors")
    assert done.lossless and len(meant) == 14
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model(torch.arange(16)[None])  # what is packed still is decompressed
    found = model.state_dict()
    for name, value in tiny_llama(F16).state_dict().items():
        wanted = meant[name].dequantize(F16) if name in meant else value
        assert torch.equal(bits_of(found[name]), bits_of(wanted)), name


def test_float_weights_are_a_plain_model(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    meant = write(gptq.FORMAT, tmp_path / "in", {"layers": "int4-g32"}, F16)
    lowbit.convert(tmp_path / "in", tmp_path / "out", format="float", lossy=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], q.dequantize(F16)) for name, q in meant.items())
