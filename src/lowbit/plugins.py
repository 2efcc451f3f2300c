"""Plug-ins are files: the name of the file is the name of the method, format, metric or statistic.

A plug-in folder is a package; `methods/gptq.py` is the method `gptq` and defines `METHOD`. Listing a folder
imports nothing, loading imports one file. Names starting with an underscore are helpers, not plug-ins.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lowbit.errors import UnsupportedError

_ATTRIBUTE = {
    "methods": "METHOD", "formats": "FORMAT", "metrics": "METRIC", "stats": "STATISTIC", "transforms": "TRANSFORM",
    "corrections": "CORRECTION",
}  # fmt: skip

READ_ONLY = frozenset({"mxfp4", "quanto", "torchao"})  # formats that are read and never written
# Formats whose tensors no method makes yet: `convert` keeps what is in them.
CONVERTED = frozenset({"aqlm", "spqr", "vptq"})


def written() -> list[str]:
    """Names of the formats that are written too, sorted."""
    return [name for name in names("formats") if name not in READ_ONLY]


def names(folder: str) -> list[str]:
    """Names of the plug-ins in one folder (`methods`, `formats`, ...), sorted."""
    files = (Path(__file__).parent / folder).glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def load(folder: str, name: str) -> Any:
    """The record that the plug-in file defines; `-` in a name stands for `_`.

    Raises:
        UnsupportedError: no such file in the folder; the text lists those there are, of formats those that are written.
    """
    return getattr(_module(folder, name), _ATTRIBUTE[folder])


@cache  # asked for every weight, and listing a folder takes longer than the rest; what failed is asked again
def _module(folder: str, name: str) -> ModuleType:
    stem = name.replace("-", "_")
    if stem not in names(folder):
        known = written() if folder == "formats" else names(folder)
        raise UnsupportedError(f"no {folder[:-1]} is called {name!r}; there are: {', '.join(known)}")
    return import_module(f"lowbit.{folder}.{stem}")
