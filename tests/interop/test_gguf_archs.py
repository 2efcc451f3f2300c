"""GGUF files of more architectures: what llama.cpp computes from them, and what is read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lowbit.errors import UnsupportedError
from lowbit.formats._mixtures import choose, place_of, require_arch
from lowbit.pipeline import Request, run, run_conversion, run_imatrix
from lowbit.runtime.model import open_model
from lowbit.stages._changes import Goal
from lowbit.stages._experts import apart
from lowbit.stages._gguf import encoded, entry, header_of, read_gguf
from lowbit.stages._model import open_tokenizer
from lowbit.stages.checkpoint import AHEAD, open_checkpoint
from lowbit.stages.plan import Calibration, Rules
from lowbit.stages.samples import read_samples
from tests.interop.test_gguf import (
    QWEN,
    SMALL,
    TEXT,
    agree,
    alone,
    byte_level,
    foretold,
    llama_quantize,
    ours,
    quantized,
    saved_model,
    tensors,
    tokens_and_logits,
)
from tests.reference.models import to_mxfp4

library: Any = transformers
JSON = dict[str, Any]


@final
@dataclass(frozen=True)
class Case:
    """A small model of transformers.

    Attributes:
        family: its class without `ForCausalLM`, and its configuration's without `Config`.
        settings: of its configuration.
        exact: how far llama.cpp's logits may be, as a share of the largest, where weights are float32; GELU is a table
            in float16 there, and the approximation by tanh.
        again: other settings with which a file is read, of what it does not tell.
        share: of the positions for which `q8_0` must agree: rounding moves tokens to other experts.
        rounded: how far they may be with `q8_0`; small states that are fed back grow what rounding changes.
        config: class of the configuration, where it is named otherwise.
    """

    family: str
    settings: JSON
    exact: float = 1e-4
    share: float = 1.0
    rounded: float = 0.1
    config: str = ""
    again: JSON = field(default_factory=dict)

    def model(self, **more: Any) -> Any:
        """It, with other settings."""
        config = getattr(library, f"{self.config or self.family}Config")(**{**self.settings, **more})
        return getattr(library, f"{self.family}ForCausalLM")(config)


_PLAIN = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
_FALCON = {**_PLAIN, "ffn_hidden_size": 96, "tie_word_embeddings": False}
_MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 400, "state_size": 16, "time_step_rank": 32,
          "intermediate_size": 128}  # fmt: skip
_LLAMA4 = {**SMALL, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 64, "intermediate_size_mlp": 96,
           "num_local_experts": 4, "pad_token_id": 0}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}
_OSS = {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64,
        "sliding_window": 8, "rope_parameters": _YARN}  # fmt: skip
_MIXED = {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
_PART = {"rope_theta": 5000.0, "partial_rotary_factor": 0.25}
_MANY = {"num_local_experts": 128, "use_qk_norm": False, "interleave_moe_layer_step": 4}
_GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 3.0}
_OLMOE = {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
_COHERE2 = {"head_dim": 16, "num_hidden_layers": 4, "logit_scale": 0.2, "sliding_window": 8}
_ROUTED = {
    **SMALL,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
_WHOLE = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
_ALPHA = {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0, "rope_theta": 100.0}
_GLM = {**_ROUTED, "use_qk_norm": True, "attention_bias": True, "pad_token_id": 0}
_ERNIE = {**SMALL, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1,
          "moe_layer_start_index": 1}  # fmt: skip
_LATENT = {
    **{name: value for name, value in _ROUTED.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
_LONG = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 100.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
_GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
_LITE = {"q_lora_rank": None, "num_hidden_layers": 27, "n_routed_experts": 2, "num_experts_per_tok": 1}
_FEW = {"num_experts_per_tok": 2}
_WINDOW = {"num_hidden_layers": 4, "sliding_window": 8}
_CONV = {"num_hidden_layers": 4, "pad_token_id": 0, "layer_types": ["conv", "full_attention", "conv", "conv"]}
_LFM_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_dense_layers": 1}
_TWO_ROPES = {
    "full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 300.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
_STEPS = {**_LONG, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
          "original_max_position_embeddings": 16}  # fmt: skip
_DELTA = {**SMALL, "num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
          "linear_num_key_heads": 2, "linear_num_value_heads": 6,
          "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5,
                              "mrope_section": [2, 1, 1], "mrope_interleaved": True}}  # fmt: skip
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
             "shared_expert_intermediate_size": 32}  # fmt: skip
_MAMBA2 = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 400, "state_size": 16, "num_heads": 8,
           "head_dim": 16, "n_groups": 2}  # fmt: skip
_HYBRID = {
    **SMALL,
    **_GRANITE,
    "num_local_experts": 0,
    "shared_intermediate_size": 64,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_NEMOTRON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 400,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
}
_NEMOTRON_MOE = {
    **_NEMOTRON,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
}
CASES = {
    "glm4_moe": Case("Glm4Moe", _GLM, share=0.5),
    "glm4_moe without norms": Case("Glm4Moe", {**_GLM, "use_qk_norm": False, "attention_bias": False}, share=0.5),
    "dots1": Case("Dots1", {**_ROUTED, "num_key_value_heads": 4}, share=0.5),
    "ernie4_5_moe": Case("Ernie4_5_Moe", _ERNIE, share=0.5),
    "hunyuan moe": Case("HunYuanMoEV1", {**SMALL, "head_dim": 16, "num_experts": 4, "moe_topk": 2}, share=0.5),
    "exaone4": Case("Exaone4", {**SMALL, **_WHOLE, "head_dim": 16}),
    "exaone4 with windows": Case(
        "Exaone4", {**SMALL, "head_dim": 16, "num_hidden_layers": 64, "sliding_window": 8}
    ),
    "olmo3": Case("Olmo3", {**SMALL, **_WINDOW, "rope_parameters": _TWO_ROPES}),
    "lfm2": Case("Lfm2", {**SMALL, **_CONV}),
    "lfm2_moe": Case("Lfm2Moe", {**SMALL, **_CONV, **_LFM_MOE}, share=0.5),
    "ministral3": Case("Ministral3", {**SMALL, "head_dim": 16, "rope_parameters": _STEPS}),
    "qwen3_5": Case("Qwen3_5", _DELTA, share=0.5, config="Qwen3_5Text"),
    "qwen3_5 one to one": Case("Qwen3_5", {**_DELTA, "linear_num_key_heads": 6}, share=0.5, config="Qwen3_5Text"),
    "qwen3_5_moe": Case("Qwen3_5Moe", {**_DELTA, **_QWEN_MOE}, share=0.5, rounded=0.3, config="Qwen3_5MoeText"),
    "qwen3_next": Case("Qwen3Next", {**_DELTA, **_QWEN_MOE}, share=0.5, rounded=0.3),
    "mamba2": Case("Mamba2", _MAMBA2),
    "granite hybrid": Case("GraniteMoeHybrid", _HYBRID),
    "granite hybrid moe": Case("GraniteMoeHybrid", {**_HYBRID, "num_local_experts": 4}, share=0.5),
    "nemotron_h": Case("NemotronH", _NEMOTRON),
    "nemotron_h moe": Case("NemotronH", _NEMOTRON_MOE, share=0.5),
    "glm4_moe_lite": Case("Glm4MoeLite", _LATENT, share=0.5),
    "minimax_m2": Case("MiniMaxM2", {**SMALL, **_FEW, "head_dim": 16, "num_local_experts": 4}, share=0.5),
    "deepseek_v3": Case("DeepseekV3", {**_LATENT, **_GROUPS}, share=0.5),
    "deepseek_v3 far": Case("DeepseekV3", {**_LATENT, "rope_parameters": _LONG}, share=0.5),
    "deepseek_v2": Case("DeepseekV2", _LATENT, share=0.5),
    "deepseek_v2 lite": Case("DeepseekV2", {**_LATENT, **_LITE, "rope_parameters": _LONG}, share=0.5),
    "gpt_neox": Case("GPTNeoX", {**_PLAIN, "rope_parameters": _PART}, 4e-3),
    "gpt_neox in line": Case("GPTNeoX", {**_PLAIN, "use_parallel_residual": False}, 4e-3),
    "falcon 7b": Case("Falcon", {**_FALCON, "multi_query": True}, 4e-3),
    "falcon 40b": Case("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, 4e-3),
    "falcon 11b": Case(
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        4e-3,
    ),
    "bloom": Case("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 400}, 2e-3),
    "mamba": Case("Mamba", _MAMBA),
    "llama4": Case("Llama4", {**_LLAMA4, "interleave_moe_layer_step": 2}, share=0.5, config="Llama4Text"),
    "llama4 without norms": Case("Llama4", {**_LLAMA4, **_MANY}, share=0.5, config="Llama4Text"),
    "gpt-oss": Case("GptOss", _OSS, share=0.5, again={"rope_parameters": {**_YARN, "truncate": False}}),
    "gpt-oss mixed": Case(
        "GptOss", {**_OSS, **_MIXED}, share=0.5, again={"rope_parameters": {**_YARN, "truncate": False}}
    ),
    "granitemoe": Case("GraniteMoe", {**SMALL, **_GRANITE, "num_local_experts": 4}, share=0.5),
    "granite": Case("Granite", {**SMALL, **_GRANITE}),
    "starcoder2": Case("Starcoder2", {**SMALL, "sliding_window": None}, 2e-3),
    "stablelm": Case("StableLm", {**SMALL, "use_qkv_bias": True}),
    "stablelm in parallel": Case("StableLm", {**SMALL, "use_parallel_residual": True}),
    "olmo": Case("Olmo", SMALL),
    "olmo2": Case("Olmo2", SMALL),
    "olmoe": Case("Olmoe", {**SMALL, **_OLMOE}, share=0.5),
    "cohere": Case("Cohere", {**SMALL, "logit_scale": 0.2}),
    "cohere2": Case("Cohere2", {**SMALL, **_COHERE2}),
    "phi": Case("Phi", SMALL, 2e-3),
    "glm4": Case("Glm4", {**SMALL, "head_dim": 16, "pad_token_id": 0}),
    "smollm3": Case("SmolLM3", {**SMALL, "num_hidden_layers": 4, "pad_token_id": 0}),
    "seed_oss": Case("SeedOss", {**SMALL, "head_dim": 16}),
    "ernie4_5": Case("Ernie4_5", {**SMALL, "head_dim": 16}),
    "arcee": Case("Arcee", SMALL),
    "nemotron": Case("Nemotron", {**SMALL, "head_dim": 16}),
    "hunyuan": Case("HunYuanDenseV1", {**SMALL, "head_dim": 16}),
    "hunyuan with alpha": Case("HunYuanDenseV1", {**SMALL, "head_dim": 16, "rope_parameters": _ALPHA}),
}  # fmt: skip


def saved(case: Case, path: Path, **more: Any) -> Path:
    return saved_model(case.model(**more), path, byte_level())


@pytest.mark.parametrize("kind", CASES)
def test_logits_and_what_is_read_back(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    source = saved(case, tmp_path / "model")
    file = quantized(source, tmp_path / "f32", "f32")
    agree(file, source, case.exact)
    written, original = open_checkpoint(file), apart(open_checkpoint(source), "gguf")
    for name in written.weights:
        torch.testing.assert_close(written.dequantized(name), original.dequantized(name), rtol=0, atol=3e-7)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | case.again))
    other, ids = alone(file, tmp_path / "alone"), list(range(2, 60))
    found, wanted = ours(other, ids), ours(source, ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    again = quantized(other, tmp_path / "again", "f32")
    assert tensors(again) == tensors(file)
    run_conversion(str(other), tmp_path / "float", Goal("float"))
    assert np.abs(ours(tmp_path / "float", ids) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    agree(quantized(source, tmp_path / "q8_0", "q8_0"), source, case.rounded, case.share)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "ffn_hidden_size": 256, "num_hidden_layers": 16, "n_layer": 16}
TYPES = {"q2_k": 10, "q2_k_s": 21, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
         "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "iq3_s": 26, "iq3_m": 27}  # fmt: skip
FLAT = (
    "gpt_neox",
    "falcon 7b",
    "falcon 40b",
    "bloom",
    "mamba",
    "cohere",
    "granitemoe",
    "olmo2",
    "glm4_moe",
    "deepseek_v3",
    "ernie4_5_moe",
    "lfm2",
    "lfm2_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "mamba2",
    "granite hybrid moe",
    "nemotron_h moe",
)


@pytest.mark.parametrize("kind", FLAT)
def test_types_are_llama_quantizes(kind: str, tmp_path: Path) -> None:
    """Falcon has rules of its own; rows that no super-block divides get others."""
    case = CASES[kind]
    more = {name: value for name, value in WIDE.items() if name in case.settings} | {"tie_word_embeddings": True}
    more |= {"intermediate_size": 512} if kind == "mamba" else {"num_key_value_heads": 4} if kind == "olmo2" else {}
    more |= {"tie_word_embeddings": False} if kind in ("gpt_neox", "falcon 7b", "olmo2") else {}
    kinds = {name: case.settings[name] for name in ("layer_types", "layers_block_type") if name in case.settings}
    more |= {name: value * (16 // len(value)) for name, value in kinds.items()}
    more |= {"head_dim": 64} if kind == "mamba2" else {}
    experts = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    more |= {name: 2 for name in experts if case.settings.get(name) == 4}  # of 8 there are rules, of 4 none
    source = saved(case, tmp_path / "model", **more)
    f16 = quantized(source, tmp_path / "f16", "f16")
    checkpoint = apart(open_checkpoint(source), "gguf")
    weights = [weight for name, weight in checkpoint.weights.items() if name not in checkpoint.tied]
    arch = require_arch(checkpoint.config)
    for scheme, file_type in TYPES.items():
        found = choose(scheme, weights, checkpoint.config)
        ours = {place_of(arch, checkpoint.weights[name]): kind.upper() for name, (kind, _) in found.items()}
        assert ours == foretold(f16, file_type), scheme
    _, logits = tokens_and_logits(quantized(source, tmp_path / "q4_k_m", "q4_k_m"), "It loads.")
    assert np.isfinite(logits).all()


def test_heads_by_group_are_llama_quantizes(tmp_path: Path) -> None:
    """Blocks of 256 columns with two heads that are elsewhere in transformers: to the byte, and as they are read."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    model = CASES["qwen3_5"].model(**wide, linear_num_value_heads=4)
    source = saved_model(model, tmp_path / "model", byte_level(QWEN35, nfc=True))
    f16 = quantized(source, tmp_path / "f16", "f16")
    theirs = tensors(llama_quantize(f16, tmp_path / "theirs.gguf", 15))
    file = quantized(f16, tmp_path / "ours", "q4_k_m")
    assert tensors(file) == theirs
    assert theirs["blk.0.ssm_out.weight"][0] == "Q4_K"
    other = alone(file, tmp_path / "alone")
    run_conversion(str(other), tmp_path / "float", Goal("float"))
    agree(quantized(tmp_path / "float", tmp_path / "f32", "f32"), other.parent, 1e-4)
    ids = torch.arange(2, 60)
    with torch.inference_mode():  # kernels round inputs to 8 bits
        found = open_model(other).model(input_ids=ids[None]).logits[0].numpy()
    wanted = ours(other, ids.tolist())
    assert np.median(np.abs(found - wanted).max(1)) <= 0.2 * np.abs(wanted).max()
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    learned = Calibration((str(text),), samples=4, length=64)
    made = quantized(source, tmp_path / "out", "q4_k_m", "gptq", calibration=learned)
    rows = json.loads((made.parent / "report.json").read_text())["rows"]
    methods = {row["name"]: row["outcome"]["method"] for row in rows if row["outcome"]}
    assert methods["model.layers.0.linear_attn.out_proj.weight"] == "ggml_fit"
    assert methods["model.layers.0.linear_attn.in_proj_qkv.weight"] == "gptq"
    other = alone(made, tmp_path / "alone again")
    run_conversion(str(other), tmp_path / "again", Goal("float"))
    agree(quantized(tmp_path / "again", tmp_path / "f32 again", "f32"), other.parent, 1e-4)


