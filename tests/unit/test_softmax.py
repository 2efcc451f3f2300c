"""The native softmax of causal scores and its derivative, against float64 formulas."""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import unwrap

import pytest
import torch
from torch import Tensor

from lowbit import native

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(6, 3, 0, 3), (8, 4, 12, 16), (10, 5, 30, 35), (4, 1, 99, 17), (128, 64, 64, 128), (0, 2, 0, 5)]
shapes = pytest.mark.parametrize(("rows", "period", "first", "cols"), SHAPES)


def make(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols)) * 8).to(dtype)


def exact(scores: Tensor, period: int, first: int, scale: float) -> Tensor:
    rows, cols = scores.shape
    beyond = torch.arange(cols)[None] > (first + torch.arange(rows) % period)[:, None]
    return (scores.double() * scale).masked_fill(beyond, -torch.inf).softmax(-1)


@shapes
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(rows: int, period: int, first: int, cols: int, dtype: torch.dtype) -> None:
    scores = make(rows, cols, dtype)
    wanted, found = exact(scores, period, first, 0.7), torch.full_like(scores, 9)
    native.causal_softmax(scores, period, first, 0.7, out=found)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=step / 2 + 1e-5, atol=1e-7)
    assert not found[wanted == 0].any()
    again = scores.clone()
    native.causal_softmax(again, period, first, 0.7, out=again)
    assert torch.equal(again, found)
    wide = torch.empty(rows, cols)
    native.causal_softmax(scores, period, first, 0.7, out=wide)
    torch.testing.assert_close(wide.double(), wanted, rtol=1e-5, atol=1e-30)


@shapes
@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes(rows: int, period: int, first: int, cols: int, dtype: torch.dtype) -> None:
    shares = exact(make(rows, cols), period, first, 0.2).to(dtype)
    slopes = make(rows, cols, dtype).flip(0)
    p, g = shares.double(), slopes.double()
    wanted = 0.2 * p * (g - (p * g).sum(-1, keepdim=True))
    native.causal_softmax_slopes(shares, period, first, 0.2, slopes)
    torch.testing.assert_close(slopes.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize(("scale", "wanted"), [(1.0, [0.5, 0.5, 0.0]), (1e30, [0.5, 0.5, 0.0]), (1e-30, [1 / 3] * 3)])
def test_scores_of_any_size(scale: float, wanted: list[float]) -> None:
    found = torch.tensor([[3e4, 3e4, -3e4]])
    native.causal_softmax(found, 1, 2, scale, out=found)
    torch.testing.assert_close(found, torch.tensor([wanted]), rtol=1e-6, atol=1e-30)


def test_what_is_seen_and_no_number_makes_all_of_its_row_so() -> None:
    scores = make(4, 40)
    scores[0, 2], scores[1, 20], scores[2, 39] = torch.nan, torch.inf, torch.nan
    native.causal_softmax(scores, 4, 35, 1.0, out=scores)
    assert scores[:2, :36].isnan().all() and not scores[:2, 37:].any()
    assert scores[2].isfinite().all() and scores[3, :39].isfinite().all()


def test_every_instruction_set_gives_the_same_bits() -> None:
    code = (
        "import hashlib, torch; from lowbit import native; from tests.unit.test_softmax import make\n"
        "found = [make(70, cols, kind) for cols in (5, 16, 100) for kind in (torch.float32, torch.bfloat16)]\n"
        "for x in found: native.causal_softmax(x, 7, 3, 0.3, out=x); native.causal_softmax_slopes(x, 7, 3, 0.3, x)\n"
        "print(hashlib.sha256(b''.join(x.view(torch.uint8).numpy().tobytes() for x in found)).hexdigest())"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "LOWBIT_ISA": isa}, capture_output=True, check=True
        ).stdout
        for isa in native.supported_isas()
    }
    assert len(made) == 1


def test_what_does_not_fit_is_refused() -> None:
    scores = make(4, 8)
    for period, first, scale in ((0, 0, 1.0), (1, -1, 1.0), (1, 0, 0.0)):
        with pytest.raises(ValueError, match="must be at least"):
            native.causal_softmax(scores, period, first, scale, out=scores)
    with pytest.raises(ValueError, match="shape"):
        unwrap(native.causal_softmax)(scores, 1, 0, 1.0, out=torch.empty(4, 9))
    with pytest.raises(ValueError, match="slopes is"):
        native.causal_softmax_slopes(scores.bfloat16(), 1, 0, 1.0, scores)
