"""Models that differ from the published ones: llama.cpp computes them, or they are refused, or what differs is said."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.inspect import inspect
from lowbit.pipeline import Request, run, run_conversion
from lowbit.stages._changes import Goal
from lowbit.stages._gguf import read_gguf
from lowbit.stages._model import open_tokenizer
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules
from tests.interop.test_gguf import (
    SMALL,
    TEXT,
    agree,
    alone,
    byte_level,
    ours,
    quantized,
    saved_model,
    tokens_and_logits,
    with_bytes,
)

library: Any = transformers
JSON = dict[str, Any]
Model = tuple[str, JSON]

_TURNED = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
_GEMMA = {**SMALL, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
_MIXED = {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
_FOUR = {**SMALL, "num_hidden_layers": 4, "pad_token_id": 0}
_HEADS = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 400, "n_positions": 512}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def saved(model: Model, path: Path, tokenizer: Tokenizer | None = None) -> Path:
    """A small model at random; `Gemma3` is what reads of one."""
    family, settings = model
    make = getattr(library, f"{family}{'Text' if family == 'Gemma3' else ''}Config")
    config = make(**deepcopy(settings))  # it writes into what it is given
    kind = getattr(library, f"{family}ForCausalLM", None) or getattr(library, f"{family}LMHeadModel")
    return saved_model(kind(config), path, tokenizer or byte_level())


def said(source: Path, out: Path) -> list[str]:
    """What is told of llama.cpp while a file is written; the report has it too."""
    told: list[str] = []
    run(
        Request(str(source), out, Rules(scheme="f32", method="ggml", format="gguf")), tell=lambda t: told.append(str(t))
    )
    report, told = (out / "report.md").read_text(), [text for text in told if "llama.cpp" in text]
    assert all(text in report for text in told)
    return told


COMPUTED: dict[str, Model] = {
    "wide heads of Llama": ("Llama", {**SMALL, "head_dim": 32}),
    "wide heads of Mistral": ("Mistral", {**SMALL, "head_dim": 32, "sliding_window": None}),
    "wide heads of Mixtral": ("Mixtral", {**SMALL, "head_dim": 32, "sliding_window": None, "num_local_experts": 4}),
    "wide heads of Granite": ("Granite", {**SMALL, "head_dim": 32}),
    "biases of Granite": ("Granite", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "biases of Nemotron": ("Nemotron", {**SMALL, "head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "heads turned in part": ("Phi3", {**SMALL, "pad_token_id": 0, "rope_parameters": _TURNED}),
    "mixed layers of Gemma 2": ("Gemma2", {**_GEMMA, **_MIXED}),
    "mixed layers of Gemma 3": ("Gemma3", {**_GEMMA, **_MIXED}),
    "capped logits of Gemma 3": ("Gemma3", {**_GEMMA, "final_logit_softcapping": 5.0}),
    "mixed layers of Command R": ("Cohere2", {**SMALL, **_MIXED, "logit_scale": 0.2, "sliding_window": 8}),
    "queries without a rank": ("DeepseekV3", {**_LATENT, "q_lora_rank": None}),
}


@pytest.mark.parametrize("what", COMPUTED)
def test_what_llama_cpp_computes(what: str, tmp_path: Path) -> None:
    """And what is read from the file alone is the same."""
    source = saved(COMPUTED[what], tmp_path / "model")
    assert said(source, tmp_path / "out") == []
    file = tmp_path / "out" / "model.gguf"
    agree(file, source, 2e-3 if "Gemma" in what else 1e-4)
    ids = list(range(2, 60))
    found, wanted = ours(alone(file, tmp_path / "alone"), ids), ours(source, ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


REFUSED: dict[str, tuple[Model, str]] = {
    "wide heads of Phi 3": (("Phi3", {**SMALL, "pad_token_id": 0, "head_dim": 32}), "head_dim is 32"),
    "wide heads of Qwen 2": (("Qwen2", {**SMALL, "head_dim": 32}), "head_dim is 32"),
    "wide heads of Nemotron": (("Nemotron", {**SMALL, "head_dim": 32}), "head_dim is 32"),
    "wide heads of Command R": (("Cohere2", {**SMALL, "head_dim": 32}), "head_dim is 32"),
    "scaled queries of Gemma 2": (("Gemma2", {**_GEMMA, "query_pre_attn_scalar": 48}), "query_pre_attn_scalar is 48"),
    "scaled queries of Gemma 3": (("Gemma3", {**_GEMMA, "query_pre_attn_scalar": 64}), "query_pre_attn_scalar is 64"),
    "uncapped attention": (("Gemma2", {**_GEMMA, "attn_logit_softcapping": None}), "attn_logit_softcapping is null"),
    "uncapped logits": (("Gemma2", {**_GEMMA, "final_logit_softcapping": None}), "final_logit_softcapping is null"),
    "both ways": (("Gemma3", {**_GEMMA, "use_bidirectional_attention": True}), "use_bidirectional_attention is True"),
    "another rhythm": (("SmolLM3", {**_FOUR, "no_rope_layers": [1, 0, 1, 0]}), r"no_rope_layers is \[1, 0, 1, 0\]"),
    "unscaled": (("GPT2", {**_GPT2, "scale_attn_weights": False}), "scale_attn_weights is False"),
    "scaled by layer": (("GPT2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}), "by_inverse_layer_idx is True"),
    "biases of Qwen 3": (("Qwen3", {**SMALL, "attention_bias": True}), "attention_bias is True"),
    "biases of Gemma": (("Gemma", {**SMALL, "attention_bias": True}), "attention_bias is True"),
    "biases of Gemma 2": (("Gemma2", {**_GEMMA, "attention_bias": True}), "attention_bias is True"),
    "biases of Gemma 3": (("Gemma3", {**_GEMMA, "attention_bias": True}), "attention_bias is True"),
    "biases of OLMo": (("Olmo", {**SMALL, "attention_bias": True}), "attention_bias is True"),
    "biases of OLMo 2": (("Olmo2", {**SMALL, "attention_bias": True}), "attention_bias is True"),
    "biases of Command R": (("Cohere", {**SMALL, "attention_bias": True}), "attention_bias is True"),
    "biases of Arcee": (("Arcee", {**SMALL, "mlp_bias": True}), "mlp_bias is True"),
    "biases of SmolLM3": (("SmolLM3", {**_FOUR, "attention_bias": True}), "attention_bias is True"),
    "biases of HunYuan": (("HunYuanDenseV1", {**SMALL, "head_dim": 16, "attention_bias": True}), "attention_bias is"),
    "biases of Ernie": (("Ernie4_5", {**SMALL, "head_dim": 16, "use_bias": True}), "use_bias is True"),
    "biases of Seed": (
        ("SeedOss", {**SMALL, "head_dim": 16, "attention_out_bias": True}),
        "attention_out_bias is True",
    ),
    "no biases of GPT-NeoX": (("GPTNeoX", {**_HEADS, "attention_bias": False}), "attention_bias is False"),
    "no biases of StarCoder2": (("Starcoder2", {**SMALL, "use_bias": False}), "use_bias is False"),
    "untied Gemma": (("Gemma", {**SMALL, "tie_word_embeddings": False}), "tie_word_embeddings is False"),
    "untied Command R": (("Cohere2", {**SMALL, "tie_word_embeddings": False}), "tie_word_embeddings is False"),
    "ranks": (("DeepseekV2", {**_LATENT, "num_hidden_layers": 27, "n_routed_experts": 2}), "q_lora_rank is 24.*27"),
    "groups of heads": (("Olmoe", {**SMALL, **_EXPERTS}), "different num_attention_heads and num_key_value_heads"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_refused(what: str, tmp_path: Path) -> None:
    model, words = REFUSED[what]
    with pytest.raises(UnsupportedError, match=words):
        quantized(saved(model, tmp_path / "model"), tmp_path / "out", "f32")
    assert not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_heads_turned_in_part_are_refused(family: str, tmp_path: Path) -> None:
    """The key is written afterwards: where auto-round was imported, transformers cannot make such a model."""
    source = saved((family, SMALL), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_parameters": _TURNED}))
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor is 0\.5"):
        quantized(source, tmp_path / "out", "f32")
    assert not list((tmp_path / "out").glob("*.gguf"))


_SHORT = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
WINDOWS: dict[str, tuple[Model, int]] = {
    "mistral": (("Mistral", {**SMALL, "sliding_window": 16}), 16),
    "mixtral": (("Mixtral", {**SMALL, "sliding_window": 16, "num_local_experts": 4}), 16),
    "phi3": (("Phi3", {**SMALL, "pad_token_id": 0, "sliding_window": 16}), 16),
    "qwen2": (("Qwen2", {**SMALL, **_SHORT}), 16),
    "qwen3": (("Qwen3", {**SMALL, **_SHORT, "head_dim": 32}), 16),
    "starcoder2": (("Starcoder2", {**SMALL, "sliding_window": 16}), 16),
    "mistral as long as its context": (("Mistral", {**SMALL, "sliding_window": 512}), 0),
    "qwen2 without": (("Qwen2", {**SMALL, "use_sliding_window": False, "sliding_window": 16}), 0),
    "qwen2 in no layer": (("Qwen2", {**SMALL, **_SHORT, "max_window_layers": 2}), 0),
    "llama": (("Llama", {**SMALL, "sliding_window": 16}), 0),
}


@pytest.mark.parametrize("what", WINDOWS)
def test_windows_that_llama_cpp_has_not_are_said(what: str, tmp_path: Path) -> None:
    """Texts that fit into one are computed alike."""
    model, window = WINDOWS[what]
    source = saved(model, tmp_path / "model")
    told = said(source, tmp_path / "out")
    assert len(told) == bool(window) and all(f"sliding_window is {window}, and llama.cpp" in text for text in told)
    short = TEXT[:12] if window else TEXT
    agree(tmp_path / "out" / "model.gguf", source, 2e-3 if what == "starcoder2" else 1e-4, text=short)
    notes: list[str] = []
    run_conversion(str(source), tmp_path / "converted", Goal("gguf"), note=notes.append)
    assert notes == told


def test_a_window_that_the_configuration_leaves_to_transformers_is_said(tmp_path: Path) -> None:
    """4,096 tokens of Mistral, as it was published."""
    source = saved(("Mistral", {**SMALL, "max_position_embeddings": 8192}), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    del config["sliding_window"]
    (source / "config.json").write_text(json.dumps(config))
    assert ["sliding_window is 4096" in text for text in said(source, tmp_path / "out")] == [True]


CONTRADICTIONS: dict[str, tuple[JSON, str]] = {
    "width": (
        {"hidden_size": 128, "num_attention_heads": 8},
        r"hidden_size is 128.* \[400, 128\].* is \[400, 64\]",
    ),
    "heads": ({"num_attention_heads": 2, "head_dim": 16}, r"num_attention_heads is 2 .*blk\.0\.attn_output"),
    "keys": ({"num_key_value_heads": 4}, r"num_key_value_heads is 4 .*blk\.0\.attn_k\.weight to be \[64, 64\]"),
    "inner width": ({"intermediate_size": 128}, r"intermediate_size is 128.*blk\.0\.ffn_down"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and there are weights of 2 layers"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_configuration_of_another_model_is_refused(what: str, tmp_path: Path) -> None:
    change, words = CONTRADICTIONS[what]
    source = saved(("Llama", SMALL), tmp_path / "model")
    assert inspect(source).sound
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    assert inspect(source).sound == (what in ("heads", "keys", "layers"))  # which take more than a look at one number
    with pytest.raises(CheckpointError, match=words):
        run_conversion(str(source), tmp_path / "out", Goal("gguf"))
    with pytest.raises(CheckpointError, match=words):
        quantized(source, tmp_path / "quantized", "q8_0")


def phi(spaces: bool) -> Tokenizer:
    """A tokenizer with the special tokens of Phi 3; `spaces`: they take the spaces after them, as its do."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<unk>", "<s>", "<|endoftext|>"])
    ends = ["<|start|>", "<|end|>", "</s>", "<|user|>"]
    tokenizer.add_special_tokens([AddedToken(text, rstrip=spaces, special=True) for text in ends])
    return tokenizer


