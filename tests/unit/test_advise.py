"""Advice: bytes against hand-made sums and against transformers' own caches, rules of runtimes, sentences."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import lowbit
from lowbit.advise import Loss, Question, advise, read_measured
from lowbit.advise.hardware import Hardware, find, probe, profiles
from lowbit.cli.advise import command
from lowbit.errors import UnsupportedError, UsageError
from lowbit.schemes import parse
from lowbit.stages.checkpoint import Checkpoint, arch_rows, open_checkpoint
from lowbit.stages.plan import Rules, make_plan
from lowbit.stages.running import activation_bytes, cache_of, read_bytes

GIB = 2**30
# As published in the models' config.json.
LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_8B = {**LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
MISTRAL = {**LLAMA_3_8B, "model_type": "mistral", "sliding_window": 4096, "vocab_size": 32000}
GEMMA_2_9B = {
    "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip


def config(facts: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**facts)


@pytest.mark.parametrize(
    ("facts", "context", "latent", "total"),
    [
        (LLAMA_2_7B, 4096, True, 2 * GIB),  # 512 KiB a token: 2 GiB, as its makers' paper on grouped queries has it
        (LLAMA_3_8B, 8192, True, 1 * GIB),  # 128 KiB a token
        (MISTRAL, 32768, True, 4096 * 131072),  # all layers keep 4,096 tokens
        (MISTRAL, 1000, True, 1000 * 131072),
        (GEMMA_2_9B, 8192, True, (21 * 4096 + 21 * 8192) * 2 * 8 * 256 * 2),  # every other layer has a window
        (DEEPSEEK_V3, 1000, True, 1000 * 70272),  # 70.272 KB a token, arXiv 2505.09343, table 1
        (DEEPSEEK_V3, 1000, False, 1000 * 61 * 128 * (192 + 128) * 2),
        ({"model_type": "gpt2"}, 1024, True, 1024 * 12 * 2 * 768 * 2),
        ({"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
          "multi_query": True, "new_decoder_architecture": False}, 2048, True, 2048 * 32 * 2 * 64 * 2),  # one head
        ({**LLAMA_3_8B, "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 8192, True, GIB),
    ],
)  # fmt: skip
def test_a_cache_is_what_a_hand_makes_it(facts: dict[str, Any], context: int, latent: bool, total: int) -> None:
    assert cache_of(config(facts), context, 1, latent).nbytes(16) == total
    assert cache_of(config(facts), context, 3, latent).nbytes(16) == 3 * total
    assert cache_of(config(facts), context, 1, latent).nbytes(8) == total // 2


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


@pytest.mark.parametrize(
    "facts",
    [
        {"model_type": "llama", "num_key_value_heads": 2, **TINY},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 40},
        {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, **TINY},
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24, **TINY},
        {"model_type": "deepseek_v3", "num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": None,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 10, "v_head_dim": 14, "first_k_dense_replace": 2, **TINY},
    ],
    ids=lambda facts: facts["model_type"],
)  # fmt: skip
def test_a_cache_is_what_transformers_keeps(facts: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    shape = config(facts)
    model: Any = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        cache = model(torch.zeros(3, 11, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_of(shape, 11, 3, latent=True).total == kept


def test_a_state_that_does_not_grow_and_a_layer_that_is_not_known() -> None:
    facts = {"model_type": "qwen3_next", "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 256,
             "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_key_heads": 16,
             "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}  # fmt: skip
    found = cache_of(config(facts), 1000, 2, latent=True)
    assert found.total == 2 * 1000 * 2 * 2 * 256
    assert found.state == 2 * 3 * 4 * (32 * 128 * 128 + (2 * 16 * 128 + 32 * 128) * 4)
    strange = config({**TINY, "model_type": "llama"})
    strange.layer_types = ["full_attention", "mamba"]
    with pytest.raises(UnsupportedError, match="layer of kind 'mamba'"):
        cache_of(strange, 10, 1, latent=True)


def test_activations_grow_with_a_pass_and_no_further() -> None:
    shape = config(LLAMA_2_7B)
    one = 2 * 4096 + 3 * 11008  # the hidden state twice; gate, up and their product
    assert activation_bytes(shape, 100, 1, 512, 2) == 100 * 2 * one + 4 * 32000
    assert activation_bytes(shape, 100_000, 2, 512, 4) == 512 * 4 * one + 2 * 4 * 32000


def hollow(path: Path, facts: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint whose file has a header and a hole: of full size to whoever reads headers alone."""
    path.mkdir()
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (path / "config.json").write_text(json.dumps(facts))
    return open_checkpoint(path)


