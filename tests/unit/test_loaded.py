"""What `lowbit.load` gives is a model of transformers, as its own `from_pretrained` gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.errors import CheckpointError
from tests.reference.models import save_tiny

IDS = torch.tensor([[3, 7, 1, 9, 60, 12]])


def loaded(kind: str, path: Path, scheme: str = "int4-g16", **settings: Any) -> Any:
    """A tiny model, quantized and loaded."""
    save_tiny(kind, path / "m")
    lowbit.quantize(path / "m", path / "q", scheme=scheme, method="rtn")
    return lowbit.load(path / "q", **settings)


def change(path: Path, **told: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))


def test_texts_go_on_as_the_checkpoint_says(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    file, auto = tmp_path / "generation_config.json", transformers.AutoModelForCausalLM

    def both() -> Any:
        ours = lowbit.load(tmp_path).generation_config
        assert ours.to_dict() == auto.from_pretrained(tmp_path).generation_config.to_dict()
        return ours

    change(file, do_sample=True, temperature=0.5, top_k=7, eos_token_id=[2, 15])
    assert (both().eos_token_id, both().temperature) == ([2, 15], 0.5)
    file.unlink()
    change(tmp_path / "config.json", top_k=3, do_sample=True)
    assert (both().top_k, both().eos_token_id) == (3, 2)


@pytest.mark.parametrize("told", ["x", ["x"], {"2": 1}, 1.5])
def test_a_damaged_generation_config_is_one_sentence(told: Any, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    change(tmp_path / "generation_config.json", eos_token_id=told)
    with pytest.raises(CheckpointError, match=r"generation_config.json has .* as eos_token_id, where the number"):
        lowbit.load(tmp_path)
    change(tmp_path / "generation_config.json", eos_token_id=2, max_new_tokens=-1)
    with pytest.raises(CheckpointError, match=r"generation_config.json says nothing usable .*: .max_new_tokens. must"):
        lowbit.load(tmp_path)
