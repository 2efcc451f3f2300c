"""Our GGUF files in llama.cpp, and llama.cpp's in ours: tokens, logits, types and bytes."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lowbit.cli import group
from lowbit.errors import CheckpointError, ResourceError, UnsupportedError
from lowbit.formats._mixtures import choose, place_of, require_arch
from lowbit.inspect import inspect
from lowbit.pipeline import Request, run, run_conversion, run_imatrix
from lowbit.runtime.runner import open_runner
from lowbit.stages._changes import Goal
from lowbit.stages._gguf import read_gguf
from lowbit.stages._model import open_blueprint, open_tokenizer
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.evaluate import evaluate
from lowbit.stages.plan import Calibration, Rules, make_plan
from lowbit.stages.quantize import estimate_memory
from lowbit.stages.samples import read_samples
from tests.reference.models import save_tiny

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

TEXT = "The river, it's said, had 1850 bridges; nobody knew why. Zürich  is über 9,000 miles away!\n\tÇa va?"
# Types of the file and how far llama.cpp's logits may be from ours, as a share of the largest: it rounds activations to
# 8 bits where weights are in blocks, and to 16 where they are float16.
SCHEMES = {"f32": 1e-4, "f16": 2e-3, "q8_0": 3e-2, "q4_0": 3e-2, "q4_k_m": 3e-2, "nvfp4": 3e-2}


def quantized(model: Path, out: Path, scheme: str, method: str = "ggml", **rules: Any) -> Path:
    run(Request(str(model), out, Rules(scheme=scheme, method=method, format="gguf", **rules)))
    return out / "model.gguf"


def tokens_and_logits(file: Path, text: str) -> tuple[list[int], np.ndarray[Any, Any]]:
    exact = {"type_k": 0, "type_v": 0}  # keys and values in float32; the default is float16
    model = llama_cpp.Llama(str(file), n_ctx=256, n_batch=256, logits_all=True, verbose=False, n_threads=1, **exact)
    ids = model.tokenize(text.encode(), add_bos=True, special=False)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.close()
    return ids, logits


def ours(path: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    model = open_blueprint(open_checkpoint(path), torch.float32).resident()
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


def agree(file: Path, source: Path, tolerance: float, share: float = 1.0, text: str = TEXT) -> None:
    """For this share of the positions; where rounding moves a token to another expert its logits are others."""
    ids, theirs = tokens_and_logits(file, text)
    assert ids == open_tokenizer(open_checkpoint(source))(text)["input_ids"]
    found = ours(file.parent, ids)
    worst = np.abs(found - theirs).max(1) / np.abs(found).max()
    assert np.quantile(worst, share) <= tolerance


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_embedded_model_in_llama_cpp(scheme: str, wiki_8m: Path, tmp_path: Path) -> None:
    file = quantized(wiki_8m, tmp_path / "out", scheme)
    agree(file, wiki_8m, SCHEMES[scheme])
    assert inspect(file).made_by["quantized_by"].startswith("lowbit ")


def perplexity_in_llama_cpp(file: Path, text: Path, tokens: int, context: int) -> float:
    """Of windows without overlap, from its own tokens and its logits at all positions."""
    exact = {"type_k": 0, "type_v": 0}
    model = llama_cpp.Llama(
        str(file), n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=1, **exact
    )
    start, losses = text.read_bytes()[: 16 * tokens], list[torch.Tensor]()
    ids = torch.tensor(model.tokenize(start, add_bos=True, special=True)[:tokens])
    for window in ids.view(-1, context):
        model.reset()
        model.eval(window.tolist())
        logits = torch.from_numpy(model.scores[: len(window)]).double()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none"))
    model.close()
    return float(torch.cat(losses).mean().exp())


@pytest.mark.parametrize("scheme", ["q4_k_m", "q8_0"])
def test_perplexity_in_llama_cpp_is_ours(scheme: str, shared: Path, tmp_path: Path) -> None:
    file, text = quantized(shared / "models" / "wiki-8m", tmp_path / "out", scheme), shared / "data/wikitext2_test.txt"
    line = ["evaluate", str(file), "--text", str(text), "--tokens", "4096", "--context", "512", "--threads", "1"]
    done = CliRunner().invoke(group, [*line, "--json"])
    assert done.exit_code == 0, done.output
    ours = json.loads(done.stdout)["scores"]["perplexity"]["value"]
    assert perplexity_in_llama_cpp(file, text, 4096, 512) == pytest.approx(ours, rel=3e-3)


def alone(file: Path, folder: Path) -> Path:
    """A copy with nothing beside it."""
    folder.mkdir()
    return Path(shutil.copy(file, folder / "other.gguf"))


def test_a_file_brings_what_lies_beside_it_for_texts_and_nothing_else(base: Path, tmp_path: Path) -> None:
    """A file of a folder that holds a model's: what the folder's own conversion carries, but for letters and photos."""
    folder = Path(shutil.copytree(base.parent, tmp_path / "folder"))
    (folder / "letter.txt").write_text("not of the model")
    run_conversion(str(folder / base.name), tmp_path / "out", Goal("float", lossy=True))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "letter.txt").exists()


def test_a_file_alone_tells_configuration_and_tokenizer(base: Path, wiki_8m: Path, tmp_path: Path) -> None:
    """It is evaluated, and becomes a checkpoint of transformers that computes the same."""
    file = alone(base, tmp_path / "alone")
    ids = open_tokenizer(open_checkpoint(wiki_8m))(TEXT)["input_ids"]
    assert open_tokenizer(open_checkpoint(file))(TEXT)["input_ids"] == ids
    wanted = ours(base.parent, ids)
    assert np.array_equal(ours(file, ids), wanted)
    run_conversion(str(file), tmp_path / "float", Goal("float"))
    assert np.array_equal(ours(tmp_path / "float", ids), wanted)
    assert open_tokenizer(open_checkpoint(tmp_path / "float"))(TEXT)["input_ids"] == ids
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    original = json.loads((wiki_8m / "config.json").read_text())
    for key in ("architectures", "hidden_size", "rms_norm_eps", "bos_token_id", "tie_word_embeddings", "vocab_size"):
        assert config[key] == original[key]


def test_a_file_with_its_configuration_beside_it_tells_the_tokenizer(base: Path, tmp_path: Path) -> None:
    alone(base, tmp_path / "part")
    shutil.copy(base.parent / "config.json", tmp_path / "part")
    ids = open_tokenizer(open_checkpoint(base))(TEXT)["input_ids"]
    run_conversion(str(tmp_path / "part"), tmp_path / "float", Goal("float"))
    assert open_tokenizer(open_checkpoint(tmp_path / "float"))(TEXT)["input_ids"] == ids
    written = json.loads((tmp_path / "float/config.json").read_text())
    assert written == json.loads((base.parent / "config.json").read_text())
    run_conversion(str(tmp_path / "float"), tmp_path / "again", Goal("gguf"))
    assert tokens_and_logits(tmp_path / "again/model.gguf", TEXT)[0] == ids


@pytest.mark.parametrize("architecture", ["qwen2", "gemma"])
def test_the_empty_tokenizer_of_a_class_is_none(architecture: str, tmp_path: Path) -> None:
    """transformers makes one of a folder that has no file of any."""
    save_tiny(architecture, tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        quantized(tmp_path / "model", tmp_path / "out", "q8_0")
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_a_file_alone_is_quantized_into_other_formats(tmp_path: Path) -> None:
    """With its tokenizer; where that is of a kind that nobody knows, one line says that there is none."""
    source = saved("qwen3", tmp_path / "model")
    file = alone(quantized(source, tmp_path / "f16", "f16"), tmp_path / "alone")
    strange = rewritten(file, tmp_path / "strange.gguf", "tokenizer.ggml.pre", "nobody-knows")
    for path, out in ((file, tmp_path / "out"), (strange, tmp_path / "bare")):
        done = CliRunner().invoke(group, ["quantize", str(path), str(out), "--scheme", "int8-g32", "--threads", "1"])
        assert done.exit_code == 0, done.output
        assert ("no tokenizer was written" in done.output) == (path == strange)
        assert (out / "tokenizer.json").exists() == (path == file)
    ids = open_tokenizer(open_checkpoint(source))(TEXT)["input_ids"]
    assert open_tokenizer(open_checkpoint(tmp_path / "out"))(TEXT)["input_ids"] == ids
    found, wanted = ours(tmp_path / "out", ids), ours(source, ids)
    assert np.abs(found - wanted).max() <= 0.1 * np.abs(wanted).max()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def rewritten(file: Path, out: Path, key: str, value: str) -> Path:
    """A copy whose text under a key is another, of any length."""
    found = read_gguf(file)
    field, data = found.fields[key], file.read_bytes()
    text = struct.pack("<Q", len(value)) + value.encode()
    start = min(tensor.start for tensor in found.tensors.values())
    last = max(found.tensors, key=lambda name: found.tensors[name].start)
    end = data.index(last.encode()) + len(last) + 4 + 8 * len(found.tensors[last].shape) + 12
    head = data[: field.start] + text + data[field.stop : end]
    out.write_bytes(head + bytes(-len(head) % 32) + data[start:])
    return out


def byte_level(pattern: str | None = None, nfc: bool = False) -> Tokenizer:
    """A small tokenizer of byte-level BPE, trained here."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern:
        from tokenizers import Regex

        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def spread(model: Any) -> Any:
    """Weights large enough that every part of the model shows in its logits; norms that are not 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 1 + 0.3 * noise if "norm" in name or "ln_" in name else 0.12 * noise
    return model


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 512}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500.0}  # fmt: skip


def models_of(kind: str) -> Any:
    t: Any = transformers
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, attention_bias=False)),
        "llama tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True)),
        "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, head_dim=32)),
        "qwen3 moe": lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(
                **SMALL,
                head_dim=32,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                norm_topk_prob=True,
            )
        ),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_local_experts=4, sliding_window=None)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SMALL, head_dim=32)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, head_dim=32, query_pre_attn_scalar=32)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SMALL, head_dim=32, query_pre_attn_scalar=32)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SMALL, pad_token_id=0)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=400, n_positions=512)
        ),
    }[kind]()


KINDS = [
    "llama",
    "llama tied",
    "llama3",
    "qwen2",
    "qwen3",
    "qwen3 moe",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
]


def saved(kind: str, path: Path, tokenizer: Tokenizer | None = None) -> Path:
    """A small random model with a tokenizer."""
    own = byte_level(QWEN, nfc=True) if kind.startswith("qwen") else byte_level()
    return saved_model(models_of(kind), path, tokenizer or own)


def saved_model(model: Any, path: Path, tokenizer: Tokenizer) -> Path:
    """With weights at random."""
    model = spread(model)
    model.config.eos_token_id = 1
    model.save_pretrained(path)
    library: Any = transformers
    fast = library.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>")
    fast.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "model")
    file = quantized(source, tmp_path / "f32", "f32")
    # llama.cpp has a table of GELU in float16.
    agree(file, source, 2e-3 if kind.startswith(("gemma", "gpt2")) else 1e-4)
    # What is read back is what was in the checkpoint, but for norms that have 1 added in float32.
    written, original = open_checkpoint(file), open_checkpoint(source)
    for name in written.weights:
        torch.testing.assert_close(written.dequantized(name), original.dequantized(name), rtol=0, atol=2e-7)
    ids = list(range(2, 60))
    found, wanted = ours(alone(file, tmp_path / "alone"), ids), ours(source, ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    sparse = kind in ("qwen3 moe", "mixtral")
    agree(quantized(source, tmp_path / "q8_0", "q8_0"), source, 0.1, 0.5 if sparse else 1.0)


def test_the_part_that_reads_of_a_model_that_sees_too(tmp_path: Path) -> None:
    """Against a model of its own with the same weights; what is left out is said."""
    library: Any = transformers
    sight = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
             "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
    text = library.Gemma3TextConfig(**SMALL, head_dim=32, query_pre_attn_scalar=32)
    whole = library.Gemma3ForConditionalGeneration(library.Gemma3Config(text_config=text, vision_config=sight))
    alone_model = library.Gemma3ForCausalLM(text)
    seeing = saved_model(whole, tmp_path / "seeing", byte_level())
    alone_model.model.load_state_dict(whole.model.language_model.state_dict())
    alone_model.config.eos_token_id = 1
    reading = tmp_path / "reading"
    alone_model.save_pretrained(reading)
    for file in seeing.glob("token*"):
        shutil.copy(file, reading)
    told: list[str] = []
    rules = Rules(scheme="f32", format="gguf")
    run(Request(str(seeing), tmp_path / "out", rules), tell=lambda each: told.append(str(each)))
    assert len(told) == 1 and "of what sees or hears are left out" in told[0]
    (row,) = (row for row in (tmp_path / "out" / "report.md").read_text().splitlines() if "left out" in row)
    assert f"| {told[0].split()[0]} |" in row
    agree(tmp_path / "out" / "model.gguf", reading, 2e-3)
    run(Request(str(reading), tmp_path / "own", rules))
    ours, own = (open_checkpoint(tmp_path / name / "model.gguf") for name in ("out", "own"))
    assert ours.weights == own.weights and ours.config.items() >= own.config.items()
    run_conversion(str(seeing), tmp_path / "converted", Goal("gguf"))
    agree(tmp_path / "converted" / "model.gguf", reading, 2e-3)


def test_what_llama_cpp_would_compute_in_another_way_is_refused(tmp_path: Path) -> None:
    library: Any = transformers
    config = library.Qwen2Config(**SMALL, rope_parameters=YARN | {"beta_fast": 8.0})
    source = saved_model(library.Qwen2ForCausalLM(config), tmp_path / "model", byte_level())
    with pytest.raises(UnsupportedError, match="beta_fast"):
        quantized(source, tmp_path / "out", "f32")


@pytest.mark.parametrize("form", ["gptq", "compressed_tensors"])
def test_integers_go_into_gguf_and_back_without_loss(form: str, wiki_8m: Path, tmp_path: Path) -> None:
    """Rows of queries and keys change their order on the way; scales of 64 weights are repeated.

    Those of compressed-tensors are bfloat16 as the model is, and become float16.
    """
    start, there, back = (tmp_path / name for name in ("start", "there", "back"))
    run(Request(str(wiki_8m), start, Rules(scheme="int4-g64", format=form)))
    assert run_conversion(str(start), there, Goal("gguf")).lossless
    agree(there / "model.gguf", start, 3e-2)
    assert run_conversion(str(there), back, Goal(form)).largest == 0
    before, after = open_checkpoint(start), open_checkpoint(back)
    assert after.format == form
    assert all(torch.equal(before.dequantized(name), after.dequantized(name)) for name in before.weights)


@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_a_float_model_goes_into_gguf_and_back(kind: str, tmp_path: Path) -> None:
    """With what llama.cpp adds to norms, and transposed layers."""
    source, there, back = saved(kind, tmp_path / "model"), tmp_path / "there", tmp_path / "back"
    run_conversion(str(source), there, Goal("gguf"))
    agree(there / "model.gguf", source, 2e-3)
    run_conversion(str(there), back, Goal("float"))
    found, original = open_checkpoint(back), open_checkpoint(source)
    for name in found.weights:
        torch.testing.assert_close(found.dequantized(name), original.dequantized(name), rtol=0, atol=2e-7)


def test_nvfp4_of_experts_comes_from_modelopt_and_goes_back(tmp_path: Path) -> None:
    """The number that multiplies the scales of an expert is one of a tensor beside; llama.cpp multiplies by it."""
    source, start, there, back = saved("mixtral", tmp_path / "model"), *(tmp_path / name for name in "abc")
    run(Request(str(source), start, Rules(scheme="nvfp4", format="modelopt", skip=("w2|down",))))
    assert run_conversion(str(start), there, Goal("gguf")).lossless
    file = there / "model.gguf"
    assert sum(name.endswith(".scale") for name in tensors(file)) == 2 * 6
    agree(file, start, 0.1, 0.5)
    run_conversion(str(alone(file, tmp_path / "alone")), back, Goal("modelopt"))
    before, after = (
        {n: c.dequantized(n, torch.float32) for n in c.weights} for c in map(open_checkpoint, (start, back))
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_super_blocks_go_into_floats_and_into_nothing_else(wiki_8m: Path, tmp_path: Path) -> None:
    file = quantized(wiki_8m, tmp_path / "out", "q4_k_m")
    assert run_conversion(str(file.parent), tmp_path / "float", Goal("float", "f32")).lossless
    ids = open_tokenizer(open_checkpoint(wiki_8m))(TEXT)["input_ids"]
    assert np.array_equal(ours(tmp_path / "float", ids), ours(file.parent, ids))
    with pytest.raises(UnsupportedError, match="has no minima; use asym; with --lossy the relative squared error is"):
        run_conversion(str(file.parent), tmp_path / "no", Goal("compressed-tensors"))


def llama_quantize(
    source: Path, out: Path, file_type: int, imatrix: tuple[Path, Means] | None = None, entries: Any = None, **more: Any
) -> Path:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    parameters.imatrix = entries
    if imatrix:
        entries, keys = given_imatrix(*imatrix)
        parameters.imatrix, parameters.kv_overrides = entries, keys
    for name, value in more.items():
        setattr(parameters, name, value)
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    assert code == 0
    return out


def foretold(source: Path, file_type: int, entries: Any = None) -> dict[str, str]:
    """Types by name that llama-quantize says it will write, which takes it a thousandth of the time."""
    said: list[str] = []
    listen = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        llama_quantize(source, source.with_suffix(".none"), file_type, entries=entries, dry_run=True)
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))  # its own
    assert not source.with_suffix(".none").exists()
    lines = re.findall(r"^\[ *\d+/ *\d+\] (\S+) .*, type = *(\w+), .*?(?:\((\w+)\))?$", "".join(said), re.MULTILINE)
    return {name: (after or before).upper() for name, before, after in lines}


@pytest.mark.parametrize("file_type", [12, 15, 30])
def test_what_llama_quantize_foretells_is_what_it_writes(file_type: int, base: Path, tmp_path: Path) -> None:
    written = tensors(llama_quantize(base, tmp_path / "theirs.gguf", file_type))
    assert foretold(base, file_type) == {name: kind for name, (kind, _) in written.items()}


Means = dict[str, np.ndarray[Any, Any]]


def given_imatrix(path: Path, means: Means) -> tuple[Any, Any]:
    """What llama-quantize hands on when it has read this file; the last entries end the lists."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for place, (name, values) in zip(entries, means.items(), strict=False):
        data = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        place.name, place.size = name.encode(), data.size
        place.data = (ctypes.c_float * data.size)(*data.tolist())
    keys = (llama_cpp.llama_model_kv_override * 5)()
    told: list[tuple[str, str | int]] = [
        ("file", str(path)),
        ("dataset", "wiki.txt"),
        ("entries_count", len(means)),
        ("chunks_count", 7),
    ]
    for place, (name, value) in zip(keys, told, strict=False):
        place.key, place.tag = f"quantize.imatrix.{name}".encode(), 3 if isinstance(value, str) else 0
        if isinstance(value, str):
            place.value.val_str = value.encode()[:127]
        else:
            place.value.val_i64 = value
    return entries, keys


