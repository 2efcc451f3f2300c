"""Checkpoints that are damaged, lie about themselves, or mean harm: one line each.

`Case.build` makes one in an empty directory and returns what a user would name; `says` are parts of the sentence that
must come. `format` is the plug-in that reads the case, where one does.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH = "pytorch_model.bin"


@dataclass(frozen=True)
class Case:
    """A hostile checkpoint."""

    id: str
    build: Callable[[Path], Path]
    says: tuple[str, ...]
    format: str | None = None


def raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file from its parts; `length` is what it claims its header to be."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    """One entry of a header, right unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _bytes(content: bytes, name: str = SHARD) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root / name

    return build


def _text(text: str, size: int = 24, length: int | None = None) -> Callable[[Path], Path]:
    return lambda root: raw(root / SHARD, text.encode(), bytes(size), length)


def _header(*, size: int = 24, **entries: Any) -> Callable[[Path], Path]:
    return _text(json.dumps(entries), size)


def _directory(
    shards: Mapping[str, Mapping[str, Tensor]], index: Any = None, config: Any = None, **more: bytes
) -> Callable[[Path], Path]:
    """A directory; `index` and `config` are JSON values or ready bytes, `more` are further files."""

    def build(root: Path) -> Path:
        for name, tensors in shards.items():
            save = save_file if name.endswith(".safetensors") else torch.save
            save(dict(tensors), root / name)
        for name, document in ((INDEX, index), ("config.json", config)):
            if document is not None:
                (root / name).write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        for name, content in more.items():
            (root / name).write_bytes(content)
        return root

    return build


