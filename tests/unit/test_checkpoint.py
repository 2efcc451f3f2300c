"""Reading checkpoints: what is listed and read is what peers read, nothing is loaded, everything is carried."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.budget import anonymous_bytes
from lowbit.errors import CheckpointError, UsageError
from lowbit.formats import Spec, Weight
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.tensors import QTensor
from tests.hostile.cases import entry, packed, raw

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits of a dtype; bits of floats may well be NaN."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)


def agrees(checkpoint: Checkpoint, wanted: dict[str, Tensor]) -> None:
    assert set(checkpoint.specs) == set(wanted) == set(checkpoint.weights)
    for name, tensor in wanted.items():
        found = checkpoint.tensor(name)
        assert checkpoint.specs[name] == Spec(tensor.dtype, tuple(tensor.shape))
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert raw_bytes(found) == raw_bytes(tensor), name
        assert checkpoint.weights[name] == Weight(name, tuple(tensor.shape), tensor.dtype)


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Tensor]:
    """Every dtype, a scalar, an empty tensor; saved as `model.safetensors` in `tmp_path`."""
    tensors = {f"x.{name}": some(dtype, 3, 5) for dtype, name in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "deep": some(torch.int16, 2, 1, 3, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_every_dtype_reads_as_it_was_saved(tmp_path: Path, model: dict[str, Tensor]) -> None:
    agrees(open_checkpoint(tmp_path), model)
    agrees(open_checkpoint(tmp_path / "model.safetensors"), model)
    assert open_checkpoint(tmp_path).nbytes == sum(tensor.nbytes for tensor in model.values())


@pytest.mark.parametrize("padding", range(8))
def test_any_alignment(tmp_path: Path, padding: int) -> None:
    a, b = some(torch.float64, 3), some(torch.bfloat16, 2, 2)
    header = json.dumps({"a": entry("F64", [3], [0, 24]), "b": entry("BF16", [2, 2], [24, 32])}) + " " * padding
    path = raw(tmp_path / "m.safetensors", header.encode(), raw_bytes(a) + raw_bytes(b))
    agrees(open_checkpoint(path), {"a": a, "b": b})
    assert set(load_file(path)) == {"a", "b"}


def test_metadata_may_be_null(tmp_path: Path) -> None:
    header = {"__metadata__": None, "a": entry("U8", [1], [0, 1])}
    path = raw(tmp_path / "m.safetensors", json.dumps(header).encode(), b"7")
    assert open_checkpoint(path).tensor("a").tolist() == load_file(path)["a"].tolist() == [55]


def test_tensors_are_listed_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"late": entry("U8", [2], [3, 5]), "none": entry("U8", [0], [3, 3]), "early": entry("U8", [3], [0, 3])}
    path = raw(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes(range(5)))
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.specs) == list(checkpoint.weights) == ["early", "none", "late"]
    assert checkpoint.tensor("late").tolist() == [3, 4]


def test_shards_with_an_index_and_without(tmp_path: Path) -> None:
    tensors = {name: some(torch.float16, 4, 4) for name in ("a", "b", "c")}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"b": tensors["b"]}, tmp_path / names[0])
    save_file({"a": tensors["a"], "c": tensors["c"]}, tmp_path / names[1])
    agrees(open_checkpoint(tmp_path), tensors)
    table = {"a": names[1], "b": names[0], "c": names[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    save_file({"a": torch.ones(9)}, tmp_path / "consolidated.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    agrees(checkpoint, tensors)
    assert [shard.name for shard in checkpoint.shards] == names
    assert list(checkpoint.specs) == ["b", "a", "c"]


def pytorch_model() -> dict[str, Tensor]:
    base = some(torch.float32, 4, 6)
    return {
        "whole": base,
        "turned": base.t(),
        "part": base[1:3, 2:5],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "f8": some(torch.float8_e4m3fn, 5),
        "scalar": torch.tensor(7),
        "empty": torch.empty(3, 0),
        "alias": base,
    }


def test_pytorch_files_read_as_torch_reads_them(tmp_path: Path) -> None:
    torch.save(pytorch_model() | {"epoch": 3, "name": "x"}, tmp_path / "pytorch_model.bin")
    wanted = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    skipped = {name: wanted.pop(name) for name in ("epoch", "name")}
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        checkpoint = open_checkpoint(path)
        agrees(checkpoint, {name: tensor.detach() for name, tensor in wanted.items()})
        assert list(checkpoint.specs) == list(wanted)
        assert checkpoint.skipped == tuple(sorted(skipped))
        assert checkpoint.tied == {"alias": "whole"}
        assert not checkpoint.tensor("parameter").requires_grad
        assert checkpoint.nbytes == sum(t.nbytes for name, t in wanted.items() if name != "alias")


def test_pytorch_weights_one_level_down_and_in_shards(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save({"state_dict": {"a": tensors["a"]}, "optimizer": {"x": 1}}, tmp_path / "one.bin")
    torch.save({"b": tensors["b"]}, tmp_path / "two.bin")
    table = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(table))
    agrees(open_checkpoint(tmp_path), tensors)


def test_safetensors_come_before_pytorch_files(tmp_path: Path, model: dict[str, Tensor]) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    agrees(checkpoint, model)
    assert checkpoint.extras == ()


def test_everything_that_is_no_weight_is_carried(tmp_path: Path, model: dict[str, Tensor]) -> None:
    carried = ["LICENSE", "README.md", "chat_template.jinja", "code/modeling.py", "config.json", "tokenizer.json"]
    left = ["model.safetensors.index.json.bak/.x", ".git/config", "code/__pycache__/a.pyc", "x.gguf", "onnx/m.onnx"]
    for name in [*carried, *left, "old.h5.index.json", "original/consolidated.pth"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"torch_dtype": "float16"}' if name == "config.json" else "raise SystemExit")
    (tmp_path / "linked").symlink_to("tokenizer.json")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.extras == tuple(sorted(tmp_path / name for name in [*carried, "linked"]))
    assert checkpoint.config == {"torch_dtype": "float16"}


def test_weights_may_be_links_to_elsewhere(tmp_path: Path, model: dict[str, Tensor]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.safetensors").symlink_to(tmp_path / "model.safetensors")
    agrees(open_checkpoint(tmp_path / "mine"), model)


def test_a_single_file_brings_nothing_along(tmp_path: Path, model: dict[str, Tensor]) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert (checkpoint.extras, checkpoint.config) == ((), {})


HEADER = {f"layer.{i}": entry("BF16", [5 * 2**28, 4], [i * 10 * 2**30, (i + 1) * 10 * 2**30]) for i in range(10)}


def hundred_gigabytes(root: Path) -> None:
    """100 GiB in one file, none of it on disk, with a 1 at the very end."""
    path = raw(root / "model.safetensors", json.dumps(HEADER).encode())
    try:
        os.truncate(path, path.stat().st_size + 100 * 2**30)
        with path.open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(raw_bytes(torch.ones(1, dtype=torch.bfloat16)))
    except OSError as error:
        pytest.skip(f"no sparse files of 100 GiB here: {error}")


def test_a_hundred_gigabytes_open_at_once_and_take_no_memory(tmp_path: Path) -> None:
    hundred_gigabytes(tmp_path)
    open_checkpoint(
        raw(tmp_path / "m.safetensors", b'{"a":' + json.dumps(entry("U8", [1], [0, 1])).encode() + b"}", b"1")
    )
    before, start = anonymous_bytes(), time.perf_counter()
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    views = {name: checkpoint.tensor(name) for name in checkpoint.specs}
    assert time.perf_counter() - start < 0.5
    assert checkpoint.nbytes == 100 * 2**30
    assert [float(view[-1, -1]) for view in views.values()] == [0.0] * 9 + [1.0]
    assert anonymous_bytes() - before < 2**20


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_reading_takes_no_anonymous_memory(tmp_path: Path, kind: str) -> None:
    tensors = {"a": torch.ones(2**25, dtype=torch.uint8), "b": torch.ones(2**23)}
    path = tmp_path / f"m.{kind}"
    (save_file if kind == "safetensors" else torch.save)(tensors, path)
    checkpoint = open_checkpoint(path)
    float(checkpoint.tensor("b")[:10].sum())
    before = anonymous_bytes()
    held = [checkpoint.tensor(name) for name in ("a", "b")]
    assert [int(view[::4096].sum(dtype=torch.int64)) for view in held] == [2**13, 2**11]
    assert anonymous_bytes() - before < 2**20


def test_writing_to_a_view_reaches_neither_the_file_nor_another_view(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    one, other = checkpoint.tensor("a"), checkpoint.tensor("a")
    one.mul_(3)
    assert one.sum() == 24 and other.sum() == 8 and checkpoint.tensor("a").sum() == 8
    assert (tmp_path / "m.safetensors").read_bytes() == content


@pytest.mark.parametrize("size", [40, 200])
def test_a_file_that_changed_is_not_read(tmp_path: Path, size: int) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    os.truncate(tmp_path / "m.safetensors", size)
    with pytest.raises(CheckpointError, match=r"m\.safetensors changed"):
        checkpoint.tensor("a")
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*'a'.*No such file"):
        checkpoint.tensor("a")


def test_a_tensor_that_is_not_there(tmp_path: Path, model: dict[str, Tensor]) -> None:
    for read in (open_checkpoint(tmp_path).tensor, open_checkpoint(tmp_path).load):
        with pytest.raises(CheckpointError, match="no tensor 'y'"):
            read("y")


TABLE = {"model.embed.weight": torch.randn(6, 4), "norm.weight": torch.ones(6)}
TIED = {"tie_word_embeddings": True, "vocab_size": 6}
COPY = {"lm_head.weight": TABLE["model.embed.weight"].clone()}


@pytest.mark.parametrize(
    ("tensors", "config", "tied"),
    [
        (TABLE, TIED, {"lm_head.weight": "model.embed.weight"}),
        (TABLE | COPY, TIED, {"lm_head.weight": "model.embed.weight"}),
        (TABLE | COPY, {"text_config": TIED}, {"lm_head.weight": "model.embed.weight"}),
        (TABLE | {"lm_head.weight": torch.zeros(6, 4)}, TIED, {}),
        (TABLE | {"lm_head.weight": COPY["lm_head.weight"].half()}, TIED, {}),
        (TABLE | COPY, {"tie_word_embeddings": False, "vocab_size": 6}, {}),
        (TABLE | COPY, {"vocab_size": 6}, {}),
        (COPY, TIED, {}),
        (COPY | {"a.weight": TABLE["model.embed.weight"]}, TIED, {"lm_head.weight": "a.weight"}),
        (TABLE | {"x.lm_head.weight": torch.zeros(3, dtype=torch.uint8)}, TIED, {}),
    ],
)  # fmt: skip
def test_tied_weights(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, object], tied: dict[str, str]
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).tied == tied


def test_quantized_weights_stand_for_their_pieces(tmp_path: Path) -> None:
    codes = torch.randint(16, (8, 32))
    words = sum(codes[:, i::8] << 4 * i for i in range(8))
    assert isinstance(words, Tensor)
    scale = torch.rand(8, 1).bfloat16()
    parts = {"weight_packed": words.to(torch.int32), "weight_scale": scale, "input_scale": torch.ones(1)}
    checkpoint = open_checkpoint(packed(**parts)(tmp_path))
    assert (checkpoint.format, list(checkpoint.weights)) == ("compressed_tensors", ["m.weight"])
    weight = checkpoint.weights["m.weight"]
    assert (weight.shape, weight.dtype, str(weight.scheme)) == ((8, 32), torch.bfloat16, "int4-g32-bf16")
    loaded = checkpoint.load("m.weight")
    assert isinstance(loaded, QTensor) and torch.equal(loaded.codes, codes.byte())
    wanted = (codes - 8) * scale.float()
    assert torch.equal(checkpoint.dequantized("m.weight", torch.float32), wanted)
    assert torch.equal(checkpoint.dequantized("m.weight"), wanted.bfloat16())


def test_stored_floats_dequantize_to_themselves(tmp_path: Path) -> None:
    save_file({"a": torch.randn(3, 4), "n": torch.arange(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format is None
    assert checkpoint.dequantized("a").dtype == torch.float32
    assert torch.equal(checkpoint.dequantized("a", torch.float16), checkpoint.tensor("a").half())
    assert checkpoint.dequantized("n").dtype == torch.int64


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds `org/name`, as links into `blobs`; the hub itself cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root, commit = tmp_path / "models--org--name", "0123456789abcdef0123456789abcdef01234567"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (root / folder).mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    save_file({"a": torch.ones(2)}, root / "blobs/1")
    (root / "blobs/2").write_text('{"model_type": "x"}')
    for blob, name in (("1", "model.safetensors"), ("2", "config.json")):
        (root / "snapshots" / commit / name).symlink_to(f"../../blobs/{blob}")
    return root / "snapshots" / commit


def test_a_model_of_the_hub_by_its_name(hub: Path) -> None:
    checkpoint = open_checkpoint("org/name")
    assert (checkpoint.path, checkpoint.config, checkpoint.extras) == (hub, {"model_type": "x"}, (hub / "config.json",))
    assert checkpoint.tensor("a").tolist() == [1, 1]


def test_a_model_that_the_hub_does_not_give(hub: Path) -> None:
    with pytest.raises(UsageError, match="no file or directory 'org/other', and the hub gave no model") as caught:
        open_checkpoint("org/other")
    assert str(caught.value).isprintable()


def test_the_embedded_model_opens(wiki_8m: Path) -> None:
    wanted = load_file(wiki_8m / "model.safetensors")
    agrees(open_checkpoint(wiki_8m), wanted)


def test_what_hqq_pickles_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "qmodel.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"qmodel\.pt, in which the hqq package .* save_pretrained"):
        open_checkpoint(tmp_path)
