"""The native decoder and loaded models against `transformers` on the same weights."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch.nn.functional import kl_div

import lowbit
from lowbit.cli import group
from lowbit.cli.bench import _reading
from lowbit.errors import FormatError, UnsupportedError, UsageError
from lowbit.native import KEEPS, DecoderShape
from lowbit.runtime.bench import bench
from lowbit.runtime.decoder import Engine, native_of, start
from lowbit.runtime.generate import Sampling, answer, chooser, generate, generate_all
from lowbit.runtime.linear import Linear
from lowbit.runtime.model import open_model
from lowbit.runtime.runner import open_runner, runner_of
from lowbit.stages._gguf import read_gguf
from tests.reference.models import save_tiny

IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(5))
MIXED = ["sliding_attention", "full_attention"]
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
BY_KIND = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
           "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}  # fmt: skip
# Kind of the model, and what is not as the class has it.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA_3}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "phi3": ("phi3", {"sliding_window": 16, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 8, "layer_types": MIXED, "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 10.0, "query_pre_attn_scalar": 20}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "layer_types": MIXED, "rope_parameters": BY_KIND,
                               "query_pre_attn_scalar": 20}),
}  # fmt: skip


def saved(path: Path, kind: str, **settings: Any) -> Any:
    """A tiny model with heads of 16; biases and norms are not trivial."""
    kind_of: Any = transformers.CONFIG_MAPPING[kind]
    config = kind_of(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96, max_position_embeddings=128, eos_token_id=2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.3) if tensor.dim() > 1 else tensor.add_(0.2 * torch.randn_like(tensor))
    model.save_pretrained(path)
    return model


def read(session: Any, pieces: tuple[int, ...]) -> torch.Tensor:
    """Logits after each piece of the ids."""
    return torch.stack([session.read(part) for part in torch.split(IDS[0, : sum(pieces)], list(pieces))])


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, settings = KINDS[name]
    model = saved(tmp_path, kind, **settings)
    pieces = (1, 7, 1, 1, 20, 1, 9)
    got = read(start(open_model(tmp_path, exact=True), 40, threads=2), pieces)
    ends = torch.tensor(pieces).cumsum(0) - 1
    with torch.no_grad():
        want = model(IDS).logits[0, ends]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8-row", "fp8-e4m3-row"])
def test_weights_are_multiplied_as_they_are_where_inputs_are_declared_in_few_bits(
    scheme: str, wiki_8m: Path, tmp_path: Path
) -> None:
    """The kernels round inputs more finely, or not at all; `reference` rounds them as declared."""
    for name, inputs in (("plain", None), ("declared", scheme)):
        lowbit.quantize(wiki_8m, tmp_path / name, scheme=scheme, method="rtn", activations=inputs)
    one, other = (open_runner(tmp_path / name) for name in ("plain", "declared"))
    assert one.kernels == other.kernels and not other.others
    assert one.engine and other.engine
    assert torch.equal(one.engine.start(64).read(IDS[0]), other.engine.start(64).read(IDS[0]))
    ends = [lowbit.load(tmp_path / name, reference=True)(IDS).logits for name in ("plain", "declared")]
    assert not torch.equal(*ends)
    line = ["generate", str(tmp_path / "declared"), "--prompt", "The", "--max-tokens", "2"]
    assert f"inputs are rounded as the kernels do, not to {scheme}" in CliRunner().invoke(group, line).output


def is_opened_whole(path: Path, kept: Path, blocks: str) -> None:
    """A start alone, one that writes a cache, and one that finds it, give the bits of a model that has all weights."""
    ids = IDS[0]
    want = Engine(native_of(open_model(path))).start(64).read(ids)
    for runner in [open_runner(path), *(open_runner(path, cache=kept) for _ in range(2))]:
        assert runner.engine and runner.engine.native.blocks == blocks
        assert torch.equal(runner.engine.start(64).read(ids), want)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_an_embedding_is_looked_up_as_it_is_stored(name: str, tmp_path: Path) -> None:
    kind, settings = KINDS[name]
    saved(tmp_path / "model", kind, **settings)
    is_opened_whole(tmp_path / "model", tmp_path / "kept", "")


def test_an_embedding_in_blocks_is_looked_up_there(wiki_8m: Path, tmp_path: Path) -> None:
    lowbit.quantize(wiki_8m, tmp_path / "out", scheme="q4_0", format="gguf", method="ggml")
    (file,) = (tmp_path / "out").glob("*.gguf")
    embedding = read_gguf(file).tensors["token_embd.weight"]
    is_opened_whole(tmp_path / "out", tmp_path / "kept", embedding.type)
    data = bytearray(file.read_bytes())
    data[embedding.start : embedding.start + embedding.nbytes] = b"\xff" * embedding.nbytes
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"\.gguf.*embed_tokens.*must be finite"):
        open_runner(tmp_path / "out")


def test_tokens_one_by_one_turn_as_those_read_at_once(tmp_path: Path) -> None:
    """Also where the angles that are at hand end, and where some tokens are before it and some after."""
    saved(tmp_path, "llama")
    engine = Engine(native_of(open_model(tmp_path)), 1)
    ids = torch.randint(3, 96, (260,), generator=torch.Generator().manual_seed(6))
    whole, one, two = (engine.start(300) for _ in range(3))
    want = whole.read(ids)
    one.read(ids[:254])
    assert torch.equal([one.read(each[None]) for each in ids[254:]][-1], want)
    two.read(ids[:254])
    assert torch.equal(two.read(ids[254:]), want)


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_the_likeliest_token_is_that_of_the_logits(name: str, tmp_path: Path) -> None:
    """Of several texts too, with a cap as without."""
    kind, settings = KINDS[name]
    saved(tmp_path, kind, **settings)
    engine = Engine(native_of(open_model(tmp_path)), 2)
    texts, others = ([engine.start(64) for _ in range(3)] for _ in range(2))
    for text, other, count in zip(texts, others, (1, 9, 30), strict=True):
        text.read(IDS[0, :count])
        other.read(IDS[0, :count])
    for token in IDS[0, 30:36].tolist():
        want = engine.read([(text, torch.tensor([token])) for text in texts]).argmax(1).tolist()
        assert engine.likeliest([(other, token) for other in others]) == want
    assert others[1].likeliest(7) == int(texts[1].read(torch.tensor([7])).argmax())
    assert others[1].ids == texts[1].ids


@pytest.mark.parametrize("keep", KEEPS)
def test_what_a_text_begins_with_is_not_read_again(keep: str, tmp_path: Path) -> None:
    """Whatever was read before, a text gets the bits that it gets alone; so does one of several."""
    saved(tmp_path, "mistral", sliding_window=16)
    engine = Engine(native_of(open_model(tmp_path)), 1)
    alone = [engine.start(128, keep).follow(IDS[0, :count]) for count in (30, 12, 40)]
    one = engine.start(128, keep)
    assert [torch.equal(one.follow(IDS[0, :count]), want) for count, want in zip((30, 12, 40), alone, strict=True)]
    one.follow(torch.cat([IDS[0, :20], IDS[0, :9]]))
    assert one.cache.known == len(one.ids) == 29
    read: list[int] = []
    whole = one.read
    one.read = lambda ids: (read.append(len(ids)), whole(ids))[1]  # type: ignore[method-assign, func-returns-value]
    assert torch.equal(one.follow(IDS[0, :40]), alone[2]) and read == [20]
    assert torch.equal(one.follow(IDS[0, :40]), alone[2]) and read == [20, 1]
    texts = [engine.start(128, keep) for _ in range(3)]
    for text in texts:
        text.read(IDS[0, :5])
    together = engine.read([(text, IDS[0, 5:count]) for text, count in zip(texts, (30, 12, 40), strict=True)])
    assert torch.equal(together, torch.stack(alone))


def test_a_model_on_the_kernels_is_not_saved_without_its_weights(quantized: Path, tmp_path: Path) -> None:
    """What `transformers` would write is embeddings and norms, which load with random matrices beside them."""
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight is on the kernels.*lowbit convert"):
        lowbit.load(quantized).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
    lowbit.load(quantized, reference=True).save_pretrained(tmp_path / "floats")
    again = lowbit.load(tmp_path / "floats", reference=True)(IDS).logits
    assert torch.equal(again, lowbit.load(quantized, reference=True)(IDS).logits)


def test_keys_and_values_in_fewer_bits_hardly_move_predictions(quantized: Path, wiki_8m: Path) -> None:
    """KL in nats per token from those in float32; inputs are not rounded, which would hide it."""
    loaded = open_model(quantized, exact=True)
    text = (wiki_8m.parent / "evaluation.txt").read_text()[:1000]
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[0, :96]
    engine = Engine(native_of(loaded), 2)
    found = {}
    for keep in KEEPS:
        session = engine.start(256, keep)
        found[keep] = torch.stack([session.read(token[None]) for token in ids]).double().log_softmax(-1)
        assert session.cache.nbytes == 256 * 2048 * {"float32": 4, "float16": 2, "int8": 1 + 4 / 32}[keep]
    for keep, most in {"float16": 1e-6, "int8": 1e-4}.items():
        assert 0 < float(kl_div(found[keep], found["float32"], reduction="batchmean", log_target=True)) < most


def test_a_quantized_model_runs_on_its_codes(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama", **KINDS["llama"][1])
    lowbit.quantize(tmp_path / "model", tmp_path / "out", scheme="int4-g32-asym")
    reference = open_model(tmp_path / "out", reference=True)
    exact = open_model(tmp_path / "out", exact=True)
    assert len(exact.kernels) == 15 and not exact.others
    assert isinstance(exact.model.model.layers[0].mlp.up_proj, Linear)
    with torch.no_grad():
        want = reference.model(IDS).logits
        torch.testing.assert_close(exact.model(IDS).logits, want, rtol=1e-4, atol=1e-4)
        rounded = lowbit.load(tmp_path / "out")(IDS).logits
    assert 1e-4 < (rounded - want).abs().max() < 0.1 * want.abs().max()
    torch.testing.assert_close(read(start(exact, 40), (40,))[0], want[0, -1], rtol=1e-4, atol=1e-4)


def test_model_code_may_take_a_weight_from_its_layer(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of a linear layer itself."""
    save_tiny("mamba", tmp_path / "model")
    lowbit.quantize(tmp_path / "model", tmp_path / "out", scheme="int4-g8")
    exact, reference = open_model(tmp_path / "out", exact=True), open_model(tmp_path / "out", reference=True)
    layers: list[Any] = [each.model.get_submodule("backbone.layers.0.mixer.dt_proj") for each in (exact, reference)]
    assert isinstance(layers[0], Linear) and layers[0].weight.shape == layers[1].weight.shape
    torch.testing.assert_close(layers[0].weight + 0, layers[1].weight + 0)
    with torch.no_grad():
        torch.testing.assert_close(exact.model(IDS).logits, reference.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_do_more_than_a_product_and_heads_before_their_embedding_stay(tmp_path: Path) -> None:
    """Llama 4's router is a linear layer with another result; Camembert's head, defined first, shares the embedding."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    more = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    known: Any = transformers.CONFIG_MAPPING
    auto: Any = transformers.AutoModelForCausalLM
    for kind, settings in {"llama4_text": sizes | more, "camembert": {**sizes, "is_decoder": True}}.items():
        torch.manual_seed(0)
        model = auto.from_config(known[kind](**settings)).eval()
        model.save_pretrained(tmp_path / kind)
        loaded = open_model(tmp_path / kind, exact=True)
        assert loaded.kernels
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_the_decoder_does_not_know_runs_as_transformers_has_it(tmp_path: Path) -> None:
    for kind, reason in {"gpt2": "it is a gpt2", "llama": "its heads are 8 wide", "mixtral": "it is a mixtral"}.items():
        model = save_tiny(kind, tmp_path / kind)
        loaded = open_model(tmp_path / kind, exact=True)
        with pytest.raises(UnsupportedError, match=reason):
            start(loaded, 10)
        assert loaded.kernels
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_more_than_there_is_room_for_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    session = start(open_model(tmp_path), 8)
    session.read(IDS[0, :6])
    with pytest.raises(ValueError, match="over the limit of 8"):
        session.read(IDS[0, :3])
    decoder = session.engine.decoder
    with pytest.raises(ValueError, match="no decoder that runs here"):
        type(decoder)(DecoderShape(64, 4, 3, 16, 96, 16, 1e-6, 0.25), [], session.engine.ends, 1)
    with pytest.raises(ValueError, match="cannot be kept of 6"):
        session.cache.forget(7)
    with pytest.raises(ValueError, match="not as float8"):
        decoder.cache("float8")
    with pytest.raises(ValueError, match="twice"):
        decoder.read([1, 1], [(session.cache, 1)] * 2)
    with pytest.raises(ValueError, match="2 tokens for"):
        decoder.read([1, 1], [(session.cache, 1)])
    with pytest.raises(LookupError, match="rows 5 to 96 of a table of 96"):
        decoder.read([96, 5], [(session.cache, 2)])
    with pytest.raises(UsageError, match="a context of 129 tokens is more than this model takes, which is 128"):
        open_runner(tmp_path, context=129)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, wiki_8m: Path) -> Path:
    out = tmp_path_factory.mktemp("wiki") / "out"
    lowbit.quantize(wiki_8m, out, scheme="int4-g64")
    return out


def test_greedy_text_is_that_of_the_slow_way(quantized: Path) -> None:
    """Token by token `generate` of transformers on dequantized weights chooses the same."""
    prompt = "The history of the city"
    exact, reference = open_runner(quantized, exact=True), open_model(quantized, reference=True)
    shown: list[str] = []
    got = generate(exact, prompt, Sampling(tokens=48), shown.append)
    assert got.decoder == "native" and got.tokens == 48 and "".join(shown) == got.text
    ids = reference.tokenizer(prompt, return_tensors="pt").input_ids
    whole: Any = reference.model
    want = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, pad_token_id=0)
    assert got.text == reference.tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)


def test_prompts_together_give_what_each_gives_alone(quantized: Path) -> None:
    runner = open_runner(quantized, context=64)
    prompts, sampling = ["The history of the city", "In 1912 the", "The river"], Sampling(tokens=12)
    got = generate_all(runner, prompts, sampling)
    assert [each.text for each in got] == [generate(runner, prompt, sampling).text for prompt in prompts]
    assert generate_all(runner, ["The city " * 15, "The"], Sampling(tokens=100))[0].tokens < 60


def test_rounding_of_inputs_hardly_moves_predictions(quantized: Path, wiki_8m: Path) -> None:
    text = (wiki_8m.parent / "evaluation.txt").read_text()[:3000]
    rounded, reference = open_model(quantized), open_model(quantized, reference=True)
    ids = reference.tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        got, want = (each.model(ids).logits[0].double().log_softmax(-1) for each in (rounded, reference))
    assert 0 < float(kl_div(got, want, reduction="batchmean", log_target=True)) < 1e-3


def test_weights_of_floats_in_16_bits_move_predictions_far_less(wiki_8m: Path) -> None:
    """As little as llama.cpp's rounding of inputs to float16: a ten-thousandth of what int8 does."""
    text = (wiki_8m.parent / "evaluation.txt").read_text()[:3000]
    rounded, exact = open_model(wiki_8m), open_model(wiki_8m, exact=True)
    assert {each.panels.way for each in rounded.kernels.values()} == {"wide"}
    ids = exact.tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        got, want = (each.model(ids).logits[0].double().log_softmax(-1) for each in (rounded, exact))
    assert 0 < float(kl_div(got, want, reduction="batchmean", log_target=True)) < 1e-6


def test_choices() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0, 2.9])
    seen = torch.tensor([2])
    assert chooser(Sampling())(seen, logits) == 2
    assert chooser(Sampling(repetition_penalty=1.5))(seen, logits) == 3
    assert {chooser(Sampling(temperature=1.0, top_k=1, seed=n))(seen, logits) for n in range(5)} == {2}
    drawn = [chooser(Sampling(temperature=1.0, min_p=0.5, seed=n))(seen, logits) for n in range(40)]
    assert set(drawn) == {2, 3}
    assert chooser(Sampling(temperature=2.0, seed=3))(seen, logits) == chooser(Sampling(temperature=2.0, seed=3))(
        seen, logits
    )
    assert len({chooser(Sampling(temperature=5.0, seed=n))(seen, logits) for n in range(60)}) == 4


