"""What the format `hqq` refuses, how it declares a model, and which files it does not read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Spec, Weight
from lowbit.formats.hqq import FORMAT
from lowbit.schemes import parse
from tests.reference.qtensors import random_qtensor

MODULE = "model.layers.0.mlp.up_proj"
DECLARED = {"quantization_config": {"quant_method": "hqq"}}


def weight(
    module: str = MODULE,
    shape: tuple[int, ...] = (64, 128),
    scheme: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> Weight:
    bare = Weight(f"{module}.weight", shape, dtype)
    return replace(bare, scheme=FORMAT.fit(parse(scheme), bare)) if scheme else bare


def stored(planned: Weight) -> dict[str, Tensor]:
    assert planned.scheme is not None
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(planned).items()}
    FORMAT.pack(planned, random_qtensor(planned.scheme, planned.shape), into)
    return into


def recognised(tensors: dict[str, Tensor]) -> dict[str, Weight]:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = FORMAT.recognise(DECLARED, specs, tensors.__getitem__)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "fitted"),
    [
        ("int4-g64", (64, 128), torch.float16, "int4-g64-fzero"),
        ("int4-g64-asym-f32", (64, 128), torch.bfloat16, "int4-g64-fzero-bf16"),
        ("int4-g128", (64, 128), torch.float32, "int4-row-fzero-f32"),
        ("int4-flat64", (64, 128), torch.float16, "int4-g64-fzero"),
        ("int4-g64", (64, 100), torch.float16, "int4-flat64-fzero"),
        ("int3-g64", (5, 64), torch.float16, "int3-row-fzero"),
    ],
)
def test_fit_says_how_it_is_stored(scheme: str, shape: tuple[int, int], dtype: torch.dtype, fitted: str) -> None:
    assert FORMAT.fit(parse(scheme), weight(shape=shape, dtype=dtype)) == parse(fitted)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("int5-g64", (64, 128), "1, 2, 3, 4 and 8 bits"),
        ("nf4-g64", (64, 128), "packs integers"),
        ("int4-g64-dq", (64, 128), "plain scales"),
        ("int4-g64", (5, 100), "divide the 500 elements"),
        ("int4-tensor", (64, 128), "use g64"),
        ("int4-16x16", (64, 128), "use g64"),
        ("int4-row", (5, 64), "packs 2 groups together, and this has 5"),
        ("int1-row", (12, 64), "packs 8 groups together, and this has 12"),
        ("int4-g64", (128,), "--skip"),
    ],
)
def test_fit_refuses_with_what_works(scheme: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        FORMAT.fit(parse(scheme), weight(shape=shape))


def test_pack_refuses_a_zero_point_that_the_dtype_lacks() -> None:
    planned = weight(scheme="int4-g64")
    assert planned.scheme is not None
    q = random_qtensor(planned.scheme, planned.shape)
    assert q.zeros is not None
    q.zeros[2, 1] = 0.1
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(planned).items()}
    with pytest.raises(FormatError, match=rf"{MODULE}\.zero: 0\.1"):
        FORMAT.pack(planned, q, into)


def test_config_by_kind_of_layer() -> None:
    schemes = {
        "0.mlp.up": "int4-g64",
        "1.mlp.up": "int4-g64",
        "2.mlp.up": "int8-row",
        "0.attn.q": "int3-g32",
        "1.attn.q": None,
    }
    weights = [weight(f"model.layers.{name}", scheme=scheme) for name, scheme in schemes.items()]
    declared = FORMAT.config([*weights, weight("model.norm", (4,))], {})["config.json"]["quantization_config"]
    assert declared["skip_modules"] == ["lm_head", "model.layers.1.attn.q"]
    kinds = {tag: options["weight_quant_params"] for tag, options in declared["quant_config"].items()}
    assert {tag: (kind["nbits"], kind["group_size"], kind["axis"]) for tag, kind in kinds.items()} == {
        "mlp.up": (4, 64, 1),
        "attn.q": (3, 32, 1),
    }
    same = FORMAT.config(weights[:2], {})["config.json"]["quantization_config"]["quant_config"]
    assert same["weight_quant_params"]["nbits"] == 4


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("axis", 0, "along axis 0"),
        ("nbits", 7, "7 bits"),
        ("group_size", 0, "groups of 0"),
        ("group_size", 96, "do not divide"),
        ("nbits", 1.58, "not a whole number"),
        ("zero", None, r"zero is missing"),
    ],
)
def test_files_that_are_not_read(name: str, value: float | None, reason: str) -> None:
    tensors = stored(weight(scheme="int4-g64"))
    del tensors[f"{MODULE}.{name}"]
    if value is not None:
        tensors[f"{MODULE}.{name}"] = torch.tensor(value)
    with pytest.raises(FormatError, match=rf"{MODULE}.*{reason}"):
        recognised(tensors)


def test_metadata_that_contradicts_the_codes_is_refused() -> None:
    planned = weight(scheme="int4-g64")
    tensors = stored(planned) | {f"{MODULE}.packing": torch.tensor(list(b"2bit_u8"), dtype=torch.uint8)}
    with pytest.raises(FormatError, match=rf"{MODULE}\.packing is"):
        FORMAT.unpack(planned, tensors, None)


def test_codes_beyond_the_grid_are_refused() -> None:
    planned = replace(weight(shape=(2, 64)), scheme=parse("int5-row-fzero"))
    tensors = stored(planned)
    tensors[f"{MODULE}.W_q"][1, 3] = 32
    with pytest.raises(FormatError, match=rf"{MODULE}\.W_q holds code 32 at element 67"):
        FORMAT.unpack(planned, tensors, None)
