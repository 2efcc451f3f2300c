"""What the formats `gptq` and `gptq_v2` refuse, how they declare a model, and how they read declarations of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight, gptq, gptq_v2
from lowbit.schemes import parse
from tests.reference.qtensors import random_qtensor

MODULE = "model.layers.0.mlp.up_proj"
V1, V2 = gptq.FORMAT, gptq_v2.FORMAT


def weight(module: str = MODULE, shape: tuple[int, ...] = (64, 128), scheme: str | None = None) -> Weight:
    bare = Weight(f"{module}.weight", shape, torch.bfloat16)
    return replace(bare, scheme=V2.fit(parse(scheme), bare)) if scheme else bare


def stored(form: Format, planned: Weight, lowest_zero: int = 1) -> dict[str, Tensor]:
    assert planned.scheme is not None
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in form.layout(planned).items()}
    form.pack(planned, random_qtensor(planned.scheme, planned.shape, lowest_zero=lowest_zero), into)
    return into


@pytest.mark.parametrize(
    ("scheme", "shape", "fitted"),
    [
        ("int4-g128", (64, 256), "int4-g128"),
        ("int4-g128-bf16", (64, 256), "int4-g128"),
        ("int4-g128", (64, 128), "int4-row"),
        ("int3-g128", (64, 96), "int3-row"),
        ("int8-flat64", (64, 128), "int8-g64"),
    ],
)
def test_fit_says_how_it_is_stored(scheme: str, shape: tuple[int, int], fitted: str) -> None:
    assert str(V1.fit(parse(scheme), weight(shape=shape))) == fitted


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("int5-g64", (64, 128), "2, 3, 4 or 8 bits"),
        ("nf4-g64", (64, 128), "with plain scales"),
        ("int4-g64-fzero", (64, 128), "use asym"),
        ("int4-g48", (64, 96), "use g128"),
        ("int4-tensor", (64, 128), "one scale per row"),
        ("int4-16x16", (64, 128), "one scale per row"),
        ("int4-g64", (64, 172), r"multiples of 32.* 64 x 172"),
        ("int4-g64", (100, 128), r"multiples of 32.* 100 x 128"),
        ("int4-g128", (64, 2880), "use g64"),
        ("int4-g64", (2, 64, 128), "--skip"),
    ],
)
@pytest.mark.parametrize("form", [V1, V2])
def test_fit_refuses_with_what_works(form: Format, scheme: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        form.fit(parse(scheme), weight(shape=shape))


def test_v1_takes_no_asymmetric_scheme() -> None:
    with pytest.raises(UnsupportedError, match=r"zero points less one"):
        V1.fit(parse("int4-g64-asym"), weight())
    assert str(V2.fit(parse("int4-g64-asym"), weight())) == "int4-g64-asym"


def test_v1_refuses_a_zero_point_of_zero_by_its_place() -> None:
    planned = weight(scheme="int4-g64-asym")
    assert planned.scheme is not None
    q = random_qtensor(planned.scheme, planned.shape, lowest_zero=1)
    assert q.zeros is not None
    q.zeros[5, 1] = 0
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in V1.layout(planned).items()}
    with pytest.raises(FormatError, match=rf"{MODULE}\.qzeros: .* row 5, group 1 is 0"):
        V1.pack(planned, q, into)


def test_pack_refuses_a_scale_that_float16_lacks() -> None:
    planned = weight(scheme="int4-g64")
    assert planned.scheme is not None
    q = random_qtensor(planned.scheme, planned.shape)
    assert isinstance(q.scales, Tensor)
    q.scales[3, 1] = 0.1
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in V1.layout(planned).items()}
    with pytest.raises(FormatError, match=rf"{MODULE}\.scales: 0\.1"):
        V1.pack(planned, q, into)


def declaration(form: Format, weights: list[Weight], source: dict[str, Any] | None = None) -> dict[str, Any]:
    documents = form.config(weights, source or {})
    assert documents["config.json"]["quantization_config"] == documents["quantize_config.json"]
    return documents["quantize_config.json"]


def test_config_names_what_differs_from_the_rest() -> None:
    names = ["model.layers.0.a", "model.layers.1.a", "model.layers.0.b", "model.layers.1.b", "lm_head"]
    schemes = ["int4-g64", "int4-g64", "int8-row-asym", None, "int4-g64"]
    declared = declaration(V2, [weight(name, scheme=scheme) for name, scheme in zip(names, schemes, strict=True)])
    assert declared == {
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "lm_head": True,
        "pack_dtype": "int32",
        "dynamic": {
            r"-:^model\.layers\.1\.b$": {},
            r"+:^model\.layers\.0\.b$": {"bits": 8, "group_size": -1, "sym": False},
            "+:^lm_head$": {"bits": 4, "group_size": 64, "sym": True},
        },
        "modules_in_block_to_quantize": [["model.layers.0.a", "model.layers.0.b", "model.layers.1.a"]],
    }


def test_config_of_v1() -> None:
    declared = declaration(V1, [weight(scheme="int4-g64"), weight("lm_head"), weight("model.norm", (4,))])
    assert (declared["checkpoint_format"], declared["format"], declared["lm_head"]) == ("gptq", "gptq", False)
    assert "dynamic" not in declared
    assert "meta" not in declared  # transformers takes it for a reason not to load with auto-round


def test_an_index_of_groups_stays_declared() -> None:
    source = {"quantization_config": {"quant_method": "gptq", "desc_act": True}}
    assert declaration(V2, [weight(scheme="int4-g64")], source)["desc_act"] is True


def found(declared: dict[str, Any], tensors: dict[str, Tensor], form: Format = V1) -> dict[str, Weight] | None:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return form.recognise({"quantization_config": {"quant_method": "gptq"} | declared}, specs, tensors.__getitem__)


def test_reads_files_without_an_index_of_groups() -> None:
    planned = weight(scheme="int3-g64")
    tensors = stored(V1, planned)
    whole = V1.unpack(planned, tensors, None)
    del tensors[f"{MODULE}.g_idx"]
    known = found({"bits": 3, "group_size": 64}, tensors)
    assert known is not None and known[planned.name].shape == (64, 128)
    again = V1.unpack(known[planned.name], tensors, None)
    assert torch.equal(again.codes, whole.codes) and again.scheme == planned.scheme


def test_reads_overrides_of_others() -> None:
    """The first rule that matches counts; a rule without a sign overrides."""
    rules = {r".*\.1\..*": {"bits": 8}, r"+:.*up_proj": {"bits": 2, "group_size": 32}, r".*": {"bits": 3}}
    tensors = {
        name.replace(MODULE, module): tensor
        for module, scheme in {"x.1.up_proj": "int8-g64", "x.2.up_proj": "int2-g32", "x.2.o": "int3-g64"}.items()
        for name, tensor in stored(V2, weight(scheme=scheme)).items()
    }
    known = found({"bits": 4, "group_size": 64, "dynamic": rules, "checkpoint_format": "gptq_v2"}, tensors, V2)
    assert known is not None
    schemes = {name: str(each.scheme) for name, each in known.items()}
    assert schemes == {"x.1.up_proj.weight": "int8-g64", "x.2.up_proj.weight": "int2-g32", "x.2.o.weight": "int3-g64"}


@pytest.mark.parametrize(
    ("declared", "v1", "v2"),
    [
        ({}, True, False),
        ({"checkpoint_format": "gptq"}, True, False),
        ({"checkpoint_format": "gptq_v2"}, False, True),
        ({"format": "gptq_v2"}, False, True),
        ({"checkpoint_format": "gptq_p"}, False, True),
    ],
)
def test_the_checkpoint_format_decides(declared: dict[str, Any], v1: bool, v2: bool) -> None:
    tensors = stored(V2, weight(scheme="int4-g64"))
    declared = {"bits": 4, "group_size": 64} | declared
    assert (found(declared, tensors, V1) is not None, found(declared, tensors, V2) is not None) == (v1, v2)


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"checkpoint_format": "marlin"}, "'marlin' .* is not read"),
        ({"bits": 3, "checkpoint_format": "gptq_p"}, "'gptq_p' .* is not read"),
        ({"bits": 5}, "5 bits"),
        ({"bits": "4"}, "'4' bits"),
        ({"bits": 8}, r"up_proj\.qweight has 16 rows, which 128 codes of 8 bits"),
        ({"group_size": 0}, "group_size 0"),
        ({"dynamic": {"(": {}}}, "'\\(' in `dynamic`"),
    ],
)
def test_declarations_that_are_not_read(declared: dict[str, Any], reason: str) -> None:
    tensors = stored(V1, weight(scheme="int4-g64"))
    with pytest.raises(FormatError, match=reason):
        found({"bits": 4, "group_size": 64} | declared, tensors)


def test_a_symmetric_file_with_other_zero_points_is_refused() -> None:
    planned = weight(scheme="int4-g64")
    tensors = stored(V1, planned)
    tensors[f"{MODULE}.qzeros"][1, 0] -= 0x100  # the third row's
    with pytest.raises(FormatError, match=r"qzeros holds zero point 7 for row 2, group 1; .* 8 everywhere"):
        V1.unpack(planned, tensors, None)


def test_a_zero_point_that_readers_take_differently_is_refused() -> None:
    planned = weight(scheme="int4-g64-asym")
    tensors = stored(V1, planned)
    tensors[f"{MODULE}.qzeros"][0, 0] |= 0xF0
    with pytest.raises(FormatError, match=r"stores 15 for row 1, group 0, .* 16 and others for 0"):
        V1.unpack(planned, tensors, None)
    assert V2.unpack(planned, tensors, None)


def test_an_index_beyond_the_groups_is_refused() -> None:
    planned = weight(scheme="int4-g64")
    tensors = stored(V1, planned)
    tensors[f"{MODULE}.g_idx"][7] = 2
    with pytest.raises(FormatError, match=r"g_idx puts column 7 into group 2; groups are 0 to 1"):
        V1.unpack(planned, tensors, None)
