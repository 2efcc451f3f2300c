"""Which method made each weight, as far as lowbit left word: its plan, or what a conversion noted of its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.stages._weightfile import read_json
from lowbit.stages.checkpoint import Checkpoint

PLAN, CONVERSION = "lowbit-plan.json", "lowbit-conversion.json"


def methods(checkpoint: Checkpoint) -> dict[str, str]:
    """Weight to the method that made its codes; of a converted one, the method of the checkpoint it came from.

    Raises:
        CheckpointError: the plan, or the note of a conversion, is damaged.
    """
    plan = _beside(checkpoint, PLAN)
    rows = plan.get("tensors") if plan else None
    pairs = [(row.get("name"), row.get("method")) for row in rows or [] if isinstance(row, Mapping)]
    noted = _beside(checkpoint, CONVERSION).get("methods")
    known = noted if isinstance(noted, Mapping) else {}
    found = {name: method for name, method in pairs if isinstance(name, str) and isinstance(method, str)}
    return {name: _converted(method, known.get(name)) for name, method in found.items()}


def _converted(method: str, before: object) -> str:
    """`carry` is no method: the one before is, if it is known. What was rounded again is so said."""
    before = before if isinstance(before, str) else "an unknown method"
    steps = {"carry": before, "round": f"{before}, rounded again", "dequantize": f"{before}, dequantized"}
    return steps.get(method, method)


def conversion_note(source: Checkpoint) -> bytes:
    """What a converted checkpoint keeps of its source: where it was, its format, and what made each weight."""
    document = {"path": str(source.path), "format": source.format, "methods": methods(source)}
    return json.dumps({"lowbit_conversion": 1, **document}, indent=1).encode() + b"\n"


def converted_from(checkpoint: Checkpoint) -> str | None:
    """Path and format of the checkpoint that this one was converted from; None where it was not, or nothing is known.

    Raises:
        CheckpointError: the note of the conversion is damaged.
    """
    note = _beside(checkpoint, CONVERSION)
    path, form = note.get("path"), note.get("format")
    return f"{form or 'float'} in {path}" if isinstance(path, str) else None


def _beside(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    files: list[Path] = [extra for extra in checkpoint.extras if extra == checkpoint.root / name]
    return read_json(files[0]) if files else {}