def test_importance_of_heads_by_group_is_in_llama_cpps_order(tmp_path: Path) -> None:
    model = CASES["qwen3_5"].model()
    source, text = saved_model(model, tmp_path / "model", byte_level()), tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    learned = Calibration((str(text),), samples=4, length=32)
    run_imatrix(str(source), tmp_path / "imatrix.gguf", learned)
    found = np.array(read_gguf(tmp_path / "imatrix.gguf").floats("blk.0.ssm_out.weight.in_sum2"))
    inputs: list[torch.Tensor] = []
    model.model.layers[0].linear_attn.out_proj.register_forward_hook(lambda module, seen, out: inputs.append(seen[0]))
    with torch.inference_mode():
        model.eval()(read_samples(learned.sources, open_checkpoint(source), samples=4, length=32).ids)
    sums = inputs[0].double().square().sum((0, 1)).reshape(2, 3, 16).swapaxes(0, 1).reshape(-1)
    assert np.abs(found - sums.numpy()).max() <= 1e-6 * float(sums.max())
    file = quantized(source, tmp_path / "out", "q8_0", "imatrix", imatrix=tmp_path / "imatrix.gguf")
    assert tensors(file)["blk.0.ssm_out.weight"][0] == "Q8_0"


def test_layers_that_foresee_are_left_out_of_new_files_and_read_in_others(tmp_path: Path) -> None:
    """As GLM-4.5 and DeepSeek-V3 are published, with a layer that no class has."""
    source = saved(CASES["glm4_moe"], tmp_path / "model")
    plain = quantized(source, tmp_path / "plain", "f32")
    stored, last = load_file(source / "model.safetensors"), "model.layers.2."
    more = {last + name[15:]: tensor.clone() for name, tensor in stored.items() if name.startswith("model.layers.1.")}
    more |= {f"{last}eh_proj.weight": torch.ones(64, 128), f"{last}enorm.weight": torch.ones(64)}
    more |= {f"{last}hnorm.weight": torch.ones(64)}
    save_file({**stored, **more}, source / "model.safetensors", {"format": "pt"})
    told: list[str] = []
    rules = Rules(scheme="f32", method="ggml", format="gguf")
    run(Request(str(source), tmp_path / "out", rules), tell=lambda each: told.append(str(each)))
    assert told == [f"{len(more)} weights are left out: {AHEAD}"]
    assert tensors(tmp_path / "out" / "model.gguf") == tensors(plain)
    # As llama.cpp's own converter writes it: one layer more, and how many of them foresee.
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    whole = alone(quantized(source, tmp_path / "whole", "f32"), tmp_path / "alone")
    values = {key: read_gguf(whole).raw(key) for key in read_gguf(whole).fields}
    file = with_values(whole, values | {"glm4moe.nextn_predict_layers": encoded(1)})
    assert open_checkpoint(file).config["num_hidden_layers"] == 2
    ids = list(range(2, 60))
    wanted = ours(plain.parent, ids)
    assert np.abs(ours(file, ids) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    again = quantized(file, tmp_path / "again", "q8_0")
    assert tokens_and_logits(again, TEXT)[0] == tokens_and_logits(plain, TEXT)[0]


def with_values(file: Path, values: dict[str, bytes]) -> Path:
    """The file with other metadata, whose tensors stay as they are."""
    header, data = read_gguf(file), file.read_bytes()
    start = min(tensor.start for tensor in header.tensors.values())
    entries = [entry(name, tensor.shape, tensor.type, tensor.start - start) for name, tensor in header.tensors.items()]
    file.write_bytes(header_of(values, entries) + data[start:])
    return file


_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
_SIGHT = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48}
SEEING: dict[str, tuple[str, JSON, JSON]] = {
    "qwen2_vl": ("Qwen2", {}, {}),
    "qwen2_5_vl": ("Qwen2", {}, {}),
    "qwen3_vl": ("Qwen3", {"head_dim": 16}, {"deepstack_visual_indexes": [0, 1]}),
    "qwen3_vl_moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        {"deepstack_visual_indexes": [1]},
    ),
}


