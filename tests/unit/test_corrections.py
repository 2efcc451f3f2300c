"""Low-rank corrections against the optimum by brute force: singular values in the whitened space, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lowbit import plugins
from lowbit.corrections import Correction, Term
from lowbit.corrections._lowrank import ranks
from lowbit.errors import UsageError

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 16), (16, 1)]


def problem(rows: int, cols: int, samples: int = 400) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """An error matrix, correlated inputs with outliers, and their statistics."""
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    x = torch.randn(samples, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    x[:, 0] *= 30
    error = 0.01 * torch.randn(rows, cols, generator=generator)
    return error, x, {"second_moment": x.T @ x / samples, "mean_abs": x.abs().mean(0)}


def fit(name: str, error: Tensor, stats: Mapping[str, Tensor], rank: int, dtype: str = "f32") -> tuple[Tensor, Tensor]:
    correction: Correction = plugins.load("corrections", name)
    term = correction.fit(error, stats, correction.options(rank=rank, dtype=dtype))
    assert term.down.shape == (rank, error.shape[1])
    assert term.up.shape == (error.shape[0], rank)
    return term.down, term.up


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    whitening: Tensor = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return whitening


def loss(error: Tensor, terms: tuple[Tensor, Tensor], whitening: Tensor) -> float:
    return float(((error - terms[1] @ terms[0]).double() @ whitening).norm() ** 2)


def least(error: Tensor, whitening: Tensor, rank: int) -> float:
    """Eckart and Young: the squares of the singular values that are cut."""
    return float((torch.linalg.svdvals(error.double() @ whitening)[rank:] ** 2).sum())


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_eora_is_the_optimum_at_the_output(rows: int, cols: int, rank: int) -> None:
    error, _, stats = problem(rows, cols)
    rank = min(rank, rows, cols)
    whitening = root(stats["second_moment"])
    found = loss(error, fit("eora", error, stats, rank), whitening)
    none = float((error.double() @ whitening).norm() ** 2)
    assert found == pytest.approx(least(error, whitening, rank), rel=1e-4, abs=1e-8 * none)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_lqer_is_the_optimum_of_scaled_channels(rows: int, cols: int) -> None:
    error, _, stats = problem(rows, cols)
    rank, whitening = min(3, rows, cols), torch.diag(stats["mean_abs"].double())
    found = loss(error, fit("lqer", error, stats, rank), whitening)
    none = float((error.double() @ whitening).norm() ** 2)
    assert found == pytest.approx(least(error, whitening, rank), rel=1e-4, abs=1e-8 * none)


def test_eora_beats_lqer_beats_plain_at_the_output() -> None:
    error, x, stats = problem(48, 64)
    plain = stats | {"mean_abs": torch.zeros(64)}  # no scales: the error's own singular vectors
    left, values, right = torch.linalg.svd(error.double(), full_matrices=False)
    svd = ((values[:8, None] * right[:8]).float(), left[:, :8].float())
    terms = {"eora": fit("eora", error, stats, 8), "lqer": fit("lqer", error, stats, 8), "svd": svd}
    lost = {name: float((x @ (error - up @ down).T).norm()) for name, (down, up) in terms.items()}
    assert lost["eora"] < lost["lqer"] < lost["svd"]
    down, up = fit("lqer", error, plain, 8)
    torch.testing.assert_close(up @ down, svd[1] @ svd[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["eora", "lqer"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_terms_are_exact_in_their_dtype_and_lose_little(name: str, dtype: str) -> None:
    error, _, stats = problem(40, 56)
    error = error * 1e-4  # float16 would make subnormals of factors that nobody balanced
    storage = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    down, up = fit(name, error, stats, 6, dtype)
    for part in (down, up):
        assert part.dtype == torch.float32
        assert torch.equal(part, part.to(storage).float())
    whitening = root(stats["second_moment"]) if name == "eora" else torch.diag(stats["mean_abs"].double())
    assert loss(error, (down, up), whitening) < 1.001 * least(error, whitening, 6)


def test_a_moment_without_full_rank_is_no_special_case() -> None:
    error, x, _ = problem(20, 32)
    x = x[:10].clone()
    x[:, 5] = 0
    moment = x.T @ x / 10
    whitening = root(moment)
    down, up = fit("eora", error, {"second_moment": moment}, 4)
    assert down.isfinite().all() and up.isfinite().all()
    none = float((error.double() @ whitening).norm() ** 2)
    assert loss(error, (down, up), whitening) == pytest.approx(least(error, whitening, 4), rel=1e-3, abs=1e-7 * none)
    dead = fit("eora", error, {"second_moment": torch.zeros(32, 32)}, 4)
    assert loss(error, dead, torch.eye(32).double()) == pytest.approx(least(error, torch.eye(32).double(), 4), rel=1e-4)


@pytest.mark.parametrize(("rows", "cols"), SHAPES[:2])
def test_an_error_of_which_no_square_is_finite_is_no_special_case(rows: int, cols: int) -> None:
    error, _, stats = problem(rows, cols)
    down, up = fit("eora", error, stats, 4)
    for large, wanted in zip(fit("eora", error * 2.0**80, stats, 4), (down, up), strict=True):
        torch.testing.assert_close(large / 2.0**40, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["eora", "lqer"])
def test_no_error_needs_no_term(name: str) -> None:
    _, _, stats = problem(8, 12)
    down, up = fit(name, torch.zeros(8, 12), stats, 2, "bf16")
    assert not (up @ down).any()


def test_a_rank_beyond_the_weight_is_the_weights() -> None:
    error, _, stats = problem(6, 9)
    correction: Correction = plugins.load("corrections", "eora")
    term = correction.fit(error, stats, correction.options(rank=64, dtype="f32"))
    assert term.down.shape == (6, 9)
    torch.testing.assert_close(term.up @ term.down, error, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank 0"),
        ({"dtype": "int4"}, "int4"),
        ({"budget": 0.0}, "budget 0"),
        ({"budget": float("nan")}, "budget nan"),
        ({"rank": 8, "budget": 0.25}, "both"),
    ],
)
def test_options_are_checked(options: dict[str, object], text: str) -> None:
    with pytest.raises((ValueError, UsageError), match=text):
        plugins.load("corrections", "lqer").options(**options)


def fitted(name: str, rows: int, cols: int, rank: int, dtype: str = "f32") -> tuple[Tensor, Tensor, Term]:
    """An error, the root of its norm, and a term of it."""
    error, _, stats = problem(rows, cols)
    correction: Correction = plugins.load("corrections", name)
    norm = root(stats["second_moment"]) if name == "eora" else torch.diag(stats["mean_abs"].double())
    return error, norm, correction.fit(error, stats, correction.options(rank=rank, dtype=dtype))


@pytest.mark.parametrize("name", ["eora", "lqer"])
def test_gains_are_what_ranks_take_from_the_loss_and_the_first_ranks_are_the_best(name: str) -> None:
    error, norm, term = fitted(name, 24, 40, 12, "bf16")
    none = least(error, norm, 0)
    assert term.nbytes == 2 * (24 + 40)
    for rank in (0, 1, 5, 12):
        first = term.first(rank)
        lost = loss(error, (first.down, first.up), norm)
        assert lost == pytest.approx(least(error, norm, rank), rel=1e-3, abs=1e-6 * none)
        assert none - float(first.gains.sum()) == pytest.approx(lost, rel=1e-3, abs=1e-6 * none)


def by_hand(errors: Mapping[str, tuple[Tensor, Tensor]], budget: int, itemsize: int) -> float:
    """Least loss over every choice of ranks for three weights within the budget, by singular values."""
    one, two, three = (
        [(rank * itemsize * sum(error.shape), least(error, norm, rank)) for rank in range(min(error.shape) + 1)]
        for error, norm in errors.values()
    )
    return min(x[1] + y[1] + z[1] for x in one for y in two for z in three if x[0] + y[0] + z[0] <= budget)


@pytest.mark.parametrize("budget", [0, 127, 128, 1000, 2500])
def test_ranks_by_budget_are_the_best_of_all(budget: int) -> None:
    """Where a rank of each costs the same, greed is exact."""
    found = {f"{rows}": fitted("eora", rows, cols, 12) for rows, cols in ((12, 20), (20, 12), (16, 16))}
    chosen = ranks({name: term for name, (*_, term) in found.items()}, budget)
    assert sum(chosen[name] * term.nbytes for name, (*_, term) in found.items()) <= budget
    lost = sum(least(error, norm, chosen[name]) for name, (error, norm, _) in found.items())
    errors = {name: (error, norm) for name, (error, norm, _) in found.items()}
    assert lost == pytest.approx(by_hand(errors, budget, 4), rel=1e-5)


def bare(gains: list[float], nbytes: int) -> Term:
    return Term(torch.zeros(len(gains), 3), torch.zeros(2, len(gains)), torch.tensor(gains), nbytes)


def test_a_rank_that_does_not_fit_leaves_room_for_cheaper_ones() -> None:
    terms = {"wide": bare([100.0, 90.0], 60), "thin": bare([1.0, 0.5, 0.0], 10)}
    assert ranks(terms, 85) == {"wide": 1, "thin": 2}
    assert ranks(terms, 20) == {"wide": 0, "thin": 2}
    assert ranks(terms, 1000) == {"wide": 2, "thin": 2}  # a rank that takes nothing is not bought


def test_a_budget_is_bits_per_weight() -> None:
    options = plugins.load("corrections", "eora").options(budget=0.25)
    assert options.even(4096, 4096) == 32  # 32 * 16 * 8192 bits for 4096 * 4096 weights
    assert options.most(4096, 4096) == 128
    assert (options.even(32, 32), options.most(32, 32)) == (0, 1)
    assert plugins.load("corrections", "eora").options(budget=0.25, dtype="f32").even(4096, 4096) == 16


def test_svdquant_takes_the_largest_part_of_the_weight() -> None:
    weight, _, _ = problem(24, 40)
    down, up = fit("svdquant", weight, {}, 5)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close((up @ down).double(), left[:, :5] * values[:5] @ right[:5], atol=1e-7, rtol=1e-4)
