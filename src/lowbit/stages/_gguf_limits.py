"""What llama.cpp can do with a model of an architecture: what a configuration says beyond it is refused.

A file either computes the function of the model in llama.cpp or is not written. The facts are in `arch/gguf.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats._gguf import Arch, arch_of, layer_of, shapes_of
from lowbit.stages._directory import GGUF
from lowbit.stages._gguf_facts import facts_of
from lowbit.stages._gguf_tokenizer import cuts_of, tokenizer_of
from lowbit.stages._records import Count
from lowbit.stages._weightfile import show
from lowbit.stages.checkpoint import Checkpoint, swapped

Shape = tuple[int, ...]
_KIND: Final = "otherwise in llama.cpp"  # of what is said, in the report


def limits(source: Checkpoint, form: str | None) -> tuple[Count, ...]:
    """What of a model llama.cpp computes in another way only now and then: it is said, and the file is written."""
    arch = arch_of(source.config)
    if form != "gguf" or arch is None or source.shards[0].suffix == GGUF:
        return ()
    try:
        cuts = [Count(_KIND, text, count) for text, count in cuts_of(tokenizer_of(source))]
        return (*_window(source, arch), *cuts)
    except (CheckpointError, UnsupportedError):
        return ()  # it is refused before anything is written


def _window(source: Checkpoint, arch: Arch) -> tuple[Count, ...]:
    """Layers with a window that llama.cpp knows nothing of, and texts that are longer than it."""
    if source.config.get("model_type") not in arch.boundless:
        return ()
    facts = facts_of(source, arch)
    size, layers = facts.get("sliding_window"), int(facts["num_hidden_layers"])
    kinds = facts.get("layer_types") or ["sliding_attention"] * layers
    count = sum(kind == "sliding_attention" for kind in kinds)
    if not size or not count or size >= facts["max_position_embeddings"]:
        return ()
    text = (
        f"sliding_window is {size}, and llama.cpp has no window in a model of the architecture {arch.arch}: texts of "
        f"up to {size} tokens are computed alike, longer ones in another way"
    )
    return (Count(_KIND, text, count),)


def require_computed(path: Path, arch: Arch, facts: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` where llama.cpp would compute something else than what the configuration says."""
    for key, wanted in _wanted(arch, facts).items():
        value = facts.get(key)
        if value is not None and value not in wanted:
            raise UnsupportedError(
                f"{path} says {key} is {show(value)}; llama.cpp computes a model of the architecture {arch.arch} as if "
                f"it were {wanted[0]!r}"
            )
    for key in arch.needs:
        if facts.get(key) is None:
            raise UnsupportedError(
                f"{path} says {key} is null; llama.cpp computes a model of the architecture {arch.arch} with one"
            )
    if len({facts[name] for name in arch.equal}) > 1:
        raise UnsupportedError(
            f"{path} has different {' and '.join(arch.equal)}; llama.cpp takes them to be the same for a model of the "
            f"architecture {arch.arch}"
        )
    _require_ranks(path, arch, facts)