def _then(build: Callable[[Path], Path], change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def built(root: Path) -> Path:
        path = build(root)
        change(path)
        return path

    return built


def _link(name: str, target: str) -> Callable[[Path], Path]:
    """A good model with one more file, which links out of it."""

    def build(root: Path) -> Path:
        (root / "outside.json").write_text('{"private": true}')
        model = root / "model"
        model.mkdir()
        (model / name).symlink_to(target)
        return _directory({SHARD: A})(model)

    return build


def torch_bytes(value: Any, **options: Any) -> bytes:
    """What `torch.save` writes for a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _rezip(data: bytes, change: Mapping[str, bytes], method: int = zipfile.ZIP_STORED, more: str = "") -> bytes:
    """A PyTorch archive with some of its records replaced (by the last part of their name) or all compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in [*old.namelist(), *filter(None, [more])]:
            content = b"" if name == more else old.read(name)
            new.writestr(name, change.get(name.partition("/")[2], content))
    return buffer.getvalue()


def _encrypted(data: bytes) -> bytes:
    """The archive with every record flagged as encrypted."""
    local, central = b"PK\3\4", b"PK\1\2"
    for mark, at in ((local, 6), (central, 8)):
        parts = data.split(mark)
        data = mark.join(
            [parts[0], *(part[: at - 4] + bytes([part[at - 4] | 1]) + part[at - 3 :] for part in parts[1:])]
        )
    return data


def _huge_record(root: Path) -> Path:
    """An archive whose pickle is a gigabyte of nothing, none of it on disk."""
    path = root / TORCH
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    head, size = path.read_bytes(), 1_000_000_000
    at = head.index(b"PK\1\2")
    record, end = bytearray(head[at:]), bytearray(head[at:])
    record[20:28] = size.to_bytes(4, "little") * 2
    end = record[record.index(b"PK\5\6") :]
    end[16:20] = (at + size).to_bytes(4, "little")
    with path.open("r+b") as file:
        file.seek(at + size)
        file.write(record[: record.index(b"PK\5\6")] + end)
    return path


class Bomb:
    """Pickles into a call that makes a file named `EXPLODED` in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("EXPLODED",)


def _pipe(root: Path) -> Path:
    os.mkfifo(root / SHARD)
    return root


def _folder(name: str) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        (root / name).mkdir()
        return root

    return build


def _sparse_header(root: Path) -> Path:
    path = raw(root / SHARD, b"{", length=150_000_000)
    os.truncate(path, 200_000_000)
    return path


A = {"a": torch.ones(2, 3)}
B = {"b": torch.ones(4)}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PAIR: dict[str, Mapping[str, Tensor]] = {ONE: A, TWO: B}
GOOD_TORCH = torch_bytes(A)


def _indexed(**table: Any) -> Callable[[Path], Path]:
    return _directory(PAIR, {"weight_map": table})


def _config(content: Any) -> Callable[[Path], Path]:
    return _directory({SHARD: A}, config=content)


def _bin(content: bytes) -> Callable[[Path], Path]:
    return _bytes(content, TORCH)


def _tensors(value: Any) -> Callable[[Path], Path]:
    return _bin(torch_bytes(value))


LENGTHS = [
    Case("empty file", _bytes(b""), (SHARD, "0 bytes", "truncated")),
    Case("seven bytes", _bytes(bytes(7)), (SHARD, "7 bytes", "truncated")),
    Case("length alone", _bytes(bytes(8)), (SHARD, "8 bytes", "truncated")),
    Case("header of length zero", _bytes(bytes(10)), (SHARD, "begins with b''")),
    Case("header of all bits set", _bytes(b"\xff" * 8 + b"{}"), (SHARD, "18,446,744,073,709,551,615", "2 follow")),
    Case("header of a terabyte", _text("{}", length=1 << 40), (SHARD, "1,099,511,627,776", "26 follow")),
    Case("header over the cap", _sparse_header, (SHARD, "150,000,000", "100,000,000 allowed")),
    Case("header cut off", _text('{"a":', 0, length=60), (SHARD, "claims 60 bytes", "5 follow")),
    Case("pickle called safetensors", _bytes(GOOD_TORCH), (SHARD, "claims")),
    Case(
        "git lfs pointer",
        _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        (SHARD, "git lfs pull"),
    ),
    Case("directory called safetensors", _folder(SHARD), (SHARD, "is a directory")),
    Case("pipe called safetensors", _pipe, (SHARD, "pipe")),
]

JSON = [
    Case(
        "header not utf-8", lambda root: raw(root / SHARD, b'{"\xff":1}'), (SHARD, "header", "not valid JSON", "0xff")
    ),
    Case("header not json", _text('{"a": }'), (SHARD, "header", "not valid JSON")),
    Case("header an array", _text("[1, 2]"), (SHARD, "begins with b'[1, 2]'")),
    Case("header after a space", _text(" {}"), (SHARD, "begins with")),
    Case("header two values", _text("{}{}"), (SHARD, "not valid JSON", "Extra data")),
    Case("header zero bytes after", _text("{}\0\0"), (SHARD, "not valid JSON", "Extra data")),
    Case("header nested deeply", _text('{"a":' * 9999 + "1" + "}" * 9999), (SHARD, "not valid JSON", "recursion")),
    Case("header lists nested deeply", _text('{"a":' + "[" * 900 + "]" * 900 + "}"), (SHARD, "tensor 'a'", "entry is")),
    Case("number of 5,000 digits", _text('{"a":' + "9" * 5000 + "}"), (SHARD, "not valid JSON", "digits")),
    Case(
        "tensor twice", _text(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}'), (SHARD, "'a' occurs twice")
    ),
    Case(
        "dtype twice", _text('{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}'), (SHARD, "'dtype'")
    ),
    Case("half a surrogate pair", _text('{"\\ud800":1}'), (SHARD, "not valid JSON", "surrogates")),
    Case("name with a newline", _text(json.dumps({"a\nb": entry()})), (SHARD, r"tensor 'a\nb'", "control characters")),
    Case("metadata a number", _header(__metadata__=3, a=entry()), (SHARD, "__metadata__", "3")),
    Case("metadata a text", _header(__metadata__="pt", a=entry()), (SHARD, "__metadata__", "'pt'")),
    Case("metadata of numbers", _header(__metadata__={"format": 1}, a=entry()), (SHARD, "__metadata__", "not a table")),
    Case("no tensors", _text("{}", 0), (SHARD, "no tensors")),
    Case("metadata only", _header(__metadata__={"format": "pt"}, size=0), (SHARD, "no tensors")),
]

ENTRIES = [
    Case("entry a number", _header(a=3), (SHARD, "tensor 'a'", "entry is 3")),
    Case("entry without dtype", _header(a={"shape": [], "data_offsets": [0, 4]}), (SHARD, "tensor 'a'", "entry is")),
    Case("entry without offsets", _header(a={"dtype": "F32", "shape": [6]}), (SHARD, "tensor 'a'", "entry is")),
    Case("entry with more keys", _header(a=entry() | {"stride": [1]}), (SHARD, "tensor 'a'", "stride")),
    Case("dtype unknown", _header(a=entry("F31")), (SHARD, "tensor 'a'", "'F31'", "BF16")),
    Case("dtype in small letters", _header(a=entry("f32")), (SHARD, "tensor 'a'", "'f32'")),
    Case("dtype complex", _header(a=entry("C64", [3])), (SHARD, "tensor 'a'", "'C64'")),
    Case("dtype of half bytes", _header(a=entry("F4", [48])), (SHARD, "tensor 'a'", "'F4'")),
    Case("dtype a number", _header(a=entry(32)), (SHARD, "tensor 'a'", "dtype 32")),
    Case("dtype a list", _header(a=entry(["F32"])), (SHARD, "tensor 'a'", "dtype ['F32']")),
    Case("dtype wrong size", _header(a=entry("F16")), (SHARD, "tensor 'a'", "takes 12 bytes", "span 24")),
    Case("shape negative", _header(a=entry(shape=[-2, -3])), (SHARD, "tensor 'a'", "shape is [-2, -3]")),
    Case("shape a fraction", _header(a=entry(shape=[2.0, 3])), (SHARD, "tensor 'a'", "shape is [2.0, 3]")),
    Case("shape a text", _header(a=entry(shape="23")), (SHARD, "tensor 'a'", "shape is '23'")),
    Case("shape of texts", _header(a=entry(shape=["2", "3"])), (SHARD, "tensor 'a'", "shape is ['2', '3']")),
    Case("shape true", _header(a=entry(shape=[True, 6])), (SHARD, "tensor 'a'", "shape is [True, 6]")),
    Case("shape null", _header(a=entry(shape=None)), (SHARD, "tensor 'a'", "shape is None")),
    Case("shape beyond 64 bits", _header(a=entry(shape=[2**64 + 6])), (SHARD, "tensor 'a'", "18446744073709551622")),
    Case("shape that overflows", _header(a=entry(shape=[2**32, 2**32])), (SHARD, "tensor 'a'", "larger than any")),
    Case("shape of rank 65", _header(a=entry("U8", [1] * 65, [0, 1])), (SHARD, "tensor 'a'", "larger than any")),
    Case("shape of rank 10,000", _header(a=entry(shape=[2**62] * 10_000)), (SHARD, "tensor 'a'", "larger than any")),
    Case(
        "shape zero times too much",
        _header(a=entry(shape=[2**62, 0, 9], offsets=[0, 0])),
        (SHARD, "tensor 'a'", "larger"),
    ),
    Case("offsets reversed", _header(a=entry(offsets=[24, 0])), (SHARD, "tensor 'a'", "[24, 0]", "begin and an end")),
    Case("offsets three", _header(a=entry(offsets=[0, 12, 24])), (SHARD, "tensor 'a'", "[0, 12, 24]")),
    Case("offsets negative", _header(a=entry(offsets=[-24, 0])), (SHARD, "tensor 'a'", "data_offsets is [-24, 0]")),
    Case(
        "offsets a fraction", _header(a=entry(offsets=[0, 2.4e1])), (SHARD, "tensor 'a'", "data_offsets is [0, 24.0]")
    ),
    Case("offsets too short", _header(a=entry(offsets=[0, 20])), (SHARD, "tensor 'a'", "takes 24 bytes", "span 20")),
]

LAYOUTS = [
    Case(
        "tensor of a terabyte", _header(a=entry("U8", [2**40], [0, 2**40])), (SHARD, "tensor 'a'", "1,099,511,627,776")
    ),
    Case("data cut off", _header(a=entry(), size=12), (SHARD, "tensor 'a'", "data byte 24", "has 12", "truncated")),
    Case("data cut by one byte", _header(a=entry(), size=23), (SHARD, "tensor 'a'", "truncated")),
    Case("data missing", _header(a=entry(), size=0), (SHARD, "tensor 'a'", "truncated")),
    Case("bytes after the last", _header(a=entry(), size=25), (SHARD, "1 more data bytes follow tensor 'a'")),
    Case(
        "overlap", _header(a=entry(), b=entry(offsets=[20, 44]), size=44), (SHARD, "tensor 'b'", "overlaps tensor 'a'")
    ),
    Case("same place twice", _header(a=entry(), b=entry()), (SHARD, "tensor 'b'", "overlaps tensor 'a'")),
    Case("one inside the other", _header(a=entry(), b=entry("U8", [4], [8, 12])), (SHARD, "tensor 'b'", "overlaps")),
    Case(
        "hole", _header(a=entry(), b=entry(offsets=[32, 56]), size=56), (SHARD, "tensor 'b'", "hole after tensor 'a'")
    ),
    Case(
        "hole at the start", _header(a=entry(offsets=[8, 32]), size=32), (SHARD, "tensor 'a'", "hole after the header")
    ),
]

DIRECTORIES = [
    Case("empty directory", lambda root: root, ("no weights",)),
    Case("no weights", _directory({}, config={}), ("no weights",)),
    Case("missing shard", _directory({ONE: A}, {"weight_map": {"a": ONE, "b": TWO}}), ("1 of 2", TWO, "missing")),
    Case("missing shard, no index", _directory({TWO: B}), ("1 of 2", ONE, "missing")),
    Case("index leads up", _indexed(a=ONE, b="../" + TWO), (INDEX, "tensor 'b'", "../" + TWO)),
    Case("index leads away", _indexed(a=ONE, b="/etc/passwd"), (INDEX, "tensor 'b'", "/etc/passwd")),
    Case("index leads down", _indexed(a=ONE, b="x/" + TWO), (INDEX, "tensor 'b'", "x/" + TWO)),
    Case("index leads up the other way", _indexed(a=ONE, b="..\\" + TWO), (INDEX, "tensor 'b'", ".." + "\\")),
    Case("index names the parent", _indexed(a=ONE, b=".."), (INDEX, "tensor 'b'", "'..'")),
    Case("index names nothing", _indexed(a=ONE, b=""), (INDEX, "tensor 'b'", "''")),
    Case("index names with a zero byte", _indexed(a=ONE, b=TWO + "\0"), (INDEX, "tensor 'b'", "\\x00")),
    Case("index names a number", _indexed(a=ONE, b=2), (INDEX, "tensor 'b'", "2")),
    Case("index names a list", _indexed(a=ONE, b=[TWO]), (INDEX, "tensor 'b'", TWO)),
    Case("index not json", _directory(PAIR, b"{"), (INDEX, "not valid JSON")),
    Case("index a list", _directory(PAIR, []), (INDEX, "[]")),
    Case("index without map", _directory(PAIR, {"metadata": {}}), (INDEX, "weight_map", "None")),
    Case("index with empty map", _indexed(), (INDEX, "weight_map", "{}")),
    Case(
        "index names a tensor twice",
        _directory(PAIR, f'{{"weight_map":{{"a":"{ONE}","a":"{ONE}"}}}}'.encode()),
        (INDEX, "'a'"),
    ),
    Case("index names too much", _indexed(a=ONE, b=TWO, c=TWO), (INDEX, "tensor 'c'", TWO)),
    Case("index names too little", _directory({ONE: A | B}, {"weight_map": {"a": ONE}}), (ONE, "tensor 'b'", INDEX)),
    Case("index swaps", _indexed(a=TWO, b=ONE), (INDEX, "tensor 'a'", TWO)),
    Case(
        "two indexes",
        _directory(PAIR, **{"x.safetensors.index.json": b"{}", "y.safetensors.index.json": b"{}"}),
        ("x.saf", "y.saf"),
    ),
    Case("shard with a newline", _directory({"a\nb.safetensors": A}), (r"'a\nb.safetensors'", "control characters")),
    Case("tensor in two shards", _directory({ONE: A, TWO: A}), ("tensor 'a'", ONE, TWO)),
    Case(
        "second shard cut off",
        _then(_indexed(a=ONE, b=TWO), lambda root: os.truncate(root / TWO, 70)),
        (TWO, "truncated"),
    ),
    Case(
        "second shard gone bad",
        _then(_indexed(a=ONE, b=TWO), lambda root: (root / TWO).write_bytes(b"<html>")),
        (TWO, "6 bytes"),
    ),
    Case(
        "index of a bin leads up",
        _directory({}, **{TORCH + ".index.json": b'{"weight_map":{"a":"../a.bin"}}'}),
        (TORCH, "../a.bin"),
    ),
    Case(
        "missing bin", _directory({}, **{TORCH + ".index.json": b'{"weight_map":{"a":"a.bin"}}'}), ("1 of 1", "a.bin")
    ),
]

CONFIGS = [
    Case("config not json", _config(b"{'a': 1}"), ("config.json", "not valid JSON")),
    Case("config empty", _config(b""), ("config.json", "not valid JSON")),
    Case("config a list", _config([]), ("config.json", "[]")),
    Case("config null", _config(b"null"), ("config.json", "None")),
    Case("config not utf-8", _config(b'{"a": "\xc3"}'), ("config.json", "not valid JSON")),
    Case("config nested deeply", _config(b"[" * 100_000), ("config.json", "not valid JSON", "recursion")),
    Case("config key twice", _config(b'{"a": 1, "a": 2}'), ("config.json", "'a'", "twice")),
    Case(
        "config a directory",
        _then(_config(None), lambda root: (root / "config.json").mkdir()),
        ("config.json", "directory"),
    ),
    Case("quantized by a text", _config({"quantization_config": "int4"}), ("config.json", "'int4'")),
    Case("quantized by nobody", _config({"quantization_config": {"quant_method": "abracadabra"}}), ("'abracadabra'",)),
    Case("quantized without a method", _config({"quantization_config": {"bits": 4}}), ("quantized by None",)),
    Case(
        "text model by nobody", _config({"text_config": {"quantization_config": {"quant_method": "abra"}}}), ("'abra'",)
    ),
    Case("link leads out", _link("tokenizer.json", "../outside.json"), ("tokenizer.json", "outside.json", "link")),
    Case("config leads out", _link("config.json", "../outside.json"), ("config.json", "outside.json", "link")),
    Case("link with a newline", _link("a\nb", "../outside.json"), (r"'a\nb'", "outside.json", "link")),
    Case("link leads nowhere", _link("tokenizer.json", "nowhere"), ("tokenizer.json", "broken link")),
    Case("link leads to itself", _link("LICENSE", "LICENSE"), ("LICENSE", "broken link")),
    Case("no such file", lambda root: root / SHARD, (SHARD, "no file")),
    Case("no such directory", lambda root: root / "model", ("model", "no file or directory")),
    Case("some other file", _bytes(b"hello", "notes.txt"), ("notes.txt", ".safetensors")),
]

PICKLES = [
    Case("bin empty", _bin(b""), (TORCH, "no zip archive")),
    Case("bin of zeros", _bin(bytes(1000)), (TORCH, "no zip archive")),
    Case("bin cut in half", _bin(GOOD_TORCH[: len(GOOD_TORCH) // 2]), (TORCH, "no zip archive")),
    Case("bin cut by one byte", _bin(GOOD_TORCH[:-1]), (TORCH, "no zip archive")),
    Case("bin cut at the front", _bin(GOOD_TORCH[100:]), (TORCH,)),
    Case("bin older than the zip", _bin(torch_bytes(A, _use_new_zipfile_serialization=False)), (TORCH, "older")),
    Case("bin a plain pickle", _bin(pickle.dumps({"a": [1.0]})), (TORCH, "no zip archive")),
    Case("bin that runs code", _tensors({"a": Bomb()}), (TORCH, "mkdir", "could run code")),
    Case(
        "bin that runs code in its pickle",
        _bin(_rezip(GOOD_TORCH, {"data.pkl": pickle.dumps(Bomb(), protocol=2)})),
        (TORCH, "run code"),
    ),
    Case("bin with a garbled pickle", _bin(_rezip(GOOD_TORCH, {"data.pkl": b"\x80\x02hello"})), (TORCH,)),
    Case("bin without its pickle", _bin(_rezip(GOOD_TORCH, {"data.pkl": b""})), (TORCH,)),
    Case(
        "bin compressed",
        _bin(_rezip(torch_bytes({"a": torch.zeros(10**6)}), {}, zipfile.ZIP_DEFLATED)),
        (TORCH, "compressed"),
    ),
    Case("bin encrypted", _bin(_encrypted(GOOD_TORCH)), (TORCH, "encrypted")),
    Case("bin with a list of a gigabyte", _huge_record, (TORCH, "data.pkl", "1,000,000,000")),
    Case("bin with a short record", _bin(_rezip(GOOD_TORCH, {"data/0": bytes(8)})), (TORCH, "tensor 'a'")),
    Case("bin a program", _bin(_rezip(GOOD_TORCH, {}, more="archive/constants.pkl")), (TORCH, "TorchScript")),
    Case("bin of the other byte order", _bin(_rezip(GOOD_TORCH, {"byteorder": b"big"})), (TORCH, "big")),
    Case("bin a tensor", _tensors(torch.ones(3)), (TORCH, "Tensor")),
    Case("bin a list", _tensors([torch.ones(3)]), (TORCH, "list")),
    Case("bin without tensors", _tensors({"epoch": 3}), (TORCH, "no tensors")),
    Case("bin name a number", _tensors({7: torch.ones(3)}), (TORCH, "tensor 7")),
    Case("bin name with a newline", _tensors({"a\nb": torch.ones(3)}), (TORCH, r"'a\nb'")),
    Case(
        "bin tensor complex", _tensors({"c": torch.ones(3, dtype=torch.complex64)}), (TORCH, "tensor 'c'", "complex64")
    ),
    Case("bin tensor sparse", _tensors({"s": torch.eye(3).to_sparse()}), (TORCH, "tensor 's'", "sparse")),
    Case("bin tensor without data", _tensors({"m": torch.ones(3, device="meta")}), (TORCH, "tensor 'm'")),
    Case(
        "bin tensor of a terabyte",
        _tensors({"e": torch.ones(1).expand(2**20, 2**18)}),
        (TORCH, "tensor 'e'", "repeats 1"),
    ),
]


def packed(**changes: Tensor) -> Callable[[Path], Path]:
    """compressed-tensors, 4 bits, one group a row; `changes` replace parts of `m`."""
    parts = {
        "weight_packed": torch.zeros(8, 4, dtype=torch.int32),
        "weight_scale": torch.ones(8, 1, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([8, 32]),
    } | changes
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}
    return _directory(
        {SHARD: {f"m.{part}": tensor for part, tensor in parts.items()}}, config={"quantization_config": declared}
    )


NAN, INF = float("nan"), float("inf")
CT = "compressed_tensors"
QUANTIZED = [
    Case(
        "scale nan",
        packed(weight_scale=torch.full((8, 1), NAN, dtype=torch.bfloat16)),
        (SHARD, "m", "weight_scale", "nan"),
        CT,
    ),
    Case(
        "scale infinite",
        packed(weight_scale=torch.full((8, 1), INF, dtype=torch.bfloat16)),
        (SHARD, "weight_scale", "inf"),
        CT,
    ),
    Case(
        "scale of another shape",
        packed(weight_scale=torch.ones(8, 3, dtype=torch.bfloat16)),
        (SHARD, "weight_scale", "[8, 3]"),
        CT,
    ),
    Case("shape lies", packed(weight_shape=torch.tensor([8, 2**40])), ("m.weight_shape",), CT),
    Case("codes of another dtype", packed(weight_packed=torch.zeros(8, 4)), (SHARD, "weight_packed", "float32"), CT),
    Case(
        "groups a number",
        _config({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": 5}}),
        ("config_groups",),
        CT,
    ),
]

GGUF = "model.gguf"


def gguf_text(value: str | bytes) -> bytes:
    """A text as GGUF has it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def gguf_key(name: str, kind: int = 4, value: bytes = b"\x01\0\0\0") -> bytes:
    """One key and its value."""
    return gguf_text(name) + struct.pack("<I", kind) + value


def gguf_entry(name: str | bytes = "w", shape: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """One tensor in the list; the innermost axis comes first."""
    sides = struct.pack(f"<{len(shape)}Q", *shape)
    return gguf_text(name) + struct.pack("<I", len(shape)) + sides + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    entries: Sequence[bytes] = (gguf_entry(),),
    keys: Sequence[bytes] = (),
    size: int = 128,
    version: int = 3,
    tensors: int | None = None,
    values: int | None = None,
) -> bytes:
    """A GGUF file from its parts, right unless told otherwise; `size` bytes of data."""
    counts = (len(entries) if tensors is None else tensors, len(keys) if values is None else values)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % 32) + bytes(size)


