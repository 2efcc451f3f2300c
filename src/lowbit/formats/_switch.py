"""MLX's experts: one tensor has all of a layer (`SwitchLinear`, mlx-lm: switch_layers.py); here each is a weight.

mlx-lm makes these tensors of separate experts as it loads float checkpoints, and of quantized ones not for every class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

_GATED = {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"}
_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# What its parts are called in transformers, by type of the model; `_GATED` for others.
_PARTS: Mapping[str, Mapping[str, str]] = {
    "granitemoe": _NUMBERED,
    "granitemoehybrid": _NUMBERED,
    "lfm2_moe": _NUMBERED,
    "minimax": _NUMBERED,
    "minimax_m2": _NUMBERED,
    "mixtral": _NUMBERED,
    "nemotron_h": {"fc1": "up_proj", "fc2": "down_proj"},
    "phimoe": _NUMBERED,
}
# What mlx-lm calls the module of a layer's experts, by type of the model; `switch_mlp` for others.
_MODULES: Mapping[str, str] = {"gpt_oss": "experts", "llama4": "experts"}
# Types of which mlx-lm loads no stack of floats as transformers has it.
APART_ONLY = ("gpt_oss",)
_TENSORS = r"(weight|scales|biases|bias)"
_EXPERT = re.compile(rf"(.*\.)experts\.(0|[1-9]\d{{0,5}})\.(\w+)\.{_TENSORS}")


def stacked(name: str, model_type: str) -> tuple[str, int] | None:
    """The tensor that has one of an expert, and the number of the expert; None for all else."""
    found = _EXPERT.fullmatch(name)
    part = next((ours for ours, theirs in _parts(model_type).items() if found and theirs == found[3]), None)
    return (f"{found[1]}{_module(model_type)}.{part}.{found[4]}", int(found[2])) if found and part else None


def of_expert(name: str, model_type: str) -> tuple[str, str] | None:
    """What is before and behind the number of an expert in the name of what a tensor has of it; None for all else."""
    found = _stack(_module(model_type)).fullmatch(name)
    part = _parts(model_type).get(found[2]) if found else None
    return (f"{found[1]}experts.", f".{part}.{found[3]}") if found and part else None


def _parts(model_type: str) -> Mapping[str, str]:
    return _PARTS.get(model_type, _GATED)


def _module(model_type: str) -> str:
    return _MODULES.get(model_type, "switch_mlp")


@cache
def _stack(module: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.){module}\.(\w+)\.{_TENSORS}")
