"""The native decoder's part of a model whose `config.json` tells all: what transformers' class, slow to import, has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowbit.runtime.model import EMBEDDING, LOOKED_UP, Loaded, pack_all, table_of
from lowbit.runtime.panels import Packed
from lowbit.runtime.table import Table
from lowbit.stages._told import Told, kind_of, told_config
from lowbit.stages.checkpoint import Checkpoint
from lowbit.tensors import QTensor

_HEAD = "lm_head.weight"
_PLACES = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_NORMS, _HEAD_NORMS = ("input_layernorm", "post_attention_layernorm"), ("self_attn.q_norm", "self_attn.k_norm")


def told_model(checkpoint: Checkpoint, exact: bool, threads: int) -> Loaded | None:
    """What the native decoder reads of a model, in the places where transformers' class has it.

    None where that class has to be asked: the configuration leaves something to it, or weights are not those that it
    would have.
    """
    config, head = told_config(checkpoint.config), _HEAD if _HEAD in checkpoint.weights else EMBEDDING
    shapes = {name: weight.shape for name, weight in checkpoint.weights.items()}
    if config is None or checkpoint.terms or config.num_hidden_layers > len(shapes):
        return None
    if shapes != _shapes(config):
        return None
    matrices = [name for name, weight in checkpoint.weights.items() if len(weight.shape) > 1 and name != EMBEDDING]
    stored = pack_all(checkpoint, list(dict.fromkeys([*matrices, head])), exact, threads)
    others: dict[str, str] = dict(stored.facts["others"])
    table = table_of(checkpoint, EMBEDDING, threads)
    if table is None and head != EMBEDDING and checkpoint.weights[EMBEDDING].scheme:
        others[EMBEDDING] = LOOKED_UP
    table = table or Table(_floats(checkpoint, EMBEDDING))
    model: Any = _model(config, partial(_part, checkpoint, stored.matrices), head)
    return Loaded(checkpoint, model, dict(stored.matrices), others, table)


def _shapes(config: Told) -> dict[str, tuple[int, ...]]:
    """Of all weights that transformers' class would have."""
    found = {EMBEDDING: (config.vocab_size, config.hidden_size), "model.norm.weight": (config.hidden_size,)}
    if not getattr(config, "tie_word_embeddings", False):
        found[_HEAD] = found[EMBEDDING]
    block = _block_shapes(config)
    blocks = range(config.num_hidden_layers)
    return found | {f"model.layers.{number}.{name}": shape for number in blocks for name, shape in block.items()}


def _block_shapes(config: Told) -> dict[str, tuple[int, ...]]:
    """Of the weights of one block."""
    kind, hidden, inner = kind_of(vars(config)), config.hidden_size, config.intermediate_size
    assert kind is not None  # or it would not be told
    heads, kept = (config.head_dim * count for count in (config.num_attention_heads, config.num_key_value_heads))
    sizes = {"query": (heads, hidden), "key": (kept, hidden), "value": (kept, hidden), "output": (hidden, heads)}
    sizes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    found: dict[str, tuple[int, ...]] = {f"{path}.weight": sizes[name] for name, path in _PLACES.items()}
    biased = [names for key, names in kind.biased.items() if getattr(config, key, key == "always")]
    found |= {f"{_PLACES[name]}.bias": sizes[name][:1] for names in biased for name in names}
    found |= dict.fromkeys((f"{norm}.weight" for norm in _NORMS), (hidden,))
    return found | ({f"{norm}.weight": (config.head_dim,) for norm in _HEAD_NORMS} if kind.normed else {})


def _model(config: Told, part: Callable[[str], Any], head: str) -> Any:
    """The parts of a model where `native_of` looks for them."""
    layers = [_block(config, part, f"model.layers.{number}") for number in range(config.num_hidden_layers)]
    inner = SimpleNamespace(
        layers=layers, norm=part("model.norm"), embed_tokens=SimpleNamespace(), rotary_emb=_turns(config)
    )
    output = part(head.removesuffix(".weight"))
    return SimpleNamespace(config=config, generation_config=config, model=inner, lm_head=output)


def _block(config: Told, part: Callable[[str], Any], start: str) -> SimpleNamespace:
    def parts(above: str, names: Sequence[str]) -> dict[str, Any]:
        return {name: part(f"{start}.{above}{name}") for name in names}

    attention = SimpleNamespace(
        head_dim=config.head_dim, scaling=config.head_dim**-0.5, **parts("self_attn.", _ATTENTION)
    )
    feed = SimpleNamespace(**parts("mlp.", ("gate_proj", "up_proj", "down_proj")))
    return SimpleNamespace(self_attn=attention, mlp=feed, **parts("", _NORMS))


def _part(checkpoint: Checkpoint, packed: Mapping[str, Packed], path: str) -> SimpleNamespace | None:
    """A layer or a norm; None where the checkpoint has none of that name."""
    name, bias = f"{path}.weight", f"{path}.bias"
    if name not in checkpoint.weights:
        return None
    ready = packed.get(name)
    return SimpleNamespace(
        packed=ready,
        weight=None if ready else _floats(checkpoint, name),
        bias=_floats(checkpoint, bias) if bias in checkpoint.weights else None,
    )


def _floats(checkpoint: Checkpoint, name: str) -> Tensor:
    value = checkpoint.load(name)
    return (value.dequantize() if isinstance(value, QTensor) else value).float()


def _turns(config: Told) -> SimpleNamespace:
    """Turns of each pair of dimensions of a head per position (RoPE, arXiv 2104.09864, section 3.4.2)."""
    kind, size = config.rope_parameters["rope_type"], config.head_dim
    if kind == "default":
        turns, factor = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        turns, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return SimpleNamespace(inv_freq=turns, attention_scaling=factor, rope_type=kind)