def _gguf(*entries: bytes, **parts: Any) -> Callable[[Path], Path]:
    return _bytes(gguf_bytes(entries or (gguf_entry(),), **parts), GGUF)


_ARCH = gguf_key("general.architecture", 8, gguf_text("llama"))
_HEADS = gguf_key("llama.attention.head_count", 4, struct.pack("<I", 3))
_QUERY = gguf_entry("blk.0.attn_q.weight", (32, 4))
_QWEN = [
    gguf_key("general.architecture", 8, gguf_text("qwen35")),
    *(gguf_key(f"qwen35.ssm.{key}", 4, struct.pack("<I", count)) for key, count in
      (("group_count", 2), ("time_step_rank", 4), ("state_size", 8))),
]  # fmt: skip


def _scaled(shape: Sequence[int] = (1,), kind: int = 40, value: float = 1.0) -> Callable[[Path], Path]:
    """A matrix in NVFP4, or another type, with what multiplies its scales."""
    at = 160 if kind == 40 else 512
    names = gguf_entry("blk.0.ffn_up.weight", (64, 4), kind), gguf_entry("blk.0.ffn_up.scale", shape, 0, at)
    return _bytes(gguf_bytes(names, [_ARCH], size=at) + struct.pack("<8f", *[value] * 8), GGUF)


