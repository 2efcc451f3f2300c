"""GGUF files: the reader against the `gguf` package's writer, names against its tables, mixtures, tokenizers."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lowbit.errors import CheckpointError, FormatError, LowbitError, UnsupportedError, UsageError
from lowbit.formats import Weight
from lowbit.formats._gguf import archs, from_file, interleave, separate, to_file
from lowbit.formats._mixtures import choose
from lowbit.formats.gguf import FORMAT
from lowbit.inspect import inspect
from lowbit.pipeline import run_conversion
from lowbit.schemes import parse
from lowbit.stages._changes import Goal
from lowbit.stages._gguf import read_gguf
from lowbit.stages._gguf_model import open_gguf
from lowbit.stages._imatrix import imatrix_bytes, read_importance
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules, make_plan
from tests.hostile.cases import gguf_bytes, gguf_entry, gguf_key, gguf_text
from tests.reference.qtensors import random_qtensor

Kind = gguf.GGMLQuantizationType


def write(path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]], kinds: dict[str, Kind]) -> Path:
    """A file of the `gguf` package; `kinds`: block types of some tensors."""
    writer = gguf.GGUFWriter(path, str(keys.pop("arch", "llama")))
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in tensors.items():
        if name in kinds:
            writer.add_tensor(name, gguf.quants.quantize(values, kinds[name]), raw_dtype=kinds[name])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    keys = {"a.text": "grün", "a.list": ["x", "", "é"], "a.numbers": [3, -4], "a.float": 0.5, "a.truth": True}
    tensors = {"w": numbers(3, 64), "h": numbers(5, dtype=np.float16), "q": numbers(4, 64)}
    found = read_gguf(write(tmp_path / "m.gguf", {**keys}, tensors, {"q": Kind.Q4_1}))
    assert {key: found.value(key) for key in keys} == keys
    assert found.value("general.architecture") == "llama"
    assert found.value("nothing", 7) == 7
    places = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, tensor in found.tensors.items():
        theirs = places.pop(name)
        assert (tensor.start, tensor.nbytes, tensor.type) == (
            theirs.data_offset,
            theirs.n_bytes,
            theirs.tensor_type.name.lower(),
        )
        assert tensor.shape == tuple(reversed(theirs.shape.tolist()))
    assert not places


def test_a_large_vocabulary_opens_at_once(tmp_path: Path) -> None:
    keys = {
        "tokenizer.ggml.tokens": [f"token{number}" for number in range(150_000)],
        "tokenizer.ggml.token_type": [1] * 150_000,
    }
    path = write(tmp_path / "m.gguf", {**keys}, {"w": numbers(4, 4)}, {})
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        found = read_gguf(path)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05
    assert found.value("tokenizer.ggml.tokens") == keys["tokenizer.ggml.tokens"]


def test_other_alignments(tmp_path: Path) -> None:
    entries = [gguf_entry("a", (1,)), gguf_entry("b", (1,), offset=64)]
    data = gguf_bytes(entries, [gguf_key("general.alignment", 4, struct.pack("<I", 64))], size=0)
    head = len(b"GGUF") + 20 + len(gguf_key("general.alignment")) + sum(map(len, entries))
    data = data[:head] + bytes(-head % 64) + bytes(68)
    (tmp_path / "m.gguf").write_bytes(data)
    assert [tensor.start % 64 for tensor in read_gguf(tmp_path / "m.gguf").tensors.values()] == [0, 0]


@pytest.mark.parametrize("arch", archs(), ids=lambda arch: arch.arch)
def test_names_are_those_of_the_package(arch: Any) -> None:
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.arch)
    # The package lags behind llama.cpp, which reads an output or layers that foresee in more architectures.
    maps = [gguf.get_tensor_name_map(each, 3) for each in (kind, gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.GLM4_MOE)]
    for stem, module in arch.names.items():
        name = module.format(2, 5)
        if (arch.tied and stem == "output") or (".shared_mlp." in module and "granite" in arch.arch):
            continue  # the converter takes Granite's apart and names the parts itself
        wanted = f"blk.2.{stem}" if "{}" in module else stem
        # The package knows experts by their stack, parts of heads by a name of their own, BLOOM without its first part.
        known = module.replace("experts.{}", "experts").replace(
            "backbone.layers.{}.mixer.exp", "model.layers.{}.mlp.exp"
        )
        known = known.replace("kv_b_proj.{}.k_b", "k_b_proj").replace("kv_b_proj.{}.v_b", "v_b_proj").format(2)
        others = (known, known.removeprefix("transformer."), known.removeprefix("model."))
        found = [names.get_name(each) for names in maps for each in others]
        assert wanted == next(filter(None, found))
        place = arch.place(f"{name}.weight")
        assert place is not None
        assert (place.name, place.expert) == (f"{wanted}.weight", 5 if arch.stacks(f"{wanted}.weight") else None)
        assert arch.name(place.name, 5) == f"{name}.weight"


def test_rows_of_heads(tmp_path: Path) -> None:
    """llama.cpp's `permute` of its convert script, written as there."""
    rows = torch.arange(24.0).reshape(24, 1).repeat(1, 4)
    permuted = rows.reshape(3, 2, 4, 4).swapaxes(1, 2).reshape(24, 4)
    weight = Weight("q", (24, 4), torch.float32, interleaved=3, plus=1.0)
    assert torch.equal(to_file(weight, rows), permuted + 1)
    assert torch.equal(from_file(weight, permuted + 1), rows)
    assert torch.equal(interleave(24, 3)[separate(24, 3)], torch.arange(24))


