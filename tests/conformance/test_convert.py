"""Every format that is read into every format that is written, found by listing: what is called lossless is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lowbit import plugins
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Weight
from lowbit.pipeline import run_conversion
from lowbit.schemes import parse
from lowbit.stages._changes import Changer, Goal
from lowbit.stages._rooms import Rooms
from lowbit.stages.checkpoint import open_checkpoint
from tests.reference.checkpoints import NAMES, SHAPE, scattered, write_checkpoint
from tests.reference.qtensors import slow_dequantize

# GGUF and ONNX are of a whole model: tests/interop/test_gguf.py, test_onnx.py.
FORMATS = [name.replace("_", "-") for name in plugins.written() if name not in ("gguf", "onnx")]
# One of each kind that formats tell apart: bits, blocks, zero points, tables, small floats, quantized scales.
SCHEMES = [
    "int2-g64", "int3-g32", "int4-g64", "int4-row", "int4-g64-asym", "int8-g128", "int8-row", "int4-g64-fzero",
    "int4-g64-min", "int2-g32-min", "levels[-1,0,1]-tensor", "fp8-e4m3-128x128",
    "nf4-g64", "nf4-g64-dq", "fp4-g64", "fp8-e4m3-tensor", "fp8-e4m3-row", "fp8-e4m3-64x64", "mxfp4", "mxfp8", "nvfp4",
    "vectors[1x8:8+8]-row", "vectors[8*3x1:5,4x1:7+9]-column-min-perm", "spqr-perm-sparse7",
]  # fmt: skip


def sources() -> Iterator[tuple[str, str, bool]]:
    """Format, scheme, whether the columns have an order of their own: each fitted scheme once."""
    for name in FORMATS:
        form: Format = plugins.load("formats", name)
        seen = set()
        for scheme in SCHEMES:
            with suppress(UnsupportedError):
                fitted = form.fit(parse(scheme), Weight(NAMES[0], SHAPE, torch.float16))
                if fitted not in seen:
                    seen.add(fitted)
                    yield name, scheme, False
                    if name.startswith("gptq"):
                        yield name, scheme, True


SOURCES = list(sources())


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize(("name", "scheme", "act_order"), SOURCES, ids=["-".join(map(str, each)) for each in SOURCES])
def test_what_is_called_lossless_is_and_goes_back_to_the_same_bytes(
    name: str, scheme: str, act_order: bool, tmp_path: Path
) -> None:
    """Values against the slow definition; back, the same weight files where nothing had to be spelled otherwise."""
    settings = {"quantization_config": {"desc_act": True}} if act_order else None
    try:
        meant = write_checkpoint(
            tmp_path / "made", name, {NAMES[0]: scheme}, change=scattered if act_order else lambda q: q, config=settings
        )
    except FormatError:
        pytest.skip(f"{name} has no such tensors at random")
    except UnsupportedError as error:
        pytest.skip(f"{name} has no such tensors alone: {error}")
    wanted = {weight: slow_dequantize(q) for weight, q in meant.items()}
    start = tmp_path / "start"
    assert run_conversion(str(tmp_path / "made"), start, Goal(name)).lossless, "into its own format"
    for target in (each for each in FORMATS if each != name):
        with open_checkpoint(start) as source:
            changer = Changer(source, Goal(target), torch.float16, Rooms(tmp_path, False), 1 << 20)
            change = changer.lossless(source.weights[NAMES[0]])
        if isinstance(change, str):
            assert change
            continue
        there, back = tmp_path / target, tmp_path / f"{target}-back"
        assert run_conversion(str(start), there, Goal(target)).largest == 0
        with open_checkpoint(there) as found:
            assert found.format == target.replace("-", "_")
            for weight, value in wanted.items():
                assert torch.equal(bits_of(found.dequantized(weight, torch.float32)), bits_of(value)), target
        try:
            assert run_conversion(str(there), back, Goal(name)).lossless
        except UnsupportedError:
            assert respelled(change.entry.reason), target
            continue
        if respelled(change.entry.reason):
            continue
        assert (back / "model.safetensors").read_bytes() == (start / "model.safetensors").read_bytes(), target


def respelled(reason: str) -> bool:
    """Whether the other format holds the values in a scheme that does not lead back."""
    return any(words in reason for words in ("repeated for", "written out", "which has its levels"))
