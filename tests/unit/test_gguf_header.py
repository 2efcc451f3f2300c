"""What a GGUF header is made of without `transformers` is what `transformers` makes of the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from lowbit.formats._gguf import Arch, arch_of, archs
from lowbit.pipeline import Request, run
from lowbit.stages._gguf_facts import told_facts
from lowbit.stages._gguf_metadata import _derived, _rope
from lowbit.stages._plain_tokenizer import plain_tokenizer
from lowbit.stages._told import kind_of
from lowbit.stages.plan import Rules

JSON = dict[str, Any]
SIZES: JSON = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256, "rms_norm_eps": 2e-5,
    "hidden_act": "silu", "rope_theta": 5000.0, "head_dim": 16, "sliding_window": 64,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
KINDS = [kind for row in archs() for kind in row.told]


def config_of(kind: str) -> JSON:
    """`config.json` with what the header needs, and no more."""
    arch, told = arch_of({"model_type": kind}), kind_of({"model_type": kind})
    assert arch is not None
    assert told is not None
    names = {*arch.told[kind], *told.needs, "rms_norm_eps", "rope_theta"}
    facts = {name: value for name, value in SIZES.items() if name in names}
    return {"model_type": kind, **facts, **arch.implied}


def header(arch: Arch, facts: Mapping[str, Any]) -> JSON:
    """The part of a header that tells of the model."""
    told = {
        key: next((facts[name] for name in names if facts.get(name) is not None), None)
        for key, names in arch.keys.items()
    }
    assert all(key not in facts or arch.wants(key, facts[key]) for key in arch.requires)
    return told | _derived(arch, facts) | {"rope": _rope(arch, facts)}


def of_transformers(config: JSON) -> JSON:
    library: Any = transformers
    facts: JSON = library.AutoConfig.for_model(**json.loads(json.dumps(config))).to_dict()
    return {**facts, **facts["rope_parameters"]}


def in_words_of_today(config: JSON) -> JSON:
    """As transformers saves it: all of its defaults, and the rope apart."""
    library: Any = transformers
    saved: JSON = json.loads(library.AutoConfig.for_model(**config).to_json_string(use_diff=False))
    return saved


WORDS: dict[str, Callable[[JSON], JSON]] = {
    "plain": dict,
    "today's": in_words_of_today,
    "nothing": lambda config: config | {"rope_scaling": None, "head_dim": config.get("head_dim")},
    "llama3": lambda config: config | {"rope_scaling": LLAMA3},
    "llama3 today": lambda config: in_words_of_today(config | {"rope_scaling": LLAMA3}),
    "wide heads": lambda config: config | {"head_dim": 32},
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_those_of_transformers(kind: str, words: str) -> None:
    config, arch = WORDS[words](config_of(kind)), arch_of({"model_type": kind})
    assert arch is not None
    facts = told_facts(config, arch)
    assert facts is not None
    assert header(arch, facts) == header(arch, of_transformers(config))
    assert facts.get("sliding_window") == of_transformers(config).get("sliding_window")


LEFT: dict[str, JSON] = {
    "code of its own": {"auto_map": {}},
    "a default": {"num_key_value_heads": None},
    "a text": {"hidden_size": "48"},
    "a fraction": {"num_hidden_layers": 3.5},
    "a truth": {"vocab_size": True},
    "nothing of it": {"intermediate_size": 0},
    "not a number": {"rms_norm_eps": float("nan")},
    "heads that do not divide": {"num_attention_heads": 7},
    "another activation": {"hidden_act": "gelu"},
    "a rope in part": {"partial_rotary_factor": 0.5},
    "a rope that is told twice": {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}},
    "no rope": {"rope_theta": None},
    "a stretched rope": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "a rope in old words": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "a rope that lacks a number": {"rope_scaling": {**LLAMA3, "factor": None}},
    "a rope that is none": {"rope_scaling": None, "rope_parameters": 5},
    "a head of a text": {"head_dim": "16"},
}


@pytest.mark.parametrize("change", LEFT)
def test_transformers_is_asked_of_all_else(change: str) -> None:
    arch = arch_of({"model_type": "llama"})
    assert arch is not None and told_facts(config_of("llama"), arch)
    assert told_facts(config_of("llama") | LEFT[change], arch) is None


def save(path: Path, config: JSON, **other: str) -> Path:
    """A directory with a byte-level tokenizer that begins each text, and more files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: number for number, token in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens([AddedToken("ab a", normalized=False)])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 257)])
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens | config))
    (path / "config.json").write_text(json.dumps(config_of("llama")))
    for name, text in other.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
