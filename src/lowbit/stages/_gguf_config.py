"""What the header of a GGUF file tells of `config.json`: numbers under the names of transformers, and its rope."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import log, pi, prod
from typing import Any

from lowbit.errors import UnsupportedError
from lowbit.formats._gguf import Arch
from lowbit.stages._gguf import Gguf

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
UNTOLD = "untold"  # type of a rope whose factors no type of transformers gives
_TYPES = {"none": None, "linear": "linear", "yarn": "yarn"}
_LARGEST = 3e38  # of float32, about
_CLOSE = 1e-4  # relative: factors are float32


def config_of(header: Gguf, arch: Arch) -> dict[str, Any]:
    """`config.json`, as far as the header tells it; what it does not tell is what llama.cpp takes.

    Raises:
        CheckpointError: factors of rope that are damaged.
    """
    told = {key: header.value(f"{arch.arch}.{key}") for key in arch.keys}
    lists = {key for keys in arch.layers.values() for key in keys if isinstance(told.get(key), list)}
    told |= {key: max(told[key], default=0) for key in lists}
    facts = {arch.keys[key][0]: _short(value) for key, value in told.items() if value is not None}
    ahead = header.value(f"{arch.arch}.nextn_predict_layers")
    if isinstance(ahead, int) and isinstance(facts.get("num_hidden_layers"), int):
        facts |= {
            "num_hidden_layers": facts["num_hidden_layers"] - ahead,
            "num_nextn_predict_layers": ahead,
        }
    kind = arch.sparse_type if told.get("expert_count") else arch.model_types[0]
    facts = {"model_type": kind, "architectures": [arch.classes[kind]], **arch.implied, **facts}
    facts["tie_word_embeddings"] = "output.weight" not in header.tensors
    facts |= {key: f"blk.0.{tensor}" in header.tensors for key, tensor in arch.biases.items()}
    embedding = header.tensors.get("token_embd.weight")
    facts |= {"vocab_size": embedding.shape[0]} if embedding and embedding.shape else {}
    for name in ("bos", "eos", "padding"):
        facts[f"{name.removesuffix('ding')}_token_id"] = header.value(f"tokenizer.ggml.{name}_token_id")
    try:
        rope = _rope(header, arch, facts) if "rope.freq_base" in arch.keys else {}
        return facts | _heads(header, arch, facts) | rope | _layers(header, arch, facts) | _factors(header, arch, facts)
    except (TypeError, ValueError, ArithmeticError, LookupError):  # it can be inspected
        return facts | {"rope_scaling": {"rope_type": UNTOLD}}


def _factors(header: Gguf, arch: Arch, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The first factor of a product, where the header has the others under keys of their own."""
    found = {}
    for key, (first, *others) in arch.products.items():
        if first not in facts and all(facts.get(name) for name in others):
            found[first] = int(header.value(f"{arch.arch}.{key}", 0)) // prod(facts[name] for name in others)
    return found


