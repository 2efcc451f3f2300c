"""The native decoder over a loaded model of the Llama family: logits token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lowbit.errors import UnsupportedError
from lowbit.native import Decoder, DecoderLayer, DecoderShape, Matrix
from lowbit.runtime.linear import Linear
from lowbit.runtime.model import Loaded
from lowbit.runtime.panels import pack_dense
from lowbit.stages.checkpoint import arch_rows

_CHUNK = 256  # tokens of a prompt that go through the blocks together


@final
@dataclass(frozen=True, eq=False)
class Session:
    """A text that a model has read so far, and what comes next. Made by `start`."""

    decoder: Decoder
    model: Any

    def read(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Read more tokens, at least one; the logits of the token after them."""
        with torch.inference_mode():
            for part in torch.split(ids, _CHUNK):
                at = torch.arange(self.decoder.known, self.decoder.known + len(part))
                hidden = self.model.model.embed_tokens(part).float()
                cosine, sine = self.model.model.rotary_emb(hidden[None], at[None])
                hidden = self.decoder(hidden, cosine[0].contiguous(), sine[0].contiguous())
            logits: Tensor = self.model.lm_head(self.model.model.norm(hidden[-1:]))[0]
        return logits


def start(loaded: Loaded, capacity: int, threads: int | None = None) -> Session:
    """A session with room for `capacity` tokens.

    Raises:
        UnsupportedError: the model is of no kind whose blocks the decoder knows, with what is different.
    """
    model: Any = loaded.model
    reason = next(_objections(model), None)
    if reason:
        raise UnsupportedError(f"the native decoder does not run this model: {reason}")
    config, attention = model.config, model.model.layers[0].self_attn
    shape = DecoderShape(
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, attention.head_dim,
        config.intermediate_size, config.rms_norm_eps, attention.scaling, _window(config) or 0,
    )  # fmt: skip
    layers = [_layer(each) for each in model.model.layers]
    return Session(Decoder(shape, layers, capacity, threads or torch.get_num_threads()), model)


def _objections(model: Any) -> Iterator[str]:
    """What is not as the decoder computes it."""
    config = model.config
    kinds = [kind for row in arch_rows("decoder") for kind in row["model_types"]]
    if config.model_type not in kinds:
        yield f"it is a {config.model_type}, no {', '.join(kinds)}"
        return
    if config.hidden_act not in ("silu", "swish"):
        yield f"its feed-forward layers have {config.hidden_act}"
    if len(set(getattr(config, "layer_types", None) or ["one"])) > 1:
        yield "its layers see different windows"
    size = model.model.layers[0].self_attn.head_dim
    if size % 16:
        yield f"its heads are {size} wide, no multiple of 16"
    cosine, _ = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64))
    if cosine.shape[-1] != size:
        yield f"{cosine.shape[-1]} of {size} dimensions of its heads turn"


def _window(config: Any) -> int | None:
    full = set(getattr(config, "layer_types", None) or []) == {"full_attention"}
    return None if full else getattr(config, "sliding_window", None)


def _layer(block: Any) -> DecoderLayer:
    attention, feed = block.self_attn, block.mlp
    return DecoderLayer(
        query=_matrix(attention.q_proj),
        key=_matrix(attention.k_proj),
        value=_matrix(attention.v_proj),
        output=_matrix(attention.o_proj),
        gate=_matrix(feed.gate_proj),
        up=_matrix(feed.up_proj),
        down=_matrix(feed.down_proj),
        before=_norm(block.input_layernorm),
        after=_norm(block.post_attention_layernorm),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
    )


def _matrix(module: nn.Module) -> Matrix:
    """That of a layer on the kernels; one that is not is packed as it is."""
    if isinstance(module, Linear):
        return module.matrix
    return pack_dense(module.get_parameter("weight").detach()).matrix(getattr(module, "bias", None))


def _norm(module: nn.Module) -> Float[Tensor, " width"]:
    return module.get_parameter("weight").detach().float().contiguous()
