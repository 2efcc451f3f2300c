"""The plan: which tensor gets what, as data that survives saving and editing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.errors import UnsupportedError, UsageError
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Calibration, Plan, Rules, load_plan, make_plan
from lowbit.stages.write import make_shards

MATRIX = "model.layers.0.self_attn.q_proj.weight"


def write_model(path: Path, extra: Mapping[str, Tensor] | None = None, **config: Any) -> Checkpoint:
    """A checkpoint with one of everything that the defaults tell apart."""
    path.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.ones(64, 128),
        MATRIX: torch.ones(64, 128),
        "model.layers.0.mlp.gate_proj.weight": torch.ones(64, 128),
        "model.layers.0.mlp.gate.weight": torch.ones(4, 128),
        "model.layers.0.mixer.conv1d.weight": torch.ones(64, 1, 4),
        "model.layers.0.mixer.A_log": torch.ones(64, 16),
        "model.layers.0.input_layernorm.weight": torch.ones(128),
        "model.position_ids": torch.arange(8),
        "lm_head.weight": torch.ones(64, 128),
        **(extra or {}),
    }
    save_file({name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
              path / "model.safetensors")  # fmt: skip
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return open_checkpoint(path)


def schemes(plan: Plan) -> dict[str, str]:
    """Tensor to scheme, only of those that have one."""
    return {entry.weight.name: str(entry.weight.scheme) for entry in plan.entries if entry.weight.scheme}


def test_defaults_quantize_linear_layers_and_nothing_else(tmp_path: Path) -> None:
    plan = make_plan(write_model(tmp_path / "m"), Rules("int4-g128"))
    assert set(schemes(plan)) == {MATRIX, "model.layers.0.mlp.gate_proj.weight"}
    assert all(entry.reason for entry in plan.entries)


def test_transposed_layers_of_gpt2_are_kept_with_a_reason(tmp_path: Path) -> None:
    extra = {"transformer.h.0.attn.c_attn.weight": torch.ones(64, 128)}
    plan = make_plan(write_model(tmp_path / "m", extra, model_type="gpt2"), Rules("int4-g128"))
    entry = next(entry for entry in plan.entries if "c_attn" in entry.weight.name)
    assert entry.weight.scheme is None and "transposed" in entry.reason and "gptq" in entry.reason


def test_set_wins_over_skip_and_defaults(tmp_path: Path) -> None:
    rules = Rules("int4-g128", skip=("q_proj",), sets=(("q_proj|lm_head", "int8-row"), ("gate_proj", "keep")))
    found = schemes(make_plan(write_model(tmp_path / "m"), rules))
    assert set(found) == {MATRIX, "lm_head.weight"}
    assert all(name.startswith("int8-row") for name in found.values())


def test_skip_keeps_a_tensor(tmp_path: Path) -> None:
    plan = make_plan(write_model(tmp_path / "m"), Rules("int4-g128", skip=("q_proj",)))
    assert set(schemes(plan)) == {"model.layers.0.mlp.gate_proj.weight"}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Rules("int4-g128", skip=("nothing_like_it",)), "matches no tensor"),
        (Rules("int4-g128", skip=("[",)), "not a regular expression"),
        (Rules("int9"), "no scheme is called"),
        (Rules("int4-g128", method="magic"), "there are: "),
        (Rules("int4-g128", format="magic"), "there are: "),
        (Rules("int4-g128", options={"steps": 3}), "rtn has no option 'steps'"),
    ],
)
def test_a_wrong_rule_is_one_sentence(tmp_path: Path, rules: Rules, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_plan(write_model(tmp_path / "m"), rules)


def test_groups_in_an_order_of_their_own_are_refused_where_the_format_has_no_place_for_them(tmp_path: Path) -> None:
    rules = Rules("int4-g16", "gptq", options={"order": "group"}, calibration=Calibration(("text",)))
    checkpoint = write_model(tmp_path / "model")
    for name in ("gptq", "gptq_v2"):
        assert make_plan(checkpoint, replace(rules, format=name)).entries
    for name in ("compressed-tensors", "gguf", "mlx"):
        with pytest.raises(UsageError, match=f"which gptq and gptq_v2 store and {name} does not"):
            make_plan(checkpoint, replace(rules, format=name))


@pytest.mark.parametrize(
    ("method", "makes"),
    [("gptq", "gptq"), ("autoround", "gptq"), ("imatrix_fit", "ggml_fit"), ("omniquant", "ggml_fit")],
)
def test_who_makes_what_is_outside_of_the_blocks_in_gguf(method: str, makes: str, wiki_8m: Path) -> None:
    """Where no statistics are taken the encoder leaves 15% less error than `mse` in `q8_0`."""
    plan = make_plan(open_checkpoint(wiki_8m), Rules("q8_0", method, "gguf", calibration=Calibration(("text",))))
    outside = {entry.method for entry in plan.entries if entry.weight.scheme and ".layers." not in entry.weight.name}
    assert outside == {makes}


def test_gptq_makes_every_type_of_a_mixture(wiki_8m: Path) -> None:
    rules = Rules("iq3_m", "gptq", "gguf", calibration=Calibration(("text",)))
    plan = make_plan(open_checkpoint(wiki_8m), rules)
    inside = {(str(e.weight.scheme), e.method) for e in plan.entries if e.weight.scheme and ".layers." in e.weight.name}
    assert inside == {("iq3_s", "gptq"), ("q4_k", "gptq")}


def test_types_of_a_mixture_that_a_method_cannot_make_are_another_s_and_say_so(wiki_8m: Path, tmp_path: Path) -> None:
    """`iq3_m` has `iq3_s`, which is runs of codes from a table, and `q4_k` for what is sensitive."""
    rules = Rules("iq3_m", "autoround", "gguf", calibration=Calibration(("text",)))
    plan = make_plan(open_checkpoint(wiki_8m), rules)
    inside = {e.weight.name: e for e in plan.entries if e.weight.scheme and ".layers." in e.weight.name}
    assert {(str(e.weight.scheme), e.method) for e in inside.values()} == {
        ("iq3_s", "gptq"),
        ("q4_k", "autoround"),
    }
    said = {(entry.method, entry.instead) for entry in plan.entries if entry.weight.scheme}
    assert said == {
        ("autoround", None),
        ("gptq", "autoround cannot make iq3_s"),
        ("gptq", "outside of the blocks, where single weights are made"),
    }
    named = {e.weight.name for e in plan.entries if e.weight.scheme and "cannot make" in str(e.instead)}
    assert named == {name for name, entry in inside.items() if entry.method == "gptq"}
    saved = tmp_path / "plan.json"
    saved.write_text(plan.to_json())
    assert load_plan(saved, open_checkpoint(wiki_8m)) == plan


@pytest.mark.parametrize(
    ("asked", "text", "made"),
    [("awq", True, "awq+imatrix_fit"), ("eora", True, "imatrix_fit+eora"), ("rotate", False, "rotate+ggml_fit")],
)
def test_steps_without_a_method_are_followed_by_the_formats_own(
    asked: str, text: bool, made: str, wiki_8m: Path
) -> None:
    """`clip` and `rtn`, which follow in other formats, make none of these types."""
    rules = Rules("q4_k_m", asked, "gguf", calibration=Calibration(("text",)) if text else None)
    plan = make_plan(open_checkpoint(wiki_8m), rules)
    assert plan.recipe == made
    assert {entry.method for entry in plan.entries if entry.weight.scheme} <= {*made.split("+"), "ggml_fit"}


@pytest.mark.parametrize(("method", "scheme"), [("omniquant", "q4_k_m"), ("clip", "q5_k_s"), ("hqq", "q4_k_m")])
def test_a_method_that_makes_none_of_the_types_is_refused(method: str, scheme: str, wiki_8m: Path) -> None:
    rules = Rules(scheme, method, "gguf", calibration=Calibration(("text",)))
    with pytest.raises(UnsupportedError, match=f"weight: method {method} cannot use q"):
        make_plan(open_checkpoint(wiki_8m), rules)


@pytest.mark.parametrize("method", [None, "awq"])
def test_a_method_that_nobody_asked_for_may_leave_all_to_others(method: str | None, wiki_8m: Path) -> None:
    sets = (("proj", "nvfp4"), (".", "keep"))
    rules = Rules("q4_0", method, "gguf", sets=sets, calibration=Calibration(("text",)))
    plan = make_plan(open_checkpoint(wiki_8m), rules)
    made = {entry.method for entry in plan.entries if str(entry.weight.scheme) == "nvfp4"}
    assert made == {"mse"} and len(schemes(plan)) > 50


def test_a_scheme_that_the_format_cannot_hold_names_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"gate_proj.*\[64, 128\].*cannot hold nvfp4"):
        make_plan(write_model(tmp_path / "m"), Rules("nvfp4", format="gptq"))


def test_a_tied_embedding_is_stored_once_and_not_quantized(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "m", tie_word_embeddings=True, vocab_size=64)
    plan = make_plan(checkpoint, Rules("int4-g128"))
    entry = next(entry for entry in plan.entries if entry.weight.name == "lm_head.weight")
    assert entry.tied == "model.embed_tokens.weight" and plan.stored_bytes(entry) == 0
    with pytest.raises(UnsupportedError, match=r"embed_tokens\.weight is shared with another layer"):
        make_plan(checkpoint, Rules("int4-g128", sets=(("embed_tokens", "int8-row"),)))
    rules = Rules("int4-g32-min", format="mlx", sets=(("embed_tokens", "int8-g32-min"),))  # mlx-lm has both in codes
    assert schemes(make_plan(checkpoint, rules))["model.embed_tokens.weight"].startswith("int8-g32-min")


def test_what_no_reader_of_the_format_would_find_is_kept_with_a_reason(tmp_path: Path) -> None:
    extra = {"transformer.w.weight": torch.full((64, 128), 2.0), "model.hc_head.mixing": torch.ones(4, 128)}
    checkpoint = write_model(tmp_path / "m", extra)
    tied = replace(checkpoint, config={**checkpoint.config, "tie_word_embeddings": True})
    vars(tied)["tied"] = {"lm_head.weight": "transformer.w.weight"}  # as of an embedding that no table names
    plan = make_plan(tied, Rules("int4-g128"))
    reasons = {entry.weight.name: entry.reason for entry in plan.entries if not entry.weight.scheme}
    assert "shared with another layer" in reasons["transformer.w.weight"]
    assert "no layer's weight" in reasons["model.hc_head.mixing"]
    assert set(schemes(plan)) == {MATRIX, "model.layers.0.mlp.gate_proj.weight"}
    with pytest.raises(UnsupportedError, match=r"mixing .* is none"):
        make_plan(checkpoint, Rules("int4-g128", sets=(("mixing", "int8-row"),)))


def test_a_saved_plan_comes_back_equal_and_edits_are_followed(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "m")
    plan = make_plan(checkpoint, Rules("int4-g64-asym"))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert load_plan(file, checkpoint) == plan
    data = json.loads(plan.to_json())
    row = next(row for row in data["tensors"] if row["name"] == MATRIX)
    row["scheme"] = "int8-row"
    file.write_text(json.dumps(data))
    assert schemes(load_plan(file, checkpoint))[MATRIX].startswith("int8-row")


@pytest.mark.parametrize(
    "damage", ["not json", "[]", '{"lowbit_plan": 99, "format": "gptq", "options": 0, "tensors": 0}']
)
def test_a_damaged_plan_is_refused(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(damage)
    with pytest.raises(UsageError, match=r"plan\.json"):
        load_plan(file, write_model(tmp_path / "m"))


def test_a_plan_for_another_model_is_refused_by_name(tmp_path: Path) -> None:
    other = write_model(tmp_path / "a", {"extra.weight": torch.ones(2, 2)})
    plan = make_plan(other, Rules("int4-g128", skip=("extra",)))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    with pytest.raises(UsageError, match=r"another model: extra\.weight"):
        load_plan(file, write_model(tmp_path / "b"))


def test_stored_bytes_are_what_the_shards_hold(tmp_path: Path) -> None:
    plan = make_plan(write_model(tmp_path / "m"), Rules("int4-g128"))
    shards = make_shards(plan, limit=10_000)
    held = sum(shard.nbytes - len(shard.header) for shard in shards)
    assert held == sum(plan.stored_bytes(entry) for entry in plan.entries)
    assert len(shards) > 1


def test_bits_per_weight_count_scales_and_kept_tensors(tmp_path: Path) -> None:
    plan = make_plan(write_model(tmp_path / "m"), Rules("int4-g128", skip=("gate_proj",)))
    bits, over_all = plan.bits_per_weight()
    assert bits == pytest.approx(4 + 16 / 128)
    numel = [entry.weight.shape for entry in plan.entries]
    total = sum(torch.Size(shape).numel() for shape in numel)
    kept = sum(entry.source_bytes for entry in plan.entries if not entry.weight.scheme)
    assert over_all == pytest.approx((64 * 128 * 4.125 + 8 * kept) / total)


@pytest.mark.parametrize("blocks", [(0, 2), (5, 9)])
def test_blocks_that_are_not_there_are_refused_with_how_many_there_are(tmp_path: Path, blocks: tuple[int, int]) -> None:
    source = write_model(tmp_path / "m")
    assert schemes(make_plan(source, Rules("int4-g128", blocks=(0, 1))))
    with pytest.raises(UsageError, match=r"--blocks \d:\d: .* has 1 block, 0:1 at most"):
        make_plan(source, Rules("int4-g128", blocks=blocks))