def _layers(header: Gguf, arch: Arch, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What layers are, where the configuration's default would be another; a header may claim any number of them."""
    if not arch.layers:
        return {}
    count, rest = min(facts["num_hidden_layers"], len(header.tensors)), next(k for k, v in arch.layers.items() if not v)
    marks = {kind: _marks(header, arch, keys[0], count) for kind, keys in arch.layers.items() if keys}
    return {arch.kinds: [next((kind for kind in marks if marks[kind][i]), rest) for i in range(count)]}


def _marks(header: Gguf, arch: Arch, key: str, count: int) -> list[Any]:
    """Of each layer what a key says; what it says of none is so in all but every so manieth, as llama.cpp takes it."""
    value = header.value(f"{arch.arch}.{key}", arch.every)
    if isinstance(value, list):
        return [*value, *[0] * count]
    return [value] * count if key in arch.keys else [(layer + 1) % value for layer in range(count)]


def _short(value: Any) -> Any:
    """A float32 with no more digits than tell it from the others, as people write them."""
    if not isinstance(value, float) or not abs(value) < _LARGEST or _single(value) != value:
        return value
    return next(short for digits in range(6, 18) if _single(short := float(f"{value:.{digits}g}")) == value)


def _single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def require_told(config: Mapping[str, Any], where: object) -> None:
    """Raise `UnsupportedError` where a file rotates in a way that `config.json` has no words for."""
    if (config.get("rope_scaling") or {}).get("rope_type") == UNTOLD:
        raise UnsupportedError(
            f"{where} does not tell its heads and its rope in numbers that a model of transformers has; put the "
            "original's config.json beside it"
        )


def _heads(header: Gguf, arch: Arch, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and width of heads where the configuration's defaults would be others."""
    heads, name = facts.get("num_attention_heads") or facts.get("n_head"), arch.arch
    if not isinstance(heads, int) or "num_attention_heads" not in facts:
        return {}
    found: dict[str, Any] = {} if "num_key_value_heads" in facts else {"num_key_value_heads": heads}
    if "attention.kv_lora_rank" in arch.keys:
        turned, whole = (
            int(header.value(f"{name}.{key}")) for key in ("rope.dimension_count", "attention.key_length_mla")
        )
        split = {"qk_rope_head_dim": turned, "qk_nope_head_dim": whole - turned}
        return {"num_key_value_heads": heads, "q_lora_rank": facts.get("q_lora_rank") or None, **split}
    width, size = int(facts["hidden_size"]), header.value(f"{name}.attention.key_length")
    if size and size * heads != width:
        found["head_dim"] = int(size)
    size = size or width // heads
    turned = header.value(f"{name}.rope.dimension_count")
    if turned and turned != size:
        found[arch.rotary] = turned / size
    if arch.largest:
        found["query_pre_attn_scalar"] = width // heads if facts["num_hidden_layers"] == arch.largest else size
    return found


def _rope(header: Gguf, arch: Arch, facts: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, in the words that every version of transformers reads."""
    name = arch.arch
    theta = _short(float(header.value(f"{name}.rope.freq_base", 10000.0)))
    found: dict[str, Any] = {arch.keys["rope.freq_base"][0]: theta}
    scaling = _scaling(header, arch, facts, theta)
    if scaling.get("rope_type") == "longrope":  # Phi 3's own code looks for it at the top
        found["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    inside = {name: told[:3] if isinstance(told, list) else told for name in arch.in_rope if (told := facts.get(name))}
    if inside:
        scaling = {"rope_type": "default", **scaling, **inside}
    if arch.local and "rope.freq_base_swa" not in arch.keys:
        plain = {"rope_type": "default", "rope_theta": theta}
        found["rope_parameters"] = {"full_attention": {**plain, **scaling}, arch.local: plain}
    return found | ({"rope_scaling": scaling} if scaling else {})


def _scaling(header: Gguf, arch: Arch, facts: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """How positions are stretched; empty where they are not."""
    name = arch.arch
    if FREQUENCIES in header.tensors:
        return _llama3(header.floats(FREQUENCIES), theta)
    if LONG in header.tensors and SHORT in header.tensors:
        return _longrope(header, name, facts)
    factor = header.value(f"{name}.rope.scaling.factor") or header.value(f"{name}.rope.scale_linear") or 0.0
    kind = _TYPES.get(header.value(f"{name}.rope.scaling.type", "linear"), UNTOLD)
    if kind is None or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    scaling = {"rope_type": kind, "factor": float(factor)}
    return scaling | (_yarn(header, arch, facts, factor) if kind == "yarn" else {})


def _yarn(header: Gguf, arch: Arch, facts: Mapping[str, Any], factor: float) -> dict[str, Any]:
    name = arch.arch
    told = {key: header.value(f"{name}.rope.scaling.{key}") for key in
            ("original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor",
             "yarn_log_multiplier")}  # fmt: skip
    stretched = told["yarn_log_multiplier"] if arch.stretch else None
    if (told["yarn_log_multiplier"] and not stretched) or told["yarn_ext_factor"] not in (None, 1.0):
        return {"rope_type": UNTOLD}
    found: dict[str, Any] = {
        "original_max_position_embeddings": int(told["original_context_length"] or facts["max_position_embeddings"])
    }
    if told["attn_factor"] not in (None, 1.0):
        found["attention_factor"] = float(told["attn_factor"]) * (0.1 * log(factor) + 1 if factor > 1 else 1)
    if stretched:
        found["mscale"] = found["mscale_all_dim"] = _short(_single(float(stretched) / arch.stretch))
    if name == "gpt-oss":
        found["truncate"] = False
    names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    return found | {ours: float(told[key]) for ours, key in names.items() if told[key]}


def _longrope(header: Gguf, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Phi 3's."""
    longest = int(facts["max_position_embeddings"])
    trained = int(header.value(f"{name}.rope.scaling.original_context_length", longest))
    return {"rope_type": "longrope", "long_factor": list(header.floats(LONG)),
               "short_factor": list(header.floats(SHORT)), "original_max_position_embeddings": trained,
               "attention_factor": float(header.value(f"{name}.rope.scaling.attn_factor", 1.0))}  # fmt: skip


def llama3_factors(scaling: Mapping[str, Any], theta: float, dims: int) -> list[float]:
    """By how much each frequency is divided (transformers' `_compute_llama3_parameters`)."""
    low, high, factor = (float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    trained, found = float(scaling["original_max_position_embeddings"]), []
    for dim in range(0, dims, 2):
        turns = trained / (2 * pi * theta ** (dim / dims))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return found


def _llama3(factors: Sequence[float], theta: float) -> dict[str, Any]:
    """The numbers of llama3 that give these factors; between its two ends the share of each frequency is a line.

    Only two of its three lengths can be told from factors: the lower end is taken to be 1, as in every model known.
    """
    factor, dims = max(factors), 2 * len(factors)
    rates = [1 / (2 * pi * theta ** (dim / dims)) for dim in range(0, dims, 2)]
    shares = [(1 / each - 1 / factor) / (1 - 1 / factor) if factor > 1 else 0.0 for each in factors]
    between = [(rate, share) for rate, share in zip(rates, shares, strict=True) if 1e-5 < share < 1 - 1e-5]
    if not between:
        return {"rope_type": UNTOLD}
    (first, top), (last, bottom) = between[0], between[-1]
    slope = (top - bottom) / (first - last) if len(between) > 1 else (top + 1 / 3) / first
    offset = slope * first - top
    if slope <= 0 or offset <= 0:
        return {"rope_type": UNTOLD}
    trained = slope / offset  # share = (trained * rate - 1) / (high - 1)
    scaling = {
        "rope_type": "llama3",
        "factor": round(factor, 5),
        "low_freq_factor": 1.0,
        "high_freq_factor": round(1 + 1 / offset, 3),
        "original_max_position_embeddings": round(trained),
    }
    again = llama3_factors(scaling, theta, dims)
    same = all(abs(one - other) <= _CLOSE * other for one, other in zip(again, factors, strict=True))
    return scaling if same else {"rope_type": UNTOLD}
