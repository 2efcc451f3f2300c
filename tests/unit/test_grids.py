"""Float weights that lie on a grid are told from ordinary ones; other packages and definitions by hand make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.inspect import inspect
from lowbit.inspect.grids import recognise

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def normal(rows: int = 64, cols: int = 512) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(5)) * 0.02


def affine(bits: int, group: int, asym: bool) -> Tensor:
    """Integers by their definition, in numpy and float64."""
    weight = normal().numpy().astype(np.float64).reshape(-1, group)
    low, high = np.minimum(weight.min(1), 0)[:, None], np.maximum(weight.max(1), 0)[:, None]
    if asym:
        scale = (high - low) / (2**bits - 1)
        zero = np.rint(-low / scale)
        values = (np.clip(np.rint(weight / scale) + zero, 0, 2**bits - 1) - zero) * scale
    else:
        scale = np.maximum(-low, high) / (2 ** (bits - 1) - 1 / 2)
        values = np.clip(np.rint(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return torch.from_numpy(values.reshape(64, 512)).float()


@pytest.mark.parametrize(
    ("bits", "group", "asym", "wanted"),
    [
        (2, 32, False, "int2-g32"), (3, 64, False, "int3-g64"), (4, 128, False, "int4-g128"),
        (4, 32, True, "int4-g32-asym"), (5, 64, False, "int5-g64"), (6, 128, True, "int6-g128-asym"),
        (8, 512, False, "int8-row"), (8, 512, True, "int8-row-asym"), (8, 32, False, "int8-g32"),
        (4, 64 * 512, False, "int4-tensor"), (8, 64 * 512, False, "int8-tensor"),
    ],
)  # fmt: skip
def test_integers(bits: int, group: int, asym: bool, wanted: str) -> None:
    """Rounded to BF16, which takes more from the evidence than the other types do."""
    found = recognise(affine(bits, group, asym).to(BF16))
    assert found is not None
    assert found.scheme == wanted
    assert found.distinct <= 2**bits or found.scheme.endswith("tensor")


def bitsandbytes(kind: str) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(normal(), blocksize=64, quant_type=kind)
    found: Tensor = dequantize_4bit(packed, state)
    return found


def hqq(bits: int) -> Tensor:
    from hqq.core.quantize import Quantizer  # type: ignore[import-untyped]

    codes, meta = Quantizer.quantize(
        normal(), nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=F32, round_zero=False
    )
    found: Tensor = Quantizer.dequantize(codes, meta)
    return found


def gguf(kind: str) -> Tensor:
    from gguf import GGMLQuantizationType, dequantize, quantize

    number = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(normal().numpy(), number), number))


def compressed_tensors(kind: str, **settings: int | str | bool) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs  # type: ignore[import-untyped]
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # type: ignore[import-untyped]

    weight = normal()
    args = QuantizationArgs(num_bits=8, type="float", strategy=kind, **settings)
    scale = weight.abs().amax(1, keepdim=True) / 448 if kind == "channel" else (weight.abs().max() / 448).reshape(1)
    found: Tensor = fake_quantize(weight, scale, torch.zeros_like(scale), args)
    return found


PEERS: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: bitsandbytes("nf4"), "nf4-g64"),
    (lambda: bitsandbytes("fp4"), "fp4-g64"),
    (lambda: hqq(4), "int4-g64-min"),
    (lambda: hqq(3), "int3-g64-min"),
    (lambda: gguf("Q4_0"), "int4-g32"),
    (lambda: gguf("Q4_1"), "int4-g32-min"),
    (lambda: gguf("Q8_0"), "int8-g32"),
    (lambda: gguf("TQ1_0"), "levels[-1,0,1]-g256"),
    (lambda: gguf("MXFP4"), "mxfp4"),
    (lambda: compressed_tensors("channel"), "fp8-e4m3-row"),
    (lambda: compressed_tensors("tensor"), "fp8-e4m3-tensor"),
    (lambda: normal().to(torch.float8_e5m2).float(), "fp8-e5m2-tensor"),
]


@pytest.mark.parametrize(("make", "wanted"), PEERS, ids=[f"{at}-{row[1]}" for at, row in enumerate(PEERS)])
@pytest.mark.filterwarnings("ignore:.torch.jit.script.*:DeprecationWarning")  # hqq's
def test_what_other_packages_dequantized(make: Callable[[], Tensor], wanted: str) -> None:
    found = recognise(make().to(BF16))
    assert found is not None
    assert found.scheme == wanted


@pytest.mark.parametrize("dtype", [F16, F32])
def test_other_types(dtype: torch.dtype) -> None:
    found = [recognise(weight.to(dtype)) for weight in (affine(8, 512, True), gguf("Q4_1"))]
    assert [each and each.scheme for each in found] == ["int8-row-asym", "int4-g32-min"]


def sparse() -> Tensor:
    return normal() * (torch.rand(64, 512, generator=torch.Generator().manual_seed(1)) < 0.1)


@pytest.mark.parametrize(
    "weight",
    [normal(), normal(40, 100), sparse(), torch.zeros(64, 512), torch.ones(64, 512), normal() ** 3 * 1e4,
     torch.rand(64, 512, generator=torch.Generator().manual_seed(2)), torch.full((64, 64), torch.nan), normal(8, 16)],
)  # fmt: skip
def test_ordinary_weights_are_left_alone(weight: Tensor) -> None:
    assert recognise(weight.to(BF16)) is None


@pytest.mark.parametrize("dtype", [F16, F32])
def test_ordinary_weights_of_other_types(dtype: torch.dtype) -> None:
    assert recognise(normal().to(dtype)) is None


def test_a_trained_model_is_left_alone(wiki_8m: Path) -> None:
    tensors = list(load_file(wiki_8m / "model.safetensors").values())
    assert not [found for weight in tensors[::9] if (found := recognise(weight))]


def test_an_inspection_says_so(tmp_path: Path) -> None:
    save_file({"w": affine(4, 32, True).to(BF16), "x": normal().to(BF16)}, tmp_path / "m-4bit.safetensors")
    found = inspect(tmp_path / "m-4bit.safetensors")
    assert [facts.grid and facts.grid.scheme for facts in found.tensors] == ["int4-g32-asym", None]
    assert not found.findings
