"""What the public functions have in common: arguments of another type than they take are refused in one sentence.

Without this a wrong argument is found somewhere below, by whatever it breaks there, or by nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, wraps
from inspect import Signature, signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from reprlib import repr as shortened
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from lowbit.errors import UsageError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_TAKEN: Mapping[Any, type] = {int: Integral, float: Real, Path: PathLike}  # NumPy's numbers, every kind of path


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function as users call it, which refuses arguments that its annotations do not allow.

    Numbers are made in float32 in it, whatever type the caller's own are made in by default.

    Raises:
        UsageError: an argument is of another type.
    """

    @wraps(function)
    def checked(*args: _P.args, **given: _P.kwargs) -> _R:
        takes, hints = _declared(function)
        for name, value in takes.bind(*args, **given).arguments.items():
            if not _fits(value, hints.get(name, Any)):
                raise UsageError(f"{name} is {shortened(value)}; it must be {_words(hints[name])}")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return function(*args, **given)
        finally:
            torch.set_default_dtype(before)

    return checked


@cache
def _declared(function: Callable[..., Any]) -> tuple[Signature, dict[str, Any]]:
    """When it is first called: annotations may name what is not there yet as the module is read."""
    return signature(function), get_type_hints(function)


def at_least_one(**counts: int | None) -> None:
    """Raise UsageError for a count that is below 1; None is none."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}; it must be at least 1")


def several(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Strings that were given as one, or as several."""
    return (given,) if isinstance(given, str) else tuple(given or ())


def pairs(name: str, given: str | Sequence[str] | Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Pairs that were given as a mapping, or as `LEFT=RIGHT`, once or several times.

    Raises:
        UsageError: a string is no such pair.
    """
    if isinstance(given, Mapping):
        return tuple(given.items())
    found = []
    for each in several(given):
        left, _, right = each.rpartition("=")
        if not left or not right:
            raise UsageError(f"{name} has {each!r}; write REGEX=SCHEME, or a mapping of these")
        found.append((left, right))
    return tuple(found)


def _fits(value: object, hint: Any) -> bool:
    """Whether an annotation allows a value; what it says of arguments of calls is not looked at."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in parts)
    if hint is Any or isinstance(hint, str | TypeVar):
        return True
    if not isinstance(value, _TAKEN.get(hint, kind or hint)):
        return False
    if isinstance(value, Mapping) and len(parts) == 2:
        return all(_fits(key, parts[0]) and _fits(each, parts[1]) for key, each in value.items())
    return not (isinstance(value, Collection) and len(parts) == 1) or all(_fits(each, parts[0]) for each in value)


def _words(hint: Any) -> str:
    """An annotation as it is written, without the modules of its names."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(each) for each in get_args(hint))
    inside = ", ".join(map(_words, get_args(hint)))
    name = "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
    return f"{name}[{inside}]" if inside else name