def _wanted(arch: Arch, facts: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """What names in config.json must say, where they say anything."""
    found: dict[str, Sequence[Any]] = dict(arch.requires)
    if "rope.freq_base" in arch.keys and not arch.partial:
        found["partial_rotary_factor"] = (1.0,)
    for key, step in arch.rhythm.items():
        found[key] = ([int((layer + 1) % step > 0) for layer in range(facts["num_hidden_layers"])],)
    heads = facts.get("num_attention_heads")
    mean = int(facts["hidden_size"]) // int(heads) if heads else 0
    if heads and not {"attention.key_length"} & {*arch.keys, *arch.sums}:
        found["head_dim"] = (mean,)  # all heads together are as wide as the model
    if arch.largest:
        found["query_pre_attn_scalar"] = (mean if facts["num_hidden_layers"] == arch.largest else facts["head_dim"],)
    return found


def _require_ranks(path: Path, arch: Arch, facts: Mapping[str, Any]) -> None:
    """llama.cpp tells by the number of layers whether queries have a rank, in some models."""
    sizes = tuple(facts.get(name) for name in ("num_hidden_layers", "vocab_size"))
    if facts.get("q_lora_rank") and any(sizes[: len(each)] == each for each in arch.ranks):
        raise UnsupportedError(
            f"{path} says q_lora_rank is {show(facts['q_lora_rank'])}; llama.cpp takes a model of the architecture "
            f"{arch.arch} with {sizes[0]} layers to have none"
        )


def require_shapes(
    path: Path, arch: Arch, facts: Mapping[str, Any], values: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> None:
    """Raise `CheckpointError` where tensors are not as the keys say, by which llama.cpp loads them.

    Args:
        values: the keys of the file.
        shapes: of its tensors, by name.
    """
    numbers = _numbers(arch, values)
    layers, told = 1 + max(map(layer_of, shapes), default=-1), numbers.get("block_count")
    if told != layers:
        raise CheckpointError(
            f"{path}: {_said(arch, facts, ['block_count'])}, and there are weights of {layers} layers"
        )
    for name, shape in shapes.items():
        axes = shapes_of(name)
        wanted = [_product(axis, numbers) for axis in axes]
        wrong = [axis for axis, one, size in zip(axes, wanted, shape, strict=False) if one not in (None, size)]
        if wrong or (axes and len(axes) != len(shape)):
            keys = dict.fromkeys(key for axis in wrong or axes for key in axis)
            raise CheckpointError(
                f"{path}: where {_said(arch, facts, keys)}, llama.cpp takes {name} to be "
                f"{show([one or size for one, size in zip(wanted, shape, strict=False)])} in a model of the "
                f"architecture {arch.arch}, and it is {show(list(shape))}"
            )


def contradiction(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The first weight of another size than `config.json` gives its rows or columns, and what is to be said of all.

    Only sizes that stand there are looked at; those that are left to transformers, or are worked out, are not.
    """
    arch, config = arch_of(checkpoint.config), checkpoint.config
    if arch is None:
        return None
    wrong = dict[str, tuple[str, Shape]]()
    for name, weight in checkpoint.weights.items():
        place = None if weight.swapped or swapped(config, weight) else arch.place(name)
        axes = shapes_of(place.name) if place and place.expert is None else []
        for (key, *more), size in zip(axes, weight.shape, strict=False):
            told = next((n for n in arch.keys.get(key, ()) if config.get(n) is not None), None)
            if told and not more and key not in arch.rows and type(config[told]) is int and config[told] != size:
                wrong[name] = told, weight.shape
    if not wrong:
        return None
    name, (told, shape) = next(iter(wrong.items()))
    said = f"config.json says {told} is {show(config[told])}, and the shape is {show(list(shape))}"
    return name, f"{said}; {len(wrong)} weights are not of the sizes that it says"


def _numbers(arch: Arch, values: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers by key, but for those of which each layer has its own, and the width of heads for llama.cpp."""
    start = f"{arch.arch}."
    found = {key.removeprefix(start): value for key, value in values.items() if type(value) is int}
    if found.get("attention.head_count"):
        width = found["embedding_length"] // found["attention.head_count"]
        found = {"attention.key_length": width, "attention.value_length": width} | found
    latent = found.get("attention.value_length_mla")
    return found | ({"attention.value_length": latent} if latent else {})


def _product(axis: Sequence[str], numbers: Mapping[str, int]) -> int | None:
    return prod(numbers[key] for key in axis) if all(key in numbers for key in axis) else None


def _said(arch: Arch, facts: Mapping[str, Any], keys: Iterable[str]) -> str:
    """What of the configuration says these keys, in its words."""
    width = ["embedding_length", "attention.head_count"]
    wanted = [name for key in keys for name in ([key] if key in arch.keys else width)]
    names = [next((n for n in arch.keys.get(key, ()) if facts.get(n) is not None), key) for key in wanted]
    told = {name: facts[name] for name in names if name in facts}
    return " and ".join(f"{name} is {show(value)}" for name, value in told.items()) or "config.json says nothing else"
