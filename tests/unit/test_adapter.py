"""Low-rank terms as a PEFT adapter: read back by `peft` where it is installed, and by the definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.corrections import LowRank
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.stages._adapter import read_adapter, write_adapter
from tests.interop.models import tiny_llama

_RANKS = {"layers.0.self_attn.q_proj": 3, "layers.0.mlp.down_proj": 8, "layers.1.mlp.down_proj": 3}


def terms_of(model: Any) -> dict[str, LowRank]:
    """Random terms, exact in bfloat16, of several ranks."""
    torch.manual_seed(1)
    found = {}
    for module, rank in _RANKS.items():
        rows, cols = model.get_submodule(f"model.{module}").weight.shape
        draw = torch.randn(rank, cols), torch.randn(rows, rank) / 8
        found[f"model.{module}.weight"] = (draw[0].bfloat16().float(), draw[1].bfloat16().float())
    return found


def logits_with(model: Any, terms: dict[str, LowRank]) -> Tensor:
    """The definition: the terms are added to the weights."""
    with torch.no_grad():
        for name, (down, up) in terms.items():
            model.get_parameter(name).add_(up @ down)
        logits: Tensor = model(input_ids=torch.arange(20)[None]).logits
    return logits


def test_the_files_are_a_lora_adapter(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32).eval()
    terms = terms_of(model)
    write_adapter(tmp_path, terms, "some/model", torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.mlp.down_proj": 8}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * len(terms)
    merged = {}
    for module, rank in _RANKS.items():
        down, up = (stored[f"base_model.model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert down.dtype == up.dtype == torch.bfloat16
        assert len(down) == rank
        merged[f"model.{module}.weight"] = (down.float(), up.float())
    torch.testing.assert_close(logits_with(tiny_llama(torch.float32).eval(), merged), logits_with(model, terms))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between the two packages
def test_peft_adds_the_terms(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    terms = terms_of(tiny_llama(torch.float32))
    write_adapter(tmp_path, terms, "some/model", torch.bfloat16)
    model = peft.PeftModel.from_pretrained(tiny_llama(torch.float32), tmp_path).eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(20)[None]).logits
    torch.testing.assert_close(found, logits_with(tiny_llama(torch.float32).eval(), terms))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    terms = terms_of(tiny_llama(torch.float32))
    write_adapter(tmp_path, terms, "some/model", torch.bfloat16)
    found = read_adapter(tmp_path)
    assert found.keys() == terms.keys()
    for name, (down, up) in terms.items():
        assert torch.equal(found[name][0], down) and torch.equal(found[name][1], up)


def test_another_scale_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, terms_of(tiny_llama(torch.float32)), "some/model", torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    with pytest.raises(CheckpointError, match=r"is not as adapter_config\.json says"):
        read_adapter(tmp_path)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    term = (torch.ones(1, 4), torch.ones(4, 1))
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj is no weight"):
        write_adapter(tmp_path, {"model.layers.0.mlp.experts.gate_up_proj": term}, "m", torch.float32)
    with pytest.raises(UnsupportedError, match="at least one"):
        write_adapter(tmp_path, {}, "m", torch.float32)
