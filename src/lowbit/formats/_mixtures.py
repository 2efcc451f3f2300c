"""llama.cpp's mixtures: which block type each tensor gets under a name as `q4_k_m`.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp. They go by the role of a tensor, by
how many of that role came before it, layer by layer, and by whether there is an importance matrix (without which
llama.cpp writes no `q2_k_s`, and none from `iq1_s` to `iq3_xs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lowbit.errors import UnsupportedError
from lowbit.formats import Weight
from lowbit.formats._ggml import BLOCKS
from lowbit.formats._gguf import Arch, arch_of, archs

FLOATS = ("f32", "f16", "bf16")
# Name to `general.file_type` and the type of what no rule names.
MIXTURES: Mapping[str, tuple[int, str]] = {
    "f32": (0, "f32"), "f16": (1, "f16"), "bf16": (32, "bf16"),
    "q4_0": (2, "q4_0"), "q4_1": (3, "q4_1"), "q5_0": (8, "q5_0"), "q5_1": (9, "q5_1"), "q8_0": (7, "q8_0"),
    "q2_k": (10, "q2_k"), "q2_k_s": (21, "q2_k"),
    "q3_k_s": (11, "q3_k"), "q3_k_m": (12, "q3_k"), "q3_k_l": (13, "q3_k"),
    "q4_k_s": (14, "q4_k"), "q4_k_m": (15, "q4_k"), "q5_k_s": (16, "q5_k"), "q5_k_m": (17, "q5_k"),
    "q6_k": (18, "q6_k"),
    "iq1_s": (24, "iq1_s"), "iq1_m": (31, "iq1_m"), "iq2_xxs": (19, "iq2_xxs"), "iq2_xs": (20, "iq2_xs"),
    "iq2_s": (28, "iq2_xs"), "iq2_m": (29, "iq2_s"), "iq3_xxs": (23, "iq3_xxs"), "iq3_xs": (22, "iq3_s"),
    "iq3_s": (26, "iq3_s"), "iq3_m": (27, "iq3_s"),
    "iq4_nl": (25, "iq4_nl"), "iq4_xs": (30, "iq4_xs"), "tq1_0": (36, "tq1_0"), "tq2_0": (37, "tq2_0"),
    "nvfp4": (39, "nvfp4"),
}  # fmt: skip
_FALLBACK = {
    "q2_k": "q4_0", "q3_k": "q4_0", "tq1_0": "q4_0", "tq2_0": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1",
    "q6_k": "q8_0", "nvfp4": "q8_0",
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
}  # fmt: skip
_KV = "attention.head_count_kv"
_NEVER = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types")
# Mixtures under which attention's output gets more where a model has eight experts.
_FEW = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "iq4_xs", "q4_k_s", "q4_k_m", "iq3_xs", "iq3_xxs", "iq3_s", "iq3_m")
# Mixtures of about two bits, which have rules of their own; those of them with more for what is sensitive.
_TWO = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
_TWO_MORE = ("iq2_s", "iq2_m")


@final
@dataclass(frozen=True)
class _Model:
    """What the rules ask of a model."""

    layers: int
    grouped: int
    experts: int
    large: bool
    has_output: bool
    important: bool
    falcon: bool


def require_arch(config: Mapping[str, Any]) -> Arch:
    """The row of the table for a model.

    Raises:
        UnsupportedError: there is none; the text has those there are.
    """
    arch = arch_of(config)
    if arch is None:
        known = ", ".join(sorted({kind for row in archs() for kind in row.model_types}))
        raise UnsupportedError(f"gguf is written for models of type {known}, not {config.get('model_type')!r}")
    return arch


def place_of(arch: Arch, weight: Weight) -> str:
    """Name of a weight's tensor in the file.

    Raises:
        UnsupportedError: llama.cpp has none.
    """
    place = arch.place(weight.name)
    if place is None:
        raise UnsupportedError(f"llama.cpp has no tensor for {weight.name} in a model of the architecture {arch.arch}")
    return place.name


def float_only(weight: Weight, stored: str) -> bool:
    """Whether a tensor stays float32 under any mixture."""
    stem = stored.split(".")[-2]
    return len(weight.shape) != 2 or not stored.endswith("weight") or stem.endswith("_norm") or stem in _NEVER


def choose(
    name: str, weights: Sequence[Weight], config: Mapping[str, Any], important: bool = False
) -> dict[str, tuple[str, str]]:
    """Name of the scheme (or of a float type) for each weight, and why.

    Args:
        name: of a mixture, or of a block type, which then all matrices get.
        weights: those that are stored, `[outputs, inputs]`.
        important: whether they are quantized with an importance matrix.

    Raises:
        UnsupportedError: another name, or a model that `arch/gguf.toml` does not have.
    """
    if name not in MIXTURES and name not in BLOCKS:
        raise UnsupportedError(
            f"gguf has no scheme {name!r}; there are: {', '.join(dict.fromkeys([*MIXTURES, *BLOCKS]))}"
        )
    arch = require_arch(config)
    stored = {weight.name: place_of(arch, weight) for weight in weights}
    model = _model(arch, config, set(stored.values()), important)
    seen: dict[str, list[str]] = {}
    matrices = [weight for weight in weights if not float_only(weight, stored[weight.name])]  # these alone are counted
    for weight in sorted(matrices, key=lambda weight: order(stored[weight.name])):
        role, places = stored[weight.name].split(".")[-2], seen
        role = "attn_v" if role == "attn_qkv" else role
        if stored[weight.name] not in places.setdefault(role, []):
            places[role].append(stored[weight.name])
    found = {}
    for weight in weights:
        place = stored[weight.name]
        role = place.split(".")[-2]
        role = "attn_v" if role == "attn_qkv" else role
        if float_only(weight, place):
            found[weight.name] = "f32", f"{name}: stays float32"
        else:
            by_layer = model.experts > 1 and role.startswith("ffn")
            layer = order(place)[0] if by_layer else seen[role].index(place)
            wanted = _wanted(name, role, layer, len(seen[role]), model, weight.shape[1])
            found[weight.name] = _fitting(name, wanted, weight.shape[1])
    return found


def order(stored: str) -> tuple[int, str]:
    """llama.cpp's order of tensors: what is in no layer first, then by layer; by name within."""
    parts = stored.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1), stored


