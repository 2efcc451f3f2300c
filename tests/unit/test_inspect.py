"""Inspection finds what was planted, counts what is there, and stays silent where nothing is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.inspect import Finding, inspect
from lowbit.inspect.sanity import CHUNK, check_plain, check_quantized, code_counts
from lowbit.schemes import parse
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.tensors import QTensor


def sound(scheme: str = "int4-g32", rows: int = 8, cols: int = 96, dtype: torch.dtype = torch.float16) -> QTensor:
    """A tensor in which every code of the grid occurs, under scales of one."""
    parsed = parse(scheme)
    count = len(parsed.grid.levels)
    codes = (torch.arange(rows * cols) % count).to(torch.uint8).reshape(rows, cols)
    blocks = (rows, -(-cols // (parsed.block.cols or cols)))
    zeros = {"none": None, "int": torch.full(blocks, count // 2, dtype=torch.uint8), "float": torch.full(blocks, 7.5)}
    return QTensor(parsed, (rows, cols), codes, torch.ones(blocks), zeros[parsed.zero])


def facts(q: QTensor, dtype: torch.dtype = torch.float16) -> list[str]:
    return [f"{finding.level}: {finding.fact}" for finding in check_quantized("w", q, dtype)[1]]


def put(values: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    changed = values.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32-asym", "int8-row", "nf4-g32", "int4-g32-fzero", "int1-g32"])
def test_a_sound_tensor_gives_no_finding(scheme: str) -> None:
    q = sound(scheme)
    codes, found = check_quantized("w", q, torch.float16)
    assert not found
    assert (codes.used, codes.available) == (len(q.scheme.grid.levels), len(q.scheme.grid.levels))


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_counted_and_placed(value: float, dtype: torch.dtype) -> None:
    rows = CHUNK // 1024 + 1  # the second piece holds the second one
    weight = torch.ones(rows, 1024, dtype=dtype)
    weight[3, 17], weight[rows - 1, 1023] = value, nan
    (finding,) = check_plain("w", weight)
    counts = "2 NaN and 0 Inf" if isnan(value) else "1 NaN and 1 Inf"
    assert finding == Finding("error", "w", f"{counts}, the first at [3, 17]")


def test_the_first_bad_element_may_be_far_in() -> None:
    (finding,) = check_plain("w", put(torch.ones(3, CHUNK), (2, 5), nan))
    assert finding.fact == "1 NaN and 0 Inf, the first at [2, 5]"


def test_nan_in_an_8_bit_float_is_found() -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    weight.view(torch.uint8)[1, 2] = 0x7F
    assert check_plain("w", weight) == [Finding("error", "w", "1 NaN and 0 Inf, the first at [1, 2]")]


def test_zeros_are_worth_a_note_in_a_matrix_only() -> None:
    assert check_plain("w", torch.zeros(4, 4)) == [Finding("note", "w", "every element is zero")]
    assert not check_plain("w", torch.zeros(4))
    assert not check_plain("w", put(torch.zeros(4, 4), (3, 3), 1e-30))
    assert not check_plain("w", put(torch.zeros(2, CHUNK), (0, 0), 1.0))
    assert not check_plain("w", torch.zeros(4, 4, dtype=torch.int32))
    assert not check_plain("w", torch.zeros(0, 4))


@pytest.mark.parametrize(
    ("scales", "wanted"),
    [
        (nan, "error: 1 of 24 scales are NaN or Inf, the first at [5, 1]"),
        (inf, "error: 1 of 24 scales are NaN or Inf, the first at [5, 1]"),
        (0.0, "error: 1 of 24 scales are zero, the first at [5, 1]; the codes under them are lost"),
    ],
)
def test_scales_that_mean_nothing(scales: float, wanted: str) -> None:
    q = sound()
    assert isinstance(q.scales, Tensor)
    assert facts(replace(q, scales=put(q.scales, (5, 1), scales))) == [wanted]


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym"])
def test_negative_scales_are_usual_of_symmetric_integers_alone(scheme: str) -> None:
    q = sound(scheme)
    assert isinstance(q.scales, Tensor)
    note = ["note: 1 of 24 scales are negative, the first at [5, 1]"]
    assert facts(replace(q, scales=put(q.scales, (5, 1), -1.0))) == ([] if scheme == "int4-g32" else note)


def test_a_zero_scale_over_one_code_loses_nothing() -> None:
    q = sound()
    assert isinstance(q.scales, Tensor)
    codes = q.codes.clone()
    codes[5, 32:64] = 8
    dead = replace(q, codes=codes, scales=put(q.scales, (5, 1), 0.0))
    assert facts(dead) == ["note: 1 of 24 scales are zero, the first at [5, 1], over blocks of one code"]


def test_zero_scales_follow_the_act_order_index() -> None:
    q = sound()
    assert isinstance(q.scales, Tensor)
    index = (torch.arange(96) % 3).int()
    codes = q.codes.clone()
    codes[5, 1::3] = 8
    scattered = replace(q, codes=codes, scales=put(q.scales, (5, 1), 0.0), group_index=index)
    assert [fact[:4] for fact in facts(scattered)] == ["note"]
    assert [fact[:5] for fact in facts(replace(scattered, group_index=None))] == ["error"]


def test_codes_off_the_grid_are_counted_and_placed() -> None:
    q = sound("levels[-1,0,0.5]-g32")
    codes = q.codes.clone()
    codes[2, 5], codes[7, 95] = 3, 200
    wanted = f"error: 2 codes that {q.scheme.grid.name} does not have, as 3 at [2, 5]"
    assert facts(replace(q, codes=codes)) == [wanted]


def test_a_code_that_means_nan_is_off_the_grid() -> None:
    q = sound("fp8-e4m3", cols=512)
    codes = torch.where(q.codes.int() % 128 == 127, 0, q.codes.int()).to(torch.uint8)
    good = replace(q, codes=codes)
    assert check_quantized("w", good, torch.float16)[0].available == 254
    assert not facts(good)
    codes = codes.clone()
    codes[0, 0] = 0xFF
    assert facts(replace(q, codes=codes)) == ["error: 1 codes that fp8-e4m3 does not have, as 255 at [0, 0]"]


def test_codes_that_hardly_occur_are_noted() -> None:
    q = sound("int4-g32", rows=32)
    few = replace(q, codes=q.codes % 7)
    assert facts(few) == ["note: only 7 of 16 codes occur"]
    assert not facts(replace(q, codes=q.codes % 8))
    assert not facts(sound("int8-row", rows=2, cols=50))  # too few weights to say anything


def test_zero_points_and_indices_that_point_nowhere() -> None:
    whole, real = sound("int4-g32-asym"), sound("int4-g32-fzero")
    assert whole.zeros is not None
    assert real.zeros is not None
    beyond = replace(whole, zeros=put(whole.zeros, (0, 2), 16))
    assert facts(beyond) == ["note: 1 of 24 zero points lie beyond the codes, the first at [0, 2]"]
    broken = replace(real, zeros=put(real.zeros, (7, 0), nan))
    assert facts(broken) == ["error: 1 of 24 zero points are NaN or Inf, the first at [7, 0]"]
    astray = replace(whole, group_index=put(torch.zeros(96, dtype=torch.int32), (40,), 3))
    assert facts(astray) == ["error: 1 of 96 columns name a block that is not there, the first at [40]"]


def test_values_that_the_dtype_cannot_hold() -> None:
    q = sound()
    assert isinstance(q.scales, Tensor)
    large = replace(q, scales=put(q.scales, (0, 0), 9000.0))
    assert facts(large) == ["error: values beyond the range of float16 become Inf when it is loaded"]
    assert not facts(large, torch.bfloat16)
    assert not facts(replace(large, codes=q.codes.clamp(2, 14)))  # 6 * 9000 still fits


def test_code_counts_add_up_over_pieces() -> None:
    codes = torch.arange(3 * 5 * 256).reshape(3, -1).to(torch.uint8)
    codes[0, :256] = 7
    assert code_counts(codes).tolist() == [14 + 256 * (value == 7) for value in range(256)]
    assert code_counts(torch.full((2, CHUNK), 9, dtype=torch.uint8))[9] == 2 * CHUNK


def write(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, object], **metadata: str) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def packed_checkpoint(folder: Path) -> Path:
    """One layer of 4-bit integers in groups of 32, written by hand as compressed-tensors lays them out."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "version": "0.99.0",
    }
    tensors = {
        "model.embed_tokens.weight": torch.ones(10, 64, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight_packed": torch.full((16, 8), 0x76543210, dtype=torch.int32),
        "model.layers.0.mlp.up_proj.weight_scale": torch.ones(16, 2, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight_shape": torch.tensor([16, 64]),
        "model.norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }
    config = {"model_type": "llama", "transformers_version": "5.0.0", "quantization_config": quantization}
    return write(folder, tensors, config, format="pt", maker="by hand")


def test_a_packed_checkpoint_is_described(tmp_path: Path) -> None:
    found = inspect(packed_checkpoint(tmp_path / "model"))
    assert (found.format, found.container, found.sound) == ("compressed_tensors", "safetensors", True)
    assert found.made_by == {"maker": "by hand", "transformers": "5.0.0", "version": "0.99.0"}
    up, embedding, norm = found.tensors  # the order of the file: int64 first
    assert (up.name, up.scheme, up.kind, up.shape) == (
        "model.layers.0.mlp.up_proj.weight",
        "int4-g32-bf16",
        "quantized",
        (16, 64),
    )
    assert (up.nbytes, up.stored) == (16 * 64 // 2 + 2 * 32, 16 * 64 // 2 + 2 * 32 + 16)
    assert up.bits_per_weight == 4 + 16 / 32
    assert up.codes is not None
    assert (up.codes.used, up.codes.available) == (8, 16)
    assert (embedding.kind, norm.kind, norm.bits_per_weight) == ("embedding", "normalisation", 16)
    assert found.bits_per_weight(quantized=True) == 4.5
    everything = 16 * 64 * 4.5 + 10 * 64 * 16 + 64 * 16
    assert found.bits_per_weight(quantized=False) == pytest.approx(everything / (16 * 64 + 10 * 64 + 64))


def test_the_document_is_json_and_has_everything(tmp_path: Path) -> None:
    found = inspect(packed_checkpoint(tmp_path / "model"))
    document = json.loads(json.dumps(found.to_dict()))
    assert document["sound"] is True
    assert [tensor["name"] for tensor in document["tensors"]] == [tensor.name for tensor in found.tensors]
    assert document["totals"]["stored_bytes"] == sum(group["stored"] for group in document["totals"]["groups"])
    assert document["files"] == {"model.safetensors": (tmp_path / "model" / "model.safetensors").stat().st_size}
    assert document["declared"]["version"] == "0.99.0"


def test_a_weight_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path / "model")
    data = bytearray((folder / "model.safetensors").read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little")
    for name, value in (("model.layers.0.mlp.up_proj.weight_scale", b"\xc0\x7f"), ("model.norm.weight", b"\x80\x7f")):
        at = start + header[name]["data_offsets"][0]
        data[at : at + 2] = value
    (folder / "model.safetensors").write_bytes(data)
    found = inspect(folder)
    errors = {finding.tensor: finding.fact for finding in found.findings if finding.level == "error"}
    assert not found.sound
    assert errors.keys() == {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}
    assert "weight_scale" in errors["model.layers.0.mlp.up_proj.weight"]
    assert errors["model.norm.weight"] == "0 NaN and 1 Inf, the first at [0]"
    assert len(found.tensors) == 3


def test_tied_weights_count_once(tmp_path: Path) -> None:
    table = torch.arange(640.0).reshape(10, 64).bfloat16()
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 10}
    found = inspect(write(tmp_path / "model", tensors, config))
    assert len(found.tied) == 1
    assert sum(facts.stored for facts in found.stored) == 1280
    assert len(found.tensors) == 2


def test_packed_tensors_without_a_declaration_are_not_sound(tmp_path: Path) -> None:
    save_file({"a.qweight": torch.zeros(8, 8, dtype=torch.int32)}, tmp_path / "loose.safetensors")
    found = inspect(tmp_path / "loose.safetensors")
    (finding,) = found.findings
    assert finding.level == "error"
    assert "a.qweight" in finding.fact
    assert "name the directory" in finding.fact
    assert not found.sound


@pytest.mark.parametrize(
    "tensors",
    [
        {"gate.weight": torch.ones(8, 8), "gate.tid2eid": torch.zeros(8, 2, dtype=torch.int32)},  # a router's hashes
        {"embeddings.position_ids": torch.arange(8)[None]},
        {"attn.mask": torch.ones(8, 8, dtype=torch.bool)},
        {"attn.mask": torch.ones(1, 8, 8, dtype=torch.bool)},
        {"conv.weight": torch.ones(8, 8, 3), "conv.kinds": torch.zeros(8, 8, 3, dtype=torch.uint8)},
        {"attn.offsets": torch.zeros(2, 8, 8, dtype=torch.int32)},
        {"up.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)},  # its values are what they are
    ],
)
def test_tables_that_are_no_codes_are_left_alone(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert inspect(write(tmp_path / "model", tensors, {"model_type": "llama"})).sound


def test_the_method_comes_from_the_plan_beside_the_weights(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path / "model")
    row = {"name": "model.layers.0.mlp.up_proj.weight", "method": "mse"}
    (folder / "lowbit-plan.json").write_text(
        json.dumps({"tensors": [row, {"name": "x"}, {"name": 3, "method": "rtn"}, 3]})
    )
    found = inspect(folder)
    assert [facts.method for facts in found.tensors] == ["mse", None, None]
    assert found.made_by["plan"] == "lowbit-plan.json"


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    inspect(packed_checkpoint(tmp_path / "model"), lambda *step: steps.append(step))
    assert steps[-1] == ("inspect", steps[-1][2], steps[-1][2])
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


def test_an_original_is_compared_with(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path / "model")
    with open_checkpoint(folder) as opened:
        weights = {name: opened.dequantized(name).contiguous() for name in opened.weights}
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    del weights["model.embed_tokens.weight"]
    write(tmp_path / "float", weights, {"model_type": "llama"})
    found = inspect(folder, original=tmp_path / "float")
    (up,) = found.compared
    assert (up.name, up.error, up.method) == ("model.layers.0.mlp.up_proj.weight", 0, "rtn")
    assert found.changed == (1, 1)
    assert [finding.fact[:34] for finding in found.findings] == ["1 weights, as model.embed_tokens.w"]
    json.dumps(found.to_dict())


def test_a_damaged_weight_is_an_error_and_not_compared(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "original")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][3, 1] = nan
    save_file(tensors, folder / "model.safetensors")
    found = inspect(folder, original=tmp_path / "original")
    assert not found.sound
    assert not found.compared


def test_an_original_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path / "model")
    write(tmp_path / "float", {"w": torch.ones(2, 2)}, {})
    with pytest.raises(UsageError, match="has no weight of the names and shapes"):
        inspect(folder, original=tmp_path / "float")


def test_who_made_it_from_what_lies_beside(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path / "model")
    steps = "    SmoothQuantModifier:\n      x: 1\n    GPTQModifier: {scheme: W4A16}\n"
    (folder / "recipe.yaml").write_text(f"default_stage:\n  default_modifiers:\n{steps}")
    report = {"lowbit_report": 1, "source": {"path": "./float"}, "created": "2026-01-01", "calibration": None}
    (folder / "report.json").write_text(json.dumps(report))
    found = inspect(folder)
    assert found.made_by["recipe"].endswith(": SmoothQuant, GPTQ")
    assert (found.made_by["made from"], found.made_by["made"]) == ("./float", "2026-01-01")
    assert found.zero_points == ["no zero points: level * scale"]


@pytest.mark.parametrize("text", ["{}", '{"lowbit_report": 1, "source": 3, "calibration": []}', '{"methods": 3}'])
def test_reports_of_others_are_read_in_peace(tmp_path: Path, text: str) -> None:
    folder = packed_checkpoint(tmp_path / "model")
    for name in ("report.json", "lowbit-conversion.json", "lowbit-plan.json", "recipe.yaml"):
        (folder / name).write_text(text)
    assert inspect(folder).sound


def test_a_conversion_keeps_the_method(tmp_path: Path) -> None:
    import lowbit

    folder = packed_checkpoint(tmp_path / "model")
    row = {"name": "model.layers.0.mlp.up_proj.weight", "method": "gptq"}
    (folder / "lowbit-plan.json").write_text(json.dumps({"tensors": [row]}))
    lowbit.convert(folder, tmp_path / "there", format="mlx")
    found = inspect(tmp_path / "there")
    assert {facts.method for facts in found.tensors if facts.scheme} == {"gptq"}
    assert found.made_by["converted from"] == f"compressed_tensors in {folder}"
