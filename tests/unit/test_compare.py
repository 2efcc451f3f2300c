"""What residuals tell of the method, on weights that definitions written here make."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowbit.inspect.compare import Compared, Verdict, compare, methods_of, verdict
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.reference.qtensors import random_qtensor

ROWS, COLS, GROUP = 96, 128, 32


def weight(seed: int = 3) -> Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed)) * 0.02


def scales_of(w: Tensor, shrink: float = 1.0) -> Tensor:
    """GPTQ's and compressed-tensors' symmetric scales, in float16."""
    return (w.reshape(ROWS, -1, GROUP).abs().amax(-1) * shrink * 2 / 15).half().float()


def stored(values: Tensor, scales: Tensor) -> QTensor:
    """Values that are wanted, on the nearest codes of these scales."""
    step = scales.repeat_interleave(GROUP, 1)
    codes = ((values / step).round().clamp(-8, 7) + 8).to(torch.uint8)
    return QTensor(parse(f"int4-g{GROUP}"), (ROWS, COLS), codes, scales)


def rtn() -> QTensor:
    return stored(weight(), scales_of(weight()))


def searched() -> QTensor:
    w = weight()
    ratios = torch.rand(ROWS, COLS // GROUP, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.7
    return stored(w, (scales_of(w) * ratios).half().float())


def gptq() -> QTensor:
    """Column by column, the error of each divided among those that follow (arXiv:2210.17323, equations 2 and 3)."""
    w, scales = weight().double(), scales_of(weight())
    x = torch.randn(4 * COLS, COLS, generator=torch.Generator().manual_seed(2)).double()
    x = x + 2 * x.roll(1, 1)
    hessian = x.T @ x
    upper = torch.linalg.cholesky(
        torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLS)), upper=True
    )
    done = torch.zeros_like(w)
    for col in range(COLS):
        step = scales[:, col // GROUP].double()
        done[:, col] = (w[:, col] / step).round().clamp(-8, 7) * step
        error = (w[:, col] - done[:, col]) / upper[col, col]
        w[:, col + 1 :] -= error[:, None] * upper[col, col + 1 :]
    return stored(done.float(), scales)


def autoround() -> QTensor:
    """Rounding moved by up to half a step, as learned offsets do (arXiv:2309.05516)."""
    w, scales = weight(), scales_of(weight())
    offsets = (torch.rand(ROWS, COLS, generator=torch.Generator().manual_seed(4)) - 0.5) * 0.8
    return stored(w + offsets * scales.repeat_interleave(GROUP, 1), scales)


FACTORS = torch.exp(torch.randn(COLS, generator=torch.Generator().manual_seed(6)) * 0.5)


def scaled() -> QTensor:
    return stored(weight() * FACTORS, scales_of(weight() * FACTORS))


def found(
    q: QTensor, rounded_inputs: bool = False, vectors: dict[str, tuple[Tensor, Tensor]] | None = None
) -> Compared:
    return compare("w", q, weight(), rounded_inputs, vectors or {})


@pytest.mark.parametrize(
    ("make", "method", "confidence"),
    [
        (rtn, "rtn", "high"),
        (searched, "nearest codes under searched scales", "medium"),
        (gptq, "gptq", "high"),
        (autoround, "autoround", "medium"),
    ],
)
def test_methods_leave_their_marks(make: Callable[[], QTensor], method: str, confidence: str) -> None:
    seen = found(make())
    assert (seen.method, seen.confidence) == (method, confidence), seen
    assert seen.spread == 0
    assert seen.farthest <= {"rtn": 0.51, "autoround": 1.05}.get(method, 100)


def test_errors_are_those_of_the_definition() -> None:
    q, w = rtn(), weight()
    error = float((w - q.dequantize()).double().square().sum() / w.double().square().sum())
    seen = found(q)
    assert seen.error == pytest.approx(error, rel=1e-6)
    assert seen.snr == pytest.approx(-10 * torch.log10(torch.tensor(error)).item(), rel=1e-5)


NORM = torch.rand(COLS, generator=torch.Generator().manual_seed(7)) + 0.5
ROW_FACTORS = torch.exp(torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(8)) * 0.6)


@pytest.mark.parametrize(("rounded_inputs", "name"), [(False, "awq+rtn"), (True, "smoothquant+rtn")])
def test_columns_that_were_scaled(rounded_inputs: bool, name: str) -> None:
    seen = found(scaled(), rounded_inputs, {"other": (NORM, NORM * 2), "norm": (NORM, NORM / FACTORS)})
    assert (seen.method, seen.partner, seen.confidence) == (name, "norm", "medium"), seen
    assert seen.spread == pytest.approx(float(FACTORS.log2().std()), rel=0.05)
    assert seen.moved < 1e-3
    alone = found(scaled(), rounded_inputs)
    assert (alone.method, alone.partner, alone.moved) == (name, None, 0), alone
    assert alone.spread == pytest.approx(seen.spread, rel=0.01)


def test_columns_under_a_norm_that_adds_one() -> None:
    seen = found(scaled(), vectors={"norm": (NORM - 1, NORM / FACTORS - 1), "other": (NORM, NORM.flip(0))})
    assert (seen.method, seen.partner) == ("awq+rtn", "norm"), seen


def test_rows_that_were_divided_for_the_columns_of_a_later_weight() -> None:
    """AWQ folds the factors of one layer's inputs into the rows of the layer before, some with factors of its own."""
    alone = found(stored(weight() / ROW_FACTORS, scales_of(weight() / ROW_FACTORS)))
    w = weight() * FACTORS / ROW_FACTORS
    both = found(stored(w, scales_of(w)), vectors={"other": (NORM, NORM * FACTORS), "norm": (NORM, NORM / FACTORS)})
    for seen, partner in ((alone, None), (both, "norm")):
        assert (seen.method, seen.partner, seen.moved) == ("awq+rtn", partner, 0), seen
        assert seen.rows == pytest.approx(float(ROW_FACTORS.log2().std()), rel=0.02)
    assert alone.spread == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_that_went_into_16_bits(dtype: torch.dtype) -> None:
    """Other tools multiply what is stored, and store it again, before they round: so do norms."""
    norm = (NORM / FACTORS).to(dtype)
    w = (weight().to(dtype) * FACTORS.to(dtype)).float()
    q, vectors = stored(w, scales_of(w)), {"norm": (NORM.to(dtype), norm)}
    seen = compare("w", q, weight().to(dtype).float(), False, vectors, torch.finfo(dtype).eps)
    assert (seen.method, seen.partner, seen.confidence) == ("awq+rtn", "norm", "medium"), seen


