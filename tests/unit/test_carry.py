"""Codes under another scheme: whatever is not refused has the same values, whichever two schemes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowbit.errors import UnsupportedError
from lowbit.schemes import parse
from lowbit.stages._carry import carried, variants
from tests.reference.qtensors import random_qtensor, slow_dequantize

SHAPE = (4, 64)
TERNARY = "levels[-1,0,1]-g64"
OLD = [TERNARY, "iq4_nl", "mxfp4", "nf4-g64", "fp8-e4m3-row",
       *(f"int{bits}-g64{zero}" for bits in (2, 3, 4, 8) for zero in ("", "-asym", "-fzero"))]  # fmt: skip
NEW = [TERNARY, "nf4-g32", "fp8-e4m3-g32", "fp8-e5m2-g32",
       *(f"int{bits}-g32{zero}" for bits in (2, 3, 4, 8) for zero in ("", "-asym", "-fzero", "-min"))]  # fmt: skip


def test_values_stay_or_the_scheme_is_refused() -> None:
    """Minima are products, rounded to float32, which whoever carries looks at again."""
    kept = set()
    for old, new in product(OLD, NEW):
        q = random_qtensor(parse(old), SHAPE)
        wanted = slow_dequantize(q)
        try:
            made = carried(q, parse(f"{new}-f32"))
        except UnsupportedError:
            continue
        kept.add((old, new))
        rounded = 1e-6 * float(wanted.abs().max()) if new.endswith("min") else 0.0
        assert torch.allclose(slow_dequantize(made), wanted, rtol=0, atol=rounded), (old, new)
    zeros = ("", "-asym", "-fzero", "-min")
    assert {(TERNARY, f"int{bits}-g32{zero}") for bits in (2, 4, 8) for zero in zeros} <= kept
    assert {("iq4_nl", f"int8-g32{zero}") for zero in zeros} <= kept
    assert {("int2-g64-asym", "int4-g32-asym"), ("int3-g64", "int8-g32-min")} <= kept
    assert ("iq4_nl", "int4-g32-asym") not in kept


@pytest.mark.parametrize(("old", "new"), [(TERNARY, "int2-g64"), ("iq4_nl", "int8-g32"), ("iq4_xs", "int8-g32-f32")])
def test_a_table_of_whole_numbers_may_become_integers(old: str, new: str) -> None:
    assert parse(new) in [*variants(parse(old))]