@pytest.mark.parametrize("kind", SEEING)
def test_the_part_that_reads_of_qwen(kind: str, tmp_path: Path) -> None:
    """Against its own class; what sees is left out, and how much it hands to the layers is told."""
    family, settings, sight = SEEING[kind]
    config = library.AutoConfig.for_model(
        kind,
        text_config={**SMALL, **settings, "rope_parameters": _SECTIONS},
        vision_config={**_SIGHT, **sight},
        tie_word_embeddings=False,
    )
    model, tokenizer = library.AutoModelForImageTextToText.from_config(config), byte_level(QWEN, nfc=True)
    source = saved_model(model, tmp_path / "model", tokenizer)
    file = quantized(source, tmp_path / "f32", "f32")
    # The installed llama.cpp takes no epsilon of its norms from a qwen2vl file.
    agree(file, source, 2e-3 if family == "Qwen2" else 1e-4)
    assert json.loads((file.parent / "config.json").read_text())["architectures"] == [f"{family}ForCausalLM"]
    header, arch = read_gguf(file), kind.replace("_5", "").replace("_", "")
    assert header.value(f"{arch}.rope.dimension_sections") == [3, 3, 2, 0]
    assert header.value(f"{arch}.n_deepstack_layers", 0) == len(sight.get("deepstack_visual_indexes", ()))
    ids = list(range(2, 60))
    found, wanted = ours(alone(file, tmp_path / "alone"), ids), ours(source, ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_qwen_3_5_as_it_is_published(tmp_path: Path) -> None:
    """With what sees, and a layer that foresees; both are left out."""
    config = library.AutoConfig.for_model(
        "qwen3_5", text_config=_DELTA, vision_config=_SIGHT, tie_word_embeddings=False
    )
    model = library.AutoModelForImageTextToText.from_config(config)
    source = saved_model(model, tmp_path / "model", byte_level(QWEN35, nfc=True))
    stored = load_file(source / "model.safetensors")
    save_file(stored | {"mtp.fc.weight": torch.ones(64, 128)}, source / "model.safetensors", {"format": "pt"})
    file = quantized(source, tmp_path / "f32", "f32")
    agree(file, source, 1e-4)
    assert read_gguf(file).value("general.architecture") == "qwen35"
    assert json.loads((file.parent / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]
    ids = list(range(2, 60))
    found, wanted = ours(alone(file, tmp_path / "alone"), ids), ours(source, ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_experts_of_qwen_3_5_in_one_tensor(tmp_path: Path) -> None:
    """As they are published; transformers saves them apart."""
    source = saved(CASES["qwen3_5_moe"], tmp_path / "model")
    before = tensors(quantized(source, tmp_path / "before", "f32"))
    stored = load_file(source / "model.safetensors")
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts."
        one = {
            part: [stored.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(4)] for part in ("gate", "up", "down")
        }
        pairs = [torch.cat(pair) for pair in zip(one["gate"], one["up"], strict=True)]
        stored |= {f"{prefix}gate_up_proj": torch.stack(pairs), f"{prefix}down_proj": torch.stack(one["down"])}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    assert tensors(quantized(source, tmp_path / "after", "f32")) == before


def test_what_foresees_beside_the_layers_is_left_out(tmp_path: Path) -> None:
    """As Qwen3-Next is published."""
    source = saved(CASES["qwen3_next"], tmp_path / "model")
    before = tensors(quantized(source, tmp_path / "before", "f32"))
    stored = load_file(source / "model.safetensors")
    save_file(stored | {"mtp.fc.weight": torch.ones(64, 128)}, source / "model.safetensors", {"format": "pt"})
    assert tensors(quantized(source, tmp_path / "after", "f32")) == before


def test_keys_of_heads_are_left_to_the_encoder(tmp_path: Path) -> None:
    """No layer of DeepSeek's class multiplies by these, so that no method of calibration sees what they read."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "kv_lora_rank": 256}
    wide["qk_nope_head_dim"] = 256
    source, text = saved(CASES["deepseek_v2"], tmp_path / "model", **wide), tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    learned = Calibration((str(text),), samples=4, length=64)
    file = quantized(source, tmp_path / "out", "q4_k_m", "gptq", calibration=learned)
    rows = json.loads((file.parent / "report.json").read_text())["rows"]
    made = {row["name"]: row["outcome"]["method"] for row in rows if ".kv_b_proj." in row["name"]}
    assert made == {name: "ggml_fit" if name.endswith("k_b.weight") else "gptq" for name in made} and len(made) == 16
    agree(file, source, 0.3, 0.5)


O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001 - as it is
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# As the models' own tokenizers split: the steps, and whether a text is normalized.
SPLITS: dict[str, tuple[list[Any], bool]] = {
    "mpt": ([GPT2], True),
    "command-r": ([pre_tokenizers.Digits(True), GPT2], True),
    "falcon": (
        [
            pre_tokenizers.Punctuation("contiguous"),
            GPT2,
            pre_tokenizers.Digits(False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ],
        False,
    ),
    "bloom": ([pre_tokenizers.Split(Regex(BLOOM), "isolated"), BYTES], False),
    "stablelm2": ([pre_tokenizers.Split(Regex(QWEN), "isolated"), BYTES], False),
    "qwen35": ([pre_tokenizers.Split(Regex(QWEN35), "isolated"), BYTES], True),
    "tekken": ([pre_tokenizers.Split(Regex(TEKKEN), "isolated"), BYTES], False),
    "gpt-4o": ([pre_tokenizers.Split(Regex(O200K), "isolated"), BYTES], False),
}
HARD = (
    TEXT
    + " 1234567 12a I'll WE'RE camelCase HTTPServer  \n\n  end... (a, b) $5+3=8 <x> `q` -- 'tis don't?!\r\n\n ok 2.50%"
)


@pytest.mark.parametrize("pre", SPLITS)
def test_splits_of_more_tokenizers_are_llama_cpps(pre: str, tmp_path: Path) -> None:
    steps, nfc = SPLITS[pre]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    made.normalizer = normalizers.NFC() if nfc else None
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([HARD] * 4, trainer)
    made.model.ignore_merges = pre == "tekken"
    source = saved_model(CASES["granite"].model(), tmp_path / "model", made)
    file = quantized(source, tmp_path / "out", "q8_0")
    assert read_gguf(file).value("tokenizer.ggml.pre") == pre
    told = open_tokenizer(open_checkpoint(alone(file, tmp_path / "alone")))
    for text in (HARD, HARD[::-1]):
        ids = open_tokenizer(open_checkpoint(source))(text)["input_ids"]
        assert tokens_and_logits(file, text)[0] == ids
        assert told(text)["input_ids"] == ids


def test_what_old_checkpoints_store_beside_parameters_is_left_out(tmp_path: Path) -> None:
    """Pythia's masks and frequencies."""
    source = saved(CASES["gpt_neox"], tmp_path / "model")
    before = tensors(quantized(source, tmp_path / "before", "q8_0"))
    stored, name = load_file(source / "model.safetensors"), "gpt_neox.layers.0.attention."
    stored |= {f"{name}bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), f"{name}masked_bias": torch.tensor(-1e9)}
    save_file(stored | {f"{name}rotary_emb.inv_freq": torch.ones(2)}, source / "model.safetensors", {"format": "pt"})
    assert tensors(quantized(source, tmp_path / "after", "q8_0")) == before


REFUSED: dict[str, tuple[str, JSON, str]] = {
    "alibi": ("falcon 7b", {"alibi": True}, "alibi"),
    "biases": ("falcon 40b", {"bias": True}, "says bias"),
    "heads apart": ("falcon 7b", {"multi_query": False}, "multi_query"),
    "tied": ("gpt_neox", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    "wide": ("mamba", {"expand": 3, "intermediate_size": 192}, "expand"),
    "another limit": ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
    "norms": ("llama4", {"use_qk_norm": False}, "use_qk_norm"),
    "clipped": ("olmo", {"clip_qkv": 3.0}, "clip_qkv"),
    "windows": ("exaone4", {"sliding_window": 8, "layer_types": None}, "num_hidden_layers"),
    "two bases": (
        "olmo3",
        {"rope_parameters": {**_TWO_ROPES, "sliding_attention": {"rope_type": "default", "rope_theta": 9.0}}},
        "window",
    ),
    "kinds": ("exaone4", {"layer_types": ["sliding_attention", "full_attention"]}, "layers of the kinds"),
    "steps": ("ministral3", {"rope_parameters": {**_STEPS, "mscale": 0.5, "mscale_all_dim": 0.5}}, "mscale_all_dim"),
    "states and rope": ("granite hybrid moe", {"position_embedding_type": "rope"}, "position_embedding_type"),
    "wide values": ("qwen3_5", {"linear_value_head_dim": 32}, "different linear_key_head_dim"),
    "biases of convolutions": ("lfm2", {"conv_bias": True}, "conv_bias"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_computes_in_another_way_is_refused(what: str, tmp_path: Path) -> None:
    kind, settings, words = REFUSED[what]
    with pytest.raises(UnsupportedError, match=words):
        quantized(saved(CASES[kind], tmp_path / "model", **settings), tmp_path / "out", "q8_0")


def test_gpt_oss_in_mxfp4_goes_into_gguf_without_loss(tmp_path: Path) -> None:
    source = to_mxfp4(saved(CASES["gpt-oss"], tmp_path / "model"))
    assert run_conversion(str(source), tmp_path / "out", Goal("gguf")).lossless
    file = tmp_path / "out" / "model.gguf"
    assert {kind for name, (kind, _) in tensors(file).items() if name.endswith("exps.weight")} == {"MXFP4"}
    written, whole = open_checkpoint(file), open_checkpoint(source)
    both = whole.dequantized(
        "model.layers.1.mlp.experts.gate_up_proj"
    )  # [experts, inputs, outputs], gate and up by turns
    for expert in range(4):
        for part, name in enumerate(("gate", "up")):
            found = written.dequantized(f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight", torch.float32)
            assert torch.equal(found, both[expert, :, part::2].T.float())
    agree(file, source, 0.1, 0.5)


def test_latent_keys_and_values_of_a_quantized_model_are_taken_apart(tmp_path: Path) -> None:
    """DeepSeek's, which are published in 8 bits only: llama.cpp has a part of each head, some of them transposed."""
    source, start = saved(CASES["deepseek_v3"], tmp_path / "model"), tmp_path / "start"
    run(Request(str(source), start, Rules("int8-row", "rtn")))
    with pytest.raises(UnsupportedError, match=r"kv_b_proj\.weight is quantized as one.*--requantize"):
        run_conversion(str(start), tmp_path / "refused", Goal("gguf", lossy=True))
    assert not (tmp_path / "refused").exists()
    run(Request(str(start), tmp_path / "out", Rules("f32", "ggml", "gguf"), requantize=True))
    agree(tmp_path / "out" / "model.gguf", start, 2e-3)


@pytest.mark.parametrize(("form", "scheme"), [("gguf", "q8_0"), ("compressed-tensors", "int8-g32")])
def test_gpt_oss_in_mxfp4_is_quantized_again_expert_by_expert(form: str, scheme: str, tmp_path: Path) -> None:
    source = to_mxfp4(saved(CASES["gpt-oss"], tmp_path / "model"))
    run(Request(str(source), tmp_path / "out", Rules(scheme, format=form), requantize=True))
    written, whole = open_checkpoint(tmp_path / "out"), open_checkpoint(source)
    for layer, expert in ((0, 3), (1, 0)):
        both = whole.dequantized(f"model.layers.{layer}.mlp.experts.gate_up_proj", torch.float32)[expert]
        for part, name in enumerate(("gate", "up")):
            weight = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
            found, wanted = written.dequantized(weight, torch.float32), both[:, part::2].T
            assert str(written.weights[weight].scheme).startswith("int8-g32")
            assert (found - wanted).square().sum() < 1e-4 * wanted.square().sum()
