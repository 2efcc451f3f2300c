"""Every format that is written, as the start of another run: what its codes stand for is what is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import plugins
from lowbit.errors import UsageError
from lowbit.formats import Format
from lowbit.pipeline import Request, find_plan, run
from lowbit.stages._dequantized import dequantized
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules
from tests.reference.checkpoints import NAMES, scattered, write_checkpoint
from tests.reference.qtensors import slow_dequantize

# GGUF and ONNX are of a whole model; what the others are read in alone is in the golden files.
FORMATS = [name for name in plugins.written() if name not in ("gguf", "onnx")]
SHAPE = (128, 128)


def made(path: Path, name: str, **options: Any) -> dict[str, torch.Tensor]:
    """A checkpoint in the format's default scheme, of a float32 model; what its weights stand for, slowly."""
    form: Format = plugins.load("formats", name)
    schemes = dict.fromkeys(NAMES, form.default)
    meant = write_checkpoint(path, name, schemes, dtype=torch.float32, shape=SHAPE, **options)
    return {weight: slow_dequantize(q) for weight, q in meant.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_view_has_what_codes_stand_for_in_the_type_of_the_model(name: str, tmp_path: Path) -> None:
    wanted = made(tmp_path / "in", name)
    with open_checkpoint(tmp_path / "in") as source:
        view = dequantized(source)
        assert view.format is None and list(view.weights) == list(source.weights)
        assert view.view.was.keys() == wanted.keys() and "quantization_config" not in view.config
        for weight in view.weights.values():
            assert weight.scheme is None and weight.dtype == torch.float32
            assert torch.equal(view.tensor(weight.name), wanted.get(weight.name, source.dequantized(weight.name)))
            assert view.specs[weight.name].shape == weight.shape == view.tensor(weight.name).shape
        assert set(view.specs) == set(view.weights), "no piece of the old format is left"


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_again_is_what_its_floats_quantized_are(name: str, tmp_path: Path) -> None:
    wanted = made(tmp_path / "in", name)
    kept = load_file(tmp_path / "in" / "model.safetensors")
    floats = {n: wanted[n] if n in wanted else kept[n] for n in open_checkpoint(tmp_path / "in").weights}
    (tmp_path / "floats").mkdir()
    save_file(floats, tmp_path / "floats" / "model.safetensors", {"format": "pt"})
    (tmp_path / "floats" / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    rules = Rules("int5-row", "rtn")
    found = run(Request(str(tmp_path / "in"), tmp_path / "out", rules, requantize=True))
    run(Request(str(tmp_path / "floats"), tmp_path / "expected", rules))
    files = [tmp_path / each / "model.safetensors" for each in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("out", "expected")]
    assert configs[0] == configs[1]
    assert sum(count.tensors for count in found.counts if count.kind == "quantized again") == len(NAMES)


def test_columns_in_an_order_of_their_own_and_files_of_the_old_format_stay_behind(tmp_path: Path) -> None:
    wanted = made(tmp_path / "in", "gptq", change=scattered, config={"quantization_config": {"desc_act": True}})
    assert (tmp_path / "in" / "quantize_config.json").exists()
    view = dequantized(open_checkpoint(tmp_path / "in"))
    assert all(torch.equal(view.tensor(name), value) for name, value in wanted.items())
    run(Request(str(tmp_path / "in"), tmp_path / "out", Rules("int5-row", "rtn"), requantize=True))
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_it_is_done_only_where_it_was_asked_for_and_on_floats_changes_nothing(tmp_path: Path) -> None:
    made(tmp_path / "in", "gptq")
    rules = Rules("int5-row", "rtn")
    with pytest.raises(UsageError, match=r"is already quantized \(gptq\).*--requantize"):
        run(Request(str(tmp_path / "in"), tmp_path / "refused", rules))
    plan = find_plan(Request(str(tmp_path / "in"), tmp_path / "plan.json", rules, requantize=True))
    (tmp_path / "plan.json").write_text(plan.to_json())
    with pytest.raises(UsageError, match="--requantize"):
        run(Request(str(tmp_path / "in"), tmp_path / "refused", plan=tmp_path / "plan.json"))
    assert not (tmp_path / "refused").exists()
    save_file({NAMES[0]: torch.ones(4, 8)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    source = open_checkpoint(tmp_path / "in")
    assert dequantized(source) is source