def test_experts_are_slices_of_one_tensor(tmp_path: Path) -> None:
    keys = {"arch": "qwen3moe", "qwen3moe.expert_count": 3, "qwen3moe.attention.head_count": 2}
    stack = numbers(3, 8, 32)
    path = write(tmp_path / "m.gguf", keys, {"blk.1.ffn_up_exps.weight": stack}, {})
    model = open_gguf(path)
    for expert in range(3):
        found = model.files[0].tensor(f"model.layers.1.mlp.experts.{expert}.up_proj.weight")
        assert torch.equal(found, torch.from_numpy(stack[expert]))
    assert model.config["model_type"] == "qwen3_moe"


def test_nvfp4_without_a_scale_beside_it_has_a_scale_of_one(tmp_path: Path) -> None:
    """As in llama.cpp, which multiplies only where the file has `NAME.scale`."""
    blocks = np.random.default_rng(0).integers(0, 120, (4, 36), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "nobody")
    writer.add_tensor("a.weight", blocks, raw_dtype=Kind.NVFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path / "m.gguf").dequantized("a.weight", torch.float32)
    np.testing.assert_allclose(found.numpy(), gguf.quants.dequantize(blocks, Kind.NVFP4), rtol=1e-6)


def test_the_scale_of_nvfp4_may_be_in_another_part(tmp_path: Path) -> None:
    """And what stands there for its inputs is told in one line, by `convert` too."""
    blocks = np.random.default_rng(0).integers(0, 120, (64, 36), dtype=np.uint8)
    for part in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-{part + 1:05}-of-00002.gguf", "llama")
        for key, value in {"split.no": part, "split.count": 2, "split.tensors.count": 5}.items():
            writer.add_int32(key, value)
        if part == 0:
            for name in ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"):
                writer.add_tensor(name, blocks, raw_dtype=Kind.NVFP4)
        else:
            writer.add_tensor("blk.0.ffn_up.scale", np.array([0.25], np.float32))
            for name in ("blk.0.ffn_up.input_scale", "blk.0.ffn_gate.input_scale"):
                writer.add_tensor(name, np.array([3.0], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path = tmp_path / "m-00001-of-00002.gguf"
    checkpoint, plain = open_checkpoint(path), gguf.quants.dequantize(blocks, Kind.NVFP4)
    for stem, scale in (("up", 0.25), ("gate", 1.0)):
        found = checkpoint.dequantized(f"model.layers.0.mlp.{stem}_proj.weight", torch.float32)
        np.testing.assert_allclose(found.numpy(), scale * plain, rtol=1e-6)
    notes = [finding.fact for finding in inspect(path).findings if "input_scale" in finding.fact]
    assert len(notes) == 1 and notes[0].startswith("2 scales of inputs, as blk.0.ffn_gate.input_scale")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = list[str]()
    run_conversion(str(path), tmp_path / "out", Goal("float", "f32"), note=told.append)
    assert told == notes


def test_an_unknown_architecture_keeps_its_names(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"arch": "rwkv7"}, {"blk.0.time_mix.weight": numbers(2, 2)}, {})
    assert list(open_gguf(path).weights) == ["blk.0.time_mix.weight"]


def test_what_is_not_utf8_is_an_error_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys=[gguf_key("a", 8, gguf_text(b"\xff"))]))
    found = read_gguf(path)
    with pytest.raises(CheckpointError, match="UTF-8"):
        found.value("a")


