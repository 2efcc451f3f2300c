"""Who made a checkpoint, and how, as far as its files tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowbit.schemes import Scheme
from lowbit.stages._directory import GGUF
from lowbit.stages._gguf import read_gguf
from lowbit.stages._history import PLAN, converted_from
from lowbit.stages._weightfile import read_json
from lowbit.stages.checkpoint import Checkpoint

_ZEROS = {
    "gptq": "; qzeros hold the zero point less 1, also where it is always the middle",
    "gptq_v2": "; qzeros hold the zero point, also where it is always the middle",
    "mlx": "; biases hold what is added",
}
_TELLING = ("version", "quantizer", "producer")
# How a method was run, where a config says so (GPTQModel's meta, AutoRound).
_RUN = ("damp_percent", "iters", "nsamples", "seqlen", "dataset")
_GGUF = (
    "general.name", "general.quantized_by", "quantize.imatrix.file", "quantize.imatrix.dataset",
    "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count",
)  # fmt: skip
_LONGEST = 120
_LONGEST_RECIPE = 100_000


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
        found["recipe"] = _recipe(checkpoint)
    if PLAN in names:
        found["plan"] = PLAN
    origin = converted_from(checkpoint)
    return found | ({"converted from": origin} if origin else {}) | dict(_report(checkpoint))


def _recipe(checkpoint: Checkpoint) -> str:
    """The modifiers that llm-compressor's recipe names, in order; it is read as text."""
    path = next(extra for extra in checkpoint.extras if extra.name == "recipe.yaml")
    with path.open(encoding="utf-8", errors="replace") as file:
        names = dict.fromkeys(re.findall(r"^\s*-?\s*(\w+)Modifier:", file.read(_LONGEST_RECIPE), re.MULTILINE))
    return f"recipe.yaml, as llm-compressor leaves it{': ' if names else ''}{', '.join(names)}"


def _report(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """From the report that lowbit leaves: what it was made from, when, and what was learned from."""
    paths = [extra for extra in checkpoint.extras if extra == checkpoint.root / "report.json"]
    report = read_json(paths[0]) if paths else {}
    if "lowbit_report" not in report:
        return
    source, learned = report.get("source"), report.get("calibration")
    if isinstance(source, Mapping) and isinstance(source.get("path"), str):
        yield "made from", source["path"]
    if isinstance(report.get("created"), str):
        yield "made", report["created"]
    if isinstance(learned, Mapping) and isinstance(learned.get("sha256"), str):
        yield (
            "calibrated on",
            f"{learned.get('samples')} windows of {learned.get('length')} tokens, {learned['sha256'][:12]}",
        )


def declared(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The `quantization_config` of `config.json`, at its top or in the part for the text model."""
    text = checkpoint.config.get("text_config")
    places = (checkpoint.config, text if isinstance(text, Mapping) else {})
    return next((place["quantization_config"] for place in places if place.get("quantization_config")), None)


def convention(form: str | None, scheme: Scheme) -> str:
    """How zero points are meant, and where a format stores them in a way of its own, how."""
    text = {
        "none": "no zero points: level * scale",
        "int": "whole zero points: (code - zero) * scale",
        "float": "float zero points: (code - zero) * scale",
        "min": "minima: code * scale - minimum",
        "quantized": "zero points quantized as the scales are: (code - zero) * scale",
    }[scheme.zero]
    return text + _ZEROS.get(form or "", "")


def _metadata(file: Path) -> Iterator[tuple[str, str]]:
    """Short texts in the header of a file; `format` of safetensors says only which framework's names are used."""
    if file.suffix == GGUF:
        header = read_gguf(file)
        for key in _GGUF:
            value = header.value(key)
            if isinstance(value, str | int) and len(str(value)) <= _LONGEST:
                yield key.removeprefix("general.").removeprefix("quantize."), str(value)
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
        elif (any(word in key for word in _TELLING) or key in _RUN) and isinstance(value, str | int | float | list):
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
