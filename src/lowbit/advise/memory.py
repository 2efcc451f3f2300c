"""Memory of a running model, worked out from its configuration and its shapes: cache, activations, bytes of a token.

Nothing is loaded. What cannot be worked out is refused, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from lowbit.errors import UnsupportedError
from lowbit.stages._policy import role_of
from lowbit.stages.plan import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_EXPERTS = re.compile(r"\.experts?\.")
_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image)")
_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


@final
@dataclass(frozen=True)
class Cache:
    """What a model remembers of its context.

    Attributes:
        values: numbers that are stored per token in the layers that see the whole context.
        total: numbers in all, for the context and the batch asked for.
        state: bytes that do not grow with the context, of all sequences (linear attention), kept in float32.
        windowed: layers that keep a window alone.
    """

    values: int
    total: int
    state: int
    windowed: int

    def nbytes(self, bits: int | float) -> int:
        """Bytes, where a number takes `bits` with its share of the scales."""
        return round(self.total * bits / 8) + self.state


def cache_of(config: PreTrainedConfig, context: int, batch: int, latent: bool) -> Cache:
    """The cache of `batch` sequences of `context` tokens each.

    Two numbers (key and value) per head of keys, per element of a head, per layer and token; of multi-head latent
    attention (DeepSeek, arXiv 2405.04434) the latent and the rotary part where `latent`, else what is made of it.
    Layers with a window keep that many tokens.

    Raises:
        UnsupportedError: a layer of a kind whose memory is not worked out here.
    """
    text = config.get_text_config()
    layers = int(_told(text, "num_hidden_layers"))
    kinds = getattr(text, "layer_types", None) or [_kind(text)] * layers
    values, total, state, windowed = 0, 0, 0, 0
    for kind in kinds[:layers]:
        if kind == "linear_attention":
            state += batch * _linear_state(text)
            continue
        if kind not in ("full_attention", *_WINDOWED):
            raise UnsupportedError(
                f"the cache of a layer of kind {kind!r} ({text.model_type}) is not worked out by `lowbit advise`"
            )
        width = _width(text, latent)
        window = getattr(text, _WINDOWED[kind], None) if kind in _WINDOWED else None
        windowed += bool(window)
        values += 0 if window else width
        total += batch * width * (min(context, int(window)) if window else context)
    return Cache(values, total, state, windowed)


def _told(text: PreTrainedConfig, name: str) -> Any:
    value = getattr(text, name, None)
    if value is None:
        raise UnsupportedError(f"a configuration of {text.model_type} has no {name}: its cache is not worked out here")
    return value


def _kind(text: PreTrainedConfig) -> str:
    """What all layers are, where the configuration does not tell them apart."""
    uses = getattr(text, "use_sliding_window", True)
    return "sliding_attention" if getattr(text, "sliding_window", None) and uses else "full_attention"


def _width(text: PreTrainedConfig, latent: bool) -> int:
    """Numbers that one layer stores of one token."""
    heads = int(_told(text, "num_attention_heads"))
    rank = getattr(text, "kv_lora_rank", None)
    if rank:
        rope, plain, value = (int(_told(text, name)) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        return int(rank) + rope if latent else heads * (rope + plain + value)
    size = getattr(text, "head_dim", None) or int(_told(text, "hidden_size")) // heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 2 * int(size)
    kept = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    return 2 * int(kept) * int(size)


def _linear_state(text: PreTrainedConfig) -> int:
    """Bytes of the state of a gated delta layer (Qwen3-Next): a matrix per head, and the convolution's last inputs."""
    names = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
    key, value, keys, heads, kernel = (int(_told(text, f"linear_{name}")) for name in names)
    return 4 * (heads * key * value + (2 * keys * key + heads * value) * kernel)


def activation_bytes(config: PreTrainedConfig, context: int, batch: int, chunk: int, value: int) -> int:
    """Bytes that are alive at once at most in one block, and of the logits: an estimate from shapes.

    Of every token in a pass of `chunk` tokens at most: the hidden state before and after its norm, and the larger of
    what attention holds (queries, keys, values, output) and what the feed-forward layer does (gate, up, their product).
    Attention's scores are taken to be made in pieces. Logits of the last token of each sequence in float32.

    Args:
        value: bytes of an activation.
    """
    text = config.get_text_config()
    hidden, heads = int(_told(text, "hidden_size")), int(_told(text, "num_attention_heads"))
    size = getattr(text, "head_dim", None) or hidden // heads
    attention = 2 * heads * int(size) + _width(text, latent=False)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    experts, used = _experts(text)
    if experts:
        inner = max(inner, used * int(getattr(text, "moe_intermediate_size", None) or inner))
    tokens = min(context * batch, max(chunk, batch))
    return tokens * value * (2 * hidden + max(attention, 3 * inner)) + 4 * batch * int(_told(text, "vocab_size"))


def _experts(text: PreTrainedConfig) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token uses; zeros where there are none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((int(found) for name in names if (found := getattr(text, name, None))), 0)
    return count, int(getattr(text, "num_experts_per_tok", None) or getattr(text, "num_experts_per_token", 0) or 0)


def read_bytes(entries: Sequence[Entry], sizes: Sequence[int], config: PreTrainedConfig) -> int:
    """Bytes of weights that one step of decoding reads at least.

    Left out are the embedding's rows (but for a head that is tied to it), towers for images and sound, and, of a
    layer's experts, all but those that one token uses: with more tokens a step reads more.

    Args:
        sizes: bytes of each entry in memory.
    """
    count, used = _experts(config.get_text_config())
    headless = not any(role_of(entry.weight.name) == "head" and not entry.tied for entry in entries)
    total = 0.0
    for entry, size in zip(entries, sizes, strict=True):
        name, share = entry.weight.name, 1.0
        if (role_of(name) == "embedding" and not headless) or _TOWERS.search(name):
            continue
        if count and used and _EXPERTS.search(name):
            share = min(1.0, used / count)
        total += size * share
    return int(total)