def test_a_file_alone_of_an_unknown_architecture_goes_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"arch": "rwkv7"}, {"blk.0.time_mix.weight": numbers(4, 32)}, {})
    with pytest.raises(UnsupportedError, match=r"no config\.json"):
        make_plan(open_checkpoint(path), Rules())


def weights(layers: int, width: int = 256) -> list[Weight]:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(layers):
        names += [
            f"model.layers.{layer}.{part}.weight" for part in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
        ]
    return [Weight(name, (width,) if "norm" in name else (width, width), torch.bfloat16) for name in names]


CONFIG = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8}


def test_q4_k_m_has_more_bits_where_llama_cpp_has_them() -> None:
    found = choose("q4_k_m", weights(16), {**CONFIG, "num_hidden_layers": 16})
    more = [0, 1, 4, 7, 10, 13, 14, 15]  # as llama-quantize printed for a model of 16 layers
    for layer in range(16):
        wanted = "q6_k" if layer in more else "q4_k"
        assert found[f"model.layers.{layer}.self_attn.v_proj.weight"][0] == wanted
        assert found[f"model.layers.{layer}.mlp.down_proj.weight"][0] == wanted
        assert found[f"model.layers.{layer}.self_attn.o_proj.weight"][0] == "q4_k"
    assert found["lm_head.weight"][0] == "q6_k"
    assert found["model.embed_tokens.weight"][0] == "q4_k"
    assert found["model.norm.weight"][0] == "f32"


def test_rows_that_blocks_do_not_divide() -> None:
    found = choose("q4_k_m", weights(1, 96), {**CONFIG, "num_hidden_layers": 1})
    assert found["model.layers.0.self_attn.o_proj.weight"][0] == "q5_0"
    assert "96" in found["model.layers.0.self_attn.o_proj.weight"][1]
    assert choose("q4_k_m", weights(1, 48), {**CONFIG, "num_hidden_layers": 1})["lm_head.weight"][0] == "f16"


def test_refuses_in_one_sentence() -> None:
    with pytest.raises(UnsupportedError, match=r"int4-g128.*q4_k_m"):
        choose("int4-g128", weights(1), CONFIG)
    with pytest.raises(UnsupportedError, match=r"llama.*bert"):
        choose("q8_0", weights(1), {"model_type": "bert"})


