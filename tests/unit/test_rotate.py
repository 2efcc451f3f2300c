"""Rotated models compute what the original computes; the judge is `transformers`, on tiny random models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.errors import UnsupportedError, UsageError, VerifyError, WeightError
from lowbit.rotations import Rotation
from lowbit.stages._model import Blueprint, open_blueprint
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.rotate import TOLERANCE, Options, Rotated, prove, rotate
from tests.reference.rotations import rotated_llama

_SIZES = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MODELS: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "phi3": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny(kind: str, path: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A random model of one class on disk, no parameter at the value it begins with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(kind, **{**_SIZES, **_MODELS.get(kind, {}), **more})
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.2 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(path)
    return path


def blueprint_of(path: Path) -> Blueprint:
    return open_blueprint(open_checkpoint(path), torch.float32)


@pytest.mark.parametrize("kind", _MODELS)
def test_a_rotated_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    original = blueprint_of(tiny(kind, tmp_path))
    turned = rotate(original)
    assert prove(original, turned) < TOLERANCE
    assert turned.width == 48
    assert turned.orders == (12, 4)
    assert turned.norms == 5
    assert turned.heads == 2
    assert (turned.untied is not None) == _MODELS[kind].get("tie_word_embeddings", False)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_a_model_without_attention_is_rotated(kind: str, tmp_path: Path) -> None:
    """Its layers read and write the stream as others do; what lies between stays as it is."""
    original = blueprint_of(tiny(kind, tmp_path, state_size=8, num_attention_heads=None))
    turned = rotate(original)
    assert prove(original, turned) < TOLERANCE and (turned.norms, turned.heads) == (3, 0)
    names = [name for name, weight in original.checkpoint.weights.items() if len(weight.shape) == 2]
    same = {name for name in names if torch.equal(original.checkpoint.tensor(name), turned.checkpoint.tensor(name))}
    assert same == {name for name in names if any(part in name for part in ("x_proj", "dt_proj", "A_log"))}


@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral"])
def test_every_matrix_of_the_blocks_was_turned(kind: str, tmp_path: Path) -> None:
    """A view that changes nothing would compute the same too."""
    original = blueprint_of(tiny(kind, tmp_path))
    turned = rotate(original).checkpoint
    for name, weight in original.checkpoint.weights.items():
        before, after = original.checkpoint.tensor(name), turned.tensor(name)
        if "q_norm" in name or "k_norm" in name:
            assert torch.equal(before, after)
        elif len(weight.shape) == 1:
            assert torch.equal(after, torch.full_like(after, 0.0 if kind == "gemma" else 1.0))
        else:
            assert not torch.allclose(before, after, atol=0.05)


def test_weights_are_the_definition(tmp_path: Path) -> None:
    original = blueprint_of(tiny("llama", tmp_path))
    turned = rotate(original, Options(seed=5))
    again = rotate(original, Options(seed=5))
    head = 48 // 4
    residual, *values = _rotation_of(original, turned, head) or []
    wanted = rotated_llama(_tensors(original.checkpoint), residual, values, head)
    for name, value in wanted.items():
        found = turned.checkpoint.tensor(name)
        torch.testing.assert_close(found.double(), value, atol=1e-5, rtol=1e-5)
        assert torch.equal(found, again.checkpoint.tensor(name))


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.tensor(name).double() for name in checkpoint.weights}


def _rotation_of(original: Blueprint, turned: Rotated, head: int) -> list[Tensor]:
    """The matrices that were used, solved for: R of the stream from the embedding, R of each layer's heads."""
    before, after = _tensors(original.checkpoint), _tensors(turned.checkpoint)
    residual = torch.linalg.lstsq(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]).solution
    found = [residual]
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        first = (residual.T @ before[name])[:, :head]
        found.append(torch.linalg.lstsq(first, after[name][:, :head]).solution)
    return found


def test_weights_of_16_bits_are_read_with_all_digits(tmp_path: Path) -> None:
    original = blueprint_of(tiny("qwen3", tmp_path, torch.bfloat16))
    turned = rotate(original)
    assert prove(original, turned) < TOLERANCE
    name = "model.layers.0.mlp.up_proj.weight"
    assert turned.checkpoint.weights[name].dtype == turned.checkpoint.specs[name].dtype == torch.bfloat16
    assert turned.checkpoint.tensor(name).dtype == torch.float32


