"""Calibrated runs with blocks on a simulated device (`device.cpp`); a process keeps it once it has it."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import rename_privateuse1_backend
from torch.utils.cpp_extension import load

from lowbit.budget import MemoryWatch
from lowbit.stages._blocks import LiveBlock
from lowbit.stages.calibrate import calibrate, prepare
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Calibration, Rules, as_planned, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.write import open_output

NAME = "simulated"
IDS = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))


def start(folder: Path) -> None:
    """Build the device and make it known."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    source = Path(__file__).with_name("device.cpp")
    load("simulated_device", [str(source)], ["-O0"], build_directory=str(folder), is_python_module=False)
    rename_privateuse1_backend(NAME)
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": True}
    functions = {name: lambda answer=answer: answer for name, answer in answers.items()}
    torch._register_device_module(NAME, types.SimpleNamespace(manual_seed_all=None, **functions))  # type: ignore[no-untyped-call]


def refusal() -> str:
    """What the device says of a tensor that was left on the processor."""
    there = torch.ones(3, device=NAME)
    assert (there + 1).cpu().tolist() == [2, 2, 2]
    try:
        there + torch.ones(3)
    except RuntimeError as error:
        return str(error)
    return ""


def quantized(
    model: Path, out: Path, method: str, device: str, scheme: str = "int4-g8", **more: Any
) -> tuple[dict[str, Tensor], set[str]]:
    """Weights after a calibrated run, and where the blocks' weights were when they ran."""
    seen, run = set[str](), LiveBlock.run

    def watched(self: LiveBlock, *args: Any, **kwargs: Any) -> Tensor:
        seen.update(parameter.device.type for parameter in self.module.parameters())
        return run(self, *args, **kwargs)

    source = open_checkpoint(model)
    plan = make_plan(
        source, Rules(scheme, method, calibration=Calibration(("x",), dtype="float32", device=device), **more)
    )
    ready = prepare(as_planned(source, plan), plan, IDS, None, 1)
    with open_output(out, ready.source, ready.plan) as output:
        LiveBlock.run = watched  # type: ignore[method-assign]
        try:
            calibrate(ready, output, MemoryWatch(None))
        finally:
            LiveBlock.run = run  # type: ignore[method-assign]
        quantize(ready.source, ready.plan, output, estimate_memory(ready.plan, None, 1), MemoryWatch(None))
        output.finish(ready.source)
    made = open_checkpoint(out)
    return {name: made.dequantized(name) for name, weight in made.weights.items() if weight.scheme}, seen
