"""Policies: what each role gets, said by hand for a small model; wrong files end in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowbit.api import make_plan as make_plan_of
from lowbit.budget import MemoryWatch
from lowbit.errors import UnsupportedError, UsageError
from lowbit.pipeline import Request
from lowbit.stages._policy import expert_of, presets, role_of, step
from lowbit.stages._row_views import apart_in_rows, joined_rows
from lowbit.stages._rows import Runs
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.frequency import count_tokens
from lowbit.stages.plan import Calibration, Plan, Rules, in_rows, load_plan, make_plan, read_rows
from lowbit.stages.samples import read_samples
from lowbit.sweep import SweepRequest, sweep
from tests.reference.models import save_tiny, save_words

PARTS = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
BLOCKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("policy")
    names = [f"model.layers.{block}.{part}.weight" for block in range(BLOCKS) for part in PARTS]
    names += ["model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.gate.weight"]
    names += ["model.embed_tokens.weight", "lm_head.weight"]
    save_file({name: torch.ones(64, 256, dtype=torch.bfloat16) for name in names}, path / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 4}
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 256, "vocab_size": 64}))
    return open_checkpoint(path)


def schemes(model: Checkpoint, rules: Rules) -> dict[str, str]:
    """Tensor, without its common words, to its scheme, without the type of scales that the format has."""
    plan = make_plan(model, rules)
    return {
        entry.weight.name.removeprefix("model.").removesuffix(".weight"): str(entry.weight.scheme).removesuffix("-bf16")
        for entry in plan.entries
        if entry.weight.scheme
    }


def test_roles_are_told_from_names() -> None:
    for part, role in PARTS.items():
        assert role_of(f"model.layers.0.{part}.weight") == role
    said = {
        "transformer.h.3.attn.c_attn.weight": "qkv", "transformer.h.3.attn.c_proj.weight": "o",
        "transformer.h.3.mlp.c_proj.weight": "down", "transformer.h.3.mlp.c_fc.weight": "up",
        "transformer.wte.weight": "embedding", "model.layers.0.mlp.gate.weight": None,
        "model.decoder.layers.1.self_attn.out_proj.weight": "o", "model.decoder.layers.1.fc2.weight": "down",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight": "gate",
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": "down", "gpt_neox.layers.0.attention.dense.weight": "o",
        "bert.encoder.layer.0.output.dense.weight": "down", "bert.encoder.layer.0.attention.output.dense.weight": "o",
        "bert.encoder.layer.0.intermediate.dense.weight": "up", "model.norm.weight": None,
    }  # fmt: skip
    assert {name: role_of(name) for name in said} == said


def test_conservative_is_what_its_page_says(model: Checkpoint) -> None:
    found = schemes(model, Rules("int3-g64-asym", policy="conservative"))
    eight, four, three = "int8-g64-asym", "int4-g64-asym", "int3-g64-asym"
    for block in range(BLOCKS):
        for part, role in PARTS.items():
            middle = three if role in ("gate", "up") else four
            assert found[f"layers.{block}.{part}"] == (eight if block in (0, 3) else middle), (block, part)
    assert found["layers.1.mlp.experts.0.up_proj"] == three
    assert not {"embed_tokens", "lm_head", "layers.1.mlp.gate"} & found.keys()


def test_aggressive_lowers_the_middle_and_uniform_nothing(model: Checkpoint) -> None:
    low = schemes(model, Rules("int4-g64", policy="aggressive"))
    assert {name for name, scheme in low.items() if scheme == "int3-g64"} == {
        "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.experts.0.up_proj",
        "layers.2.mlp.gate_proj", "layers.2.mlp.up_proj",
    }  # fmt: skip
    assert schemes(model, Rules("int4-g64", policy="uniform")) == schemes(model, Rules("int4-g64"))


def test_balanced_in_a_gguf_file_has_the_embedding_too(model: Checkpoint) -> None:
    extra = {"layers.1.mlp.experts.0.up_proj", "layers.1.mlp.gate"}
    rules = Rules("q4_k", format="gguf", policy="balanced", skip=("experts", r"mlp\.gate\."))
    with pytest.raises(UnsupportedError, match="experts"):  # llama.cpp has no such tensor in a Llama
        make_plan(model, rules)
    kept = {name: weight for name, weight in model.weights.items() if not any(part in name for part in extra)}
    found = schemes(replace(model, weights=kept), Rules("q4_k", format="gguf", policy="balanced"))
    high = {name for name, scheme in found.items() if scheme == "q5_k"}
    assert high == {"layers.0.mlp.down_proj", "layers.3.mlp.down_proj"}
    assert found["embed_tokens"] == found["lm_head"] == "int8-g32"  # llama.cpp's q8_0


def test_rules_of_the_users_own_and_set_over_them(model: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[[rule]]\nrole = ["q", "k"]\nblocks = [1, -1]\nscheme = "int8-row"\nreason = "mine"\n'
        '[[rule]]\nrole = "head"\nscheme = "int8-row"\n'
        '[[rule]]\npattern = "layers.2.*up_proj"\nscheme = "keep"\n'
    )
    rules = Rules("int4-g64", policy=str(file), sets=((r"3\.self_attn\.q_proj", "int2-g64"),))
    found = schemes(model, rules)
    assert {name for name, scheme in found.items() if scheme == "int8-row"} == {
        "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.3.self_attn.k_proj", "lm_head",
    }  # fmt: skip
    assert found["layers.3.self_attn.q_proj"] == "int2-g64" and "layers.2.mlp.up_proj" not in found
    assert found["layers.0.self_attn.q_proj"] == "int4-g64"
    reasons = {entry.weight.name: entry.reason for entry in make_plan(model, rules).entries}
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "policy mine.toml: mine"


@pytest.mark.parametrize(
    ("base", "wanted", "scheme"),
    [
        ("int4-g128", "lower", "int3-g128"), ("int8-row", "higher", "int8-row"), ("q2_k", "highest", "q8_0"),
        ("nvfp4", "higher", "fp8-e4m3-row"), ("int2-g64-asym-bf16", "higher", "int3-g64-asym-bf16"),
        ("nf4-g64", "base", "nf4-g64"), ("nf4-g64", "int8-row", "int8-row"), ("Q4_K", "lower", "q3_k"),
    ],
)  # fmt: skip
def test_steps_of_the_ladders(base: str, wanted: str, scheme: str) -> None:
    assert step(base, wanted, "p") == scheme


def test_every_preset_makes_a_plan_and_says_why(model: Checkpoint) -> None:
    for name in presets():
        plan = make_plan(model, Rules("int4-g64", policy=name))
        assert all(f"policy {name}: " in entry.reason for entry in plan.entries if entry.weight.scheme), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no .*rule"),
        ("rule = 3", "no .*rule"),
        ("[[rule", "is not a policy"),
        ("[[rule]]\nrole = 'q'", "rule 1 names no scheme"),
        ("[[rule]]\nscheme = 4", "scheme is 4"),
        ("[[rule]]\nscheme = 'int4'\nrole = 'queue'", "no role is called 'queue'; there are: embedding"),
        ("[[rule]]\nscheme = 'int4'\nroll = 'q'", "there is no 'roll'"),
        ("[[rule]]\nscheme = 'int4'\nblocks = 'middle'", "'middle' is not"),
        ("[[rule]]\nscheme = 'int4'\nblocks = [true]", "True is not"),
        ("[[rule]]\nscheme = 'int4'\npattern = '['", "not a regular expression"),
        ("[[rule]]\nscheme = 'int4'\nexperts = 'all'", "experts is 'all'"),
        ("[[rule]]\nscheme = 'int4'\nfrequency = 'often'", "'often' is not 'most N'"),
        ("[[rule]]\nscheme = 'int4'\nfrequency = 3", "frequency is 3"),
        ("[[rule]]\nscheme = 'int4'\nrole = 'embedding'\ntokens = 'often'", "tokens 'often' is not 'most N'"),
        ("[[rule]]\nscheme = 'int4'\nrole = 'q'\ntokens = 'most 5'", "tokens are rows of embedding, head; name role"),
        ("[[rule]]\nscheme = 'int4'\nheads = [1]", "heads are rows of q, k, v; name role"),
        ("[[rule]]\nscheme = 'int4'\nrole = ['q', 'o']\nheads = [1]", "heads are rows of q, k, v; name role"),
        ("[[rule]]\nscheme = 'int4'\nrole = 'q'\nheads = [true]", "heads True is not a number"),
        ("[[rule]]\nscheme = 'int4'\nrole = 'q'\nheads = '0-4'", "heads '0-4' is not a number"),
        ("[[rule]]\nscheme = 'int4'\nrole = 'q'\nheads = -1", "heads -1 is not a number"),
        ("[[rule]]\nscheme = 'int99'", "no scheme is called"),
    ],
)
def test_a_wrong_file_is_one_sentence(model: Checkpoint, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "p.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        make_plan(model, Rules("int4-g64", policy=str(file)))


def test_an_unknown_policy_and_a_scheme_on_no_ladder_are_one_sentence(model: Checkpoint) -> None:
    with pytest.raises(UsageError, match="there are: uniform, conservative, balanced, aggressive, or FILE"):
        make_plan(model, Rules("int4-g64", policy="careful"))
    with pytest.raises(UsageError, match="higher than nf4-g64, which is on no ladder"):
        make_plan(model, Rules("nf4-g64", format="bitsandbytes", policy="balanced"))


@torch.no_grad()
def routed(model: Any, ids: torch.Tensor) -> list[list[int]]:
    """Of each layer, tokens that go to each expert, by the logits that `transformers` gives out."""
    logits = model(ids, output_router_logits=True).router_logits
    return [layer.topk(2, -1).indices.flatten().bincount(minlength=4).tolist() for layer in logits]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_get_schemes_by_how_often_they_are_used(kind: str, tmp_path: Path) -> None:
    model, ids = save_tiny(kind, tmp_path / "m"), torch.randint(3, 96, (6, 20))
    source = open_checkpoint(tmp_path / "m")
    with MemoryWatch(None).running() as watch:
        counts = count_tokens(source, ids, tmp_path, None, watch)
    wanted = routed(model, ids)
    assert len(counts) == 2 * 4 * 3 and min(map(min, wanted)) < max(map(max, wanted))
    for name, count in counts.items():
        stack, expert = expert_of(name) or ("", 0)
        assert count == wanted[int(stack.split(".")[2])][expert], name
    file = tmp_path / "often.toml"
    file.write_text(
        '[[rule]]\nfrequency = "most 25%"\nscheme = "int8-g8"\n[[rule]]\nfrequency = "least 2"\nscheme = "int3-g8"\n'
    )
    plan = make_plan(source, Rules("int4-g8", policy=str(file), counts=counts))
    for entry in plan.entries:
        place, scheme = expert_of(entry.weight.name), str(entry.weight.scheme)
        if place and entry.weight.scheme:
            row = wanted[int(place[0].split(".")[2])]
            above = sum((-other, at) < (-row[place[1]], place[1]) for at, other in enumerate(row))
            assert scheme.startswith("int8" if above == 0 else "int4" if above == 1 else "int3"), entry
        elif entry.weight.scheme:
            assert scheme.startswith("int4")
    with pytest.raises(UsageError, match="name it with --calibration"):
        make_plan(source, Rules("int4-g8", policy=str(file)))


def test_a_sweep_and_the_plan_from_python_count_experts_too(tmp_path: Path) -> None:
    model, text = save_tiny("qwen3_moe", tmp_path / "m"), save_words(tmp_path / "m")
    file = tmp_path / "often.toml"
    file.write_text('[[rule]]\nfrequency = "most 1"\nscheme = "int8-g8"\n')
    calibration = Calibration((str(text),), samples=8, length=20, sampling="first")
    rules = Rules(policy=str(file), calibration=calibration)
    told: list[tuple[str, int]] = []
    request = Request(str(tmp_path / "m"), tmp_path / "s", rules, text=text, context=16, tokens=32)
    sweep(SweepRequest(request, ["int4-g8", "int3-g8"], keep=True), lambda stage, done, _: told.append((stage, done)))
    assert told.count(("experts", 0)) == 1  # not once for each point
    ids = read_samples(
        (str(text),), open_checkpoint(tmp_path / "m"), samples=8, length=20, seed=0, sampling="first"
    ).ids
    first = [max(range(4), key=lambda expert: (row[expert], -expert)) for row in routed(model, ids)]
    plan = make_plan_of(tmp_path / "m", scheme="int4-g8", policy=str(file), calibration=calibration)
    saved = [json.loads(each.read_text())["tensors"] for each in (tmp_path / "s" / "models").glob("*/lowbit-plan.json")]
    tables = [{row["name"]: row["scheme"] for row in rows} for rows in saved]
    tables.append({entry.weight.name: str(entry.weight.scheme) for entry in plan.entries})
    assert len(tables) == 3
    for table in tables:
        for name, scheme in table.items():
            if place := expert_of(name):
                often = first[int(place[0].split(".")[2])] == place[1]
                assert scheme.startswith("int8") == often, (name, scheme)


def test_a_model_without_experts_has_none_to_count(model: Checkpoint, tmp_path: Path) -> None:
    kept = {name: weight for name, weight in model.weights.items() if "experts" not in name}
    with pytest.raises(UnsupportedError, match="no experts by name"), MemoryWatch(None).running() as watch:
        count_tokens(replace(model, weights=kept), torch.ones(2, 8, dtype=torch.long), tmp_path, None, watch)


HEADS = '[[rule]]\nrole = ["q", "k"]\nheads = %s\nscheme = "int8-g64"\n'
TOKENS = """
    [[rule]]
    role = "embedding"
    tokens = "most %s"
    scheme = "keep"
    [[rule]]
    role = "embedding"
    scheme = "int8-row"
