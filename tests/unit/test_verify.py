"""Verification finds what a disk, or a packer, got wrong, and says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.budget import MemoryWatch
from lowbit.errors import VerifyError
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.verify import verify
from lowbit.stages.write import open_output

NAME = "layers.0.proj.weight"


def write_model(path: Path) -> Path:
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {NAME: torch.randn(64, 128, generator=generator), "norm.weight": torch.ones(128)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "made-up"}')
    return path


def damage(out: Path, stored: str, element: int) -> None:
    """Change one element of a stored tensor, as a packer with a mistake would."""
    tensors = load_file(out / "model.safetensors")
    flat = tensors[stored].reshape(-1)
    flat[element] = flat[element] * 2 + 1 if flat.is_floating_point() else flat[element] ^ 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("scheme", "form", "stored", "element", "words"),
    [
        ("int4-g128", "compressed-tensors", "layers.0.proj.weight_packed", 5, "element 40 of its codes"),
        ("int4-g128", "compressed-tensors", "layers.0.proj.weight_scale", 7, "element 7 of its scales"),
        ("int4-g64-asym", "compressed-tensors", "layers.0.proj.weight_zero_point", 0, "element 0 of its zeros"),
        ("nf4-dq", "bitsandbytes", "layers.0.proj.weight.absmax", 3, r"element 3 of its scales\.codes"),
        ("int4-g128", "gptq", "layers.0.proj.qweight", 64, r"element 8 of its codes"),
        ("int4-g128", "compressed-tensors", "norm.weight", 9, "element 9 of its weight: 3.0 is stored, 1.0 was meant"),
    ],
)
@pytest.mark.parametrize("healthy", [False, True])
def test_a_changed_element_fails_the_run_by_name(
    tmp_path: Path, scheme: str, form: str, stored: str, element: int, words: str, healthy: bool
) -> None:
    with open_checkpoint(write_model(tmp_path / "m")) as source:
        plan = make_plan(source, Rules(scheme, format=form))
        way = estimate_memory(plan, None, 2)
        with open_output(tmp_path / "out", source, plan) as output:
            quantize(source, plan, output, way, MemoryWatch(None))
            output.finish(source)
            if healthy:
                assert verify(source, output, way).tensors == 2
                return
            damage(tmp_path / "out", stored, element)
            with pytest.raises(VerifyError, match=words) as caught:
                verify(source, output, way)
            assert (NAME in str(caught.value)) != (stored == "norm.weight")


def test_a_tensor_too_many_is_not_overlooked(tmp_path: Path) -> None:
    with open_checkpoint(write_model(tmp_path / "m")) as source:
        plan = make_plan(source, Rules("int4-g128"))
        way = estimate_memory(plan, None, 1)
        with open_output(tmp_path / "out", source, plan) as output:
            quantize(source, plan, output, way, MemoryWatch(None))
            output.finish(source)
            tensors = load_file(tmp_path / "out/model.safetensors") | {"stray": torch.ones(1)}
            save_file(tensors, tmp_path / "out/model.safetensors")
            with pytest.raises(VerifyError, match="stray is there and was not meant"):
                verify(source, output, way)
