"""Who made a checkpoint, and how, as far as its files tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowbit.stages._directory import GGUF
from lowbit.stages._gguf import read_gguf
from lowbit.stages._weightfile import read_json
from lowbit.stages.checkpoint import Checkpoint

_PLAN = "lowbit-plan.json"
_TELLING = ("version", "quantizer", "producer")
_LONGEST = 120


def made_by(checkpoint: Checkpoint) -> dict[str, str]:
    """Tool, or field that names one, to version or detail: metadata of the files, `config.json`, recipes left beside.

    Raises:
        CheckpointError: one of these files is damaged.
    """
    found = dict(_metadata(checkpoint.shards[0]))
    if isinstance(checkpoint.config.get("transformers_version"), str):
        found["transformers"] = checkpoint.config["transformers_version"]
    found |= dict(_telling(declared(checkpoint) or {}))
    names = {extra.name for extra in checkpoint.extras}
    if "recipe.yaml" in names:
        found["recipe"] = "recipe.yaml, as llm-compressor leaves it"
    if _PLAN in names:
        found["plan"] = _PLAN
    return found


def declared(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The `quantization_config` of `config.json`, at its top or in the part for the text model."""
    text = checkpoint.config.get("text_config")
    places = (checkpoint.config, text if isinstance(text, Mapping) else {})
    return next((place["quantization_config"] for place in places if place.get("quantization_config")), None)


def methods(checkpoint: Checkpoint) -> dict[str, str]:
    """Weight to the method that made it, from the plan that lowbit leaves beside its results.

    Raises:
        CheckpointError: the plan is damaged.
    """
    plans = [extra for extra in checkpoint.extras if extra.name == _PLAN]
    rows = read_json(plans[0]).get("tensors") if plans else None
    pairs = [(row.get("name"), row.get("method")) for row in rows or [] if isinstance(row, Mapping)]
    return {name: method for name, method in pairs if isinstance(name, str) and isinstance(method, str)}


def _metadata(file: Path) -> Iterator[tuple[str, str]]:
    """Short texts in the header of a file; `format` of safetensors says only which framework's names are used."""
    if file.suffix == GGUF:
        header = read_gguf(file)
        for key in ("general.name", "general.quantized_by"):
            value = header.value(key)
            if isinstance(value, str) and len(value) <= _LONGEST:
                yield key.removeprefix("general."), value
    if file.suffix != ".safetensors":
        return
    with safe_open(file, framework="pt") as opened:
        for key, value in (opened.metadata() or {}).items():
            if key != "format" and len(value) <= _LONGEST:
                yield key, value


def _telling(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields of a quantization config, one level down, that name a tool."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key == "meta":
            yield from _telling(value)
        elif any(word in key for word in _TELLING) and isinstance(value, str | int | float | list):
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
