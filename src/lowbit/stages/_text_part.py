"""The model that reads, of one that sees or hears too, as a checkpoint: llama.cpp has it in a file of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from lowbit.formats._gguf import arch_of
from lowbit.stages._directory import GGUF
from lowbit.stages._model import open_config
from lowbit.stages._weightfile import WeightFile
from lowbit.stages.checkpoint import Checkpoint, arch_rows, is_ahead

T = TypeVar("T")
_INSIDE = re.compile(r"(language_model\.model|model\.language_model)\.|language_model\.(?=lm_head\.)")
_READS = re.compile(r"model\.(layers|embed_tokens|norm)\.|lm_head\.")
_TOP = (
    "dtype",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # said for the whole model, where at all


def text_part(source: Checkpoint, form: str | None) -> Checkpoint:
    """A view of what reads, under the names and with the configuration of a model of its own; others as they are.

    `form`: the format that it is for. Only files of llama.cpp have the parts of a model apart.

    Raises:
        CheckpointError: `transformers` cannot use the configuration.
    """
    source = _parameters(source) if form == "gguf" else source
    sees = form == "gguf" and any(
        isinstance(source.config.get(part), Mapping) for part in ("text_config", "vision_config")
    )
    config = open_config(source).get_text_config().to_dict() if sees else {}
    arch = arch_of(config)
    if arch is None:
        return source
    sight = source.config.get("vision_config") or {}
    config |= {"deepstack_layers": len(sight.get("deepstack_visual_indexes") or ())}
    config |= {key: source.config[key] for key in _TOP if source.config.get(key) is not None}
    if config["model_type"] in arch.parts:
        config = {**arch.implied, **config, "model_type": arch.model_types[0]}
    config["architectures"] = [arch.classes[config["model_type"]]]
    whole = {file: _file(file) for file in set(source.files.values())}
    return replace(
        source,
        config=config,
        specs=_renamed(source.specs),
        weights={name: replace(weight, name=name) for name, weight in _renamed(source.weights).items()},
        files={name: whole[file] for name, file in _renamed(source.files).items()},
        edits=_renamed(source.edits),
        view=replace(
            source.view,
            was=_renamed(source.view.was),
            left=frozenset(name for name in source.weights if _name(name) is None),
        ),
    )


def _parameters(source: Checkpoint) -> Checkpoint:
    """Without masks and frequencies that old checkpoints store, which no program reads, and layers after the last."""
    written = source.shards[0].suffix == GGUF  # its header tells of all layers
    later = (name for name in source.weights if is_ahead(source.config, name))
    ahead = frozenset() if written else frozenset(later)
    names = [
        name
        for name in source.weights
        if name not in ahead and not any(re.search(row["pattern"], name) for row in arch_rows("gguf", "computed"))
    ]
    if len(names) == len(source.weights):
        return source
    kept = {piece for name in names for piece in source.pieces(name)}
    return replace(
        source,
        specs={name: spec for name, spec in source.specs.items() if name in kept},
        weights={name: source.weights[name] for name in names},
        files={name: file for name, file in source.files.items() if name in kept},
        view=replace(source.view, ahead=ahead),
    )


def _file(file: WeightFile) -> WeightFile:
    tied = {alias: _name(name) or name for alias, name in _renamed(file.tied).items()}
    return replace(file, slots=_renamed(file.slots), values=_renamed(file.values), tied=tied)


def _renamed(values: Mapping[str, T]) -> dict[str, T]:
    """Of what reads, by the names that it has in a model of its own."""
    return {new: value for name, value in values.items() if (new := _name(name))}


def _name(name: str) -> str | None:
    inside = _INSIDE.match(name)
    own = ("model." if inside and inside[1] else "") + name[inside.end() :] if inside else name
    return own if _READS.match(own) else None