"""


def ruled(model: Checkpoint, folder: Path, text: str, form: str = "onnx", **rules: Any) -> Plan:
    (folder / "p.toml").write_text(text)
    asked = Rules("int4-g64", format=form, policy=str(folder / "p.toml"), **rules)
    return make_plan(in_rows(model, asked), asked)


def attention(model: Checkpoint, rows: dict[str, int], **facts: int) -> Checkpoint:
    """The same with other numbers of rows and heads."""
    config = {**model.config, **facts}
    weights = {
        name: replace(weight, shape=(next((n for part, n in rows.items() if part in name), 64), 256))
        for name, weight in model.weights.items()
    }
    return replace(model, config=config, weights=weights)


@pytest.mark.parametrize(
    ("heads", "blocks"),
    [
        ("[0, 3]", ["0-15", "16-47", "48-63"]), ("'1:'", ["0-15", "16-63"]), ("2", ["0-31", "32-47", "48-63"]),
        ("[':2', 1]", ["0-31", "32-63"]), ("':'", []),
    ],
)  # fmt: skip
def test_heads_are_runs_of_rows(model: Checkpoint, tmp_path: Path, heads: str, blocks: list[str]) -> None:
    small = attention(model, {}, head_dim=16)
    entries = [
        entry for entry in ruled(small, tmp_path, HEADS % heads).entries if "0.self_attn.k_proj" in entry.weight.name
    ]
    said = [f"{run[0]}-{run[1] - 1}" for entry in entries for run in entry.weight.rows]
    assert said == blocks and sum(entry.weight.shape[0] for entry in entries) == 64
    assert all("layers.0.self_attn.k_proj.rows" in entry.weight.name for entry in entries if blocks)
    assert {str(entry.weight.scheme)[:8] for entry in entries} == ({"int8-g64", "int4-g64"} if blocks else {"int8-g64"})


def test_heads_that_are_not_there_and_rows_that_are_no_heads_are_one_sentence(
    model: Checkpoint, tmp_path: Path
) -> None:
    small = attention(model, {}, head_dim=16)
    for heads in ("4", "'2:5'", "'3:3'"):
        with pytest.raises(UsageError, match=r"[qk]_proj.weight has heads 0 to 3"):
            ruled(small, tmp_path, HEADS % heads)
    with pytest.raises(UsageError, match=r"k_proj.weight has heads 0 to 1"):
        ruled(attention(model, {"k_proj": 32}, head_dim=16, num_key_value_heads=2), tmp_path, HEADS % "2")
    with pytest.raises(UsageError, match="has 60 rows, which are not 4 heads of 16"):
        ruled(attention(model, {"q_proj": 60}, head_dim=16), tmp_path, HEADS % "0")
    with pytest.raises(UsageError, match="does not say how many heads"):
        ruled(attention(model, {}, num_attention_heads=0, hidden_size=0), tmp_path, HEADS % "0")


def test_rows_in_schemes_of_their_own_are_for_onnx_and_counted_on_text(model: Checkpoint, tmp_path: Path) -> None:
    ranks = [(n * 5) % 64 for n in range(64)]
    with pytest.raises(UsageError, match=r"how often tokens are used.*--calibration"):
        ruled(model, tmp_path, TOKENS % "10%")
    with pytest.raises(UnsupportedError, match="which gptq cannot hold; use --format onnx"):
        ruled(model, tmp_path, TOKENS % "10%", "gptq", tokens=ranks)
    with pytest.raises(UsageError, match="has a row 50, and the model has no such token"):
        ruled(model, tmp_path, TOKENS % "10%", tokens=ranks[:50])
    plan = ruled(model, tmp_path, TOKENS % "10%", tokens=ranks)
    first, second, places = [entry for entry in plan.entries if "embed_tokens" in entry.weight.name]
    rows = sorted(range(64), key=ranks.__getitem__)[:7]
    assert [row for a, b in first.weight.rows for row in range(a, b)] == sorted(rows)
    assert first.weight.scheme is None and str(second.weight.scheme) == "int8-row"
    assert second.weight.shape == (57, 256) and "most" not in second.reason and "57 rows" in second.reason
    assert places.weight.dtype == torch.int32 and places.source_bytes == 0 and plan.stored_bytes(places) == 256
    # what names the weight outright wins, and leaves it whole
    whole = ruled(model, tmp_path, TOKENS % "10%", tokens=ranks, sets=[("embed_tokens", "int8-g64")])
    assert [e.weight.shape for e in whole.entries if "embed_tokens" in e.weight.name] == [(64, 256)]


def test_a_saved_plan_has_its_rows(model: Checkpoint, tmp_path: Path) -> None:
    plan = ruled(model, tmp_path, TOKENS % "9", tokens=[(n * 5) % 64 for n in range(64)])
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    view = apart_in_rows(model, read_rows(file))
    assert load_plan(file, view) == plan
    data = json.loads(plan.to_json())
    row = next(row for row in data["tensors"] if row["name"].endswith("rows0.weight"))
    for wrong, words in (([[0, 8]], "is not the weight whose rows"), ([[0, 9]], "in two blocks, or in none")):
        row["rows"] = wrong
        file.write_text(json.dumps(data))
        with pytest.raises(UsageError, match=words):
            apart_in_rows(model, read_rows(file))


def test_blocks_are_the_rows_of_the_whole(tmp_path: Path) -> None:
    """What a view reads, and what it is joined to again, row by row."""
    save_tiny("llama", tmp_path)
    source, name = open_checkpoint(tmp_path), "model.embed_tokens.weight"
    whole = source.tensor(name)
    runs: list[Runs] = [((3, 5), (9, 10)), ((0, 3), (5, 9)), ((10, 96),)]
    view = apart_in_rows(source, {name: runs})
    for number, rows in enumerate(([3, 4, 9], [0, 1, 2, 5, 6, 7, 8], range(10, 96))):
        found = view.tensor(f"model.embed_tokens.rows{number}.weight")
        assert all(torch.equal(found[at], whole[row]) for at, row in enumerate(rows)) and len(found) == len(rows)
    assert view.tensor("model.embed_tokens.rows").tolist()[:11] == [3, 4, 5, 0, 1, 6, 7, 8, 9, 2, 10]
    assert torch.equal(joined_rows(view, "float").tensor(name), whole)
