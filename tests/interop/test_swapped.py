"""GPT-2's `Conv1D`, stored as `[outputs, inputs]`, opened by the packages that own the formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.budget import MemoryWatch
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Rules, as_planned, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.write import open_output
from lowbit.tensors import QTensor
from tests.reference.models import save_tiny

transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 35)[None]


def written(folder: Path, form: str, scheme: str) -> Checkpoint:
    """A tiny GPT-2, all matrices of its blocks rounded to nearest."""
    save_tiny("gpt2", folder / "model", torch.float16)
    source = open_checkpoint(folder / "model")
    plan = make_plan(source, Rules(scheme, "rtn", form))
    source = as_planned(source, plan)
    with open_output(folder / "out", source, plan) as output:
        quantize(source, plan, output, estimate_memory(plan, None, 1), MemoryWatch(None))
        output.finish(source)
    return open_checkpoint(folder / "out")


def meant(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """`[outputs, inputs]` of each quantized matrix, by module."""
    found = {}
    for name, weight in checkpoint.weights.items():
        if weight.scheme:
            loaded = checkpoint.load(name)
            assert isinstance(loaded, QTensor)
            found[weight.module] = loaded.dequantize(dtype)
    assert len(found) == 8
    return found


def logits_here(checkpoint: Checkpoint) -> Tensor:
    with torch.no_grad():
        found: Tensor = open_blueprint(checkpoint, torch.float32).resident()(input_ids=IDS, use_cache=False).logits
    return found


def check_logits(model: Any, checkpoint: Checkpoint) -> None:
    """The reader computes in a type of its own, one with rounded inputs; wrong layers would not be near."""
    with torch.no_grad():
        found, wanted = model(input_ids=IDS).logits.float(), logits_here(checkpoint)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_auto_round_loads_them(tmp_path: Path) -> None:
    pytest.importorskip("auto_round")
    checkpoint = written(tmp_path, "gptq", "int4-g32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=transformers.AutoRoundConfig(backend="torch")
    )
    for module, weight in meant(checkpoint, torch.float16).items():
        found = model.get_submodule(module)
        bias = found.bias if found.bias is not None else 0
        made = found(torch.eye(weight.shape[1], dtype=torch.float16)).T - torch.as_tensor(bias)[:, None]
        torch.testing.assert_close(made.float(), weight.float(), atol=2e-3, rtol=2e-3)
    check_logits(model, checkpoint)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves a directory to clean up
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptqmodel_loads_them(form: str, tmp_path: Path, wiki_8m: Path) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    checkpoint = written(tmp_path, form, "int4-g32" if form == "gptq" else "int4-g32-asym")
    for file in wiki_8m.glob("token*"):
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    model = gptqmodel.GPTQModel.load(
        str(tmp_path / "out"), backend=gptqmodel.BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    ).model
    for module, weight in meant(checkpoint, torch.float16).items():
        assert torch.equal(model.get_submodule(module).dequantize_weight().T, weight), module
    check_logits(model, checkpoint)


@pytest.mark.parametrize("scheme", ["nf4-g32", "fp4-g32", "int8-row"])
def test_bitsandbytes_loads_them(scheme: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    checkpoint = written(tmp_path, "bitsandbytes", scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for path, weight in meant(checkpoint, torch.float16).items():
        module = model.get_submodule(path)
        assert isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
        found = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
        assert torch.equal(found.half(), weight), path
    check_logits(model, checkpoint)
