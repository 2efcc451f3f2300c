"""Checks of stored tensors: the first number that is none is named, and no finite one is taken for it."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats._checks import exact, finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 1, 998])
def test_what_is_not_finite_is_named(dtype: torch.dtype, value: float, at: int) -> None:
    scales = torch.rand(37, 27).to(dtype)
    scales.view(-1)[[at, 998]] = torch.tensor([value, -value], dtype=dtype)
    with pytest.raises(FormatError, match=rf"^scale holds .* at \[{at // 27}, {at % 27}\]; it must be finite$"):
        finite("scale", scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_of_finite_numbers(dtype: torch.dtype) -> None:
    scales = torch.full((37, 27), torch.finfo(dtype).max, dtype=dtype)
    assert finite("scale", scales) is scales and finite("none", scales[:0]).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_stored_in_no_type_its_own_neither(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match="scale: nan cannot be stored"):
        exact("scale", torch.tensor([1.0, float("nan")]), dtype)