DECODER = {
    "257": {"content": "<s>", **SPECIAL, "special": True},
    "258": {"content": "</s>", **SPECIAL, "special": True},
    "259": {"content": "ab a", **SPECIAL, "special": False},
}
PLAIN: dict[str, tuple[JSON, dict[str, str]]] = {
    "nothing more": ({}, {}),
    "named by transformers 5": ({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}, {}),
    "the same tokens again": ({"added_tokens_decoder": DECODER, "pad_token": "</s>", "unk_token": None}, {}),
    "a template": ({"chat_template": "{{ messages }}"}, {}),
    "a template in a file": ({"chat_template": "{{ 1 }}"}, {"chat_template__jinja": "{{ messages }}\nä"}),
    "templates": ({"chat_template": [{"name": "default", "template": "{{ 1 }}"}]}, {}),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_tokenizers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config, other = PLAIN[kind]
    path, library = save(tmp_path / "model", config, **other), transformers
    found, theirs = plain_tokenizer(path, "llama"), library.AutoTokenizer.from_pretrained(path)
    assert found is not None and found.document == json.loads(theirs.backend_tokenizer.to_str())
    assert found.example == theirs("a")["input_ids"] and found.example[0] == 257
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    numbers = {name: getattr(theirs, f"{name}_token_id") for name in names}
    assert found.ids == {name: number for name, number in numbers.items() if number is not None}
    template = theirs.chat_template
    assert found.template == (template if isinstance(template, str) else None)


MORE: dict[str, tuple[JSON, dict[str, str]]] = {
    "another class": ({"tokenizer_class": "LlamaTokenizer"}, {}),
    "a token that it has not": ({"pad_token": "<pad>"}, {}),
    "a token that is no special one": ({"pad_token": "a"}, {}),
    "a token with properties": ({"bos_token": {"content": "<s>", "lstrip": True}}, {}),
    "tokens that differ": ({"added_tokens_decoder": DECODER | {"259": {**DECODER["259"], "lstrip": True}}}, {}),
    "more special tokens": ({"additional_special_tokens": ["<x>"]}, {}),
    "an end": ({"add_eos_token": True}, {}),
    "a space": ({"add_prefix_space": True}, {}),
    "tokens beside it": ({}, {"added_tokens__json": "{}"}),
    "special tokens beside it": ({}, {"special_tokens_map__json": "{}"}),
    "code of its own": ({"auto_map": {"AutoTokenizer": ["a.A", None]}}, {}),
    "damaged": ({}, {"tokenizer__json": "{"}),
    "no tokenizer": ({}, {"tokenizer__json": '{"model": {"type": "BPE"}, "added_tokens": [{}]}'}),
}


@pytest.mark.parametrize("kind", MORE)
def test_transformers_is_asked_of_other_tokenizers(kind: str, tmp_path: Path) -> None:
    config, other = MORE[kind]
    assert plain_tokenizer(save(tmp_path / "model", config, **other), "llama") is None


def test_other_models_and_settings_of_a_tokenizer(tmp_path: Path) -> None:
    path = save(tmp_path / "model", {})
    assert plain_tokenizer(path, "llama") and plain_tokenizer(path, "qwen2") is None
    document = json.loads((path / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (path / "tokenizer.json").write_text(json.dumps(document | {"truncation": cut}))
    assert plain_tokenizer(path, "llama") is None


def test_files_are_equal_with_and_without_transformers(wiki_8m: Path, tmp_path: Path) -> None:
    """The second of two models leaves both parts to transformers, and says the same."""
    plain, told = (shutil.copytree(wiki_8m, tmp_path / name / "model") for name in ("plain", "told"))
    config = json.loads((told / "config.json").read_text())
    (told / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 1.0}))
    (told / "special_tokens_map.json").write_text("{}")
    arch = arch_of({"model_type": "llama"})
    assert arch is not None and told_facts(config, arch) and plain_tokenizer(plain, "llama")
    assert not told_facts(json.loads((told / "config.json").read_text()), arch)
    for model in (plain, told):
        run(Request(str(model), model / "out", Rules(scheme="q8_0", method="ggml", format="gguf")))
    assert (plain / "out" / "model.gguf").read_bytes() == (told / "out" / "model.gguf").read_bytes()
