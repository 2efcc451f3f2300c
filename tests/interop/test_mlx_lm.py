"""Whole checkpoints of the format `mlx` in mlx-lm, and of mlx-lm here: the same logits; experts of a layer are one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import lowbit
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.pipeline import Request, run
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules
from lowbit.tensors import QTensor
from tests.interop.test_mlx import as_torch
from tests.reference.models import SEEING, STACKED, save_seeing, save_stacked, save_tiny, save_words, to_mxfp4

mx: Any = pytest.importorskip("mlx.core")
utils: Any = pytest.importorskip("mlx_lm.utils")

IDS = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
EXPERTS = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {}, "qwen2": {}, "qwen3": {"tie_word_embeddings": True}, "gemma": {}, "phi3": {}, "mixtral": {},
    "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "gpt_neox": {"intermediate_size": 256},
    # Yarn is cut off at whole frequencies there, whatever `truncate` says.
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "granitemoe": {"num_hidden_layers": 2}, "granitemoehybrid": {"shared_intermediate_size": 64},
    # Four layers: it asks the fourth for its mask.
    "llama4": {"num_hidden_layers": 4, "num_experts_per_tok": 1, "attention_chunk_size": 8},
    "qwen3_5_moe": {**EXPERTS, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
                    "full_attention_interval": 2},
    "qwen3_vl_moe": EXPERTS,
}  # fmt: skip
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "granitemoehybrid", *SEEING)


def model_of(kind: str, path: Path, old: bool = False) -> Path:
    """A float checkpoint; `old`: with what mlx-lm asks for by names of transformers 4."""
    save = save_seeing if kind in SEEING else save_stacked if kind in STACKED else save_tiny
    save(kind, path, **{**SIZES, **KINDS[kind]})
    if not old:
        return path
    config = json.loads((path / "config.json").read_text())
    if kind == "qwen3_moe":
        config |= {"num_experts": config["num_local_experts"], "head_dim": 16}
        (path / "config.json").write_text(json.dumps(config))
    return path


def lowbit_floats(path: Path) -> Path:
    """The same model as the format `mlx` has it, nothing quantized."""
    out = path.with_name("kept")
    lowbit.quantize(path, out, scheme="int4-g32-min", format="mlx", method="rtn", skip=["."])
    return out


def theirs(model: Any) -> Tensor:
    return as_torch(model(mx.array(IDS.numpy())).astype(mx.float32))


def ours(path: Path) -> Tensor:
    found: Tensor = lowbit.load(path, reference=True)(IDS).logits
    return found.detach()


def close(left: Tensor, right: Tensor, most: float = 2e-5) -> bool:
    return bool((left - right).abs().max() < most * right.abs().max())


@pytest.mark.parametrize("scheme", ["int4-g32-min", "mxfp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_computes_what_was_written(kind: str, scheme: str, tmp_path: Path) -> None:
    """Some experts in another scheme. Activations of Gemma and NeoX are other approximations there, in floats too."""
    sets = {r"^(?!vision).*\.0\..*(o_proj|attention\.dense|experts\..*(down_proj|w2))\.weight": "int8-g64-min"}
    lowbit.quantize(
        model_of(kind, tmp_path / "m"), tmp_path / "out", scheme=scheme, format="mlx", method="rtn", sets=sets
    )
    with mx.stream(mx.cpu):
        model, _ = utils.load_model(tmp_path / "out", lazy=False)
        found = theirs(model)
    modules = [type(each).__name__ for _, each in model.named_modules()]
    assert sum("Quantized" in name for name in modules) >= 8
    assert ("QuantizedSwitchLinear" in modules) == (kind in WITH_EXPERTS)
    assert close(found, ours(tmp_path / "out"), 1e-3 if kind in ("gemma", "gpt_neox") else 2e-5)


def test_mlx_lm_computes_an_embedding_in_codes_that_is_the_head(tmp_path: Path) -> None:
    out, sets = tmp_path / "out", {"embed_tokens": "int8-g64-min"}
    lowbit.quantize(
        model_of("qwen3", tmp_path / "m"), out, scheme="int4-g32-min", format="mlx", method="rtn", sets=sets
    )
    with mx.stream(mx.cpu):
        model, _ = utils.load_model(out, lazy=False)
        found = theirs(model)
    assert "QuantizedEmbedding" in [type(each).__name__ for _, each in model.named_modules()]
    assert close(found, ours(out))


MADE = ["llama", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "granitemoehybrid"]


@pytest.mark.parametrize("kind", MADE)
def test_reads_what_mlx_lm_makes(kind: str, tmp_path: Path) -> None:
    """Quantized there, routers and a part of experts in 8 bits; and over to compressed-tensors, MLX and floats."""
    path = model_of(kind, tmp_path / "m", old=True)
    config = json.loads((path / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["rope_scaling"] = config["rope_parameters"] if kind == "llama" else None
    (path / "config.json").write_text(json.dumps(config))
    if kind in ("gpt_oss", "granitemoehybrid"):  # of which it loads no floats as transformers 5 has them
        path = lowbit_floats(path)

    def chosen(name: str, module: Any) -> Any:
        eight = name.endswith(("gate", "switch_mlp.up_proj", "experts.up_proj"))
        return {"group_size": 64, "bits": 8} if eight else hasattr(module, "to_quantized") and "lm_head" not in name

    with mx.stream(mx.cpu):
        model, config = utils.load_model(path, lazy=False)
        model, config = utils.quantize_model(model, config, 32, 4, quant_predicate=chosen)
        (tmp_path / "made").mkdir()
        utils.save_model(tmp_path / "made", model)
        utils.save_config(config, tmp_path / "made/config.json")
        wanted = theirs(model)
    with open_checkpoint(tmp_path / "made") as found:
        experts = [name for name, weight in found.weights.items() if ".experts." in name and weight.scheme]
        assert len(experts) == (0 if kind == "llama" else len({name.split(".experts.")[0] for name in experts}) * 12)
        gates = [weight for name, weight in found.weights.items() if name.endswith("gate.weight")]
        assert all(weight.scheme and weight.scheme.grid.bits == 8 for weight in gates)
    assert close(ours(tmp_path / "made"), wanted)
    done = lowbit.convert(tmp_path / "made", tmp_path / "again", format="mlx")
    assert done.lossless and torch.equal(ours(tmp_path / "again"), ours(tmp_path / "made"))
    floats = lowbit.convert(tmp_path / "made", tmp_path / "floats", format="float", scheme="f32")
    assert floats.lossless and torch.equal(ours(tmp_path / "floats"), ours(tmp_path / "made"))


def test_experts_of_a_layer_stay_in_one_file(tmp_path: Path) -> None:
    """Files of few bytes: each tensor is in one, by its name in the index, and mlx-lm finds all."""
    path = model_of("qwen3_moe", tmp_path / "m")
    run(Request(str(path), tmp_path / "out", Rules("int4-g32-min", format="mlx", method="rtn"), shard_bytes=20_000))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    for file in set(index.values()):
        with safe_open(tmp_path / "out" / file, "pt") as found:
            assert {name for name, place in index.items() if place == file} == set(found.keys())
            for name in found.keys():  # noqa: SIM118 - no dict
                assert len(found.get_slice(name).get_shape()) == (
                    3 if "switch_mlp" in name else found.get_tensor(name).ndim
                )
                assert ".experts." not in name
    with mx.stream(mx.cpu):
        model, _ = utils.load_model(tmp_path / "out", lazy=False)
        assert close(theirs(model), ours(tmp_path / "out"))
    with open_checkpoint(tmp_path / "out") as written, open_checkpoint(path) as before:
        for name in [name for name in before.weights if ".experts." in name]:
            value = written.load(name)
            assert isinstance(value, QTensor)
            assert (value.dequantize() - before.tensor(name)).abs().max() < 0.3


def test_experts_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    path, one = model_of("qwen3_moe", tmp_path / "m"), r"layers\.0\.mlp\.experts\.2\.up_proj"
    with pytest.raises(UsageError, match=r"all experts of a layer are one tensor, .*0\.mlp\.switch_mlp\.up_proj"):
        lowbit.quantize(path, tmp_path / "out", scheme="int4-g32-min", format="mlx", method="rtn",
                        sets={one: "int8-g32-min"})  # fmt: skip
    assert not (tmp_path / "out").exists()


def in_mlx_lm(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Logits there, and the class of each module."""
    with mx.stream(mx.cpu):
        model, _ = utils.load_model(path, lazy=False)
        return theirs(model), {name: type(module).__name__ for name, module in model.named_modules()}


