"""What is told in full against what transformers makes of it: configurations, and all that the native decoder reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.runtime.decoder import Native, native_of
from lowbit.runtime.model import open_model, open_weights
from lowbit.runtime.runner import open_runner, runner_of
from lowbit.runtime.told import told_model
from lowbit.runtime.words import open_words, plain_words
from lowbit.stages._model import open_config, open_tokenizer
from lowbit.stages._told import told_config
from lowbit.stages.checkpoint import open_checkpoint
from tests.unit.test_decoder import LLAMA_3, saved

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA_3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
}
WAYS: dict[str, dict[str, Any]] = {
    "floats": {},
    "int4": {"scheme": "int4-g16"},
    "embedding": {"scheme": "int8-row", "sets": {"embed_tokens": "int8-row"}},
}


def alike(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def assert_same(one: Native, other: Native) -> None:
    plain = ("shape", "windows", "angles", "factors", "factor", "cap", "blocks")
    assert [getattr(one, name) for name in plain] == [getattr(other, name) for name in plain]
    assert one.vectors.keys() == other.vectors.keys() and one.matrices.keys() == other.matrices.keys()
    for name, vector in one.vectors.items():
        assert torch.equal(vector, other.vectors[name]), name
    for name, matrix in one.matrices.items():
        ours, theirs = vars(matrix.panels), vars(other.matrices[name].panels)
        assert ours.keys() == theirs.keys() and matrix.inputs == other.matrices[name].inputs
        assert all(alike(ours[key], theirs[key]) for key in ours), name


def assert_told_as_asked(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    told = told_model(checkpoint, exact=False, threads=1)
    opened = open_weights(checkpoint, threads=1)
    asked = opened.bare() or opened.loaded()
    assert told is not None
    assert_same(native_of(told), native_of(asked))
    assert told.others == asked.others and told.kernels.keys() == asked.kernels.keys()
    one, other = runner_of(told, 1), runner_of(asked, 1)
    assert (one.ends, one.limit, one.decoder) == (other.ends, other.limit, other.decoder)


# A format other than GGUF keeps an embedding that is the output layer too.
CASES = [(name, way) for name in KINDS for way in WAYS if (name, way) != ("qwen3", "embedding")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_decoder_reads_what_it_reads_of_the_class(name: str, way: str, tmp_path: Path) -> None:
    kind, settings = KINDS[name]
    saved(tmp_path / "in", kind, **settings)
    path = tmp_path / "in"
    if WAYS[way]:
        lowbit.quantize(path, tmp_path / "out", **WAYS[way])
        path = tmp_path / "out"
    assert_told_as_asked(path)
    assert open_runner(path, threads=1).ends == {2}


@pytest.mark.parametrize("scheme", ["q4_k_m", "f16"])
@pytest.mark.parametrize("alone", [False, True])
def test_the_decoder_reads_what_it_reads_of_the_class_of_a_gguf_file(
    alone: bool, scheme: str, wiki_8m: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    lowbit.quantize(wiki_8m, path, scheme=scheme, format="gguf")
    if alone:
        path = next(path.glob("*.gguf")).rename(tmp_path / "model.gguf")
    assert_told_as_asked(path)
    assert open_runner(path, threads=1).others == {}  # its embedding is looked up as it is stored


@pytest.mark.parametrize("name", KINDS)
def test_a_configuration_says_what_transformers_makes_of_it(name: str, tmp_path: Path) -> None:
    kind, settings = KINDS[name]
    saved(tmp_path, kind, **settings)
    checkpoint = open_checkpoint(tmp_path)
    told, whole = told_config(checkpoint.config), open_config(checkpoint)
    assert told is not None
    unlike = {key for key, value in vars(told).items() if getattr(whole, key, None) != value}
    assert unlike <= {"dtype", "transformers_version", "rope_theta"}
    assert told.rope_theta == whole.rope_parameters["rope_theta"]
    assert {"head_dim", "sliding_window", "rope_parameters", "num_key_value_heads"} <= vars(told).keys()


LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "a default": ("llama", {"num_key_value_heads": None}),
    "an unknown key": ("llama", {"attention_multiplier": 2.0}),
    "turns of other pairs": ("llama", {"rope_interleaved": True}),
    "code of its own": ("llama", {"auto_map": {}}),
    "another type": ("gemma", {}),
    "windows of some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
    "kinds of layers": ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}),
    "a window that is none": ("mistral", {"sliding_window": "16"}),
    "a head of no width": ("llama", {"head_dim": 0}),
    "heads that do not divide": ("llama", {"num_attention_heads": 7}),
    "a rope that is a text": ("llama", {"rope_parameters": None, "rope_scaling": "llama3", "rope_theta": 1e4}),
    "an activation that is none": ("llama", {"hidden_act": ["silu"]}),
    "an end that is a text": ("llama", {"eos_token_id": ["2"]}),
    "layers that are none": ("qwen3", {"layer_types": 2}),
    "a stretched rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
}


@pytest.mark.parametrize("change", LEFT)
def test_transformers_is_asked_of_all_else(change: str, tmp_path: Path) -> None:
    kind, settings = LEFT[change]
    saved(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    assert kind == "gemma" or told_config(config)
    assert told_config(config | settings) is None


def test_what_is_off_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    assert told_config(config | {"rope_interleaved": False, "is_llama_config": True, "use_mrope": False})
    assert told_config(config | {"quantization": {"bits": 4}})
    assert told_config(
        config | {"transformers.js_config": {"dtype": "q4"}, "unsloth_version": "2025.1", "unsloth_fixed": True}
    )


def test_without_the_end_of_texts_transformers_is_asked(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    assert told_config({key: value for key, value in config.items() if key != "eos_token_id"}) is None


OTHER: list[dict[str, Any]] = [
    {"mlp_bias": True}, {"tie_word_embeddings": True}, {"intermediate_size": 80}, {"num_hidden_layers": 10**12},
]  # fmt: skip


@pytest.mark.parametrize("change", OTHER)
def test_weights_that_are_not_the_classs_are_left_to_it(change: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert told_model(open_checkpoint(tmp_path), exact=False, threads=1) is None


def test_a_model_whose_heads_the_decoder_does_not_know_runs_in_its_class(tmp_path: Path) -> None:
    config: Any = transformers.LlamaConfig
    library: Any = transformers.LlamaForCausalLM
    library(
        config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    ).save_pretrained(tmp_path)
    runner = open_runner(tmp_path, threads=1)
    assert runner.engine is None and runner.model is not None and "8 wide" in runner.decoder
    assert told_model(open_checkpoint(tmp_path), exact=False, threads=1) is not None
    assert open_model(tmp_path).model is not None


TEXTS = [
    "",
    "The city",
    " two  spaces , and . stops",
    "<s>of</s> special <unk> words",
    "\u00e9\u4e16\u754c \U0001f600\n\ttab",
]


@pytest.mark.parametrize("alone", [False, True])
def test_words_are_those_of_transformers(alone: bool, wiki_8m: Path, tmp_path: Path) -> None:
    path = wiki_8m
    if alone:
        lowbit.quantize(wiki_8m, tmp_path / "out", scheme="q8_0", format="gguf")
        path = (tmp_path / "out" / "model.gguf").rename(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(path)
    words, asked = plain_words(checkpoint), open_tokenizer(checkpoint)
    assert words is not None
    for text in TEXTS:
        ids = asked(text).input_ids
        assert list(words.encode(text)) == ids
        assert words.decode(ids) == asked.decode(ids, skip_special_tokens=True)
    assert words.ends == {asked.eos_token_id} == {1}
    assert words.special == {text: asked.convert_tokens_to_ids(text) for text in ("<s>", "</s>", "<unk>")}


@pytest.mark.parametrize("change", [{"clean_up_tokenization_spaces": True}, {"add_bos_token": False}])
def test_words_that_transformers_changes_are_its(change: dict[str, Any], wiki_8m: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(wiki_8m, tmp_path / "model"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | change))
    words, asked = open_words(open_checkpoint(path)), open_tokenizer(open_checkpoint(path))
    assert plain_words(open_checkpoint(path)) is None
    for text in TEXTS:
        assert list(words.encode(text)) == asked(text).input_ids