def make_imatrix(model: Path, path: Path) -> Means:
    """An importance matrix at random, written by the `gguf` package; one expert of a stack was never reached.

    Returns what llama-quantize makes of it.
    """
    writer, means, chance = gguf.GGUFWriter(path, "none"), {}, np.random.default_rng(1)
    del writer.kv_data[0]["general.architecture"]
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in gguf.GGUFReader(model).tensors:
        name, (cols, _, *stack) = str(tensor.name), [*tensor.shape.tolist(), 1][: max(len(tensor.shape), 2)]
        if not name.startswith("blk.") or len(tensor.shape) < 2 or "inp" in name:
            continue
        sums = (chance.random((*stack, cols)) ** 4).astype(np.float32)
        counts = np.arange(stack[0] if stack else 1, dtype=np.float32).reshape(-1, 1) + (0 if stack else 100)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts if stack else counts[0])
        means[name] = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), np.float32(1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means


@pytest.mark.parametrize(("scheme", "file_type"), [("q4_0", 2), ("q4_k_m", 15), ("iq4_xs", 30), ("q2_k_s", 21)])
def test_a_model_with_an_importance_matrix_is_llama_quantizes(
    scheme: str, file_type: int, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "imatrix.gguf"
    means = make_imatrix(base, path)
    theirs = llama_quantize(base, tmp_path / "theirs.gguf", file_type, (path, means))
    found = quantized(base.parent, tmp_path / "ours", scheme, "imatrix", imatrix=path)
    plan = make_plan(open_checkpoint(base.parent), Rules(scheme=scheme, method="imatrix", format="gguf", imatrix=path))
    assert plan.imatrix and sum(mean.nbytes for mean in means.values()) <= plan.imatrix.memory
    os.truncate(shutil.copy(path, tmp_path / "large"), 2**30)
    large = replace(plan, imatrix=replace(plan.imatrix, path=str(tmp_path / "large")))
    assert estimate_memory(large, None, 1).total - estimate_memory(plan, None, 1).total > 2**31
    left, right = tensors(found), tensors(theirs)
    assert [name for name in left if left[name] != right[name]] == []
    assert found.read_bytes() == theirs.read_bytes()


def test_experts_with_an_importance_matrix(tmp_path: Path) -> None:
    """Each has a count of its own; one that no token reached counts all of its inputs the same."""
    file, path = quantized(saved("mixtral", tmp_path / "model"), tmp_path / "f16", "f16"), tmp_path / "imatrix.gguf"
    means = make_imatrix(file, path)
    theirs = llama_quantize(file, tmp_path / "theirs.gguf", 2, (path, means))
    found = quantized(file, tmp_path / "ours", "q4_0", "imatrix", imatrix=path)
    assert found.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_an_importance_matrix_has_the_squares_of_what_layers_read(kind: str, tmp_path: Path) -> None:
    """As hooks on the layers of transformers see it; llama.cpp quantizes with it what is quantized with it here."""
    source = saved(kind, tmp_path / "model")
    (tmp_path / "text").write_text(TEXT * 40)
    text = Calibration((str(tmp_path / "text"),), samples=6, length=32)
    costs: list[Any] = []
    run_imatrix(str(source), tmp_path / "imatrix.gguf", text, ram=2**31, announce=costs.append)
    (cost,) = costs
    assert cost.tokens == 4096 and cost.base < cost.total < cost.base + 2**26
    with pytest.raises(ResourceError, match=r"--ram 8 MiB is too little: this needs at least .*--sequence-length"):
        run_imatrix(str(source), tmp_path / "again.gguf", text, ram=2**23)
    ids = read_samples(text.sources, open_checkpoint(source), samples=6, length=32).ids
    seen: dict[str, torch.Tensor] = {}

    def see(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            seen[name] = seen.get(name, 0) + inputs[0].double().square().reshape(-1, inputs[0].shape[-1]).sum(0)

        return hook

    model = open_blueprint(open_checkpoint(source), torch.float32).resident()
    places = {"model.layers.1.self_attn.o_proj": "attn_output", "model.layers.1.mlp.down_proj": "ffn_down",
              "model.layers.1.self_attn.k_proj": "attn_k", "transformer.h.1.mlp.c_proj": "ffn_down",
              "transformer.h.1.attn.c_attn": "attn_qkv"}  # fmt: skip
    for name, module in model.named_modules():
        if name in places:
            module.register_forward_pre_hook(see(name))
    with torch.inference_mode():
        model(input_ids=ids)
    found = {str(tensor.name): tensor.data for tensor in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    for name, squares in seen.items():
        stem = f"blk.1.{places[name]}.weight"
        assert found[f"{stem}.counts"].tolist() == [ids.numel()]
        np.testing.assert_allclose(found[f"{stem}.in_sum2"], squares.numpy(), rtol=1e-4)
    assert len(seen) == {"llama": 3, "mixtral": 2, "gpt2": 2}[kind]
    if kind == "mixtral":  # each token goes to two experts
        counts, sums = (found[f"blk.1.ffn_up_exps.weight.{part}"] for part in ("counts", "in_sum2"))
        assert (counts.sum(), sums.shape) == (2 * ids.numel(), (4, 64))
        assert np.array_equal(sums, found["blk.1.ffn_gate_exps.weight.in_sum2"])
    out = quantized(source, tmp_path / "out", "q4_0", "imatrix", imatrix=tmp_path / "imatrix.gguf")
    assert "Q4_0" in {kind for kind, _ in tensors(out).values()}


@pytest.fixture(scope="module")
def base(wiki_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in float16: what llama.cpp's own program quantizes."""
    return quantized(wiki_8m, tmp_path_factory.mktemp("base") / "f16", "f16")


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    found = gguf.GGUFReader(path).tensors
    return {str(tensor.name): (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in found}


@pytest.mark.parametrize(
    ("scheme", "file_type"),
    [("q8_0", 7), ("q4_0", 2), ("q5_1", 9), ("q2_k", 10), ("q3_k_s", 11), ("q3_k_m", 12), ("q3_k_l", 13),
     ("q4_k_s", 14), ("q4_k_m", 15), ("q5_k_s", 16), ("q5_k_m", 17), ("q6_k", 18),
     ("iq3_s", 26), ("iq3_m", 27), ("iq4_nl", 25), ("iq4_xs", 30), ("tq2_0", 37)],
)  # fmt: skip
def test_types_and_bytes_are_llama_quantizes(scheme: str, file_type: int, base: Path, tmp_path: Path) -> None:
    """From the same float16 values, in the same order."""
    theirs = llama_quantize(base, tmp_path / "theirs.gguf", file_type)
    found = quantized(base.parent, tmp_path / "ours", scheme)
    left, right = tensors(found), tensors(theirs)
    assert {name: kind for name, (kind, _) in left.items()} == {name: kind for name, (kind, _) in right.items()}
    assert [name for name in left if left[name] != right[name]] == []
    assert found.read_bytes() == theirs.read_bytes()  # keys, their order and values too


def test_parts_of_a_model(base: Path, wiki_8m: Path, tmp_path: Path) -> None:
    """llama.cpp loads them; here a directory, or the first of them, is the model, and they become one file again."""
    split = Request(str(wiki_8m), tmp_path / "out", Rules(scheme="f16", format="gguf"), shard_bytes=4_000_000)
    run(split)
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert [file.name for file in files] == [f"model-{n:05}-of-00005.gguf" for n in range(1, 6)]
    assert all(sum(len(data) for _, data in tensors(file).values()) <= 4_000_000 for file in files)
    agree(files[0], wiki_8m, SCHEMES["f16"])
    joined = llama_quantize(files[0], tmp_path / "theirs.gguf", 7).read_bytes()
    for name, path in (("first", files[0]), ("directory", tmp_path / "out")):
        assert quantized(path, tmp_path / name, "q8_0").read_bytes() == joined
    with pytest.raises(CheckpointError, match="name model-00001-of-00005"):
        open_checkpoint(files[1])
    files[3].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 5 .*missing.*model-00004"):
        open_checkpoint(files[0])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 10000.0,
        "long_factor": [1.5 + k for k in range(8)], "short_factor": [1 + k / 16 for k in range(8)]}  # fmt: skip
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("Llama", {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}),
    "llama3": ("Llama", LLAMA3),
    "yarn": ("Qwen2", YARN),
    "yarn attention": ("Qwen3", YARN | {"factor": 8.0, "attention_factor": 1.5}),
    "longrope": ("Phi3", LONG),
    "longrope short": ("Phi3", LONG | {"original_max_position_embeddings": 300}),
}


@pytest.mark.parametrize("kind", ROPES)
def test_stretched_ropes(kind: str, tmp_path: Path) -> None:
    """llama.cpp computes what transformers does; so does transformers from the file alone."""
    library: Any = transformers
    family, rope = ROPES[kind]
    settings: dict[str, Any] = {**SMALL, "num_hidden_layers": 1, "head_dim": 16, "rope_parameters": rope}
    if family == "Phi3":
        settings |= {"pad_token_id": 0, "original_max_position_embeddings": rope["original_max_position_embeddings"]}
    config = getattr(library, f"{family}Config")(**settings)
    model = getattr(library, f"{family}ForCausalLM")(config)
    source = saved_model(model, tmp_path / "model", byte_level())
    file = quantized(source, tmp_path / "f32", "f32")
    agree(file, source, 1e-4, text=TEXT + TEXT)
    ids = list(range(2, 90))
    found, wanted = ours(alone(file, tmp_path / "alone"), ids), ours(source, ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("scheme", "file_type"),
    [("iq1_m", 31), ("iq2_xs", 20), ("iq2_m", 29), ("iq3_xxs", 23), ("iq3_xs", 22), ("q2_k_s", 21)],
)
def test_types_are_llama_quantizes_under_an_importance_matrix(scheme: str, file_type: int, tmp_path: Path) -> None:
    size: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **size}))
    source = quantized(saved_model(model, tmp_path / "model", byte_level()), tmp_path / "f16", "f16")
    kinds = tensors(source)
    ones = (ctypes.c_float * 256)(*[1.0] * 256)
    entry = llama_cpp.llama_model_imatrix_data
    table = (entry * (len(kinds) + 1))(*[entry(name.encode(), ones, 256) for name in kinds], entry(None, None, 0))
    theirs = foretold(source, file_type, table)
    checkpoint = open_checkpoint(tmp_path / "model")
    found = choose(scheme, list(checkpoint.weights.values()), checkpoint.config, True)
    arch = require_arch(checkpoint.config)
    ours = {place_of(arch, checkpoint.weights[name]): kind.upper() for name, (kind, _) in found.items()}
    assert ours == theirs


def test_reads_what_llama_cpp_writes(base: Path, wiki_8m: Path, tmp_path: Path) -> None:
    """Weights as the `gguf` package dequantizes them, rows in the order of transformers; evaluated as a file alone."""
    path = llama_quantize(base, tmp_path / "theirs.gguf", 15)
    found = open_checkpoint(path)
    theirs = {str(tensor.name): tensor for tensor in gguf.GGUFReader(path).tensors}
    names = {"token_embd": "model.embed_tokens", "blk.3.attn_q": "model.layers.3.self_attn.q_proj",
             "blk.3.attn_v": "model.layers.3.self_attn.v_proj", "output_norm": "model.norm"}  # fmt: skip
    for name, ours in names.items():
        tensor = theirs[f"{name}.weight"]
        wanted = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name == "blk.3.attn_q":  # 8 heads of 32 rows
            wanted = wanted.reshape(8, 16, 2, 256).transpose(1, 2).reshape(256, 256)
        assert torch.equal(found.dequantized(f"{ours}.weight"), wanted)
    assert inspect(path).sound
    (tmp_path / "text").write_text(TEXT * 20)
    scores = evaluate(path, tmp_path / "text", reference=wiki_8m, context=64).scores
    assert 0 < scores["kl_mean"].value < 0.3


def test_a_sentencepiece_vocabulary(shared: Path, tmp_path: Path) -> None:
    """A llama whose tokenizer falls back to bytes, and whose rows no block of 256 divides."""
    source = shared / "models" / "stories-260k"
    file = quantized(source, tmp_path / "out", "q4_k_m")
    kinds = {kind for kind, _ in tensors(file).values()}
    assert kinds == {"F32", "F16", "Q5_0", "Q8_0"}
    agree(file, source, 5e-2)
    ids = open_tokenizer(open_checkpoint(source))(TEXT)["input_ids"]
    assert open_tokenizer(open_checkpoint(alone(file, tmp_path / "alone")))(TEXT)["input_ids"] == ids


def with_bytes(prefix: bool) -> Tokenizer:
    """A small tokenizer as the conversions of SentencePiece's are: bytes as a fallback, a space made visible."""
    steps: list[Any] = [normalizers.Prepend("\u2581")] if prefix else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trained.train_from_iterator([TEXT.replace("ü", "u")] * 4, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<|start|>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in model["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizer
    made.add_special_tokens(tokens[:3])
    return made


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_of_bytes_as_a_fallback(prefix: bool, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model", with_bytes(prefix))
    file = quantized(source, tmp_path / "out", "q8_0")
    ids, _ = tokens_and_logits(file, TEXT)
    assert ids == open_tokenizer(open_checkpoint(source))(TEXT)["input_ids"]
    assert len(ids) < len(TEXT) - 10  # most are no single characters
    told = open_tokenizer(open_checkpoint(alone(file, tmp_path / "alone")))
    short = sorted(token for token in told.get_vocab() if len(token) < 4)
    mixed = "".join(random.Random(5).choices(short, k=160)).replace("\u2581", " ")  # where the order of merges counts
    for text in (TEXT, mixed):
        assert told(text)["input_ids"] == tokens_and_logits(file, text)[0]


LLAMA3_SPLIT = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"])
def test_splits_are_those_of_llama_cpp(pre: str, tmp_path: Path) -> None:
    if pre == "smollm":
        tokenizer = byte_level()
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    elif pre in ("llama-bpe", "dbrx"):
        tokenizer = byte_level(LLAMA3_SPLIT)
        tokenizer.model.ignore_merges = pre == "llama-bpe"
    else:
        tokenizer = byte_level(QWEN, nfc=True) if pre == "qwen2" else byte_level()
    source = saved("llama", tmp_path / "model", tokenizer)
    file = quantized(source, tmp_path / "out", "q8_0")
    assert read_gguf(file).value("tokenizer.ggml.pre") == pre
    text = TEXT + " 1234567 I'll WE'RE  \n\n  end..."
    ids = open_tokenizer(open_checkpoint(source))(text)["input_ids"]
    assert tokens_and_logits(file, text)[0] == ids
    assert open_tokenizer(open_checkpoint(alone(file, tmp_path / "alone")))(text)["input_ids"] == ids


def ends_in_llama_cpp(file: Path) -> set[int]:
    """Tokens at which it ends a text."""
    how = llama_cpp.llama_model_default_params()
    how.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), how)
    words = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_vocab_n_tokens(words)
    found = {number for number in range(count) if llama_cpp.llama_vocab_is_eog(words, number)}
    llama_cpp.llama_model_free(model)
    return found


ENDS = [["<end_of_turn>", "<|endoftext|>", "<start_of_turn>"], ["<|return|>", "<|call|>", "<|flush|>"],
        ["<|im_start|>", "<|im_end|>", "<EOT>", "_<EOT>"], ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
        ["<\uff5cend\u2581of\u2581sentence\uff5c>"], ["<end_of_utterance>", "<turn|>", "[EOT]", "<|calls|>"],
        ["<|tool_response>"]]  # fmt: skip


@pytest.mark.parametrize("tokens", ENDS)
def test_a_text_ends_where_llama_cpp_ends_it(tokens: list[str], tmp_path: Path) -> None:
    """At tokens that are called so, and at the one that a file names beside its eos."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(tokens)
    source = saved("llama", tmp_path / "model", tokenizer)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|start|>", "bos_token": "!"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    file = alone(quantized(source, tmp_path / "out", "f16"), tmp_path / "alone")
    named = tmp_path / "named.gguf"
    named.write_bytes(file.read_bytes().replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eot_token_id"))
    runner, other = open_runner(file), open_runner(named)
    assert runner.words.ends | runner.ends == ends_in_llama_cpp(file)
    assert other.words.ends == ends_in_llama_cpp(named) == {*runner.words.ends, tokenizer.token_to_id("!")}


def test_a_split_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model", byte_level(r"\w+|\s+"))
    with pytest.raises(UnsupportedError, match="pre-tokenizer"):
        quantized(source, tmp_path / "out", "q8_0")


def test_a_saved_plan_is_carried_out(wiki_8m: Path, tmp_path: Path) -> None:
    rules: dict[str, Any] = {"skip": ["lm_head"], "sets": (("layers.0.*down_proj", "q6_k"), ("embed_tokens", "f16"))}
    first = quantized(wiki_8m, tmp_path / "first", "q4_0", **rules)
    run(Request(str(wiki_8m), tmp_path / "second", Rules(format="gguf"), plan=first.parent / "lowbit-plan.json"))
    assert (tmp_path / "second" / "model.gguf").read_bytes() == first.read_bytes()
    found = {name: kind for name, (kind, _) in tensors(first).items()}
    assert (found["output.weight"], found["token_embd.weight"]) == ("BF16", "F16")
    assert (found["blk.0.ffn_down.weight"], found["blk.1.ffn_down.weight"]) == ("Q6_K", "Q4_0")


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("q4_0", "gptq"), ("q4_k_m", "gptq"), ("iq3_m", "gptq"), ("iq2_xs", "gptq"), ("q4_k_m", "autoround")],
)
def test_calibrated_methods_see_the_rows_of_transformers(
    scheme: str, method: str, wiki_8m: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT * 200)
    text = Calibration((str(tmp_path / "text"),), samples=8, length=64, dtype="float32")
    out, options = tmp_path / "out", {"iterations": 20, "lr": 0.02} if method == "autoround" else {}
    rules = Rules(scheme, method, "gguf", calibration=text, blocks=(0, 2), options=options)
    run(Request(str(wiki_8m), out, rules))
    agree(out / "model.gguf", wiki_8m, 3e-2)
    learned, found = tensors(out / "model.gguf"), open_checkpoint(out)
    # What is learned starts from these blocks; where nothing was, those of the first layers are the same.
    fitted = tensors(quantized(wiki_8m, tmp_path / "fitted", scheme, "imatrix_fit", calibration=text, blocks=(0, 2)))
    moved = {
        name for name, (kind, _) in learned.items() if kind.startswith(("Q", "IQ")) and learned[name] != fitted[name]
    }
    assert {f"blk.{layer}.{role}.weight" for layer in (0, 1) for role in ("attn_v", "ffn_down", "ffn_up")} <= moved
    theirs = {str(tensor.name): tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    for name, ours in {"attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj"}.items():
        tensor = theirs[f"blk.1.{name}.weight"]
        wanted = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(found.dequantized(f"model.layers.1.{ours}.weight"), wanted)
    (tmp_path / "unseen").write_text(TEXT * 20)
    assert evaluate(out, tmp_path / "unseen", reference=wiki_8m, context=64).scores["kl_mean"].value < 0.5


def test_types_that_a_method_cannot_make_are_those_of_gptq(wiki_8m: Path, tmp_path: Path) -> None:
    """What the first layers read is the same for both."""
    (tmp_path / "text").write_text(TEXT * 200)
    text = Calibration((str(tmp_path / "text"),), samples=8, length=64, dtype="float32")
    rules: dict[str, Any] = {"calibration": text, "blocks": (0, 1)}
    options = {"iterations": 20, "lr": 0.02}
    found = quantized(wiki_8m, tmp_path / "out", "iq3_m", "autoround", options=options, **rules)
    agree(found, wiki_8m, 3e-2)
    left, right = tensors(found), tensors(quantized(wiki_8m, tmp_path / "single", "iq3_m", "gptq", **rules))
    roles = {role: f"blk.0.{role}.weight" for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up")}
    kinds = {role: left[name][0] for role, name in roles.items()}
    assert kinds == {**dict.fromkeys(roles, "IQ3_S"), "attn_v": "Q4_K", "attn_output": "Q4_K"}
    assert {role for role, name in roles.items() if left[name] == right[name]} >= {"attn_q", "attn_k"}
    assert left[roles["attn_v"]] != right[roles["attn_v"]]
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["counts"]
    assert {"kind": "fallback", "reason": "gptq: autoround cannot make iq3_s", "tensors": 4} in counts


def test_learning_starts_from_blocks_fitted_to_the_inputs(wiki_8m: Path, tmp_path: Path) -> None:
    """Scales and minima, 16 of 144 bytes: after the same embedding the first layers of a model read the same."""
    (tmp_path / "text").write_text(TEXT * 200)
    text = Calibration((str(tmp_path / "text"),), samples=8, length=64, dtype="float32")
    rules: dict[str, Any] = {"calibration": text, "blocks": (0, 1), "skip": ("embed_tokens",)}
    start = quantized(wiki_8m, tmp_path / "start", "q4_k_m", "autoround", options={"iterations": 0}, **rules)
    wanted = quantized(wiki_8m, tmp_path / "fitted", "q4_k_m", "imatrix_fit", **rules)
    left, right = ({str(each.name): each.data for each in gguf.GGUFReader(file).tensors} for file in (start, wanted))
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        assert np.array_equal(left[name].reshape(-1, 144)[:, :16], right[name].reshape(-1, 144)[:, :16])


def test_journal_resumes_and_refuses_another_tokenizer(wiki_8m: Path, tmp_path: Path) -> None:
    from lowbit.errors import JournalError

    source = Path(shutil.copytree(wiki_8m, tmp_path / "model"))
    file = quantized(source, tmp_path / "out", "q8_0")
    before = file.read_bytes()
    file.unlink()
    quantized(source, tmp_path / "out", "q8_0")
    assert file.read_bytes() == before
    document = json.loads((source / "tokenizer.json").read_text())
    document["model"]["merges"][0:2] = reversed(document["model"]["merges"][0:2])
    (source / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(JournalError, match="tokenizer"):
        quantized(source, tmp_path / "out", "q8_0")