def test_gpt_oss_in_mxfp4_goes_into_mlx_without_loss(tmp_path: Path) -> None:
    """Oracle: mlx-lm with the checkpoint as it is published, which it takes apart itself."""
    source = to_mxfp4(model_of("gpt_oss", tmp_path / "m", old=True))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    done = lowbit.convert(source, tmp_path / "out", format="mlx")
    wanted, modules = in_mlx_lm(source)
    found, written = in_mlx_lm(tmp_path / "out")
    assert done.lossless and torch.equal(found, wanted) and written == modules
    assert list(modules.values()).count("QuantizedSwitchLinear") == 6
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert said == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert close(ours(tmp_path / "out"), wanted)
    over = lowbit.convert(tmp_path / "out", tmp_path / "over", format="compressed-tensors")
    assert over.lossless and torch.equal(ours(tmp_path / "over"), ours(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "llama4", "qwen3_5_moe"])
def test_a_layer_that_is_skipped_has_its_experts_in_floats(kind: str, tmp_path: Path) -> None:
    """mlx-lm wants them apart too, beside others that are."""
    path = model_of(kind, tmp_path / "m")
    lowbit.quantize(path, tmp_path / "out", scheme="int4-g32-min", format="mlx", method="rtn", skip=[r"layers\.0\."])
    found, modules = in_mlx_lm(tmp_path / "out")
    first = {name: each for name, each in modules.items() if "layers.0." in name and each.endswith("SwitchLinear")}
    assert len(first) == 3 and set(first.values()) == {"SwitchLinear"}
    assert list(modules.values()).count("QuantizedSwitchLinear") == 3 * (len(as_layers(modules)) - 1)
    assert close(found, ours(tmp_path / "out"))


