"""Python's search for garbage, off for a while."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused(freeze: bool = False) -> Iterator[None]:
    """For parts that make very many objects none of which is garbage: the search would go through them again and again.

    `freeze`: it will never again look at what there is when they end, which is for a process of our own alone.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if before:
            gc.enable()
