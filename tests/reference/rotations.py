"""What a rotation makes of a Llama's weights, spelled out by the names of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def rotated_llama(
    weights: Mapping[str, Tensor], residual: Tensor, values: Sequence[Tensor], head: int
) -> dict[str, Tensor]:
    """Float64 weights with the stream turned by `residual` and each layer's value heads by its matrix of `values`."""
    out = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"] @ residual,
        "model.norm.weight": torch.ones(len(residual), dtype=torch.float64),
        "lm_head.weight": weights["lm_head.weight"] @ torch.diag(weights["model.norm.weight"]) @ residual,
    }
    for layer, value in enumerate(values):
        at = f"model.layers.{layer}."
        attention = torch.diag(weights[at + "input_layernorm.weight"]) @ residual
        mlp = torch.diag(weights[at + "post_attention_layernorm.weight"]) @ residual
        kv, q = (weights[f"{at}self_attn.{part}_proj.weight"].shape[0] // head for part in "vq")
        on_values, on_queries = (torch.kron(torch.eye(count).double(), value.contiguous()) for count in (kv, q))
        out[at + "self_attn.q_proj.weight"] = weights[at + "self_attn.q_proj.weight"] @ attention
        out[at + "self_attn.k_proj.weight"] = weights[at + "self_attn.k_proj.weight"] @ attention
        out[at + "self_attn.v_proj.weight"] = on_values.T @ weights[at + "self_attn.v_proj.weight"] @ attention
        out[at + "self_attn.o_proj.weight"] = residual.T @ weights[at + "self_attn.o_proj.weight"] @ on_queries
        out[at + "mlp.gate_proj.weight"] = weights[at + "mlp.gate_proj.weight"] @ mlp
        out[at + "mlp.up_proj.weight"] = weights[at + "mlp.up_proj.weight"] @ mlp
        out[at + "mlp.down_proj.weight"] = residual.T @ weights[at + "mlp.down_proj.weight"]
        out[at + "input_layernorm.weight"] = torch.ones(len(residual), dtype=torch.float64)
        out[at + "post_attention_layernorm.weight"] = torch.ones(len(residual), dtype=torch.float64)
    return out
