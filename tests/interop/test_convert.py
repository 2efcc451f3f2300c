"""Converted checkpoints, opened by the packages that own the formats: the weights are those that went in."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch

import lowbit
from lowbit.errors import UnsupportedError
from lowbit.formats import gptq
from lowbit.stages.checkpoint import open_checkpoint
from tests.interop.models import bits_of, tiny_llama, write

transformers = pytest.importorskip("transformers")
F16 = torch.float16


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-row", "int8-row"])
def test_transformers_decompresses_to_what_gptq_stored(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    (tmp_path / "in").mkdir()
    meant = write(gptq.FORMAT, tmp_path / "in", {"layers": scheme}, F16)
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="compressed-tensors")
    assert done.lossless and len(meant) == 14
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model(torch.arange(16)[None])  # what is packed still is decompressed
    found = model.state_dict()
    for name, value in tiny_llama(F16).state_dict().items():
        wanted = meant[name].dequantize(F16) if name in meant else value
        assert torch.equal(bits_of(found[name]), bits_of(wanted)), name


def test_float_weights_are_a_plain_model(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    meant = write(gptq.FORMAT, tmp_path / "in", {"layers": "int4-g32"}, F16)
    lowbit.convert(tmp_path / "in", tmp_path / "out", format="float", lossy=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], q.dequantize(F16)) for name, q in meant.items())


@pytest.fixture(scope="module")
def mixture(wiki_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's mixture, with a quantized head, which most readers of other formats never look for."""
    out = tmp_path_factory.mktemp("mixture") / "out"
    lowbit.quantize(wiki_8m, out, format="gguf", scheme="q4_k_m")
    return out


@pytest.mark.parametrize(
    ("form", "scheme", "kept"),
    [("awq", "int4-g32-asym", 2), ("fp8", "fp8-e4m3-128x128", 2), ("bitsandbytes", "nf4-g32", 1)],
)
def test_a_mixture_goes_where_some_of_its_weights_have_no_place(
    form: str, scheme: str, kept: int, mixture: Path, tmp_path: Path
) -> None:
    """These stay floats, and are said to; where weights go together in one scheme only, it is that of most."""
    done = lowbit.convert(mixture, tmp_path / "out", format=form, lossy=True)
    quantized = [group for group in done.groups if group.before]
    floats = [group for group in quantized if group.after is None]
    assert {group.after for group in quantized if group.after} == {scheme}
    assert {group.name for group in floats} == {"model.embed_tokens.weight", *["lm_head.weight"][: kept - 1]}
    assert all(group.method == "dequantize" and group.note for group in floats)
    with open_checkpoint(mixture) as before, open_checkpoint(tmp_path / "out") as after:
        assert sum(weight.scheme is not None for weight in after.weights.values()) == 58 - kept
        for name in (group.name for group in floats):
            found = after.dequantized(name, torch.float32)
            assert torch.equal(found, before.dequantized(name, torch.float32)), name
    if form == "bitsandbytes":
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.isfinite(model(torch.arange(16)[None]).logits).all()


def test_a_mixture_of_which_nothing_has_a_place_is_refused(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="bitnet cannot hold q4_k"):
        lowbit.convert(mixture, tmp_path / "out", format="bitnet", lossy=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["compressed-tensors", "bitsandbytes"])
def test_an_embedding_that_is_the_head_stays_floats(form: str, wiki_8m: Path, tmp_path: Path) -> None:
    """llama.cpp quantizes it; readers of others take a head that they do not find for random numbers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=4096, tie_word_embeddings=True, initializer_range=0.5, **sizes)
    transformers.LlamaForCausalLM(config).to(F16).save_pretrained(tmp_path / "in")
    for file in wiki_8m.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "in")
    lowbit.quantize(tmp_path / "in", tmp_path / "gguf", format="gguf", scheme="q8_0", method="rtn")
    lowbit.convert(tmp_path / "gguf", tmp_path / "float", format="float", scheme="f32")
    scheme = "int8-row" if form == "bitsandbytes" else None
    lowbit.convert(tmp_path / "gguf", tmp_path / "out", format=form, scheme=scheme, lossy=True)
    ids, auto = torch.arange(16)[None], transformers.AutoModelForCausalLM
    with torch.no_grad():
        found, meant = (auto.from_pretrained(tmp_path / name)(ids).logits.float() for name in ("out", "float"))
    assert (found - meant).norm() < 0.1 * meant.norm()


def of_gguf(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of the tensors, as the package that owns the format reads them."""
    (file,) = path.glob("*.gguf")
    return {each.name: (each.tensor_type.name, each.data.tobytes()) for each in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("there", ["compressed-tensors", "onnx", "mlx"])
def test_gguf_comes_back_as_the_same_bytes(there: str, wiki_8m: Path, tmp_path: Path) -> None:
    lowbit.quantize(wiki_8m, tmp_path / "in", format="gguf", scheme="q8_0", method="rtn")
    assert lowbit.convert(tmp_path / "in", tmp_path / "there", format=there).lossless
    assert lowbit.convert(tmp_path / "there", tmp_path / "back", format="gguf").lossless
    meant = of_gguf(tmp_path / "in")
    assert meant == of_gguf(tmp_path / "back") and {kind for kind, _ in meant.values()} == {"Q8_0", "F32"}


def test_onnx_comes_back_as_the_same_bytes(wiki_8m: Path, tmp_path: Path) -> None:
    """The graph names who made it: the tensors are compared."""
    lowbit.quantize(wiki_8m, tmp_path / "in", format="onnx", scheme="int4-g32", method="rtn")
    assert lowbit.convert(tmp_path / "in", tmp_path / "there", format="gptq").lossless
    assert lowbit.convert(tmp_path / "there", tmp_path / "back", format="onnx").lossless
    one, other = (sorted(path.glob("*.safetensors")) for path in (tmp_path / "in", tmp_path / "back"))
    assert one and [each.read_bytes() for each in one] == [each.read_bytes() for each in other]
