"""Which files of a checkpoint directory are weights, and which are carried along."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.stages._weightfile import read_json, show

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
GGUF = ".gguf"
ONNX = ".onnx"
_OTHER_SUFFIXES = (GGUF, ".ggml", ".h5", ".msgpack", ONNX, ".onnx_data", ".tflite", ".pkl", ".npz")
_PART = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\..*)")
_PICKLED = "qmodel.pt"
_PLAIN = re.compile(r"[\w .,+=@()-]+")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, *_OTHER_SUFFIXES)
_TEXT_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip


@dataclass(frozen=True)
class Index:
    """An index file, and the name of the file in which it says each tensor is."""

    path: Path
    table: Mapping[str, str]


def find_shards(root: Path) -> tuple[list[Path], Index | None]:
    """The weight files of a directory, sorted, and the index that lists them, if there is one.

    Safetensors come before PyTorch files, these before a GGUF file, and that before an ONNX model; of each, one file
    before an index before any files that are there.

    Raises:
        CheckpointError: no weights, a shard that is missing, or an index that is damaged or leads elsewhere.
    """
    for stem, suffix, others in (("model", ".safetensors", "*"), ("pytorch_model", ".bin", "pytorch_model*")):
        single = root / f"{stem}{suffix}"
        if single.exists():
            return [single], None
        index = _find_index(root, f"{stem}{suffix}.index.json", f"*{suffix}.index.json")
        if index:
            table = _weight_map(index)
            names = sorted(set(table.values()))
            _missing(root, [name for name in names if not (root / name).exists()], len(names))
            return [root / name for name in names], Index(index, table)
        loose = sorted(path for path in root.glob(f"{others}{suffix}") if not path.name.startswith("."))
        if loose:
            _check_names(root, [path.name for path in loose])
            return loose, None
    for suffix in (GGUF, ONNX):
        models = sorted(path for path in root.glob(f"*{suffix}") if not path.name.startswith("."))
        if len(models) == 1 or (models and suffix == GGUF and _are_parts([path.name for path in models])):
            _check_names(root, [path.name for path in models])
            return models[:1], None
        if models:
            raise CheckpointError(
                f"{root} holds {len(models)} {suffix[1:].upper()} files; "
                f"name one: {show([path.name for path in models])}"
            )
    if (root / _PICKLED).exists():
        raise CheckpointError(
            f"{root} holds {_PICKLED}, in which the hqq package pickles a whole model: opening such a file may run any "
            "code, so it is not read; load it with AutoHQQHFModel.from_quantized and write it with save_pretrained"
        )
    raise CheckpointError(
        f"{root} holds no weights, neither *.safetensors nor pytorch_model*.bin nor *.gguf nor *.onnx; "
        "if they are called otherwise, name the file itself"
    )


def _are_parts(names: list[str]) -> bool:
    """Whether files are named as the parts of one model."""
    matches = [_PART.fullmatch(name) for name in names]
    return len({(match[1], match[3]) for match in matches if match}) == 1 and all(matches)


def _find_index(root: Path, name: str, pattern: str) -> Path | None:
    if (root / name).exists():
        return root / name
    found = sorted(root.glob(pattern))
    if len(found) > 1:
        raise CheckpointError(f"{root} holds more than one index: {show([path.name for path in found])}")
    return found[0] if found else None


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor name to file name; the latter must be the plain name of a file in the same directory."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: weight_map is {show(table)}, not a table of tensor names and files")
    for name, file in table.items():
        if not isinstance(file, str) or file in (".", "..") or not _PLAIN.fullmatch(file):
            raise CheckpointError(
                f"{index}: tensor {show(name)} lies in {show(file)}, no name of a file in this directory"
            )
    return table


def _check_names(root: Path, names: Collection[str]) -> None:
    """Weight files without an index: of those named `...-00002-of-00005...` all five must be there."""
    for name in names:
        if not name.isprintable():
            raise CheckpointError(f"{root}: the name of {show(name)} holds control characters")
        match = _PART.fullmatch(name)
        if match:
            wanted = [f"{match[1]}{number:05}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)]
            _missing(root, sorted({*wanted} - {*names}), len(wanted))


def _missing(root: Path, names: list[str], total: int) -> None:
    if names:
        raise CheckpointError(
            f"{root}: {len(names)} of {total} weight files are missing: {show(names)}; the download is not complete"
        )


def find_extras(root: Path) -> tuple[Path, ...]:
    """Every file that is no weight, at any depth, sorted: configuration, tokenizer, templates, licence, README, code.

    Hidden files and directories are left out, linked directories are not entered. Code is carried, never run.

    Raises:
        CheckpointError: a broken link, or one out of the checkpoint: what it leads to would be carried along.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        paths = [Path(folder, name) for name in names if not name.startswith(".") and not is_weight(name)]
        found += [path for path in paths if is_inside(path, root) and path.is_file()]
    return tuple(sorted(found))


def find_beside(file: Path) -> tuple[Path, ...]:
    """What lies beside a lone weight file and tells how its model reads and writes text, sorted.

    Nothing else is taken: a folder of downloads may hold anything.

    Raises:
        CheckpointError: a broken link, or one to elsewhere.
    """
    paths = (file.parent / name for name in _TEXT_FILES)
    return tuple(path for path in paths if is_inside(path, file.parent) and path.is_file())


def is_weight(name: str) -> bool:
    """Whether a file of this name holds weights or indexes them."""
    return name.removesuffix(".index.json").endswith(WEIGHT_SUFFIXES)


def is_inside(path: Path, root: Path) -> bool:
    """True, unless it raises: a link must lead to a file of the checkpoint, or of the hub's cache around it."""
    if not path.is_symlink():
        return True
    name = show(str(path.relative_to(root)))
    if not path.exists():
        raise CheckpointError(f"{root}: {name} is a broken link; complete the download or delete the link")
    home, target = root.resolve(), path.resolve()
    if home.parent.name == "snapshots":  # the hub's cache keeps the files in `blobs`, beside `snapshots`
        home = home.parent.parent
    if not target.is_relative_to(home):
        where = show(str(target))
        raise CheckpointError(f"{root}: {name} links out of it, to {where}; copy the file if it belongs here")
    return True
