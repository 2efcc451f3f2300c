"""Memory that many passes of one kind take and give back: kept by the process, where the C library can be asked to.

glibc gives freed memory back to the system in small steps, and the system hands out pages that have to be cleared and
are in no cache. Where every pass frees as much as the next one takes, that costs up to a fifth of the time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM, _PAD, _MAP = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of malloc.h
MAPPED = 1 << 25  # bytes from which memory is mapped, and so given back at once: glibc allows no more


def give_back() -> None:
    """Give freed memory back to the system, before much is taken in pieces that do not fit into it."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


@contextmanager
def kept_pages() -> Iterator[None]:
    """While it is entered, freed memory is kept for what comes next, except of large tensors; then it is given back.

    What was freed before, by threads that had heaps of their own, is given back first: it would not be taken again.
    """
    library = _library()
    if library is None:
        yield
        return
    library.malloc_trim(0)
    for parameter, size in ((_MAP, MAPPED), (_TRIM, 1 << 30), (_PAD, 1 << 26)):
        library.mallopt(parameter, size)
    try:
        yield
    finally:
        library.mallopt(_TRIM, 2 * MAPPED)  # what glibc itself comes to when memory of that size is freed
        library.mallopt(_PAD, 1 << 17)
        library.malloc_trim(0)
