"""Files of the format `mlx`, opened by MLX, and its own read by us: float32 to the bit, 16 bits but for a rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.formats import Weight
from lowbit.formats.mlx import BITS, FORMAT, GROUPS, MODES
from lowbit.schemes import parse
from tests.interop.models import at_random, recognised, stored, unpacked

mx: Any = pytest.importorskip("mlx.core")

MODULE = "model.layers.0.mlp.up_proj"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def as_torch(array: Any) -> Tensor:
    """bfloat16 by way of float32, which holds it."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(numpy.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(numpy.array(array))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_loads_the_same_weights(bits: int, size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = Weight(f"{MODULE}.weight", (12, 256), dtype)
    weight = replace(weight, scheme=FORMAT.fit(parse(f"int{bits}-g{size}"), weight))
    q = at_random(weight, bits)
    save_file(stored(FORMAT, weight, q), tmp_path / "model.safetensors")
    found = mx.load(str(tmp_path / "model.safetensors"))
    words, scales, biases = (found[f"{MODULE}.{part}"] for part in ("weight", "scales", "biases"))
    exact = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), size, bits)
    assert torch.equal(as_torch(exact), q.dequantize())
    same = as_torch(mx.dequantize(words, scales, biases, size, bits))
    assert same.dtype == dtype
    near = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * float(q.dequantize().abs().max())
    torch.testing.assert_close(same, q.dequantize(dtype), rtol=0, atol=near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_reads_what_mlx_makes(bits: int, size: int, dtype: torch.dtype) -> None:
    made = mx.random.normal((12, 256), key=mx.random.key(bits)).astype(getattr(mx, str(dtype).removeprefix("torch.")))
    words, scales, biases = mx.quantize(made, size, bits)
    parts = {"weight": words, "scales": scales, "biases": biases}
    tensors = {f"{MODULE}.{name}": as_torch(part) for name, part in parts.items()}
    known = recognised(FORMAT, {"quantization": {"group_size": size, "bits": bits}}, tensors)
    assert known is not None
    found = unpacked(FORMAT, known[f"{MODULE}.weight"], tensors)
    assert (found.scheme.block.cols, found.scheme.grid.bits, found.scheme.zero) == (size, bits, "min")
    exact = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), size, bits)
    assert torch.equal(found.dequantize(), as_torch(exact))


def small(mode: str) -> dict[str, Any]:
    """Parameters of MLX for small floats."""
    return {"group_size": MODES[mode].block.cols, "bits": MODES[mode].grid.bits, "mode": mode}


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_mlx_loads_the_same_small_floats(mode: str, tmp_path: Path) -> None:
    weight = Weight(f"{MODULE}.weight", (12, 256), torch.bfloat16)
    weight = replace(weight, scheme=FORMAT.fit(parse(mode), weight))
    q = at_random(weight, 3)
    save_file(stored(FORMAT, weight, q), tmp_path / "model.safetensors")
    found = mx.load(str(tmp_path / "model.safetensors"))
    exact = mx.dequantize(found[f"{MODULE}.weight"], found[f"{MODULE}.scales"], dtype=mx.float32, **small(mode))
    assert torch.equal(as_torch(exact), q.dequantize())


@pytest.mark.parametrize("mode", MODES)
def test_reads_small_floats_that_mlx_makes(mode: str) -> None:
    """Beside a module of integers, whose own parameters say no mode."""
    made = mx.random.normal((12, 256), key=mx.random.key(1)) * mx.exp(mx.random.normal((12, 1), key=mx.random.key(2)))
    words, scales = mx.quantize(made, **small(mode))
    parts = {f"{MODULE}.weight": words, f"{MODULE}.scales": scales}
    parts |= {
        f"m.{name}": part for name, part in zip(("weight", "scales", "biases"), mx.quantize(made, 64, 8), strict=True)
    }
    tensors = {name: as_torch(part) for name, part in parts.items()}
    known = recognised(FORMAT, {"quantization": {**small(mode), "m": {"group_size": 64, "bits": 8}}}, tensors)
    assert known is not None
    assert str(known["m.weight"].scheme) == "int8-g64-min-f32"
    found = unpacked(FORMAT, known[f"{MODULE}.weight"], tensors)
    assert found.scheme == MODES[mode]
    exact = mx.dequantize(words, scales, dtype=mx.float32, **small(mode))
    assert torch.equal(found.dequantize(), as_torch(exact))