@pytest.mark.parametrize("folder", ["phi3", "My-Phi-3-mini", "model"])
@pytest.mark.parametrize("kind", ["none", "bare", "phi"])
def test_names_that_mean_something_to_llama_cpp(folder: str, kind: str, tmp_path: Path) -> None:
    """It takes a model that is named so for Phi 3, and ends where its tokens are not in the vocabulary."""
    tokenizer = byte_level() if kind == "none" else phi(kind == "phi")
    source = saved(("Llama", {**SMALL, "vocab_size": 410}), tmp_path / folder, tokenizer)
    assert said(source, tmp_path / "out") == []
    file = tmp_path / "out" / "model.gguf"
    name = str(read_gguf(file).value("general.name"))
    assert ("phi-3" in name.lower() or "phi3" in name.lower()) == (kind == "phi")
    import llama_cpp

    loaded, text = llama_cpp.Llama(str(file), vocab_only=True, verbose=False), "a <|user|>  b</s> c<s> d <|end|>\n e"
    found = loaded.tokenize(text.encode(), add_bos=True, special=True)
    assert found == open_tokenizer(open_checkpoint(source))(text)["input_ids"]


def test_added_tokens_that_take_spaces_are_said(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("bridges;", lstrip=True), AddedToken("why", single_word=True)])
    told = said(saved(("Llama", {**SMALL, "vocab_size": 410}), tmp_path / "model", tokenizer), tmp_path / "out")
    assert [text.split(",")[1] for text in told] == [" as 'bridges;'", " as 'why'"]
    assert "lstrip" in told[0] and "single_word" in told[1]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_spaces_that_are_put_before_a_text_now_and_then_are_said(scheme: str, tmp_path: Path) -> None:
    tokenizer = with_bytes(False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    source = saved(("Llama", SMALL), tmp_path / "model", tokenizer)
    told = said(source, tmp_path / "out")
    assert len(told) == (scheme != "never") and all(f"prepend_scheme is {scheme}" in text for text in told)
    file, spaced = tmp_path / "out" / "model.gguf", f"  {TEXT}"
    own = open_tokenizer(open_checkpoint(source))
    assert tokens_and_logits(file, TEXT)[0] == own(TEXT)["input_ids"]
    assert (tokens_and_logits(file, spaced)[0] == own(spaced)["input_ids"]) == (scheme == "never")