_TEXTS = struct.pack("<IQ", 8, 2**60)


def _split(number: int, count: int, total: int, kind: int = 2) -> list[bytes]:
    """The keys of a part of a split model."""
    value = struct.pack("<H", count) if kind == 2 else gguf_text(str(count))
    return [gguf_key("split.no", 2, struct.pack("<H", number)), gguf_key("split.count", kind, value),
            gguf_key("split.tensors.count", 5, struct.pack("<i", total))]  # fmt: skip


def _parts(first: bytes, second: bytes | None, name: str = "m-00001-of-00002.gguf") -> Callable[[Path], Path]:
    """The first part of a split model, and the second beside it."""

    def build(root: Path) -> Path:
        if second is not None:
            (root / "m-00002-of-00002.gguf").write_bytes(second)
        return _bytes(first, name)(root)

    return build


def _part(number: int, count: int = 2, total: int = 2, name: str = "w", kind: int = 2) -> bytes:
    return gguf_bytes([gguf_entry(name)], _split(number, count, total, kind))


def _factors(values: Sequence[float], kind: int = 0, name: str = "rope_freqs.weight") -> Callable[[Path], Path]:
    """A llama with factors of rope."""
    data = struct.pack(f"<{len(values)}f", *values)
    head = gguf_bytes([gguf_entry(name, (len(values),), kind)], [_ARCH], size=0)
    return _bytes(head + data + bytes(-len(data) % 32), GGUF)