def _model(arch: Arch, config: Mapping[str, Any], stored: set[str], important: bool) -> _Model:
    layers, heads = (_number(config, *arch.keys.get(key, ())) for key in ("block_count", "attention.head_count"))
    layers = layers or 1 + max(order(name)[0] for name in stored)
    shared = arch.constants.get(_KV) or _number(config, *arch.keys.get(_KV, ()))
    attends = "blk.0.attn_k.weight" in stored or not any(_KV in keys for keys in arch.layers.values())
    grouped = heads // max(shared or heads, 1) if attends else 0  # llama.cpp asks the first layer
    large = config.get("model_type") in ("llama", "mistral") and layers == 80 and grouped > 1
    experts = _number(config, *arch.keys.get("expert_count", ()))
    falcon = config.get("model_type") == "falcon"
    return _Model(layers, grouped, experts, large, "output.weight" in stored, important, falcon)


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that the configuration has as a whole number; 0 where it has none."""
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)


def _wanted(name: str, role: str, number: int, count: int, model: _Model, cols: int) -> str:
    """The type that the rules name, before it is known to fit the rows."""
    base = MIXTURES[name][1] if name in MIXTURES else name
    if base in FLOATS or name not in MIXTURES:
        return base
    if role == "output" or (role == "token_embd" and not model.has_output):
        if base in ("q8_0", "nvfp4") or cols % BLOCKS[base].weights or model.falcon:
            return "q8_0"
        return "q5_k" if name in _TWO or name == "iq3_xxs" else "q6_k"
    if role == "token_embd":
        if name in _TWO or name == "iq3_xxs":
            return "iq3_s" if name in (*_TWO_MORE, "iq3_xxs") else "q2_k"
        return {"tq1_0": "q4_k", "tq2_0": "q4_k", "nvfp4": "q8_0"}.get(name, base)
    if name in _TWO:
        return _two_bits(name, base, role, number, model)
    if role == "attn_v":
        return _values(name, base, number, count, model)
    if role == "attn_k" and model.experts == 8:
        return "q8_0"
    if role in ("attn_q", "attn_k") and name in ("iq3_xs", "iq3_xxs"):
        return "iq3_xxs" if name == "iq3_xs" else "iq2_s"
    if role.startswith(("ffn_gate", "ffn_up")) and name == "iq3_xs":
        return "iq3_xxs" if model.layers // 8 <= number < 7 * model.layers // 8 else base
    if role == "attn_output":
        if model.falcon:
            return "q4_k" if name == "q3_k_l" else base
        more = {"iq3_xxs": "iq3_s", "iq3_m": "q4_k", "q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(name, base)
        return more if model.experts != 8 else "q5_k" if name in _FEW else base
    return _down(name, base, number, model) if role.startswith("ffn_down") else base


def _two_bits(name: str, base: str, role: str, number: int, model: _Model) -> str:
    more = "iq3_s" if name in _TWO_MORE else "q2_k"
    if role == "attn_v":
        return "q4_k" if model.grouped >= 4 or model.experts >= 4 else more
    if role == "attn_k" and model.experts == 8:
        return "q4_k"
    if role.startswith("ffn_down"):
        return more if number < model.layers // 8 else base
    if role != "attn_output":
        return base
    if model.experts == 8:
        return "q5_k"
    return {"iq1_s": "iq2_xxs", "iq1_m": "iq2_xxs", "iq2_s": "iq3_s", "iq2_m": "iq3_s"}.get(name, base)


def _values(name: str, base: str, number: int, count: int, model: _Model) -> str:
    if model.experts == 8:
        return "q8_0"
    grouped = model.grouped >= 4
    found = {
        "q2_k": "q4_k" if grouped else "q3_k",
        "q2_k_s": "q4_k" if grouped else base,
        "iq3_xxs": "q4_k" if grouped else base,
        "iq3_xs": "q4_k" if grouped else base,
        "iq3_s": "q4_k" if grouped else base,
        "iq3_m": "q4_k",
        "q3_k_m": "q5_k" if number < 2 else "q4_k",
        "q3_k_l": "q5_k",
        "iq4_nl": "q5_k" if grouped else base,
        "iq4_xs": "q5_k" if grouped else base,
        "q4_k_m": "q6_k" if _more(number, count) else base,
        "q5_k_m": "q6_k" if _more(number, count) else base,
        "q4_k_s": "q5_k" if number < 4 else base,
    }.get(name, base)
    return "q5_k" if model.large and found in ("q3_k", "q4_k") else found


def _down(name: str, base: str, number: int, model: _Model) -> str:
    layers, first, important = model.layers, number < model.layers // 8, model.important
    if model.falcon and name in ("q3_k_m", "q3_k_l", "q4_k_m", "q4_k_s"):
        return _falcons_down(name, base, number, layers)
    return {
        "iq3_m": "q4_k" if first or (model.experts == 8 and _more(number, layers)) else base,
        "q2_k": "q3_k",
        "q2_k_s": "q4_k" if first else base,
        "q3_k_m": "q5_k" if number < layers // 16 else "q4_k",
        "q3_k_l": "q5_k",
        "q4_k_m": "q6_k" if _more(number, layers) else base,
        "q5_k_m": "q6_k" if _more(number, layers) else base,
        "iq4_nl": "q5_k" if first and not important else base,
        "iq4_xs": "q5_k" if first and not important else base,
        "q4_k_s": "q5_k" if first else base,
        "q4_0": "q4_1" if first and important else base,
        "q5_0": "q5_1" if first and important else base,
    }.get(name, base)


def _falcons_down(name: str, base: str, number: int, layers: int) -> str:
    more = _more(number, layers)
    return {
        "q3_k_m": "q5_k" if number < layers // 16 else "q4_k" if more else base,
        "q3_k_l": "q4_k",
        "q4_k_m": "q6_k" if number < layers // 16 else "q5_k" if more else base,
    }.get(name, base)


def _more(number: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2


def _fitting(name: str, wanted: str, cols: int) -> tuple[str, str]:
    """The wanted type, or what llama.cpp takes where its blocks do not divide the rows."""
    kind = BLOCKS.get(wanted)
    if kind is None or cols % kind.weights == 0:
        return wanted, name
    other = _FALLBACK.get(wanted, "f16")
    other = other if other == "f16" or cols % BLOCKS[other].weights == 0 else "f16"
    return other, f"{name}: {other} for {wanted}, whose blocks of {kind.weights} do not divide rows of {cols}"
