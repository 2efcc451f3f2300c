"""What readers of a format do not know for what it is: kept, or said before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import lowbit
from lowbit.errors import UnsupportedError
from lowbit.formats._linear import skipped_modules
from lowbit.pipeline import Request, run
from lowbit.stages.checkpoint import arch_rows, open_checkpoint
from lowbit.stages.plan import Entry, Plan, Rules, make_plan
from tests.reference.models import save_tiny

MATRIX = "transformer.h.0.mlp.dense_h_to_4h.weight"


def planned(path: Path, form: str, scheme: str, **rules: Any) -> dict[str, Entry]:
    made: Plan = make_plan(open_checkpoint(path), Rules(scheme, format=form, **rules))
    return {entry.weight.name: entry for entry in made.entries}


@pytest.mark.parametrize(
    ("form", "scheme", "stays"),
    [
        ("bitsandbytes", "nf4-g32", True),
        ("bitsandbytes", "int8-row", True),
        ("compressed-tensors", "int4-g32", True),
        ("compressed-tensors", "fp8-e4m3-row", False),
        ("gptq", "int4-g32", False),
        ("awq", "int4-g32-asym", False),
    ],
)
def test_layers_of_a_class_of_their_own(form: str, scheme: str, stays: bool, tmp_path: Path) -> None:
    model = save_tiny("falcon", tmp_path / "model", hidden_size=64)
    own = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "FalconLinear"}
    found = planned(tmp_path / "model", form, scheme)
    kept = {name for name, entry in found.items() if "FalconLinear" in entry.reason}
    assert kept == (own if stays else set())
    assert all((found[name].weight.scheme is None) == stays for name in own)


def test_who_names_such_a_layer_gets_it(tmp_path: Path) -> None:
    save_tiny("falcon", tmp_path / "model")
    found = planned(tmp_path / "model", "bitsandbytes", "nf4-g32", sets=(("dense_h_to_4h", "nf4-g32"),))
    assert found[MATRIX].weight.scheme is not None


def test_a_conversion_into_such_a_layer_is_refused(tmp_path: Path) -> None:
    save_tiny("falcon", tmp_path / "model")
    lowbit.quantize(tmp_path / "model", tmp_path / "awq", format="awq", scheme="int4-g32-asym")
    with pytest.raises(UnsupportedError, match="FalconLinear"):
        lowbit.convert(tmp_path / "awq", tmp_path / "out", format="compressed-tensors")


def test_the_table_has_every_class_that_is_made_of_linear() -> None:
    """Of those that models hold their matrices in; routers and parts that see are kept by rules of their own."""
    import transformers

    made = {name for row in arch_rows("readers") for name in row["model_types"]}
    folder = Path(transformers.__file__).parent / "models"
    texts = {path: path.read_text() for path in folder.glob("*/modeling_*.py")}
    users = {path.parent.name for path, text in texts.items() if f"({nn.Linear.__name__}):" in text.replace("nn.", "")}
    assert users - {"llama4", "phimoe", "idefics", "esm"} <= made


def test_step_sizes_stay(tmp_path: Path) -> None:
    save_tiny("mamba", tmp_path / "model")
    found = planned(tmp_path / "model", "compressed-tensors", "int4-g16")
    kept = {name.split("mixer.")[1] for name, entry in found.items() if "mixer" in name and not entry.weight.scheme}
    assert kept >= {"dt_proj.weight", "out_proj.weight"} and not kept & {"in_proj.weight", "x_proj.weight"}
    named = skipped_modules([entry.weight for entry in found.values()])
    assert "backbone.layers.0.mixer.dt_proj" in named
    assert "backbone.layers.0.mixer" not in named  # that has `A_log`, a matrix, and all that is quantized


def joins(mapping: list[Any]) -> bool:
    """Whether experts of a file become one tensor."""
    sources = [each.source_patterns for each in mapping]
    names = [name for each in sources for name in ([each] if isinstance(each, str) else each)]
    return any("experts.*" in name.replace("\\", "") for name in names)


def test_the_table_has_every_model_whose_experts_transformers_joins() -> None:
    build: Any = conversion_mapping._build_checkpoint_conversion_mapping
    found = {kind for kind, each in build().items() if joins(each)}
    known = {name for table in ("readers", "experts") for row in arch_rows(table) for name in row["model_types"]}
    assert found & CAUSAL.keys() <= known


@pytest.mark.parametrize(
    ("form", "scheme", "said"),
    [("gptq", "int4-g32", True), ("bitsandbytes", "nf4-g32", True), ("compressed-tensors", "int4-g32", False),
     ("compressed-tensors", "nvfp4", True)],
)  # fmt: skip
def test_experts_that_transformers_does_not_join_are_told(form: str, scheme: str, said: bool, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model", intermediate_size=64, num_key_value_heads=4)
    told, rules = list[str](), Rules(scheme, format=form)
    run(Request(str(tmp_path / "model"), tmp_path / "out", rules), tell=lambda line: told.append(str(line)))
    text = "24 weights, as model.layers.0.block_sparse_moe.experts.0.w1.weight, are experts that transformers 5"
    assert [line.startswith(text) for line in told] == [True] * said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [count["tensors"] for count in report["counts"] if count["kind"] == "apart"] == [24] * said