def test_gptq_of_scaled_columns_and_not_of_others() -> None:
    """A norm whose change explains the columns is named, another change beside plain GPTQ is not."""
    seen = found(gptq(), vectors={"norm": (NORM, NORM / FACTORS)})
    assert (seen.method, seen.confidence, seen.partner) == ("gptq", "high", None), seen
    divided = weight() / FACTORS
    seen = compare("w", gptq(), divided, False, {"norm": (NORM, NORM / FACTORS), "other": (NORM, NORM.flip(0))})
    assert (seen.method, seen.confidence, seen.partner) == ("awq+gptq", "medium", "norm"), seen


def test_what_is_scaled_unseen_is_gptq_with_low_confidence() -> None:
    factors = ROW_FACTORS**0.25 * FACTORS**0.1
    seen = found(stored(weight() * factors, scales_of(weight() * factors)))
    assert (seen.method, seen.confidence, seen.spread) == ("gptq", "low", 0.0), seen


def test_the_model_is_told_by_all_of_its_weights() -> None:
    norm = {"norm": (NORM, NORM / FACTORS)}
    w = weight() / ROW_FACTORS
    awq = [found(scaled(), vectors=norm), found(stored(w, scales_of(w))), found(rtn()), found(searched())]
    seen = verdict(awq)
    assert seen == Verdict("awq+nearest codes under searched scales", 4, 4, "high")
    assert verdict([found(rtn()), found(rtn())]) == Verdict("rtn", 2, 2, "high")
    assert verdict([*[found(gptq())] * 9, found(rtn())]) == Verdict("gptq", 9, 10, "high")
    assert verdict([found(gptq()), found(rtn()), found(autoround())]) == Verdict("gptq", 1, 3, "low")
    assert verdict([found(scaled(), True, norm), found(rtn())]) == Verdict("smoothquant+rtn", 2, 2, "high")
    assert verdict([]) is None


def test_codebooks_tell_no_method() -> None:
    q = random_qtensor(parse("vectors[1x8:8+8]-row"), (8, 32))
    seen = compare("w", q, q.dequantize() * 1.01, False, {})
    assert (seen.method, seen.confidence) == ("codebooks, of any method", "low")
    assert seen.error == pytest.approx((0.01 / 1.01) ** 2, rel=1e-3)


def test_another_model_is_no_method() -> None:
    seen = compare("w", rtn(), weight(9), False, {})
    assert seen.method.startswith("other weights")
    assert methods_of([seen, found(rtn()), found(rtn())]) == {"rtn": 2, seen.method: 1}


@pytest.mark.parametrize("scheme", ["int4-flat32", "nf4-g64", "int4-g32-asym", "int4-g32-min", "mxfp4", "int8-tensor"])
def test_what_our_rounding_makes_is_seen_in_every_kind_of_scheme(scheme: str) -> None:
    from lowbit.methods.rtn import METHOD

    w, parsed = weight(), parse(scheme)
    if parsed.block.flat:
        flat = METHOD.quantize(w.reshape(1, -1), {}, parse("int4-g32"), METHOD.options())
        q = QTensor(parsed, (ROWS, COLS), flat.codes, flat.scales)
    else:
        q = METHOD.quantize(w, {"range": torch.stack([w.min(), w.max()])}, parsed, METHOD.options())
    seen = found(q)
    assert seen.moved < 1e-3, seen
    assert seen.method in ("rtn", "nearest codes under searched scales")