def as_layers(modules: dict[str, str]) -> set[str]:
    """Paths of the layers that have experts."""
    return {name for name, each in modules.items() if each == "SwitchGLU"}


@pytest.mark.parametrize("kind", SEEING)
def test_a_part_that_reads_as_mlx_lm_saved_it_is_converted(kind: str, tmp_path: Path) -> None:
    """It has no part that sees, and names, norms and convolutions of its own: again in MLX, it is the same there."""
    lowbit.quantize(model_of(kind, tmp_path / "m"), tmp_path / "out", scheme="int4-g32-min", format="mlx", method="rtn")
    (tmp_path / "made").mkdir()
    with mx.stream(mx.cpu):
        model, config = utils.load_model(tmp_path / "out", lazy=False)
        utils.save_model(tmp_path / "made", model)
        utils.save_config(config, tmp_path / "made/config.json")
    wanted, modules = in_mlx_lm(tmp_path / "made")
    assert lowbit.convert(tmp_path / "made", tmp_path / "again", format="mlx").lossless
    found, again = in_mlx_lm(tmp_path / "again")
    assert torch.equal(found, wanted) and again == modules
    assert lowbit.convert(tmp_path / "made", tmp_path / "floats", format="float", scheme="f32").lossless
    part = "feed_forward.experts" if kind == "llama4" else "mlp.switch_mlp"
    with mx.stream(mx.cpu), open_checkpoint(tmp_path / "floats") as floats:
        for layer, expert in ((0, 3), (1, 0)):
            there: Any = model.layers[layer]
            for step in f"{part}.up_proj".split("."):
                there = getattr(there, step)
            whole = as_torch(mx.dequantize(there.weight, there.scales, there.biases, there.group_size, there.bits))
            name = f"layers.{layer}.{part.split('.')[0]}.experts.{expert}.up_proj.weight"
            (ours_of_it,) = (floats.tensor(each) for each in floats.weights if each.endswith(name))
            assert torch.equal(ours_of_it, whole[expert])