def test_an_untied_output_layer_is_a_weight_of_its_own(tmp_path: Path) -> None:
    original = blueprint_of(tiny("qwen2", tmp_path))
    turned = rotate(original)
    view = turned.checkpoint
    assert turned.untied == "lm_head.weight"
    assert "lm_head.weight" not in original.checkpoint.weights
    assert view.weights["lm_head.weight"].shape == (128, 48)
    assert view.config["tie_word_embeddings"] is False
    assert not view.tied
    assert not torch.equal(view.tensor("lm_head.weight"), view.tensor("model.embed_tokens.weight"))


def test_streamed_and_resident_models_are_the_same(tmp_path: Path) -> None:
    original = blueprint_of(tiny("gemma", tmp_path))
    turned = rotate(original)
    assert prove(original, turned, streamed=True) == prove(original, turned)


def test_the_embedded_model(wiki_8m: Path) -> None:
    original = blueprint_of(wiki_8m)
    for options in (Options(), Options(kind="orthogonal", heads=False, seed=3)):
        assert prove(original, rotate(original, options)) < TOLERANCE


def test_a_rotation_of_ones_own(wiki_8m: Path) -> None:
    original = blueprint_of(wiki_8m)
    own = Rotation(torch.ones(256, dtype=torch.float64), (torch.eye(256, dtype=torch.float64).roll(7, 0),))
    turned = rotate(original, residual=own)
    assert prove(original, turned) < TOLERANCE
    before = original.checkpoint.tensor("model.embed_tokens.weight").float()
    assert torch.equal(turned.checkpoint.tensor("model.embed_tokens.weight"), before.roll(-7, 1))


def test_the_proof_finds_an_edit_that_is_missing(tmp_path: Path) -> None:
    original = blueprint_of(tiny("llama", tmp_path))
    turned = rotate(original)
    edits = {name: edit for name, edit in turned.checkpoint.edits.items() if "0.mlp.gate_proj" not in name}
    broken = replace(turned, blueprint=replace(turned.blueprint, checkpoint=replace(turned.checkpoint, edits=edits)))
    with pytest.raises(VerifyError, match=r"logits differ by \d"):
        prove(original, broken)


@pytest.mark.parametrize(
    ("name", "where"), [("mlp.up_proj", "row 0, column 3"), ("input_layernorm", "element 3")], ids=["matrix", "norm"]
)
def test_a_weight_that_is_not_finite_is_named_by_the_proof(name: str, where: str, tmp_path: Path) -> None:
    path = tiny("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.1.{name}.weight"].view(-1)[3] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    original = blueprint_of(path)
    with pytest.raises(WeightError, match=rf"^model.layers.1.{name}.weight: nan at {where}, so that no rotation"):
        prove(original, rotate(original))


def test_a_model_that_computes_no_numbers_is_said(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e37)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    original = blueprint_of(path)
    with pytest.raises(VerifyError, match="computes values that are not finite, so that no rotation can be proved"):
        prove(original, rotate(original))


def noise(checkpoint: Checkpoint) -> float:
    """Mean over all matrices of the blocks of the largest square in a run of 16 columns over the mean square."""
    found = []
    for name, weight in checkpoint.weights.items():
        if ".layers." in name and len(weight.shape) == 2:
            value = checkpoint.tensor(name).float()
            found.append(value.reshape(-1, 16).abs().amax(1).square().mean() / value.square().mean())
    return float(torch.stack(found).mean())


def test_steps_lower_the_noise_and_stay_orthogonal(tmp_path: Path) -> None:
    original = blueprint_of(tiny("gemma", tmp_path))
    start = rotate(original, Options(heads=False))
    turned = rotate(original, Options(heads=False, learn=30, group=16))
    assert turned.learned is not None
    assert turned.learned[0] == pytest.approx(noise(start.checkpoint), rel=1e-3)
    assert turned.learned[1] == pytest.approx(noise(turned.checkpoint), rel=1e-3)
    assert turned.learned[1] < 0.97 * turned.learned[0]
    assert prove(original, turned) < TOLERANCE


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gpt_neox", "cohere"])
def test_layer_norms_are_refused(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
        "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 1},
    }
    with pytest.raises(UnsupportedError, match="LayerNorm, which takes off the mean"):
        rotate(blueprint_of(tiny(kind, tmp_path, **sizes.get(kind, {}))))


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_norms_of_what_is_added_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"layers\.0\.post_attention_layernorm norms what is added to the stream"
    ):
        rotate(blueprint_of(tiny(kind, tmp_path, head_dim=16)))


def test_online_rotations_and_quantized_models_are_refused(wiki_8m: Path) -> None:
    original = blueprint_of(wiki_8m)
    with pytest.raises(UnsupportedError, match="computed while the model runs"):
        rotate(original, Options(online=True))
    with pytest.raises(UsageError, match="already quantized"):
        rotate(replace(original, checkpoint=replace(original.checkpoint, format="gptq")))
