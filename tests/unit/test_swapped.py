"""Weights that a model holds as `[inputs, outputs]`: GPT-2's `Conv1D`, square ones among them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lowbit.budget import MemoryWatch
from lowbit.errors import UnsupportedError
from lowbit.stages._model import open_blueprint
from lowbit.stages.calibrate import calibrate, prepare
from lowbit.stages.checkpoint import Checkpoint, arch_rows, open_checkpoint, swapped
from lowbit.stages.plan import Calibration, Plan, Rules, as_planned, load_plan, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.verify import verify
from lowbit.stages.write import Record, open_output
from tests.reference.models import SETTINGS, save_tiny

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
MATRICES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
NAMES = [f"transformer.h.{block}.{each}.weight" for block in (0, 1) for each in MATRICES]


def conv1d_weights(model: Any) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_table_names_what_the_class_holds_transposed(kind: str, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    named = {name for name, weight in checkpoint.weights.items() if swapped(checkpoint.config, weight)}
    assert named == conv1d_weights(model) and bool(named) == (kind == "gpt2")


def test_the_table_has_every_model_that_uses_the_layer() -> None:
    spec = find_spec("transformers")
    assert spec and spec.origin
    files = Path(spec.origin).parent.glob("models/*/modeling_*.py")
    users = {path.parent.name for path in files if re.search(r"pytorch_utils import .*\bConv1D\b", path.read_text())}
    types = {name.replace("-gpt", "") for row in arch_rows("swapped") for name in row["model_types"]}
    assert users <= types


def quantized(
    folder: Path, method: str, scheme: str = "int4-g16", form: str = "gptq"
) -> tuple[Any, Plan, Checkpoint, dict[str, Record]]:
    """A tiny GPT-2 and its quantized checkpoint, as the line makes it."""
    model = save_tiny("gpt2", folder / "model")
    source = open_checkpoint(folder / "model")
    text = Calibration(("text",), dtype="float32") if method != "rtn" else None
    plan = make_plan(source, Rules(scheme, method, form, calibration=text))
    source, way = as_planned(source, plan), estimate_memory(plan, None, 1)
    with open_output(folder / "out", source, plan) as output:
        if text:
            calibrate(prepare(source, plan, IDS, None, 1), output, MemoryWatch(None))
        quantize(source, plan, output, way, MemoryWatch(None))
        output.finish(source)
        verify(source, output, way)
        records = dict(output.records)
    return model, plan, open_checkpoint(folder / "out"), records


def nearest(weight: Tensor) -> Tensor:
    """Round to nearest in 4 bits, one run of 16 inputs of one output after the other; the scale is a float16."""
    out = torch.empty_like(weight)
    for row in range(len(weight)):
        for at in range(0, weight.shape[1], 16):
            part = weight[row, at : at + 16].double()
            scale = float((part.abs().max() / 7.5).half())
            out[row, at : at + 16] = (part.float() / scale).round().clamp(-8, 7) * scale
    return out


@pytest.mark.parametrize("streamed", [False, True])
def test_groups_run_along_the_inputs_and_the_model_gets_its_weights_back(streamed: bool, tmp_path: Path) -> None:
    model, _, written, _ = quantized(tmp_path, "rtn")
    with torch.no_grad():
        for name in NAMES:
            weight = written.weights[name]
            own = model.get_parameter(name)
            assert weight.scheme is not None and weight.shape == tuple(own.shape[::-1])
            wanted = nearest(own.T)
            torch.testing.assert_close(written.dequantized(name, torch.float32), wanted.T, atol=1e-6, rtol=1e-3)
            own.copy_(wanted.T)
        blueprint = open_blueprint(written, torch.float32)
        found = (blueprint.streamed() if streamed else blueprint.resident())(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(found, model(input_ids=IDS, use_cache=False).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround", "gptq+eora"])
def test_calibrated_methods_reach_every_matrix(method: str, tmp_path: Path) -> None:
    model, _, written, records = quantized(tmp_path, method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(written.dequantized(name, torch.float32))
        hidden: list[Tensor] = []
        model.transformer.h[-1].register_forward_hook(lambda _, inputs, out: hidden.append(out))
        model(input_ids=IDS, use_cache=False)
        path = str(tmp_path / "out/.lowbit/hidden/quantized-2.bin")
        passed_on = torch.from_file(path, size=hidden[0].numel(), dtype=torch.float32).view_as(hidden[0])
    for name in NAMES:
        facts = records[name].facts
        assert facts["fallback"] != "no calibration row reached it" and facts["relative_error"] < 0.02
    if method != "gptq+eora":
        torch.testing.assert_close(passed_on, hidden[0], atol=1e-3, rtol=1e-3)


def test_the_statistics_are_of_the_inputs(tmp_path: Path) -> None:
    """GPTQ under the plan's groups has less error than rounding to nearest, in every matrix."""
    _, _, _, records = quantized(tmp_path, "gptq", "int3-g16")
    assert all(records[name].facts["against_rtn"] < 0.95 for name in NAMES)


@pytest.mark.parametrize("form", ["compressed-tensors", "hqq"])
def test_formats_whose_readers_do_not_take_them_keep_them_with_the_reason(form: str, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    source = open_checkpoint(tmp_path)
    plan = make_plan(source, Rules(format=form))
    assert all(entry.weight.scheme is None for entry in plan.entries)
    reasons = {entry.reason for entry in plan.entries if entry.weight.name in NAMES}
    assert len(reasons) == 1 and re.search(r"transposed linear layer \(Conv1D\).* gptq", reasons.pop())
    assert as_planned(source, plan) is source
    with pytest.raises(UnsupportedError, match=r"c_fc\.weight is a transposed linear layer"):
        make_plan(source, Rules(format=form, sets=((r"c_fc\.weight", "int8-row"),)))


def test_a_saved_plan_comes_back_equal(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    source, file = open_checkpoint(tmp_path), tmp_path / "plan.json"
    plan = make_plan(source, Rules("int4-g16", format="gptq", skip=("c_fc",)))
    file.write_text(plan.to_json())
    assert load_plan(file, source) == plan
    chosen = {entry.weight.name: entry.weight.shape for entry in plan.entries if entry.weight.scheme}
    assert chosen.keys() == {name for name in NAMES if "c_fc" not in name}
    assert chosen[NAMES[0]] == (96, 32)