@pytest.mark.parametrize(
    ("kind", "skip", "words"),
    [
        ("gpt_oss", "experts.(gate_up|down)_proj", "mlx-lm does not load it so; let --skip"),
        ("gpt_oss", "layers.0.*gate_up_proj$", "mlx-lm does not load it so; let --skip"),
        ("granitemoe", "layers.0.*put_linear", "beside others that are taken apart"),
        ("qwen3_5_moe", "experts.down_proj", "beside others that are taken apart"),
    ],
)
def test_stacks_that_mlx_lm_would_not_find_are_refused(kind: str, skip: str, words: str, tmp_path: Path) -> None:
    path = model_of(kind, tmp_path / "m")
    with pytest.raises(UnsupportedError, match=rf"layers\.0\..* stays whole, .*{words}"):
        lowbit.quantize(path, tmp_path / "out", scheme="int4-g32-min", format="mlx", method="rtn", skip=[skip])
    assert not (tmp_path / "out").exists()


def test_a_model_of_which_all_stacks_stay_whole_is_loaded(tmp_path: Path) -> None:
    path = model_of("granitemoe", tmp_path / "m")
    lowbit.quantize(path, tmp_path / "out", scheme="int4-g32-min", format="mlx", method="rtn", skip=["put_linear"])
    found, modules = in_mlx_lm(tmp_path / "out")
    assert "QuantizedSwitchLinear" not in modules.values() and "QuantizedLinear" in modules.values()
    assert close(found, ours(tmp_path / "out"))


@pytest.mark.parametrize("what", ["no axes", "no experts", "twice", "braces"])
def test_stacks_that_are_none_are_named(what: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lowbit.quantize(
        model_of("qwen3_moe", tmp_path / "m"), tmp_path / "out", scheme="int4-g32-min", format="mlx", method="rtn"
    )
    tensors = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.mlp.switch_mlp.up_proj.scales"
    bad = {
        "no axes": {name: torch.tensor(1.0)},
        "no experts": {name: torch.zeros(0, 64, 2)},
        "twice": {"model.layers.0.mlp.experts.1.up_proj.scales": torch.ones(64, 2)},
        "braces": {"model.{x}.switch_mlp.up_proj.scales": torch.ones(3)[:0]},
    }[what]
    save_file(tensors | bad, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor '.*up_proj\.scales' (is \[|has what)"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["mixed_3_6", "mixed_2_6"])
def test_reads_the_recipes_of_mlx_lm(recipe: str, tmp_path: Path) -> None:
    """What it says of a module has `group_size: null`, which is the default of the mode."""
    save_tiny("llama", tmp_path / "m", **SIZES)
    save_words(tmp_path / "m")
    convert: Any = pytest.importorskip("mlx_lm.convert")
    with mx.stream(mx.cpu):
        convert.convert(str(tmp_path / "m"), str(tmp_path / "made"), quantize=True, quant_predicate=recipe)
        wanted = theirs(utils.load_model(tmp_path / "made", lazy=False)[0])
    said = json.loads((tmp_path / "made/config.json").read_text())["quantization"]
    assert any(isinstance(each, dict) and each["group_size"] is None for each in said.values())
    low, high = (f"int{bits}-g64-min" for bits in recipe.split("_")[1:])
    with open_checkpoint(tmp_path / "made") as found:
        schemes = {str(weight.scheme).removesuffix("-f32") for weight in found.weights.values() if weight.scheme}
    assert {name.removesuffix("-bf16").removesuffix("-f16") for name in schemes} == {low, high}
    assert close(ours(tmp_path / "made"), wanted, 2e-2)


@pytest.mark.parametrize("scheme", ["mxfp4", "int4-g32-min"])
def test_what_mlx_lm_makes_two_of_is_kept(scheme: str, tmp_path: Path) -> None:
    """DeepSeek's keys and values."""
    config: Any = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "m")
    lowbit.quantize(tmp_path / "m", tmp_path / "out", format="mlx", scheme=scheme, method="rtn")
    with open_checkpoint(tmp_path / "out") as found:
        kept = [weight.scheme is None for name, weight in found.weights.items() if "kv_b_proj" in name]
    assert kept == [True] * 2
    with mx.stream(mx.cpu):
        logits = theirs(utils.load_model(tmp_path / "out", lazy=False)[0])
    assert close(logits, ours(tmp_path / "out"), 1e-3)
