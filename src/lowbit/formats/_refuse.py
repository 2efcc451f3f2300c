"""What a format says of steps that it does not do: of writing, where its layout is only read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from lowbit.errors import UnsupportedError


def never(sentence: str) -> Callable[..., NoReturn]:
    """A function for any field of a `Format` that raises `UnsupportedError` with this sentence."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise UnsupportedError(sentence)

    return refuse
