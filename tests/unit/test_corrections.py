"""Low-rank corrections against the optimum by brute force: singular values in the whitened space, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lowbit import plugins
from lowbit.corrections import Correction
from lowbit.corrections._lowrank import Spectrum, ranks
from lowbit.corrections.eora import spectrum as eora_spectrum
from lowbit.corrections.lqer import spectrum as lqer_spectrum
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
    down, up = correction.fit(error, stats, correction.options(rank=rank, dtype=dtype))
    assert down.shape == (rank, error.shape[1])
    assert up.shape == (error.shape[0], rank)
    return down, up


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


@pytest.mark.parametrize("name", ["eora", "lqer"])
def test_no_error_needs_no_term(name: str) -> None:
    _, _, stats = problem(8, 12)
    down, up = fit(name, torch.zeros(8, 12), stats, 2, "bf16")
    assert not (up @ down).any()


def test_a_rank_beyond_the_weight_is_the_weights() -> None:
    error, _, stats = problem(6, 9)
    correction: Correction = plugins.load("corrections", "eora")
    down, up = correction.fit(error, stats, correction.options(rank=64, dtype="f32"))
    assert down.shape == (6, 9)
    torch.testing.assert_close(up @ down, error, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("options", "text"), [({"rank": 0}, "rank 0"), ({"dtype": "int4"}, "int4")])
def test_options_are_checked(options: dict[str, object], text: str) -> None:
    with pytest.raises((ValueError, UsageError), match=text):
        plugins.load("corrections", "lqer").options(**options)


def by_hand(spectra: Mapping[str, Spectrum], budget: int) -> float:
    """Least loss over every choice of two ranks within the budget."""
    (_, one), (_, two) = spectra.items()
    choices = [
        float(one.energies[i:].sum() + two.energies[j:].sum())
        for i in range(len(one.energies) + 1)
        for j in range(len(two.energies) + 1)
        if i * one.nbytes + j * two.nbytes <= budget
    ]
    return min(choices)


def test_ranks_by_budget_are_the_best_where_ranks_cost_the_same() -> None:
    first, _, stats = problem(24, 40)
    second, _, other = problem(40, 24)
    spectra = {
        "first": Spectrum(lqer_spectrum(first, stats), 2 * 64),
        "second": Spectrum(eora_spectrum(second, other), 2 * 64),
    }
    for budget in (0, 127, 128, 1000, 4000):
        chosen = ranks(spectra, budget)
        assert sum(chosen[name] * spectra[name].nbytes for name in chosen) <= budget
        lost = sum(float(spectra[name].energies[rank:].sum()) for name, rank in chosen.items())
        assert lost == pytest.approx(by_hand(spectra, budget), rel=1e-5)


def test_a_rank_that_does_not_fit_leaves_room_for_cheaper_ones() -> None:
    spectra = {"wide": Spectrum(torch.tensor([100.0, 90.0]), 60), "thin": Spectrum(torch.tensor([1.0, 0.5, 0.0]), 10)}
    assert ranks(spectra, 85) == {"wide": 1, "thin": 2}
    assert ranks(spectra, 20) == {"wide": 0, "thin": 2}
    assert ranks(spectra, 1000) == {"wide": 2, "thin": 2}  # a rank that takes nothing is not bought


@pytest.mark.parametrize("module", ["eora", "lqer"])
def test_a_spectrum_says_what_each_rank_takes(module: str) -> None:
    error, _, stats = problem(24, 40)
    energies = (eora_spectrum if module == "eora" else lqer_spectrum)(error, stats)
    whitening = root(stats["second_moment"]) if module == "eora" else torch.diag(stats["mean_abs"].double())
    lost = loss(error, fit(module, error, stats, 7), whitening)
    assert float(energies[7:].sum()) == pytest.approx(lost, rel=1e-4)