LINEARS = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}  # fmt: skip


LAYERS = 3  # as many as all 32 for the sums, and quicker


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096)}
    shapes |= {f"model.layers.{layer}.{part}.weight": size for layer in range(LAYERS) for part, size in LINEARS.items()}
    shapes |= {f"model.layers.{layer}.{norm}.weight": (4096,) for layer in range(LAYERS)
               for norm in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    shapes["model.norm.weight"] = (4096,)
    return hollow(tmp_path_factory.mktemp("advise") / "llama-2-7b", {**LLAMA_2_7B, "num_hidden_layers": LAYERS}, shapes)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As many weights in one block, which is quicker to plan."""
    names = ("gate_proj", "up_proj", "down_proj")
    size = {name: (INNER, 4096) if name != "down_proj" else (4096, INNER) for name in names}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096)}
    shapes |= {f"model.layers.0.mlp.{name}.weight": shape for name, shape in size.items()}
    facts = {**LLAMA_2_7B, "num_hidden_layers": 1, "intermediate_size": INNER}
    return hollow(tmp_path_factory.mktemp("advise") / "wide", facts, shapes)


INNER = 2**19
LINEAR = LAYERS * (4 * 4096 * 4096 + 3 * 4096 * 11008)
OTHER = 2 * 32000 * 4096 + (2 * LAYERS + 1) * 4096


def card(**facts: Any) -> Hardware:
    told = {"name": "card", "vendor": "nvidia", "family": "Ada", "level": 8.9, "memory": 24 * 10**9, "bandwidth": 1e12}
    return Hardware(**{**told, "source": "made up", **facts})


def test_bytes_and_bound_of_a_llama_are_sums_made_by_hand(llama: Checkpoint) -> None:
    advice = advise(llama, Question(card(), 4096, runtime="vllm"))
    assert advice.parameters == LINEAR + OTHER
    found = {(each.format, each.scheme): each for each in advice.options}
    four = found["compressed-tensors", "int4-g128"]
    # 4 bits and a 16-bit scale for 128; each of the matrices has its shape beside it, two int64.
    assert four.file == four.weights == LINEAR * 33 // 64 + 2 * OTHER + 7 * LAYERS * 16
    assert four.bits == 4.125 and four.cache == 2 * GIB * LAYERS // 32
    read = four.weights - 2 * 32000 * 4096  # but for the rows of the embedding
    assert four.bound == pytest.approx(1e12 / (read + four.cache))
    eight = advise(llama, Question(card(), 4096, batch=8, runtime="vllm", cache="fp8")).options
    many = next(each for each in eight if each.scheme == "int4-g128" and each.format == "compressed-tensors")
    assert many.cache == 4 * four.cache and many.bound == pytest.approx(8e12 / (read + many.cache))


@pytest.mark.parametrize("room", [0, -1])
def test_what_fits_is_arithmetic_to_the_byte(wide: Checkpoint, room: int) -> None:
    plain = next(each for each in advise(wide, Question(card(), 2048, runtime="vllm")).options if each.scheme is None)
    question = Question(card(), 2048, runtime="vllm", memory=plain.total + room)
    fits = [each.scheme is None for each in advise(wide, question).options]
    assert any(fits) == (room == 0)
    if room:
        refused = next(each for each in advise(wide, question).refused if each.scheme is None)
        assert "1 B more than there is" in refused.refused


def test_transformers_unpacks_and_so_needs_the_memory_of_floats(wide: Checkpoint) -> None:
    found = advise(wide, Question(card(), 1024, runtime="transformers")).options
    gguf = next(each for each in found if each.scheme == "q8_0")
    bits8 = next(each for each in found if each.format == "bitsandbytes" and each.scheme == "int8-row")
    assert gguf.file < gguf.weights and gguf.weights >= 2 * 3 * 4096 * INNER
    assert bits8.file == bits8.weights < gguf.weights


@pytest.mark.parametrize(
    ("name", "runtime", "loads", "not_"),
    [
        ("h100", "vllm", {"w8a8-fp8", "w8a8-int8", "w4a16"}, {"mxfp4", "mlx4", "hqq"}),
        ("b200", "vllm", {"nvfp4", "mxfp8", "w8a8-fp8"}, {"w8a8-int8"}),
        ("a100", "vllm", {"w4a16", "w8a8-int8", "w8a8-fp8"}, {"mxfp4"}),
        ("t4", "vllm", {"w4a16", "w8a8-int8", "awq"}, {"mxfp8"}),
        ("v100", "vllm", {"gptq", "bnb4", "float"}, {"awq", "w4a16", "w8a8-fp8"}),
        ("mi300x", "vllm", {"w8a8-fp8", "gguf"}, {"w4a16", "awq"}),
        ("mi250", "vllm", {"float", "gguf"}, {"w8a8-fp8"}),
        ("gaudi-2", "vllm", {"float"}, {"w8a8-fp8", "w4a16"}),
        ("m2", "mlx", {"mlx4", "mlx8"}, {"gguf"}),
        ("m4-max", "llama.cpp", {"gguf"}, {"mlx4"}),
        ("snapdragon-8-gen-3", "onnxruntime", {"onnx4"}, {"gguf"}),
        ("x86-ddr5", "lowbit", {"gguf", "awq", "w4a16"}, {"w8a8-fp8"}),
        ("graviton3", "lowbit", {"gguf", "awq", "w4a16"}, {"w8a8-fp8"}),
    ],
)
def test_what_runtimes_load_where(wide: Checkpoint, name: str, runtime: str, loads: set[str], not_: set[str]) -> None:
    hardware = find(name)
    advice = advise(wide, Question(hardware, 512, runtime=runtime, memory=64 * GIB))
    kinds = {each.kind for each in advice.options}
    assert loads <= kinds and not not_ & kinds
    assert all(each.refused for each in advice.refused)


def test_a_runtime_of_other_hardware_is_refused_in_one_word(wide: Checkpoint) -> None:
    refused = advise(wide, Question(find("a100"), 512)).refused
    (mlx,) = [each.refused for each in refused if each.runtime == "mlx"]
    assert mlx == "it loads nothing on nvidia 8; it does on apple"
    alone = {"mxfp8", "mxfp4"}  # of Blackwell; the rest of what vllm knows it loads
    assert {each.scheme for each in refused if each.runtime == "vllm" and "it does not load" in each.refused} == alone


def test_the_first_is_what_the_rules_say(wide: Checkpoint) -> None:
    def first(**facts: Any) -> str:
        hardware = find(facts.pop("name"))
        return str(advise(wide, Question(hardware, 512, **facts)).options[0].scheme)

    assert first(name="h100", runtime="vllm", batch=64) == "fp8-e4m3-row"  # multiplication is the limit
    assert first(name="rtx-4090", runtime="vllm").startswith("int4-g128")  # memory is
    assert first(name="x86-ddr5", runtime="llama.cpp", memory=16 * GIB) == "iq4_xs"  # the fewest bytes of 4 bits up


def test_training_is_called_for_where_too_few_bits_fit(wide: Checkpoint) -> None:
    def said(memory: float) -> str:
        question = Question(card(), 512, runtime="llama.cpp", memory=int(memory * GIB))
        return advise(wide, question).training

    assert said(20) == "not called for: the model fits as it is"
    assert said(8.5).startswith("not called for: q6_k with 6.56 bits fits")
    assert said(6.2).startswith("perhaps: the most that fits is") and "below the 4" in said(6.2)
    assert said(1).startswith("nothing can be taken")


def test_a_loss_is_what_was_measured_or_nothing(wide: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    points = [
        {"format": "compressed-tensors", "scheme": scheme, "change": {"value": value, "low": value - 0.001,
         "high": value + 0.001}} for scheme, value in (("int4-g128", 0.02), ("int8-g128", 0.001), ("int8-g128", 0.003))
    ]  # fmt: skip
    file.write_text(json.dumps({"points": points}))
    measured = read_measured(file)
    assert measured["compressed-tensors", "int8-g128"].value == pytest.approx(0.0010005)
    advice = advise(wide, Question(card(), 512, runtime="vllm", max_loss=0.01), measured)
    assert advice.options[0].scheme == "int8-g128" and isinstance(advice.options[0].loss, Loss)
    assert all(each.loss is None for each in advice.options[1:])
    assert any("not surely below 1.00%" in each.refused for each in advice.refused if each.scheme == "int4-g128")
    for text in ("", "[]", '{"points": [{}]}', '{"points": 3}'):
        file.write_text(text)
        with pytest.raises(UsageError, match="not a sweep's result"):
            read_measured(file)


def test_of_experts_a_token_reads_those_that_it_uses(tmp_path: Path) -> None:
    facts = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 50, "num_local_experts": 8,
             "num_experts_per_tok": 2, "tie_word_embeddings": True}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, 64)}
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"}
    shapes |= {
        f"model.layers.0.block_sparse_moe.experts.{n}.{w}.weight": (128, 64) for n in range(8) for w in ("w1", "w3")
    }
    checkpoint = hollow(tmp_path / "moe", facts, shapes)
    plan = make_plan(checkpoint, Rules("int8-row", skip=(".",)))
    read = read_bytes(plan.entries, [*map(plan.stored_bytes, plan.entries)], config(facts))
    assert read == 2 * (50 * 64 + 4 * 64 * 64 + 2 * 2 * 128 * 64)  # the embedding is the head


def test_profiles_are_whole_and_found_by_any_spelling() -> None:
    names = [row["name"] for row in arch_rows("hardware")]
    also = [each for row in arch_rows("hardware") for each in row.get("also", ())]
    assert len({*names, *also}) == len(names) + len(also)
    vendors = {vendor for row in arch_rows("runtimes", "loads") for vendor in row["vendors"]}
    for each in profiles():
        assert each.source and each.bandwidth > 1e10 and each.vendor in vendors
    assert find("RTX 4090") == find("rtx4090") == find("ada") and find("Hopper").name == "h100"
    assert find("x86-ddr4").bandwidth == 2 * 8 * 3200e6  # channels, bytes, transfers a second
    assert find("epyc-9004").bandwidth == 12 * 8 * 4800e6
    runtimes = {row["name"] for row in arch_rows("runtimes")}
    kinds = {row["kind"] for row in arch_rows("candidates")} | {"float"}
    for row in arch_rows("runtimes", "loads"):
        assert row["runtime"] in runtimes and set(row["kinds"]) <= kinds and row["source"]
        assert row["speed"] in ("native", "weights", "slow", "unpacked")


def test_this_machine_is_measured() -> None:
    found = probe()
    assert found.measured and found.memory > 2**28 and found.bandwidth > 1e8


def test_precisions_are_what_torch_and_our_grids_have() -> None:
    rows = {row["name"]: row for row in arch_rows("precisions")}
    types = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16, "FP8 E4M3": torch.float8_e4m3fn,
             "FP8 E5M2": torch.float8_e5m2}  # fmt: skip
    for name, dtype in types.items():
        info, row = torch.finfo(dtype), rows[name]
        assert (row["bits"], row["largest"], row["smallest"]) == (info.bits, info.max, info.tiny), name
        assert row["mantissa"] == round(-torch.tensor(info.eps).log2().item()), name
        assert 1 + row["exponent"] + row["mantissa"] == info.bits, name
    for name, scheme in {"NVFP4": "nvfp4", "MXFP4": "mxfp4", "MXFP8": "mxfp8", "NF4": "nf4"}.items():
        levels = [abs(level) for level in parse(scheme).grid.levels if abs(level) < 1e9]
        assert rows[name]["largest"] == max(levels), name
    assert rows["NF4"]["smallest"] == pytest.approx(sorted(abs(x) for x in parse("nf4").grid.levels)[1])


def test_a_wrong_question_is_one_sentence(wide: Checkpoint, wiki_8m: Path) -> None:
    for name, near in {"rtx409": "rtx-4090", "h10": "h100", "mi30": "mi300x", "rasberry pi": "raspberry-pi-5"}.items():
        with pytest.raises(UsageError, match=f"no hardware is called '{name}'; near it: .*{near}"):
            find(name)
    for question, words in (
        (Question(card(), 1, runtime="tgi"), "there are: vllm"),
        (Question(card(), 1, runtime="vllm", cache="q4_0"), "there are: f16, fp8"),
        (Question(card(), 0), "at least 1"),
    ):
        with pytest.raises(UsageError, match=words):
            advise(wide, question)
    run = CliRunner()
    for more in (["--max-loss", "much"], ["--max-loss", "-1%"], ["--context", "0"], ["--memory", "lots"]):
        assert run.invoke(command, [str(wiki_8m), "--hardware", "h100", *more]).exit_code
    assert "name a MODEL" in run.invoke(command, []).output


def test_the_command_prints_a_table_and_json(wiki_8m: Path) -> None:
    words = [str(wiki_8m), "--hardware", "m2-ultra", "--memory", "64GiB", "--context", "512"]
    shown = CliRunner().invoke(command, [*words, "--runtime", "mlx"])
    assert shown.exit_code == 0 and "int4-g64-min" in shown.output and "a bound, no forecast" in shown.output
    data = json.loads(CliRunner().invoke(command, [*words, "--json"]).output)
    assert {each["runtime"] for each in data["options"]} == {"mlx", "llama.cpp", "transformers", "vllm"}
    assert data["options"][0]["command"].startswith("--format ")
    assert len(json.loads(CliRunner().invoke(command, ["--precisions", "--json"]).output)) == 12
    assert "NVFP4" in CliRunner().invoke(command, ["--precisions"]).output


# How, its kind; whether vLLM loads it on an A100 and on a Blackwell, and whether schemes are offered beside it.
QUANTIZED: dict[str, tuple[dict[str, Any], str, bool, bool, bool]] = {
    "fp8": ({"scheme": "fp8-e4m3-128x128", "format": "fp8"}, "w8a8-fp8", True, True, True),
    "w8a8": ({"scheme": "int8-row", "activations": "int8-row"}, "w8a8-int8", True, False, True),
    "w4a16": ({"scheme": "int4-g128"}, "w4a16", True, True, False),
    "gptq": ({"scheme": "int4-g128", "format": "gptq"}, "gptq", True, True, False),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_checkpoint_is_judged_as_what_it_is(name: str, wiki_8m: Path, tmp_path: Path) -> None:
    how, kind, ampere, blackwell, again = QUANTIZED[name]
    result = lowbit.quantize(wiki_8m, tmp_path / "q", **how).result
    checkpoint = open_checkpoint(tmp_path / "q")
    on_a_processor = advise(checkpoint, Question(find("x86-ddr5"), 512, runtime="lowbit")).options
    assert [each.bits for each in on_a_processor if each.scheme is None] == pytest.approx(
        [result.bits_quantized], rel=0.05
    )
    for hardware, loads in (("a100", ampere), ("b200", blackwell)):
        advice = advise(checkpoint, Question(find(hardware), 512))
        as_is = {each.runtime for each in advice.options if each.scheme is None}
        assert {each.kind for each in advice.options if each.scheme is None} <= {kind}
        assert ("vllm" in as_is) == loads and "llama.cpp" not in as_is
        offered = {each.command for each in advice.options if each.scheme}
        assert bool(offered) == again and all("--requantize" in each for each in offered)
        assert any("lowbit convert" in note for note in advice.notes)


def test_of_a_kind_that_no_row_has_nothing_is_said(wiki_8m: Path, tmp_path: Path) -> None:
    lowbit.quantize(wiki_8m, tmp_path / "q", scheme="int8-row", format="eetq")
    options = advise(open_checkpoint(tmp_path / "q"), Question(find("a100"), 512, runtime="vllm")).options
    (as_is,) = [each for each in options if each.scheme is None]
    assert "not judged" in as_is.reasons[-1] and "eetq" in as_is.reasons[-1]
