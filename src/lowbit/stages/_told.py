"""What `config.json` tells in full: transformers' configurations, whose import takes seconds, are then not asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, final

from lowbit.stages._model import open_config
from lowbit.stages.checkpoint import Checkpoint, arch_rows

_FACTORS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
}  # fmt: skip
_NEEDED = _SIZES | {"model_type", "rms_norm_eps", "hidden_act", "eos_token_id"}
_ROPE = {"rope_parameters", "rope_scaling", "rope_theta"}
# What changes nothing of what a model computes, and what does not where it is false.
_HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype",
    "initializer_range", "is_llama_config", "pad_token_id", "quantization", "quantization_config", "torch_dtype",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
_OFF = ("rope_interleaved", "use_mrope")


@final
@dataclass(frozen=True)
class Kind:
    """A row of `arch/told.toml`, which says what each means."""

    model_types: Sequence[str]
    needs: Sequence[str] = ()
    may: Sequence[str] = ()
    biased: Mapping[str, Sequence[str]] = field(default_factory=dict)
    normed: bool = False
    unless: str = ""


@final
class Told(SimpleNamespace):
    """A configuration with the names of transformers', and with what it works out."""

    def get_text_config(self) -> Told:
        """Itself: these models read nothing else."""
        return self

    def standardize_rope_params(self) -> None:
        """They are as transformers' functions, which call this, want them."""


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    Config = PreTrainedConfig | Told
else:  # the run-time check of annotations needs a name, and importing this costs a second
    Config = object


def open_facts(checkpoint: Checkpoint) -> Config:
    """The configuration of a checkpoint: as it is told, or as transformers completes it; raises as `open_config`."""
    return told_config(checkpoint.config) or open_config(checkpoint)


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """The row of a model's type; None where there is none."""
    rows = (Kind(**row) for row in arch_rows("told"))
    return next((row for row in rows if config.get("model_type") in row.model_types), None)


def told_config(config: Mapping[str, Any]) -> Told | None:
    """The configuration, where it leaves nothing to transformers; else None."""
    kind, rope = kind_of(config), told_rope(config)
    if kind is None or rope is None or not _in_full(config, kind):
        return None
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    if hidden % heads or not (size is None or is_size(size)) or not _one_kind(config, kind):
        return None
    seen = {} if "sliding_window" in kind.needs else {"sliding_window": None}
    turns = {"rope_parameters": rope, "rope_scaling": rope, "rope_theta": rope["rope_theta"]}  # as 5 and as 4 call them
    return Told(**{**config, **seen, **turns, "head_dim": size or hidden // heads})


def _in_full(config: Mapping[str, Any], kind: Kind) -> bool:
    """Whether all is there that is needed, and nothing else that may matter."""
    needed = _NEEDED | set(kind.needs)
    known = needed | _ROPE | _HARMLESS | {*kind.may, kind.unless, "tie_word_embeddings"}
    known |= {key for key in _OFF if config.get(key) is False}
    sizes = all(is_size(config.get(name)) for name in _SIZES) and is_real(config.get("rms_norm_eps"))
    ends = config.get("eos_token_id")
    rest = isinstance(config.get("hidden_act"), str) and all(
        each is None or type(each) is int for each in (ends if isinstance(ends, list) else [ends])
    )
    return sizes and rest and needed <= set(config) <= known


def _one_kind(config: Mapping[str, Any], kind: Kind) -> bool:
    """Whether all layers see the same: everything, or a window where the type has one."""
    window, layers = config.get("sliding_window"), config.get("layer_types")
    if kind.unless:
        alike = isinstance(layers, list) and {*map(str, layers)} == {"full_attention"}
        return not config.get(kind.unless) and (
            layers is None or (alike and len(layers) == config["num_hidden_layers"])
        )
    return window is None or is_size(window)


def told_rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters of a rope that is told in full, as it is or with the factors of Llama 3; else None.

    They are together in `rope_parameters`, or `rope_theta` is apart and the rest, if any, in `rope_scaling`.
    """
    rope, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if rope is None and isinstance(scaling or {}, Mapping):
        rope = {"rope_type": "default", **(scaling or {}), "rope_theta": config.get("rope_theta")}
    elif not isinstance(rope, dict) or scaling is not None or "rope_theta" in config:
        return None
    kind = rope.get("rope_type")
    wanted = {"rope_theta"} | (_FACTORS if kind == "llama3" else set())
    known = kind in ("default", "llama3") and set(rope) == wanted | {"rope_type"}
    return rope if known and all(is_real(rope[name]) for name in wanted) else None


def is_size(value: object) -> bool:
    """Whether this can be a size; transformers refuses others in its own words."""
    return type(value) is int and value > 0


def is_real(value: object) -> bool:
    """Whether this is a number above zero."""
    return type(value) in (int, float) and 0 < value < inf  # type: ignore[operator]
