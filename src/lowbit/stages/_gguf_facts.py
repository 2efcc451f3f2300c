"""The facts of `config.json` that the header of a GGUF file needs; transformers is asked where its defaults decide.

Importing its configurations takes seconds, which is longer than a small model is quantized in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.formats._gguf import Arch
from lowbit.stages._model import open_config
from lowbit.stages._told import is_real, is_size, kind_of, told_rope
from lowbit.stages.checkpoint import Checkpoint

LOCAL = "rope_local_base_freq"  # base of the rope of layers with a window
# What makes transformers read another file, run code, or move the facts.
_ELSEWHERE = ("auto_map", "configuration_files", "partial_rotary_factor", "per_layer_config", "text_config")


def facts_of(checkpoint: Checkpoint, arch: Arch) -> dict[str, Any]:
    """The configuration, with the parameters of its rope among the others.

    Raises:
        CheckpointError: there is none that `transformers` can use.
    """
    facts = told_facts(checkpoint.config, arch) or _flat(open_config(checkpoint).get_text_config().to_dict(), arch)
    facts = {**facts, **{name: value for name, value in arch.defaults.items() if facts.get(name) is None}}
    return facts if arch.kinds not in facts else {"num_hidden_layers": len(facts[arch.kinds] or ()), **facts}


def told_facts(config: Mapping[str, Any], arch: Arch) -> dict[str, Any] | None:
    """The facts as `config.json` has them, where it leaves none of them to a default; else None."""
    names, kind = arch.told.get(str(config.get("model_type"))), kind_of(config)
    if names is None or kind is None or any(key in config for key in _ELSEWHERE):
        return None
    if config.get(kind.unless) or not all(key in config for key in kind.needs):
        return None
    rope, sizes = told_rope(config), [config.get(name) for name in names]
    sizes += [] if config.get("head_dim") is None else [config["head_dim"]]
    if rope is None or not all(map(is_size, sizes)) or not is_real(config.get("rms_norm_eps")):
        return None
    asked = [key for key in arch.requires if key in config or key not in kind.may]
    if not all(arch.wants(key, config.get(key)) for key in asked):
        return None  # wrong, or a default
    width, rest = divmod(config["hidden_size"], config["num_attention_heads"])
    seen = {} if "sliding_window" in kind.needs else {"sliding_window": None}
    return None if rest else {**config, **rope, **seen, "head_dim": config.get("head_dim") or width}


def _flat(config: Mapping[str, Any], arch: Arch) -> dict[str, Any]:
    """With the parameters of the rope, of several those of layers that see everything; of the other its base."""
    rope = config.get("rope_parameters") or {}
    local = rope.get(arch.local) or {}
    return {**config, **(rope.get("full_attention") or {} if local else rope), LOCAL: local.get("rope_theta")}
