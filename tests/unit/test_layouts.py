"""What further formats refuse, and how they declare a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit import plugins
from lowbit.errors import UnsupportedError
from lowbit.formats import Format, Weight
from lowbit.schemes import parse

MODULE = "model.layers.0.mlp.up_proj"


def form_of(name: str) -> Format:
    form: Format = plugins.load("formats", name)
    return form


def weight(
    name: str = "",
    scheme: str = "",
    module: str = MODULE,
    shape: tuple[int, ...] = (64, 128),
    dtype: Any = torch.bfloat16,
) -> Weight:
    bare = Weight(f"{module}.weight", shape, dtype)
    return replace(bare, scheme=form_of(name).fit(parse(scheme), bare)) if scheme else bare


def declaration(name: str, weights: list[Weight], key: str = "quantization_config") -> dict[str, Any]:
    declared: dict[str, Any] = form_of(name).config(weights, {})["config.json"][key]
    return declared


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "fitted"),
    [
        ("awq", "int4-g128-asym", (64, 256), "int4-g128-asym"),
        ("awq", "int4-g128-asym", (64, 128), "int4-g128-asym"),
        ("awq", "int4-flat128-bf16", (64, 256), "int4-g128"),
        ("awq", "int4-g96", (64, 96), "int4-row"),
    ],
)
def test_fit_says_how_it_is_stored(name: str, scheme: str, shape: tuple[int, int], fitted: str) -> None:
    assert str(form_of(name).fit(parse(scheme), weight(shape=shape))) == fitted


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "reason"),
    [
        ("awq", "int3-g64", (64, 128), "4 bits"),
        ("awq", "nf4-g64", (64, 128), "compressed-tensors"),
        ("awq", "int4-g64-dq", (64, 128), "plain scales"),
        ("awq", "int4-g64-fzero", (64, 128), "use asym"),
        ("awq", "int4-g48", (64, 96), "use g128"),
        ("awq", "int4-16x16", (64, 128), "one scale per row"),
        ("awq", "int4-g64", (60, 128), "8 outputs in a word, and this has 60"),
        ("awq", "int4-g128", (64, 192), "use g64"),
        ("awq", "int4-g64", (64,), "--skip"),
    ],
)
def test_fit_refuses_with_what_works(name: str, scheme: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        form_of(name).fit(parse(scheme), weight(shape=shape))


def test_awq_leaves_the_output_head_as_it_is() -> None:
    with pytest.raises(UnsupportedError, match="output head"):
        form_of("awq").fit(parse("int4-g64-asym"), weight(module="lm_head"))


def test_awq_declares_one_scheme() -> None:
    names = ["model.layers.0.a", "model.layers.1.a", "model.layers.0.b"]
    weights = [weight("awq", "int4-g64-asym", name) for name in names]
    assert declaration("awq", [*weights, weight(module="model.layers.1.b")]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.1.b"],
    }
    symmetric = declaration("awq", [weight("awq", "int4-row")])
    assert (symmetric["group_size"], symmetric["zero_point"]) == (-1, False)
    with pytest.raises(UnsupportedError, match="int4-g64-asym, int4-row; use one"):
        form_of("awq").config([*weights, weight("awq", "int4-row", "x")], {})
