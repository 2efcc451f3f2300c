"""Pieces, joins and errors of the quantize stage, against plain torch on whole tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.methods import Method
from lowbit.plugins import load, names
from lowbit.schemes import parse
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Entry, Rules, make_plan
from lowbit.stages.quantize import make, measure, pieces_of
from lowbit.tensors import QTensor, view_shape

SCHEMES = [
    "int4-g32", "int4-g48-asym", "int8-row", "int8-tensor", "int4-tensor-asym", "fp8-e4m3-16x16", "fp8-e5m2-tensor",
    "nf4-flat64", "nf4-flat64-dq", "nf4-g32-dq", "mxfp4", "mxfp8", "nvfp4", "int3-g32-fzero", "levels[-1,0,0.5]-row",
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 96), (33, 100), (64, 32)])
@pytest.mark.parametrize("elements", [1, 500, 10**9])
def test_pieces_cover_a_tensor_once_and_end_on_blocks(scheme: str, shape: tuple[int, int], elements: int) -> None:
    block = parse(scheme).block
    seen = torch.zeros(view_shape(shape, block), dtype=torch.int)
    for rows, cols in pieces_of(shape, block, elements):
        seen[rows, cols] += 1
        assert rows.start % max(block.rows, 1) == 0
        assert not block.flat or cols.start % block.cols == 0
    assert (seen == 1).all()


def checkpoint_of(path: Path, weight: torch.Tensor) -> Path:
    save_file({"proj.weight": weight}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "made-up"}))
    return path


def with_scheme(entry: Entry, scheme: str) -> Entry:
    return replace(entry, weight=replace(entry.weight, scheme=parse(scheme)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pieces_give_what_the_whole_gives(tmp_path: Path, scheme: str) -> None:
    """Small pieces against one piece: every part of the result is equal to the bit."""
    weight = torch.randn(45, 96, generator=torch.Generator().manual_seed(3))
    with open_checkpoint(checkpoint_of(tmp_path, weight)) as checkpoint:
        plan = make_plan(checkpoint, Rules("int8-row"))
        entry = with_scheme(plan.entries[0], scheme)
        small, whole = make(checkpoint, plan, entry, 800), make(checkpoint, plan, entry, 10**9)
    assert isinstance(small, QTensor) and isinstance(whole, QTensor)
    left, right = dict(small.parts()), dict(whole.parts())
    assert left.keys() == right.keys()
    for name, part in left.items():
        assert torch.equal(part, right[name]), name
    error = (small.dequantize() - weight).square().sum() / weight.square().sum()
    assert error < 0.75


@pytest.mark.parametrize(("name", "scheme"), [
    (name, scheme) for name in names("methods") for scheme in [*SCHEMES, "q4_k"]
    if load("methods", name).into and not load("methods", name).objection(parse(scheme))
])  # fmt: skip
def test_codes_go_into_the_memory_that_is_given(name: str, scheme: str) -> None:
    """The buffer is full of another code before; with and without it the result is the same."""
    method: Method = load("methods", name)
    assert method.into
    weight = torch.randn(view_shape((45, 96), parse(scheme).block), generator=torch.Generator().manual_seed(3))
    memory = torch.full(weight.shape, 255).byte()
    stats = {"range": torch.stack([weight.min(), weight.max()]), "mean_square": weight.square().mean(0)}
    found = method.into(weight, stats, parse(scheme), method.options(), memory)
    wanted = method.quantize(weight, stats, parse(scheme), method.options())
    assert found.codes.data_ptr() == memory.data_ptr() != wanted.codes.data_ptr()
    for (_, left), (_, right) in zip(found.parts(), wanted.parts(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g48-asym", "nf4-flat64", "mxfp4"])
def test_the_error_is_the_squared_distance(tmp_path: Path, scheme: str) -> None:
    weight = torch.randn(45, 96, generator=torch.Generator().manual_seed(3))
    with open_checkpoint(checkpoint_of(tmp_path, weight)) as checkpoint:
        plan = make_plan(checkpoint, Rules("int8-row"))
        result = make(checkpoint, plan, with_scheme(plan.entries[0], scheme), 10**9)
    assert isinstance(result, QTensor)
    error = measure(weight.reshape(result.codes.shape), result)
    distance = (result.dequantize().double() - weight.double()).square().sum() / weight.double().square().sum()
    assert error.relative == pytest.approx(float(distance), rel=1e-6)
    assert error.largest == pytest.approx(float((result.dequantize() - weight).abs().max()))
