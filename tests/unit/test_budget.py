"""Sizes, the memory estimate, and the watch."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit import budget
from lowbit.errors import ResourceError, UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 * 2**30), ("500MB", 500 * 10**6), ("1.5G", 3 * 2**29), ("17", 17), ("2 kib", 2048), ("0B", 0)],
)
def test_sizes(text: str, count: int) -> None:
    assert budget.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4XB", "1e9", "4 GiB of it"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        budget.parse_size(text)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (5 * 2**40, "5 TiB")])
def test_format_size(count: int, text: str) -> None:
    assert budget.format_size(count) == text


def ways(limit: int | None) -> budget.Estimate:
    return budget.plan_memory(limit=limit, threads=4, element_bytes=8.0, buffers=2**30, fixed=2**20)


def test_the_estimate_gives_up_speed_before_it_refuses() -> None:
    free = ways(None)
    assert (free.threads, free.scratch) == (4, False)
    base = free.base
    one = ways(base + 2**30 + 2**26)
    assert (one.threads, one.scratch) == (1, False)
    mapped = ways(base + 2**28)
    assert mapped.scratch and mapped.total <= base + 2**28
    least = ways(base + 2**24)
    assert least.piece < free.piece and least.total <= base + 2**24
    with pytest.raises(ResourceError, match="at least"):
        ways(base)


def test_the_watch_sees_anonymous_memory_and_stops_the_run() -> None:
    watch = budget.MemoryWatch(budget.anonymous_bytes() + 2**25)
    with watch.running():
        watch.check()
        block = np.ones(2**26, dtype=np.uint8)
        import time

        time.sleep(0.1)
    assert block.all() and watch.peak > 2**26
    with pytest.raises(ResourceError, match="over --ram"):
        watch.check()
