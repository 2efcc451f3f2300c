"""What opening makes of a checkpoint, in a file of its own, so that the next start maps it and makes nothing.

The file is laid out as safetensors are, read by the same reader, and believed as little. Tensor `facts` is a JSON
object; `m/NAME/PART` are parts of a matrix in panels, `v/NAME` other tensors, `sum` a digest of all bytes before it.
Codes come first, at multiples of 64 bytes. The file is named after its key: a digest of the checkpoint's files (names,
sizes, times, first bytes), of how it is opened, and of the order of panels, so that a file of another version is never
found.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
import xxhash
from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError, ResourceError
from lowbit.native import PANEL_PARTS, Panels
from lowbit.runtime.panels import LAYOUT, Packed
from lowbit.stages._safetensors import read_safetensors
from lowbit.stages._weightfile import DTYPES, one_line, parse_json
from lowbit.stages.checkpoint import Checkpoint

_HEAD = 1 << 20  # bytes of each file of weights that are part of the key
_SUM, _PIECE = 16, 1 << 22  # bytes of the digest, and of what a thread takes at once
_PARTS = (*PANEL_PARTS, "level", "table")
_STUMBLES = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError)


@final
@dataclass(frozen=True, eq=False)
class Stored:
    """Facts that JSON can hold, matrices in panels, and other tensors; all by name."""

    facts: Mapping[str, Any]
    matrices: Mapping[str, Packed]
    vectors: Mapping[str, Tensor]


def stored_path(folder: Path, checkpoint: Checkpoint, what: str) -> Path:
    """The file in a folder for what was made of a checkpoint; `what` says how."""
    digest = sha256(json.dumps([LAYOUT, _SUM, what, checkpoint.config], sort_keys=True, default=str).encode())
    for path in sorted({*checkpoint.shards, *checkpoint.extras}):
        facts = path.stat()
        digest.update(json.dumps([str(path.absolute()), facts.st_size, facts.st_mtime_ns]).encode())
    for path in checkpoint.shards:
        with path.open("rb") as file:
            digest.update(file.read(_HEAD))
    return folder / f"{digest.hexdigest()[:40]}.safetensors"


def keep_stored(path: Path, stored: Stored, note: Callable[[str], None] = warnings.warn) -> None:
    """Write the file; where that cannot be, only the next start is slower for it, and `note` is told."""
    try:
        write_stored(path, stored)
    except ResourceError as error:
        note(f"nothing is kept for the next start: {error}")


def write_stored(path: Path, stored: Stored) -> None:
    """Write the file under another name, and rename it when it is whole.

    Raises:
        ResourceError: the folder cannot be written to.
    """
    facts = {**stored.facts, "key": path.stem, "matrices": {n: _scalars(each) for n, each in stored.matrices.items()}}
    tensors = {f"m/{name}/{part}": t for name, each in stored.matrices.items() for part, t in _parts(each).items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: not item[0].endswith("/codes")))
    orders = {f"order/{name}": each.order for name, each in stored.matrices.items() if each.order is not None}
    tensors |= {f"v/{name}": tensor for name, tensor in {**stored.vectors, **orders}.items()}
    tensors["facts"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w+b") as file:
            _write(file, tensors)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from None


def read_stored(path: Path) -> Stored:
    """What is in a file; its tensors are views of the mapped file.

    Raises:
        CheckpointError: it is damaged, or says other things than it is named after.
    """
    try:
        file = read_safetensors(path)
        if file.tensor("sum").numpy().tobytes() != _digest(path):
            raise CheckpointError("its bytes are not those that were written")
        facts = parse_json(file.tensor("facts").numpy().tobytes(), f"{path}: the facts")
        if facts.pop("key") != path.stem:
            raise CheckpointError("it belongs to another checkpoint")
        matrices = facts.pop("matrices")
        vectors = {name[2:]: file.tensor(name) for name in file.slots if name.startswith("v/")}
        found = {}
        for name, told in matrices.items():
            parts = {part: file.tensor(at) for part in _PARTS if (at := f"m/{name}/{part}") in file.slots}
            inputs, order = told.pop("inputs"), vectors.get(f"order/{name}")
            found[name] = Packed(Panels(**{**told, **parts}), inputs, order)
            found[name].matrix()  # which checks it
    except (LowbitError, *_STUMBLES) as error:
        raise damaged(path, error) from error
    return Stored(facts, found, {name: each for name, each in vectors.items() if not name.startswith("order/")})


def damaged(path: Path, error: Exception) -> CheckpointError:
    """What to say of a file that is not as it was written."""
    return CheckpointError(f"{path} is no cache that was written here, delete it: {one_line(error)}")


def _scalars(packed: Packed) -> dict[str, Any]:
    panels = packed.panels
    told = {each.name: getattr(panels, each.name) for each in fields(Panels) if each.name not in _PARTS}
    return {**told, "inputs": packed.inputs}


def _parts(packed: Packed) -> dict[str, Tensor]:
    found = {part: getattr(packed.panels, part) for part in _PARTS}
    return {part: tensor for part, tensor in found.items() if tensor is not None}


def _digest(path: Path) -> bytes:
    """Of a file without the digest at its end: of pieces, which threads share, so that it takes as long as reading."""
    size = path.stat().st_size - _SUM
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        memoryview(pages) as view,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        starts = range(0, size, _PIECE)
        pieces = pool.map(lambda at: xxhash.xxh3_128_digest(view[at : min(at + _PIECE, size)]), starts)
        return xxhash.xxh3_128_digest(b"".join(pieces))


def _write(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    tensors = {**tensors, "sum": torch.zeros(_SUM, dtype=torch.uint8)}
    names, at = {dtype: name for name, dtype in DTYPES.items()}, 0
    header = {}
    for name, tensor in tensors.items():
        offsets = [at, at := at + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    file.flush()
    file.seek(-_SUM, os.SEEK_END)
    file.write(_digest(Path(file.name)))