@pytest.mark.parametrize("value", [float("nan"), 0.0, -4.0])
def test_numbers_of_a_rope_that_nothing_can_have(value: float, tmp_path: Path) -> None:
    """They can be looked at, and evaluated by nobody."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_key_value("llama.rope.freq_base", value, gguf.GGUFValueType.FLOAT64)
    for key in ("embedding_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 4)
    writer.add_tensor("token_embd.weight", numbers(4, 32))
    writer.add_tensor("rope_freqs.weight", np.array([1.0, 2.0, 4.0, 4.0], np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert list(open_gguf(tmp_path / "m.gguf").weights) == ["model.embed_tokens.weight"]
    with pytest.raises(LowbitError, match="rope"):
        make_plan(open_checkpoint(tmp_path / "m.gguf"), Rules())


def older(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"", count: int | None = None) -> bytes:
    """An importance matrix as llama-imatrix wrote it before GGUF."""
    data = struct.pack("<i", len(entries) if count is None else count)
    for name, (calls, values) in entries.items():
        text = name.encode()
        data += struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


NAME = "blk.1.ffn_down.weight"
DOWN = Weight("model.layers.1.mlp.down_proj.weight", (8, 3), torch.float32)


def newer(path: Path, sums: Any, counts: Any, kind: str = "imatrix", name: str = NAME, **facts: Any) -> Path:
    tensors = {f"{name}.in_sum2": np.array(sums, np.float32), f"{name}.counts": np.array(counts, np.float32)}
    keys = {f"imatrix.{key}": value for key, value in facts.items()}
    return write(path, {"general.type": kind, **keys}, tensors, {})


def test_both_kinds_of_importance_matrix(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(older({NAME: (2, [2.0, 0.0, 5.0])}, struct.pack("<ii", 9, 4) + b"text"))
    new = newer(tmp_path / "new.gguf", [[4.0, 0.0, 10.0]], [[4.0]], chunk_count=9, datasets=["text"])
    for path in (tmp_path / "old.dat", new):
        found = read_importance(path, CONFIG, [DOWN.name])
        values = found.of(DOWN)
        assert values is not None and values.tolist() == [1.0, 0.0, 2.5]
        assert (found.facts.chunks, found.facts.dataset, found.facts.entries) == (9, "text", 1)
        assert found.of(Weight("model.layers.0.mlp.down_proj.weight", (8, 3), torch.float32)) is None
        with pytest.raises(UsageError, match="another model"):
            found.of(Weight(DOWN.name, (8, 4), torch.float32))


def test_importance_of_experts(tmp_path: Path) -> None:
    """Each has its count; all inputs of one that no token reached count 1, as in llama-quantize."""
    names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(2)]
    path = newer(tmp_path / "m.gguf", [[4.0, 0.0, 10.0], [7.0] * 3], [[4.0], [0.0]], name="blk.1.ffn_down_exps.weight")
    found = read_importance(path, {"model_type": "mixtral"}, names)
    values = [found.of(Weight(name, (8, 3), torch.float32)) for name in names]
    assert [each.tolist() for each in values if each is not None] == [[1.0, 0.0, 2.5], [1.0, 1.0, 1.0]]
    with pytest.raises(UsageError, match="another model"):
        read_importance(path, {"model_type": "mixtral"}, names[:1]).of(Weight(names[0], (8, 3), torch.float32))


def test_what_is_written_is_what_llama_imatrix_writes(tmp_path: Path) -> None:
    """By its definition: names in order, a row for each expert, counts beside, in what the `gguf` package finds."""
    sums = {"blk.1.b.weight": torch.tensor([[1.0, 2.0, 3.0]]), "blk.0.e.weight": torch.arange(6.0).reshape(2, 3)}
    counts = {"blk.1.b.weight": [5.0], "blk.0.e.weight": [4.0, 0.0]}
    (tmp_path / "m.gguf").write_bytes(imatrix_bytes(sums, counts, ["a.txt", "b.txt"], 3, 512))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {str(tensor.name): tensor for tensor in reader.tensors}
    assert list(found) == [f"blk.{name}.weight.{part}" for name in ("0.e", "1.b") for part in ("in_sum2", "counts")]
    assert [found["blk.0.e.weight.in_sum2"].shape.tolist(), found["blk.0.e.weight.counts"].shape.tolist()] == [
        [3, 2],
        [1, 2],
    ]
    assert found["blk.0.e.weight.in_sum2"].data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["blk.1.b.weight.counts"].data.tolist() == [5]
    keys = {
        key: reader.get_field(key)
        for key in ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    }
    assert [field.contents() for field in keys.values() if field] == ["imatrix", ["a.txt", "b.txt"], 3, 512]


GOOD = {NAME: (2, [2.0, 0.0, 5.0])}
BAD: dict[str, tuple[Any, str]] = {
    "empty": (b"", "truncated"),
    "text": (b"some text that is none", "entries in"),
    "no entries": (older({}), "0 entries"),
    "far too many entries": (older(GOOD, count=2**30), "entries in"),
    "fewer entries": (older(GOOD, count=2), "truncated"),
    "name too long": (struct.pack("<ii", 1, 2**31 - 1) + bytes(40), "truncated"),
    "name of negative length": (struct.pack("<ii", 1, -4) + bytes(40), "truncated"),
    "name not utf-8": (struct.pack("<ii", 1, 2) + b"\xff\xfe" + bytes(40), "truncated"),
    "no calls": (older({NAME: (0, [1.0] * 3)}), "0 calls"),
    "too many values": (older(GOOD)[:-12], "3 values"),
    "nan": (older({NAME: (1, [float("nan")] * 3)}), "not finite"),
    "negative": (older({NAME: (1, [1.0, -1.0, 0.0])}), "negative"),
    "another model": (older({"blk.7.ffn_down.weight": (1, [1.0])}), "no entry for any"),
    "a model": (lambda path: newer(path, [[1.0] * 3], [[1.0]], kind="model"), "'model'"),
    "sums alone": (
        lambda path: write(path, {"general.type": "imatrix"}, {f"{NAME}.in_sum2": numbers(3)}, {}),
        "no counts",
    ),
    "counts do not divide": (lambda path: newer(path, [[1.0] * 3], [[1.0], [2.0]]), "3 sums and 2 counts"),
    "count nan": (lambda path: newer(path, [[1.0] * 3], [[float("nan")]]), "count that is"),
    "count negative": (lambda path: newer(path, [[1.0] * 3], [[-1.0]]), "count that is"),
    "sum infinite": (lambda path: newer(path, [[float("inf")] * 3], [[1.0]]), "not finite"),
    "float16": (
        lambda path: write(
            path,
            {"general.type": "imatrix"},
            {f"{NAME}.in_sum2": numbers(3, dtype=np.float16), f"{NAME}.counts": numbers(1)},
            {},
        ),
        "float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_importance_matrices_that_are_refused(case: str, tmp_path: Path) -> None:
    made, says = BAD[case]
    path = tmp_path / "imatrix"
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        made(path)
    with pytest.raises(LowbitError) as caught:
        read_importance(path, CONFIG, [DOWN.name])
    assert says in str(caught.value) and str(path) in str(caught.value) and str(caught.value).isprintable()


DENSE = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("scheme", DENSE)
def test_codes_come_apart(scheme: str, heads: int) -> None:
    """Scales and minima without codes, and some rows of codes as words without these, in the order of the model."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = Weight(name, (64, 256), torch.float32, parse(scheme), interleaved=heads)
    q = random_qtensor(parse(scheme), weight.shape)
    parts = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(weight).items()}
    FORMAT.pack(weight, q, parts)
    hollow = FORMAT.unpack(weight, parts, torch.empty(weight.shape, dtype=torch.uint8, device="meta"))
    beside, wanted = ({name: part for name, part in each.parts() if name != "codes"} for each in (hollow, q))
    assert beside.keys() == wanted.keys() and all(torch.equal(beside[name], part) for name, part in wanted.items())
    bits = q.scheme.grid.bits
    words = torch.empty(32, 256 * bits // 32, dtype=torch.int32)
    assert FORMAT.hollow(q.scheme) and FORMAT.codes is not None
    FORMAT.codes.rows.unpack(weight, parts, 32, words)
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little").reshape(32, 256, bits)
    assert (np.packbits(stream, axis=2, bitorder="little")[:, :, 0] == q.codes[32:].numpy()).all()


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("scheme", DENSE)
def test_blocks_are_made_of_words(scheme: str, heads: int) -> None:
    """An odd number of blocks is what it is from codes, and some rows of it are what the whole has there."""
    name, q = "model.layers.0.self_attn.q_proj.weight", random_qtensor(parse(scheme), (30, 768))
    weight, bits = Weight(name, (30, 768), torch.float32, parse(scheme), interleaved=heads), q.scheme.grid.bits
    meant, found, some = (torch.full((rows, *FORMAT.layout(weight)[name].shape[1:]), 0xAA, dtype=torch.uint8)
                          for rows in (30, 30, 10))  # fmt: skip
    FORMAT.pack(weight, q, {name: meant})
    stream = np.unpackbits(q.codes.numpy()[:, :, None], axis=2, count=bits, bitorder="little").reshape(30, -1)
    words = torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32))
    hollow = replace(q, codes=torch.empty(q.codes.shape, dtype=torch.uint8, device="meta"))
    assert FORMAT.codes is not None and FORMAT.codes.pack is not None
    FORMAT.codes.pack(weight, hollow, words, {name: found})
    FORMAT.codes.pack(weight.some(10), hollow.some(10, 20, hollow.codes[10:20]), words[10:20], {name: some})
    assert FORMAT.by_rows(weight) == (10 if heads else 1)
    assert torch.equal(found, meant) and torch.equal(some, meant[10:20])


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("scheme", ["q4_0", "q5_0", "q8_0"])
def test_scales_come_without_codes(scheme: str, heads: int) -> None:
    """What a conversion looks at first: it is what is found with them, and what is damaged is named."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = Weight(name, (64, 96), torch.float32, parse(scheme), interleaved=heads)
    q, codes = random_qtensor(parse(scheme), weight.shape), torch.empty(weight.shape, dtype=torch.uint8, device="meta")
    parts = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(weight).items()}
    FORMAT.pack(weight, q, parts)
    found = FORMAT.unpack(weight, parts, codes)
    assert FORMAT.hollow(parse(scheme)) and found.codes.is_meta
    assert isinstance(found.scales, torch.Tensor) and isinstance(q.scales, torch.Tensor)
    assert torch.equal(found.scales, q.scales)
    FORMAT.pack(weight, found, parts)
    with pytest.raises(FormatError, match="cannot be stored as float16"):
        FORMAT.pack(weight, replace(found, scales=found.scales + 1e-6), parts)
    parts[name][5, 1] = 0x7E
    with pytest.raises(FormatError, match=f"{name}: scales of .* finite"):
        FORMAT.unpack(weight, parts, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logarithms_of_decays_come_back_as_they_were(dtype: torch.dtype) -> None:
    """What is stored is -exp of them, to a rounding of float32; what had few digits has them again."""
    logarithms = torch.randn(4096, generator=torch.Generator().manual_seed(0)).mul(2).to(dtype).float()
    weight = Weight("A", (4096,), torch.float32, decays=True)
    stored = to_file(weight, logarithms)
    torch.testing.assert_close(stored, -logarithms.exp(), rtol=2e-7, atol=0)
    assert torch.equal(from_file(weight, stored), logarithms)


def test_rows_of_groups() -> None:
    """llama.cpp's order of a merged matrix: all queries, all keys, all values."""
    rows = torch.arange(24.0).reshape(2, 4, 3)  # two groups of two queries, a key and a value, heads of three rows
    weight = Weight("qkv", (24,), torch.float32, grouped=(2, 2))
    wanted = torch.cat([rows[0, :2].flatten(), rows[1, :2].flatten(), rows[:, 2].flatten(), rows[:, 3].flatten()])
    assert torch.equal(to_file(weight, rows.flatten()), wanted)
    assert torch.equal(from_file(weight, wanted), rows.flatten())
