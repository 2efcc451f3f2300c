"""Tiny random models of many classes, saved as `transformers` saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WIDTH = 32
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "phi3": {},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_ln_in_parallel_attn": None, "head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 40},
    "qwen3_moe": _MOE,
    "mamba": {"state_size": 8},
}
# Their files have all experts of a layer in one tensor.
STACKED: dict[str, dict[str, Any]] = {
    "llama4_text": {**_LOCAL, "intermediate_size_mlp": 48, "num_hidden_layers": 1},
    "gpt_oss": {**_LOCAL, "sliding_window": 16},
    "granitemoe": {**_LOCAL, "num_hidden_layers": 1},
    "qwen3_5_moe_text": {
        **_MOE, "shared_expert_intermediate_size": 40, "num_hidden_layers": 1, "layer_types": ["full_attention"],
    },
}  # fmt: skip
# The same, of types that a few tests are about.
OTHERS: dict[str, dict[str, Any]] = {
    "openai-gpt": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "granitemoehybrid": {
        **_LOCAL, "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 4, "mamba_d_head": 32,
        "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2, "shared_intermediate_size": 40,
    },
}  # fmt: skip
# Models that see too: what the part that reads has.
SEEING: dict[str, dict[str, Any]] = {
    "llama4": STACKED["llama4_text"],
    "qwen3_5_moe": {
        **STACKED["qwen3_5_moe_text"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen3_vl_moe": {**_MOE, "tie_word_embeddings": False},
}  # fmt: skip


def save_tiny(kind: str, path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model of a type, its biases and norms not trivial; returns it in eval mode.

    `settings`: what its configuration has otherwise.
    """
    config_class: Any = transformers.CONFIG_MAPPING[kind]
    known = config_class()
    wanted = {**_SIZES, **{**SETTINGS, **STACKED, **OTHERS}[kind], **settings}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    config = config_class(**{name: value for name, value in wanted.items() if hasattr(known, name)})
    return _saved(transformers.AutoModelForCausalLM, config, path, dtype)


def _saved(auto: Any, config: Any, path: Path, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model: Any = auto.from_config(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.3) if tensor.dim() > 1 else tensor.mul_(1 + 0.2 * torch.randn_like(tensor)).add_(
                0.05 * torch.randn_like(tensor)
            )
    model = (model if dtype == torch.float32 else model.to(dtype)).eval()  # complex buffers are none of floats
    model.save_pretrained(path)
    return model


def save_seeing(kind: str, path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model of a type of `SEEING`, as the hub has it: it reads images too. `settings`: of the part that reads."""
    sight = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sight |= {"image_size": 28, "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32}
    text = {**_SIZES, **SEEING[kind], **settings}
    wide = {"vision_output_dim": 32, "out_hidden_size": text["hidden_size"]}
    deep = {"depth": 1, "num_heads": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    known: Any = transformers.CONFIG_MAPPING
    config = known[kind](text_config=text, vision_config={**sight, **wide, **deep}, image_token_index=0)
    return _as_held(_saved(transformers.AutoModelForImageTextToText, config, path, dtype), path)


def save_stacked(kind: str, path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The same as `save_tiny`, of a type of `STACKED`, its parameters stored as its class holds them."""
    return _as_held(save_tiny(kind, path, dtype, **settings), path)


def _as_held(model: Any, path: Path) -> Any:
    """`save_pretrained` parts the experts of some classes."""
    if "qwen3_5_moe" in model.config.model_type:
        save_file(dict(model.state_dict()), path / "model.safetensors", {"format": "pt"})
    return model


def to_mxfp4(path: Path) -> Path:
    """Replace the experts of a gpt-oss by such as it is published with: those of a layer in one tensor, in blocks."""
    stored, chance = load_file(path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outputs = stored.pop(name).shape
        shape = experts, outputs, inputs // 32
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=chance).to(torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 124, shape, generator=chance).to(torch.uint8)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def save_words(path: Path) -> Path:
    """A tokenizer of 96 words beside such a model; returns a text of 400 of these."""
    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(path)
    file, dice = path / "words.txt", torch.Generator().manual_seed(2)
    file.write_text(" ".join(f"w{n}" for n in torch.randint(3, 96, (400,), generator=dice).tolist()))
    return file
