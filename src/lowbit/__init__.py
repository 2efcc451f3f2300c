"""lowbit: model checkpoints in fewer bits, verified, measured, and in the format that your runtime loads.

    import lowbit

    report = lowbit.quantize("llama", "llama-w4", scheme="int4-g128", evaluate="wiki.txt")

Names are imported when they are first used, so that `import lowbit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.api import convert, make_plan, quantize
    from lowbit.errors import LowbitError
    from lowbit.runtime.model import load
    from lowbit.schemes import Scheme, parse
    from lowbit.stages.checkpoint import open_checkpoint
    from lowbit.stages.evaluate import evaluate
    from lowbit.tensors import QTensor

__version__ = "0.1.0"

_HOMES = {
    "LowbitError": "errors",
    "QTensor": "tensors",
    "Scheme": "schemes",
    "convert": "api",
    "evaluate": "stages.evaluate",
    "load": "runtime.model",
    "make_plan": "api",
    "open_checkpoint": "stages.checkpoint",
    "parse": "schemes",
    "quantize": "api",
}

__all__ = [
    "LowbitError",
    "QTensor",
    "Scheme",
    "convert",
    "evaluate",
    "load",
    "make_plan",
    "open_checkpoint",
    "parse",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    return getattr(import_module(f"lowbit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """What a notebook offers after `lowbit.`: names that were not used yet, and none that are imported here."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