GGUFS = [
    Case("gguf empty", _bytes(b"", GGUF), (GGUF, "0 bytes")),
    Case("gguf cut in the counts", _bytes(gguf_bytes()[:20], GGUF), (GGUF, "20 bytes")),
    Case("gguf other magic", _bytes(b"GGML" + gguf_bytes()[4:], GGUF), (GGUF, "GGML")),
    Case("gguf version 1", _gguf(version=1), (GGUF, "version 1")),
    Case("gguf big-endian", _gguf(version=0x03000000), (GGUF, "big-endian")),
    Case("gguf far too many tensors", _gguf(tensors=2**60), (GGUF, "tensor 1 of")),
    Case("gguf far too many keys", _gguf(values=2**60), (GGUF, "key")),
    Case("gguf key twice", _gguf(keys=[gguf_key("a"), gguf_key("a")]), (GGUF, "'a'", "twice")),
    Case("gguf key without a name", _gguf(keys=[gguf_key("")]), (GGUF, "key 0", "empty")),
    Case("gguf key of another type", _gguf(keys=[gguf_key("a", 13)]), (GGUF, "'a'", "type 13")),
    Case("gguf array of arrays", _gguf(keys=[gguf_key("a", 9, struct.pack("<IQ", 9, 1))]), (GGUF, "'a'", "type 9")),
    Case("gguf far too many texts", _gguf(keys=[gguf_key("a", 9, _TEXTS)]), (GGUF, "'a'", "texts")),
    Case("gguf far too many numbers", _gguf(keys=[gguf_key("a", 9, struct.pack("<IQ", 4, 2**62))]), (GGUF, "'a'")),
    Case("gguf text far too long", _gguf(keys=[gguf_key("a", 8, struct.pack("<Q", 2**63))]), (GGUF, "'a'")),
    Case("gguf alignment 3", _gguf(keys=[gguf_key("general.alignment", 4, struct.pack("<I", 3))]), (GGUF, "alignment")),
    Case("gguf alignment 0", _gguf(keys=[gguf_key("general.alignment", 4, bytes(4))]), (GGUF, "alignment")),
    Case("gguf one part of three", _gguf(keys=[gguf_key("split.count", 2, b"\x03\0")]), (GGUF, "one of 3 parts")),
    Case("gguf tensor twice", _gguf(gguf_entry(), gguf_entry(offset=128), size=256), (GGUF, "'w'", "twice")),
    Case("gguf name too long", _gguf(gguf_entry("n" * 64)), (GGUF, "64 bytes")),
    Case("gguf name not utf-8", _gguf(gguf_entry(b"\xff")), (GGUF, "UTF-8")),
    Case("gguf five axes", _gguf(gguf_entry(shape=(1,) * 5)), (GGUF, "'w'", "5 axes")),
    Case("gguf shape overflows", _gguf(gguf_entry(shape=(2**40, 2**40))), (GGUF, "'w'", "larger than any")),
    Case("gguf unknown type", _gguf(gguf_entry(kind=99)), (GGUF, "'w'", "99")),
    Case("gguf type that is not read", _gguf(gguf_entry(shape=(256,), kind=41)), (GGUF, "'w'", "Q1_0")),
    Case("gguf rows of no whole blocks", _gguf(gguf_entry(shape=(33,), kind=8)), (GGUF, "'w'", "q8_0", "33")),
    Case("gguf tensors overlap", _gguf(gguf_entry(), gguf_entry("v", offset=96), size=256), (GGUF, "'v'", "overlaps")),
    Case("gguf hole", _gguf(gguf_entry(), gguf_entry("v", offset=160), size=512), (GGUF, "'v'", "hole")),
    Case("gguf truncated", _gguf(size=127), (GGUF, "'w'", "truncated")),
    Case("gguf more data", _gguf(size=160), (GGUF, "32 more bytes")),
    Case("gguf no tensors", _bytes(gguf_bytes([], size=0), GGUF), ("no tensors",)),
    Case("gguf tensor that llama has not", _gguf(gguf_entry("blk.0.odd.weight"), keys=[_ARCH]), (GGUF, "odd", "llama")),
    Case("gguf scale of two numbers", _scaled((2,)), (GGUF, "ffn_up.scale", "one float32")),
    Case("gguf scale without an axis", _scaled(()), (GGUF, "ffn_up.scale", "one float32")),
    Case("gguf scale nan", _scaled(value=NAN), (GGUF, "mlp.up_proj.scale", "nan")),
    Case("gguf scale of float16", _scaled(kind=1), (GGUF, "ffn_up.scale", "no tensor for it")),
    Case(
        "gguf groups do not divide",
        _gguf(gguf_entry("blk.0.attn_gate.weight", (32, 6)), keys=_QWEN, size=768),
        (GGUF, "attn.in_proj_z", "4 heads"),
    ),
    Case(
        "gguf columns are no heads",
        _gguf(gguf_entry("blk.0.ssm_out.weight", (6, 32)), keys=_QWEN, size=768),
        (GGUF, "out_proj", "4 heads"),
    ),
    Case(
        "gguf too few rows for keys",
        _gguf(gguf_entry("blk.0.attn_qkv.weight", (32, 4)), keys=_QWEN, size=512),
        (GGUF, "in_proj_qkv", "4 heads"),
    ),
    Case("gguf no heads", _gguf(_QUERY, keys=[_ARCH], size=512), (GGUF, "heads")),
    Case("gguf heads do not divide", _gguf(_QUERY, keys=[_ARCH, _HEADS], size=512), (GGUF, "6 heads or parts")),
    Case(
        "gguf scale not finite",
        _then(_gguf(gguf_entry(kind=8), size=64), lambda path: _patch(path, -64, b"\0\x7e")),
        (GGUF, "q8_0"),
        "gguf",
    ),
    Case("gguf part without its second", _parts(_part(0), None), ("m-00001", "1 of 2", "m-00002")),
    Case("gguf part of thousands", _parts(_part(0, 65535), None, "m-00001-of-65535.gguf"), ("of 65535",)),
    Case("gguf part with another name", _parts(_part(0), None, "m.gguf"), ("one of 2 parts", "00001-of-00002")),
    Case("gguf part with another count", _parts(_part(0, 3), None), ("one of 3 parts",)),
    Case("gguf second part", _parts(_part(1), None), ("not the first of 2", "m-00001")),
    Case("gguf part that is no part", _parts(_part(0), gguf_bytes()), ("m-00002", "part 1 of 1")),
    Case("gguf first part twice", _parts(_part(0), _part(0, name="v")), ("m-00002", "part 1 of 2")),
    Case("gguf parts of another model", _parts(_part(0), _part(1, 5, name="v")), ("m-00002", "part 2 of 5")),
    Case("gguf too few tensors in parts", _parts(_part(0, total=3), _part(1, name="v")), ("should have 3", "2")),
    Case("gguf tensor in two parts", _parts(_part(0), _part(1)), ("m-00002", "'w'", "another one")),
    Case("gguf count of parts is a text", _parts(_part(0, kind=8), None), ("split.count", "no number")),
    Case("gguf second part damaged", _parts(_part(0), b"GGUF"), ("m-00002", "4 bytes")),
    Case("gguf factors of rope not finite", _factors([1.0, float("nan")]), (GGUF, "rope_freqs", "not finite")),
    Case("gguf factors of rope in half", _factors([1.0] * 4, kind=1), (GGUF, "rope_freqs", "float32")),
    Case(
        "gguf two in a directory",
        _directory({}, **{"a.gguf": gguf_bytes(), "b.gguf": gguf_bytes()}),
        ("2 GGUF files", "a.gguf"),
    ),
]


def _patch(path: Path, at: int, data: bytes) -> None:
    """Put bytes at a place counted from the end."""
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


CASES = LENGTHS + JSON + ENTRIES + LAYOUTS + DIRECTORIES + CONFIGS + PICKLES + QUANTIZED
CASES += [replace(case, format="gguf") for case in GGUFS]