def test_texts_end_where_they_should(quantized: Path) -> None:
    loaded = open_runner(quantized)
    whole = generate(loaded, "The history of the city", Sampling(tokens=20)).text
    stop = whole[8:14]
    cut = generate(loaded, "The history of the city", Sampling(tokens=20, stop=(stop,)))
    assert stop in cut.text and cut.tokens < 20 and whole.startswith(cut.text)
    with pytest.raises(UsageError, match="leave no room to go on in a context of"):
        generate(loaded, "word " * 3000, Sampling())


def test_bench_measures_what_it_says(quantized: Path) -> None:
    found = bench(quantized, prompt=16, tokens=4, threads=1)
    assert found.others == 0 and {(each.way, each.bits) for each in found.kernels} == {("codes", 4), ("wide", 16)}
    assert sum(each.bytes for each in found.kernels) == found.bytes > 3_000_000
    assert sum(each.weights for each in found.kernels) == 57
    assert found.share == pytest.approx(found.bytes * found.decode / found.read)
    assert found.decoder == "native"
    near, far, fast = (
        replace(found, near=size, share=share) for size, share in ((found.bytes, 0.9), (0, 0.9), (0, 2.0))
    )
    assert (near.cached, far.cached, fast.cached) == (True, False, True)
    assert ["stay in the processor's cache" in _reading(each) for each in (near, far)] == [True, False]


