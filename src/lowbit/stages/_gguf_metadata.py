"""What a GGUF file says beside its weights: the model's numbers under llama.cpp's keys, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any

from lowbit import __version__
from lowbit.errors import UnsupportedError
from lowbit.formats._gguf import Arch
from lowbit.stages._gguf_tokenizer import Value, tokenizer_values
from lowbit.stages._model import open_config
from lowbit.stages._weightfile import show
from lowbit.stages.checkpoint import Checkpoint

__all__ = ["Value", "metadata"]

_FLOATS = ("epsilon", "freq_base", "softcapping")


def metadata(checkpoint: Checkpoint, arch: Arch, file_type: int) -> tuple[dict[str, Value], dict[str, Any]]:
    """Values by key, in order, and small tensors by name, float32 arrays of numpy.

    Raises:
        CheckpointError: the checkpoint has no configuration or no tokenizer that `transformers` can use.
        UnsupportedError: a kind of rope or of tokenizer that is not written.
    """
    facts = _flat(open_config(checkpoint).get_text_config().to_dict())
    for key, wanted in arch.requires.items():
        if facts.get(key, wanted) != wanted:
            raise UnsupportedError(
                f"{checkpoint.path} says {key} is {show(facts[key])}; llama.cpp computes a model of the architecture "
                f"{arch.arch} as if it were {wanted!r}"
            )
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    values: dict[str, Value] = {"general.name": root.resolve().name or arch.arch, "general.file_type": file_type}
    values["general.quantization_version"] = 2
    values["general.quantized_by"] = f"lowbit {__version__}"
    for key, names in arch.keys.items():
        value = next((facts[name] for name in names if facts.get(name) is not None), None)
        if value is not None:
            values[f"{arch.arch}.{key}"] = float(value) if key.endswith(_FLOATS) else int(value)
    values |= _derived(arch, facts)
    rope, constants = _rope(arch, facts)
    return values | rope | tokenizer_values(checkpoint, int(facts["vocab_size"])), constants


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the parameters of its rope, where it has but one, among the others."""
    rope = config.get("rope_parameters")
    plain = isinstance(rope, Mapping) and not any(isinstance(part, Mapping) for part in rope.values())
    return {**config, **(rope if plain and isinstance(rope, Mapping) else {})}


def _derived(arch: Arch, facts: Mapping[str, Any]) -> dict[str, Value]:
    """Keys whose value is no single name of the configuration."""
    name, found = arch.arch, dict[str, Value]()
    if not facts.get("intermediate_size") and not facts.get("n_inner"):
        found[f"{name}.feed_forward_length"] = 4 * int(facts.get("n_embd") or facts["hidden_size"])
    if "rope.freq_base" in arch.keys:
        found[f"{name}.rope.dimension_count"] = int(_head(facts) * float(facts.get("partial_rotary_factor") or 1))
    return found


def _head(facts: Mapping[str, Any]) -> int:
    return int(facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"])


def _rope(arch: Arch, facts: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, Any]]:
    """How positions are stretched: keys, or for Llama 3 the factor of each frequency as a tensor."""
    kind, name = facts.get("rope_type") or "default", arch.arch
    if arch.arch == "gemma3":
        return _two_ropes(facts["rope_parameters"])
    if kind == "default" or "rope.freq_base" not in arch.keys:
        return {}, {}
    if kind == "linear":
        return {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(facts["factor"])}, {}
    if kind == "llama3":
        import numpy as np

        return {}, {"rope_freqs.weight": np.array(_llama3(facts), dtype=np.float32)}
    raise UnsupportedError(f"rope of type {show(kind)} is not written to GGUF; default, linear and llama3 are")


def _two_ropes(rope: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, Any]]:
    """Gemma 3 has one for its global layers and one for those with a window."""
    wide, local = rope["full_attention"], rope["sliding_attention"]
    found: dict[str, Value] = {"gemma3.rope.freq_base": float(wide["rope_theta"])}
    found["gemma3.rope.freq_base_swa"] = float(local["rope_theta"])
    if wide.get("rope_type", "default") == "linear":
        found |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": float(wide["factor"])}
    return found, {}


def _llama3(facts: Mapping[str, Any]) -> list[float]:
    """By how much each frequency is divided (transformers' `_compute_llama3_parameters`)."""
    low, high, factor = (float(facts[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    trained, dims, found = float(facts["original_max_position_embeddings"]), _head(facts), []
    for dim in range(0, dims, 2):
        turns = trained / (2 * pi * float(facts["rope_theta"]) ** (dim / dims))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return found
