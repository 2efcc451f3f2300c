"""What a GGUF file says beside its weights: the model's numbers under llama.cpp's keys, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, prod, sqrt
from typing import Any

from lowbit import __version__
from lowbit.errors import UnsupportedError
from lowbit.formats._gguf import Arch
from lowbit.stages._directory import GGUF
from lowbit.stages._gguf import Value, encoded, read_gguf
from lowbit.stages._gguf_config import FREQUENCIES, LONG, SHORT, llama3_factors
from lowbit.stages._gguf_facts import LOCAL, facts_of
from lowbit.stages._gguf_limits import Shape, require_computed, require_shapes
from lowbit.stages._gguf_model import COMPUTED
from lowbit.stages._gguf_tokenizer import model_name, tokenizer_of, tokenizer_values
from lowbit.stages._weightfile import show
from lowbit.stages.checkpoint import Checkpoint

Constants = dict[str, Sequence[float]]

# Keys that are true of one file alone.
_OF_THE_FILE = ("general.alignment", "split.no", "split.count", "split.tensors.count")
_FLOATS = ("epsilon", "freq_base", "freq_base_swa", "softcapping", "scale")


def metadata(
    checkpoint: Checkpoint, arch: Arch, shapes: Mapping[str, Shape], file_type: int, imatrix: dict[str, bytes]
) -> tuple[dict[str, bytes], Constants]:
    """Values by key, in order and as the file has them, and small tensors of float32 by name.

    What came from a GGUF file is handed on, in its order: as `llama-quantize` does, only the keys that tell of the
    quantization are new, and last; those of the importance matrix are `imatrix`. `shapes`: of the tensors of the file.

    Raises:
        CheckpointError: the checkpoint has no configuration or no tokenizer that `transformers` can use, or a
            configuration that is not its own.
        UnsupportedError: a kind of rope or of tokenizer that is not written, or what llama.cpp does not compute.
    """
    last: dict[str, Value] = {"general.quantization_version": 2, "general.file_type": file_type}
    if checkpoint.shards[0].suffix != GGUF:
        values, constants = _made(checkpoint, arch, shapes, last)
        return {key: encoded(value) for key, value in values.items()} | imatrix, constants
    header = read_gguf(checkpoint.shards[0])
    new = {key: encoded(value) for key, value in last.items()} | imatrix
    kept = [key for key in header.fields if key not in new and key not in _OF_THE_FILE]
    return {key: header.raw(key) for key in kept} | new, _carried(checkpoint)


def _carried(checkpoint: Checkpoint) -> Constants:
    """The factors of rope that a file has as tensors."""
    headers = [read_gguf(path) for path in checkpoint.shards]
    return {name: header.floats(name) for header in headers for name in COMPUTED if name in header.tensors}


def _made(
    checkpoint: Checkpoint, arch: Arch, shapes: Mapping[str, Shape], last: Mapping[str, Value]
) -> tuple[dict[str, Value], Constants]:
    """Keys and small tensors from what lies beside a checkpoint of transformers."""
    facts = facts_of(checkpoint, arch)
    require_computed(checkpoint.path, arch, facts)
    tokenizer = tokenizer_of(checkpoint)
    name = model_name(checkpoint.root.resolve().name or arch.arch, tokenizer)
    values: dict[str, Value] = {"general.architecture": arch.arch, "general.name": name}
    values["general.quantized_by"] = f"lowbit {__version__}"
    for key, names in arch.keys.items():
        value = next((facts[name] for name in names if facts.get(name) is not None), None)
        if value is not None:
            values[f"{arch.arch}.{key}"] = _typed(key, value)
    values |= _derived(arch, facts) | {f"{arch.arch}.{key}": value for key, value in arch.constants.items()}
    values |= {f"{arch.arch}.{key}": _rows(checkpoint, arch, stored) for key, stored in arch.rows.items()}
    values |= _lists(arch, facts, values)
    require_shapes(checkpoint.path, arch, facts, values, shapes)
    rope, constants = _rope(arch, facts)
    told = tokenizer_values(checkpoint, tokenizer, int(facts["vocab_size"]))
    return values | rope | told | dict(last), constants


def _typed(key: str, value: Any) -> Value:
    """A number or a truth as llama.cpp wants it under a key, or a list of numbers, of which it has four."""
    if isinstance(value, (list, tuple)):
        return [int(each) for each in (*value, 0, 0, 0, 0)][:4]
    if isinstance(value, bool):
        return value
    return float(value) if key.endswith(_FLOATS) else int(value)


def _derived(arch: Arch, facts: Mapping[str, Any]) -> dict[str, Value]:
    """Keys whose value is no single name of the configuration."""
    name, found = arch.arch, dict[str, Value]()
    if not facts.get("intermediate_size") and not facts.get("n_inner"):
        found[f"{name}.feed_forward_length"] = 4 * int(facts.get("n_embd") or facts["hidden_size"])
    if "rope.freq_base" in arch.keys:
        found[f"{name}.rope.dimension_count"] = int(_head(facts) * float(facts.get("partial_rotary_factor") or 1))
    for combine, table in ((prod, arch.products), (sum, arch.sums)):
        found |= {f"{name}.{key}": int(combine(facts[each] for each in names)) for key, names in table.items()}
    return found


def _rows(checkpoint: Checkpoint, arch: Arch, stored: str) -> int:
    return checkpoint.weights[str(arch.name(stored))].shape[0]


def _lists(arch: Arch, facts: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Value]:
    """Keys that have a value for each layer: what all layers of a kind have, or whether they are of it."""
    found, kinds = dict[str, Value](), facts.get(arch.kinds) or []
    if arch.layers and not set(kinds) <= arch.layers.keys():
        raise UnsupportedError(
            f"layers of the kinds {show(sorted(set(kinds)))} are not written to GGUF for a model of the architecture "
            f"{arch.arch}, which has {', '.join(arch.layers)}"
        )
    for key in dict.fromkeys(key for keys in arch.layers.values() for key in keys):
        one: Any = values.get(f"{arch.arch}.{key}", True)
        found[f"{arch.arch}.{key}"] = [one if key in arch.layers[kind] else type(one)() for kind in kinds]
    return found


def _head(facts: Mapping[str, Any]) -> int:
    """Width of a head; of DeepSeek's the part that is rotated."""
    told = facts.get("qk_rope_head_dim") or facts.get("head_dim")
    return int(told or facts["hidden_size"] // facts["num_attention_heads"])


def _rope(arch: Arch, facts: Mapping[str, Any]) -> tuple[dict[str, Value], Constants]:
    """How positions are stretched: keys, or for Llama 3 the factor of each frequency as a tensor."""
    kind, name = facts.get("rope_type") or "default", arch.arch
    local = facts["rope_parameters"][arch.local] if facts.get(LOCAL) else {}
    if local and (
        local.get("rope_type", "default") != "default"
        or ("rope.freq_base_swa" not in arch.keys and local["rope_theta"] != facts["rope_theta"])
    ):
        raise UnsupportedError(f"llama.cpp has no such rope for layers with a window of {name}: {show(dict(local))}")
    if kind == "default" or "rope.freq_base" not in arch.keys:
        return {}, {}
    if kind == "linear":
        return {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(facts["factor"])}, {}
    if kind == "dynamic" and facts.get("alpha"):  # HunYuan: it does not change with the context
        dims = _head(facts)
        theta = float(facts["rope_theta"]) * float(facts["alpha"]) ** (dims / (dims - 2))
        return {f"{name}.rope.freq_base": theta}, {}
    if kind == "yarn":
        return {f"{name}.rope.scaling.{key}": value for key, value in _yarn(facts, arch).items()}, {}
    if kind in ("longrope", "su") and arch.arch == "phi3":
        return _longrope(facts)
    if kind == "llama3":
        factors = llama3_factors(facts, float(facts["rope_theta"]), _head(facts))
        return {}, {FREQUENCIES: factors}
    raise UnsupportedError(
        f"rope of type {show(kind)} is not written to GGUF for a model of the architecture {name}; default, linear, "
        "llama3 and yarn are, and longrope for phi3"
    )


def _yarn(facts: Mapping[str, Any], arch: Arch) -> dict[str, Value]:
    """llama.cpp multiplies `attn_factor` with the factor of attention that follows from the stretching.

    It rounds the ends of the range between turned and stretched; gpt-oss, which it runs so, was trained without.
    """
    betas = (facts.get("beta_fast") or 32, facts.get("beta_slow") or 1)
    if (
        betas != (32, 1)
        or (facts.get("truncate") is False and arch.arch != "gpt-oss")
        or (facts.get("mscale") and facts.get("mscale_all_dim") and not _cancels(facts, arch))
    ):
        raise UnsupportedError(
            "rope of type yarn with a beta_fast that is not 32, a beta_slow that is not 1, mscale_all_dim or without "
            "truncation is not written to GGUF: llama.cpp would compute something else"
        )
    trained = int(facts["original_max_position_embeddings"])
    factor = float(facts.get("factor") or facts["max_position_embeddings"] / trained)
    found: dict[str, Value] = {"type": "yarn", "factor": factor, "original_context_length": trained}
    if _cancels(facts, arch):
        found["yarn_log_multiplier"] = arch.stretch * float(facts["mscale_all_dim"])
    if facts.get("attention_factor"):
        found["attn_factor"] = float(facts["attention_factor"]) / (0.1 * log(factor) + 1 if factor > 1 else 1.0)
    return found


def _cancels(facts: Mapping[str, Any], arch: Arch) -> bool:
    """Whether angles are not multiplied, as llama.cpp has it for DeepSeek and Ministral."""
    return bool(arch.stretch and facts.get("mscale")) and facts["mscale"] == facts.get("mscale_all_dim")


def _longrope(facts: Mapping[str, Any]) -> tuple[dict[str, Value], Constants]:
    """Phi 3: factors for short and for long contexts; llama.cpp chooses by the size of its context."""
    trained = int(facts["original_max_position_embeddings"])
    scale = float(facts.get("factor") or facts["max_position_embeddings"] / trained)
    factor = facts.get("attention_factor") or (sqrt(1 + log(scale) / log(trained)) if scale > 1 else 1.0)
    keys: dict[str, Value] = {"phi3.rope.scaling.original_context_length": trained}
    keys["phi3.rope.scaling.attn_factor"] = float(factor)
    named = {LONG: "long_factor", SHORT: "short_factor"}
    return keys, {name: facts[key] for name, key in named.items()}