def test_bench_takes_what_the_native_decoder_does_not(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "float", torch.float16)
    lowbit.quantize(tmp_path / "float", tmp_path / "out", scheme="int4-g16")
    found = bench(tmp_path / "out", prompt=8, tokens=3, threads=1)
    assert found.decoder.startswith("the native decoder does not run this model: ")
    runner = open_runner(tmp_path / "out")
    assert sum(each.weights for each in found.kernels) == runner.kernels > 0 < found.decode
    assert sum(each.bytes for each in found.kernels) == found.bytes
    # Keys and values of two layers, eleven tokens, in four bytes.
    assert found.kept == 2 * 2 * 11 * 32 * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "MODEL", "--prompt-tokens", "8", "--tokens", "2", "--explain"], "4 bits, codes"),
        (["generate", "MODEL", "--prompt", "The city", "--max-tokens", "3"], "decoder: native"),
        (["generate", "MODEL", "--prompt", "The city", "--max-tokens", "3", "--json"], '"tokens": 3'),
        (["generate", "MODEL", "--prompt", "The city", "--chat"], "has no chat template"),
        (["generate", "MODEL", "--prompt", "a b", "--prompt", "The", "--max-tokens", "2"], "2 tokens read"),
        (["generate", "MODEL", "a b", "--prompt", "The", "--max-tokens", "2"], "2 tokens read"),
        (["generate", "MODEL", "The city", "--max-tokens", "3"], "decoder: native"),
        (["generate", "MODEL"], "give a prompt"),
    ],
)
def test_commands(quantized: Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(group, [str(quantized) if each == "MODEL" else each for each in arguments])
    assert said in result.output + str(result.exception or "")


@pytest.fixture
def chatty(quantized: Path, tmp_path: Path) -> Path:
    """A model with a chat template."""
    path = Path(shutil.copytree(quantized, tmp_path / "chat"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (path / "chat_template.jinja").write_text(template)
    return path


def test_a_conversation(chatty: Path) -> None:
    """Every turn sees those before it."""
    arguments = ["chat", str(chatty), "--max-tokens", "4", "--temperature", "0", "--system", "Be brief."]
    result = CliRunner().invoke(group, arguments, input="The city\nThe river\n\n")
    assert result.exit_code == 0, result.exception
    loaded = runner_of(open_model(chatty))
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The city"}]
    first = answer(loaded, told, Sampling(tokens=4)).text
    told += [{"role": "assistant", "content": first}, {"role": "user", "content": "The river"}]
    assert result.output == f"{first}\n{answer(loaded, told, Sampling(tokens=4)).text}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pseudo-terminal")
def test_in_a_terminal_an_answer_can_be_ended_and_the_conversation_goes_on(chatty: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    # The keys of a terminal go to those whose terminal it is: of a session's first process the one that it opens.
    start = "import os, runpy; os.open(os.ttyname(0), os.O_RDWR); runpy.run_module('lowbit', run_name='__main__')"
    command = [sys.executable, "-c", start, "chat", str(chatty), "--max-tokens", "900"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    try:
        assert "Ctrl-C ends an answer" in _until(ours, "> ")
        os.write(ours, b"The city\n")
        _until(ours, "The city\r\n")
        select.select([ours], [], [])  # the answer begins
        os.write(ours, b"\x03")
        assert "^C" in _until(ours, "\r\n> ")
        os.write(ours, b"The river\n")
        assert len(_until(ours, "\r\n> ")) > 100
        os.write(ours, b"\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


def _until(terminal: int, end: str) -> str:
    """What comes up to some text."""
    found, limit = "", time.monotonic() + 120
    while not found.endswith(end):
        assert select.select([terminal], [], [], max(limit - time.monotonic(), 0))[0], found
        found += os.read(terminal, 1).decode(errors="replace")
    return found
