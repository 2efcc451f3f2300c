"""Every file of `stats/`, found by listing, against `lowbit.stats.Statistic` and its slow definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lowbit import plugins
from lowbit.stats import State, Statistic

Array = NDArray[np.float64]
NAMES = plugins.names("stats")
SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


def percentiles(x: Array, y: Array) -> Array:
    """The smallest value with at least that share of the values at or below it."""
    ordered = np.sort(np.abs(x), axis=0)
    return np.stack([ordered[max(int(np.ceil(share * len(x))), 1) - 1] for share in SHARES], axis=1)


# What a statistic is of rows `x`, and of the float model's rows `y`. A new file: define it here by its slowest formula.
DEFINITIONS: dict[str, Callable[[Array, Array], Array]] = {
    "absmax": lambda x, y: np.array([max(abs(v) for v in column) for column in x.T]),
    "mean_abs": lambda x, y: np.array([sum(abs(v) for v in column) / len(x) for column in x.T]),
    "mean_square": lambda x, y: np.array([sum(v * v for v in column) / len(x) for column in x.T]),
    "second_moment": lambda x, y: np.mean([np.outer(row, row) for row in x], axis=0),
    "cross_moment": lambda x, y: np.mean([np.outer(b - a, a) for a, b in zip(x, y, strict=True)], axis=0),
    "percentiles": percentiles,
    "rows": lambda x, y: x,  # all of them, while they are no more than it keeps
}
# Relative to the value, or to the largest one where values cancel.
TOLERANCE = {"percentiles": 1 / 32, "second_moment": 1e-5, "cross_moment": 1e-5, "absmax": 0.0, "rows": 0.0}
# Whether any order of the same chunks gives the same bits; the others only within their tolerance.
ANY_ORDER = {"absmax", "percentiles"}
each = pytest.mark.parametrize("name", NAMES)


def record(name: str) -> Statistic:
    statistic: Statistic = plugins.load("stats", name)
    return statistic


def inputs(rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated rows with some large and some empty channels, and the same as the float model has them."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=dice) @ torch.randn(cols, cols, generator=dice)
    x = x * torch.logspace(-3, 2, cols) + 0.1
    x[:, 1 % cols] = 0
    y = x + 0.01 * torch.randn(rows, cols, generator=dice)
    return x.to(dtype), y.to(dtype)


def feed(statistic: Statistic, x: Tensor, y: Tensor, sizes: list[int] | None = None, seed: int = 0) -> State:
    state = statistic.start(x.shape[1], seed)
    for rows, floats in zip(torch.split(x, sizes or len(x)), torch.split(y, sizes or len(y)), strict=True):
        statistic.update(state, rows, floats if statistic.paired else None)
    return state


def value(name: str, x: Tensor, y: Tensor, sizes: list[int] | None = None, seed: int = 0) -> Tensor:
    return record(name).finish(feed(record(name), x, y, sizes, seed))


def defined(name: str, x: Tensor, y: Tensor) -> Array:
    if name not in DEFINITIONS:
        pytest.fail(f"the statistic {name} has no definition; write it into DEFINITIONS, as slow as it is plain")
    return DEFINITIONS[name](x.double().numpy(), y.double().numpy())


def assert_close(name: str, found: Tensor, expected: Array) -> None:
    tolerance = TOLERANCE.get(name, 1e-6)
    base = np.abs(expected) if name not in ("second_moment", "cross_moment") else np.abs(expected).max()
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (np.abs(found.double().numpy() - expected) <= tolerance * base + 1e-12).all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (37, 3), (500, 30), (1000, 2)])
def test_a_statistic_is_what_its_definition_says(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, y = inputs(*shape, dtype)
    before = x.clone(), y.clone()
    sizes = [shape[0] // 3, 0, shape[0] - shape[0] // 3]
    assert_close(name, value(name, x, y, sizes), defined(name, x, y))
    assert torch.equal(before[0], x) and torch.equal(before[1], y)


@each
def test_chunks_and_threads_do_not_change_the_result(name: str) -> None:
    x, y = inputs(900, 24, torch.bfloat16)
    whole, product, threads = value(name, x, y), x.float().T @ y.float(), torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again, same = value(name, x, y), torch.equal(product, x.float().T @ y.float())
    finally:
        torch.set_num_threads(threads)
    assert_close(name, again, defined(name, x, y))
    # on some processors torch splits long sums among threads; docs/memory-and-resume.md
    assert torch.equal(whole, again) or (name.endswith("_moment") and not same)
    for sizes in ([1, 899], [100] * 9, [300, 17, 583]):
        cut = value(name, x, y, sizes)
        assert_close(name, cut, defined(name, x, y))
        assert name not in ANY_ORDER | {"rows"} or torch.equal(cut, whole)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(1))
    if name != "rows":
        turned = value(name, x[order], y[order])
        assert_close(name, turned, defined(name, x, y))
        assert name not in ANY_ORDER or torch.equal(turned, whole)


@each
def test_no_rows_give_a_finite_value(name: str) -> None:
    nothing = torch.zeros(0, 7)
    for found in (record(name).finish(record(name).start(7, 0)), value(name, nothing, nothing)):
        assert found.isfinite().all() and (found == 0).all() and 7 in found.shape


@each
def test_states_are_tensors_that_can_be_saved_and_go_on(name: str) -> None:
    """A run that was killed goes on from what was written, bit for bit."""
    x, y = inputs(2500, 6)
    state = feed(record(name), x[:1500], y[:1500])
    assert all(isinstance(key, str) and isinstance(part, Tensor) for key, part in state.items())
    saved = {key: part.clone() for key, part in state.items()}
    for kept in (state, saved):
        record(name).update(kept, x[1500:], y[1500:] if record(name).paired else None)
    one, other = record(name).finish(state), record(name).finish(saved)
    assert torch.equal(one, other)


@each
@pytest.mark.parametrize("shape", [(4000, 64), (300, 1100), (20, 3000)])
def test_memory_stays_within_its_estimate(name: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        value(name, x, x, [shape[0] // 2, shape[0] - shape[0] // 2])
    assert 0 < peak_bytes(recorded) <= record(name).nbytes(shape[1])


def peak_bytes(recorded: Any) -> int:
    """Most bytes that torch's CPU allocator held at once."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@each
def test_a_statistic_describes_itself(name: str) -> None:
    statistic = record(name)
    assert statistic.about and "\n" not in statistic.about
    assert 0 < statistic.nbytes(8) <= statistic.nbytes(4096) < statistic.nbytes(32768)
