"""Oracle of `lowbit evaluate`: plain loops over plain `transformers` models; and tiny models on disk to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

TEXT = "".join(f"Line {n}: {n * 7919 % 1000} and {'abc' * (n % 5)} over the lazy dog.\n" for n in range(16))
_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 260}
_LLAMA = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}

# Blocks called `layers`, `h` and `decoder.layers`; tied and untied heads; biases; transposed weights; learned and
# rotary positions; windows of attention; experts and names that `transformers` changes as it loads; a model that asks
# for the device of a weight before it runs the module that has it; one whose head's bias is set as weights are tied.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama-tied": ("LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 260}),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", _LLAMA | {"tie_word_embeddings": True}),
    "opt": ("OPTConfig", _SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES | {"intermediate_size": 48, "max_position_embeddings": 64}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 260}),
    "gemma2": ("Gemma2Config", _LLAMA | {"head_dim": 8, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", _LLAMA | {"num_local_experts": 4}),
    "llama4": ("Llama4TextConfig", _LLAMA | {"head_dim": 8, "num_local_experts": 2}),
    "ctrl": ("CTRLConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "n_positions": 64, "vocab_size": 260}),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 260}),
}


def write_model(path: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with large enough weights to have opinions, several shards, and a tokenizer of bytes with BOS."""
    kind, values = CONFIGS[name]
    tokens = {"pad_token_id": None, "bos_token_id": 256, "eos_token_id": 256}
    config = getattr(transformers, kind)(**(values | tokens), initializer_range=0.3)
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).to(dtype)
    model.save_pretrained(path, max_shard_size="40KB")
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path, reverse: bool = False) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    tokenizer = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate([*alphabet, "<s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    make: Any = transformers.PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)


def token_ids(path: Path, text: str) -> list[int]:
    return list(transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"])


def load(path: Path) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Expected:
    perplexity: float
    scored: int
    nll: Tensor
    kl: Tensor
    agreement: float


def expected(model: Any, reference: Any, ids: list[int], context: int, stride: int) -> Expected:
    """Every token that has something before it in a full window is scored once, in the first window that has it."""
    seen: set[int] = set()
    losses, divergences, same = [], [], []
    for begin in range(0, len(ids) - context + 1, stride):
        window = torch.tensor(ids[begin : begin + context])
        with torch.no_grad():
            mine, theirs = (each(input_ids=window[None], use_cache=False).logits[0] for each in (model, reference))
        loss = cross_entropy(mine[:-1], window[1:], reduction="none")
        p, q = (each.double().log_softmax(1) for each in (theirs, mine))
        divergence = kl_div(q, p, reduction="none", log_target=True).sum(1)
        for place in range(context):
            if place > 0 and begin + place not in seen:
                losses.append(loss[place - 1])
                divergences.append(divergence[place - 1])
                same.append(float(mine[place - 1].argmax() == theirs[place - 1].argmax()))
            seen.add(begin + place)
    nll = torch.stack(losses)
    return Expected(exp(nll.double().mean().item()), len(same), nll, torch.stack(divergences), sum(same) / len(same))
