"""Every file of `formats/`, found by listing, against the contract in `lowbit.formats.Format`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit import plugins
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.reference.qtensors import random_qtensor, slow_dequantize

FORMATS = plugins.written()
# Those that say in `config.json` what their tensors are; files of other containers say so themselves.
DECLARED = [name for name in FORMATS if plugins.load("formats", name).container == "safetensors"]
INTEGERS = [
    f"int{bits}-{block}{zero}"
    for bits in range(1, 9)
    for block in ("tensor", "row", "g16", "g64", "flat64", "16x16")
    for zero in ("", "-asym", "-fzero")
    if (block in ("row", "g64") and zero != "-fzero") or bits in (3, 4, 8)
]
FLOATS = [f"fp8-{grid}-{block}" for grid in ("e4m3", "e5m2") for block in ("tensor", "row", "g32", "128x128")]
TABLES = [f"{grid}-{block}{dq}" for grid in ("nf4", "fp4") for block in ("g64", "flat64", "row") for dq in ("", "-dq")]
SMOOTH = ["int4-g64-smooth", "int4-g64-asym-smooth", "nvfp4-smooth", "fp8-e4m3-row-smooth"]
OTHERS = [*SMOOTH, "mxfp4", "mxfp8", "nvfp4", "int4-g64-dq", "levels[-1,-0.25,0,0.5,1]-row", "levels[-1,0,1]-tensor"]
LLAMA = [
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "iq1_m",
    "iq2_xs",
    "iq3_s",
    "tq1_0",
    "tq2_0",
]
VECTORS = [
    "vectors[1x8:8+8]-row",
    "vectors[1x4:6]-row",
    "vectors[8x1:8]-column-min-perm",
    "vectors[4*3x1:5,4x1:7+9/2]-column-min-perm",
    "vectors[6x1:9+3]-tensor",
    "spqr",
    "spqr-perm-sparse7",
]
SCHEMES = INTEGERS + FLOATS + TABLES + OTHERS + LLAMA + VECTORS
SHAPES = [(1, 1), (3, 7), (5, 16), (32, 64), (33, 130), (64, 96), (160, 256), (128, 128)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAME = "model.layers.0.mlp.up_proj.weight"
SOURCE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}


def fitted(form: Format, scheme: str) -> Iterator[Weight]:
    """A weight of each shape and dtype on which the format stores the scheme."""
    for i, shape in enumerate(SHAPES):
        weight = Weight(NAME, shape, DTYPES[i % len(DTYPES)])
        with suppress(UnsupportedError):
            yield declarable(form, replace(weight, scheme=form.fit(parse(scheme), weight)))


def allocate(form: Format, weight: Weight, fill: int) -> dict[str, Tensor]:
    """The tensors of one weight as views of one buffer of this byte, as in a mapped file."""
    specs = sorted(form.layout(weight).items(), key=lambda item: -item[1].dtype.itemsize)
    sizes = [prod(spec.shape) * spec.dtype.itemsize for _, spec in specs]
    buffer, starts = torch.full((sum(sizes),), fill, dtype=torch.uint8), [0, *accumulate(sizes)]
    return {
        name: buffer[start : start + size].view(spec.dtype).view(spec.shape)
        for (name, spec), start, size in zip(specs, starts, sizes, strict=False)
    }


def packed(form: Format, weight: Weight, q: QTensor, fill: int = 0xA5) -> dict[str, Tensor]:
    into = allocate(form, weight, fill)
    form.pack(weight, q, into)
    return into


def made(form: Format, weight: Weight) -> tuple[QTensor, dict[str, Tensor]]:
    """A random weight and how it is stored; zero points start at 1 where the format refuses some that are 0."""
    assert weight.scheme is not None
    try:
        q = random_qtensor(weight.scheme, weight.shape)
        return q, packed(form, weight, q)
    except FormatError:
        assert weight.scheme.zero == "int", "only zero points may be out of a format's range"
        q = random_qtensor(weight.scheme, weight.shape, lowest_zero=1)
        return q, packed(form, weight, q)


def parts(q: QTensor) -> dict[str, Tensor]:
    return dict(q.parts())


def assert_same(found: QTensor, meant: QTensor) -> None:
    assert (found.scheme, found.shape) == (meant.scheme, meant.shape)
    left, right = parts(found), parts(meant)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_stores_its_default_scheme(name: str) -> None:
    form: Format = plugins.load("formats", name)
    weight = Weight(NAME, (256, 512), torch.bfloat16)
    assert form.fit(parse(form.default), weight)
    assert any(any(True for _ in fitted(form, scheme)) for scheme in SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(name: str, scheme: str) -> None:
    form: Format = plugins.load("formats", name)
    for weight in fitted(form, scheme):
        assert weight.scheme is not None
        assert form.fit(weight.scheme, weight) == weight.scheme, "fit must be at rest on what it returns"
        q, tensors = made(form, weight)
        assert {key: Spec(t.dtype, tuple(t.shape)) for key, t in tensors.items()} == form.layout(weight)
        for key, again in packed(form, weight, q, fill=0x5A).items():
            assert torch.equal(bits_of(tensors[key]), bits_of(again)), f"pack leaves bytes of {key} unwritten"
        buffer = torch.full_like(q.codes, 0xEE)
        found = form.unpack(weight, tensors, buffer)
        assert_same(found, q)
        assert_same(form.unpack(weight, tensors, None), q)
        in_place = {tensor.data_ptr() for tensor in [buffer, *tensors.values()]}
        if not found.vectors:  # whose indices are fewer than the weights
            assert found.codes.data_ptr() in in_place, "codes are neither in the buffer nor a view of what is stored"
        assert torch.equal(bits_of(found.dequantize(weight.dtype)), bits_of(q.dequantize(weight.dtype)))
        assert sum(t.numel() * t.dtype.itemsize for t in tensors.values()) >= q.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_means_what_the_slow_definition_says(name: str) -> None:
    form: Format = plugins.load("formats", name)
    for scheme in SCHEMES:
        weight = next((w for w in fitted(form, scheme) if prod(w.shape) <= 2048), None)
        if weight is not None:
            q, tensors = made(form, weight)
            expected = slow_dequantize(q)
            assert torch.equal(bits_of(form.unpack(weight, tensors, None).dequantize()), bits_of(expected)), scheme


def declarable(form: Format, weight: Weight) -> Weight:
    """The weight, with its inputs rounded by a stored scale where the format cannot declare it without."""
    try:
        form.layout(weight)
    except UnsupportedError:
        assert weight.scheme is not None
        return replace(weight, activations=form.fit_activations(weight.scheme, weight), input_scale=0.5)
    return weight


def checkpoint(form: Format, weights: list[Weight], path: Path) -> dict[str, QTensor]:
    """Write weights and what declares them, as the pipeline does; returns what was meant."""
    meant, tensors = {}, {}
    for weight in weights:
        if weight.scheme is None:
            tensors[weight.name] = torch.zeros(weight.shape, dtype=weight.dtype)
        else:
            meant[weight.name], stored = made(form, weight)
            tensors |= stored
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path / "model.safetensors")
    for file, document in form.config(weights, SOURCE).items():
        (path / file).write_text(json.dumps(document))
    return meant


def opened(form: Format, path: Path) -> tuple[dict[str, Weight] | None, dict[str, Tensor]]:
    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    config = json.loads((path / "config.json").read_text())
    specs = {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    return form.recognise(config, specs, tensors.__getitem__), tensors


def model(weight: Weight) -> list[Weight]:
    """A quantized weight (twice) among ones that stay as they are."""
    kept = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,), "lm_head.weight": (10, 4)}
    twin = replace(weight, name=NAME.replace("layers.0", "layers.1"))
    third = replace(weight, name=NAME.replace("layers.0", "layers.2"), scheme=None)
    return [weight, twin, third, *(Weight(name, shape, weight.dtype) for name, shape in kept.items())]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", DECLARED)
def test_is_found_again_in_a_file(name: str, scheme: str, tmp_path: Path) -> None:
    form: Format = plugins.load("formats", name)
    weight = next((w for w in fitted(form, scheme) if prod(w.shape) > 2000), None)
    if weight is None:
        return  # not stored; test_stores_its_default_scheme sees to it that some are
    weights = model(weight)
    meant = checkpoint(form, weights, tmp_path)
    found, tensors = opened(form, tmp_path)
    assert found is not None and found.keys() == meant.keys()
    owned = [key for w in found.values() for key in form.owns(w) if key in tensors]
    assert len(owned) == len(set(owned))
    assert set(tensors) - set(owned) == {w.name for w in weights if w.scheme is None}
    for key, w in found.items():
        assert (w.shape, w.scheme, w.dtype.is_floating_point) == (weight.shape, weight.scheme, True)
        assert_same(form.unpack(w, {part: tensors[part] for part in form.owns(w) if part in tensors}, None), meant[key])


@pytest.mark.parametrize("name", DECLARED)
def test_several_schemes_in_one_model(name: str, tmp_path: Path) -> None:
    """Formats that hold one scheme a model refuse in `config`; the others find each again."""
    form: Format = plugins.load("formats", name)
    candidates = [next((w for w in fitted(form, scheme) if w.shape == (128, 128)), None) for scheme in SCHEMES]
    schemes = {str(w.scheme): w for w in candidates if w is not None}
    weights = [replace(w, name=f"model.layers.{i}.mlp.up_proj.weight") for i, w in enumerate(schemes.values())]
    try:
        meant = checkpoint(form, weights, tmp_path)
    except UnsupportedError:
        return
    found, tensors = opened(form, tmp_path)
    assert found is not None
    for weight in weights:
        assert found[weight.name].scheme == weight.scheme
        assert_same(form.unpack(found[weight.name], tensors, None), meant[weight.name])


@pytest.mark.parametrize("name", FORMATS)
def test_leaves_other_checkpoints_alone(name: str, tmp_path: Path) -> None:
    form: Format = plugins.load("formats", name)
    assert form.recognise({}, {"model.norm.weight": Spec(torch.float32, (4,))}, dict[str, Tensor]().__getitem__) is None
    for other in set(FORMATS) - {name}:
        theirs: Format = plugins.load("formats", other)
        weight = Weight(NAME, (256, 512), torch.bfloat16)
        weight = replace(weight, scheme=theirs.fit(parse(theirs.default), weight))
        checkpoint(theirs, [weight], tmp_path)
        assert opened(form, tmp_path)[0] is None, other


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_that_stays_as_it_is(name: str) -> None:
    form: Format = plugins.load("formats", name)
    document = form.config([Weight(NAME, (4, 4), torch.float32)], SOURCE)["config.json"]
    assert document == SOURCE


@pytest.mark.parametrize("name", FORMATS)
def test_refuses_in_words(name: str) -> None:
    """What does not fit is refused with a reason, never with a failed assertion or a silent other scheme."""
    form: Format = plugins.load("formats", name)
    for scheme in SCHEMES:
        for shape in [*SHAPES, (3,), (2, 32, 32)]:
            weight = Weight(NAME, shape, torch.bfloat16)
            with suppress(UnsupportedError):
                found = form.fit(parse(scheme), weight)
                assert found.grid == parse(scheme).grid, "another grid is another scheme"


def damaged(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each stored tensor missing, of another shape or dtype, or full of NaN or ones; a name and the whole set."""
    for key, tensor in tensors.items():
        others: dict[str, Any] = {
            "transposed and longer": torch.zeros((*tensor.shape[::-1], 2), dtype=tensor.dtype),
            "longer": torch.cat([bits_of(tensor), bits_of(tensor)]).view(tensor.dtype).reshape(2, *tensor.shape),
            "empty": tensor.reshape(-1)[:0],
            "int16": torch.zeros(tensor.shape, dtype=torch.float64 if tensor.dtype == torch.int16 else torch.int16),
            "float64": torch.zeros(tensor.shape, dtype=torch.float64),
            "all bits set": torch.full_like(bits_of(tensor), 255).view(tensor.dtype).reshape(tensor.shape),
        }
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            others |= {"nan": torch.full_like(tensor, torch.nan), "inf": torch.full_like(tensor, torch.inf)}
        yield f"{key} missing", {k: t for k, t in tensors.items() if k != key}
        for what, other in others.items():
            yield f"{key} {what}", {**tensors, key: other}


HOSTILE = ["int3-g16-asym", "int4-g64", "int4-g64-asym", "int4-g64-fzero", "int8-row"]
HOSTILE += FLOATS + TABLES + OTHERS + VECTORS


def attempt(form: Format, weight: Weight, tensors: Mapping[str, Tensor]) -> tuple[str, QTensor | None]:
    """What reading a weight says, or gives."""
    try:
        return "", form.unpack(weight, tensors, None)
    except FormatError as error:
        return str(error), None


@pytest.mark.parametrize("scheme", HOSTILE)
@pytest.mark.parametrize("name", FORMATS)
def test_hostile_tensors(name: str, scheme: str) -> None:
    """Damage is a `FormatError` that names a tensor, or, where a tensor says nothing, changes nothing but values."""
    form: Format = plugins.load("formats", name)
    for weight in [w for w in fitted(form, scheme) if 1 < prod(w.shape) < 10000][-1:]:
        q, tensors = made(form, weight)
        for what, broken in damaged(tensors):
            error, found = attempt(form, weight, broken)
            if found is None:
                assert weight.module in error, f"{what}: the text names no tensor: {error}"
            elif "all bits set" in what:
                assert found.dequantize().isfinite().all(), what
            else:
                assert_same(found, q)
