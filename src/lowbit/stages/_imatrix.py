"""Importance matrices of llama.cpp: for each tensor the sum of squares of every input, and how many rows were summed.

Two kinds of file (llama.cpp's tools/imatrix): GGUF with `general.type = imatrix`, where NAME.in_sum2 has a row of sums
for each matrix of a stack and NAME.counts a number for each; and an older one: int32 number of entries; for each int32
length of the name, name, int32 calls, int32 number of values, float32 sums of means; then int32 chunks, and the length
and name of the text.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.formats import Weight
from lowbit.formats._gguf import Arch, arch_of
from lowbit.stages._gguf import encoded, entry, header_of, padded, read_gguf
from lowbit.stages._gguf_model import weight_file
from lowbit.stages._weightfile import TEXT_LIMIT, open_regular, show

SUMS, COUNTS = ".in_sum2", ".counts"
_LEAST = 14  # bytes of an entry of the older kind


@final
@dataclass(frozen=True)
class Imatrix:
    """Which file a plan takes its importance from, and what `llama-quantize` writes of it into a model.

    Attributes:
        path: as the user named it.
        sha256: of its bytes.
        entries: tensors that it has.
        chunks: of the text that were run; 0 where it does not tell.
        dataset: name of the text; empty where it does not tell.
    """

    path: str
    sha256: str
    entries: int
    chunks: int
    dataset: str

    @property
    def memory(self) -> int:
        """Bytes while it is read: the values, the file where it is of the older kind, and a tensor's check."""
        return 3 * Path(self.path).stat().st_size

    def keys(self) -> dict[str, bytes]:
        """Keys of a GGUF file, with encoded values; texts are cut to 127 bytes, as llama.cpp's are."""
        found: dict[str, bytes] = {"quantize.imatrix.file": encoded(_cut(self.path))}
        found |= {"quantize.imatrix.dataset": encoded(_cut(self.dataset))} if self.dataset else {}
        found["quantize.imatrix.entries_count"] = encoded(self.entries)
        return found | ({"quantize.imatrix.chunks_count": encoded(self.chunks)} if self.chunks else {})


def _cut(value: str) -> str:
    return value.encode()[:127].decode(errors="ignore")


@final
@dataclass(frozen=True, eq=False)
class Importance:
    """An importance matrix that was read.

    Attributes:
        facts: of the file.
        means: mean square of each input by name of llama.cpp's tensor; those of a stack one after the other. 1 for a
            matrix that no row reached.
        arch: whose names these are.
        stacks: how many weights of the model each of its tensors holds.
    """

    facts: Imatrix
    means: Mapping[str, Float[Tensor, " inputs"]]
    arch: Arch
    stacks: Mapping[str, int]

    def of(self, weight: Weight) -> Float[Tensor, " cols"] | None:
        """For the inputs of a weight, `[outputs, inputs]`; None where it has no entry.

        Raises:
            UsageError: the entry is for another number of inputs.
        """
        place = self.arch.place(weight.name)
        found = self.means.get(place.name) if place else None
        if place is None or found is None:
            return None
        stack, cols = self.stacks[place.name], weight.shape[-1]
        if len(found) != stack * cols:
            raise UsageError(
                f"{self.facts.path} has {len(found):,} values for {place.name}, the model {stack * cols:,} inputs; "
                "it is of another model"
            )
        start = (place.expert or 0) * cols
        return found[start : start + cols]


def read_importance(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> Importance:
    """Read a file of either kind for a model with this `config.json` and weights of these names.

    Raises:
        CheckpointError: it is damaged, or has values that are negative or not finite.
        UsageError: it has nothing of the model.
        UnsupportedError: names of llama.cpp are not known for this model.
    """
    arch = arch_of(config)
    if arch is None:
        raise UnsupportedError(f"llama.cpp's names are not known for models of type {config.get('model_type')!r}")
    with open_regular(path) as file:
        gguf, digest = file.peek(4)[:4] == b"GGUF", hashlib.sha256()  # type: ignore[attr-defined]
        while part := file.read(2**20):
            digest.update(part)
    means, chunks, dataset = _read_gguf(path) if gguf else _read_older(path)
    if not means:
        raise CheckpointError(f"{path} has no entries; it is no importance matrix")
    for name, values in means.items():
        if not bool(values.isfinite().all()) or bool((values < 0).any()):
            raise CheckpointError(f"{path}: {show(name)} has a value that is negative or not finite")
    stacks = Counter(place.name for place in map(arch.place, names) if place)
    if not stacks.keys() & means.keys():
        raise UsageError(f"{path} has no entry for any weight of the model, its first is {show(next(iter(means)))}")
    return Importance(Imatrix(str(path), digest.hexdigest(), len(means), chunks, dataset), means, arch, stacks)


def _read_gguf(path: Path) -> tuple[dict[str, Tensor], int, str]:
    header = read_gguf(path)
    kind = header.value("general.type")
    if kind != "imatrix":
        raise CheckpointError(f"{path} is a GGUF file of type {show(kind)}, not an importance matrix")
    file, found = weight_file(header, None), dict[str, Tensor]()
    for name in header.tensors:
        if not name.endswith(SUMS):
            continue
        stem = name.removesuffix(SUMS)
        if stem + COUNTS not in file.slots:
            raise CheckpointError(f"{path}: {show(stem)} has sums and no counts")
        sums, counts = (_floats(path, part, file.tensor(part)) for part in (name, stem + COUNTS))
        if not len(counts) or not len(sums) or len(sums) % len(counts):
            raise CheckpointError(f"{path}: {show(stem)} has {len(sums):,} sums and {len(counts):,} counts")
        if not bool(counts.isfinite().all()) or bool((counts < 0).any()):
            raise CheckpointError(f"{path}: {show(stem)} has a count that is negative or not finite")
        rows, counts = sums.view(len(counts), -1), counts[:, None]
        found[stem] = torch.where(counts > 0, rows / counts.clamp(min=1e-30), 1.0).reshape(-1)
    chunks, texts = header.value("imatrix.chunk_count", 0), header.value("imatrix.datasets", [])
    named = texts[0] if isinstance(texts, list) and texts and isinstance(texts[0], str) else ""
    return found, chunks if isinstance(chunks, int) and not isinstance(chunks, bool) and chunks >= 0 else 0, named


def _floats(path: Path, name: str, tensor: Tensor) -> Float[Tensor, " values"]:
    if tensor.dtype != torch.float32:
        raise CheckpointError(f"{path}: {show(name)} is stored as {tensor.dtype}, not as float32")
    return tensor.reshape(-1)


def _read_older(path: Path) -> tuple[dict[str, Tensor], int, str]:
    with open_regular(path) as file:
        data = file.read(20 * TEXT_LIMIT)
    at, found = 4, dict[str, Tensor]()
    try:
        (count,) = struct.unpack_from("<i", data)
        if not 0 < count <= len(data) // _LEAST:
            raise CheckpointError(f"{path} is no importance matrix: {count:,} entries in {len(data):,} bytes")
        for _ in range(count):
            name, at = _text(data, at)
            calls, size = struct.unpack_from("<ii", data, at)
            if name in found or calls <= 0 or size <= 0 or size > (len(data) - at - 8) // 4:
                raise CheckpointError(f"{path}: entry {show(name)} of {calls:,} calls and {size:,} values is damaged")
            values = torch.frombuffer(bytearray(data[at + 8 : at + 8 + 4 * size]), dtype=torch.float32)
            found[name], at = values / calls, at + 8 + 4 * size
        chunks = struct.unpack_from("<i", data, at)[0] if at + 4 <= len(data) else 0
        text = _text(data, at + 4)[0] if at + 8 <= len(data) else ""
    except (struct.error, UnicodeDecodeError):
        raise CheckpointError(f"{path} is no importance matrix, or truncated: it ends at byte {len(data):,}") from None
    return found, max(chunks, 0), text


def _text(data: bytes, at: int) -> tuple[str, int]:
    """A text with its length before it, and the byte after it."""
    (length,) = struct.unpack_from("<i", data, at)
    if not 0 <= length <= len(data) - at - 4:
        raise struct.error
    return data[at + 4 : at + 4 + length].decode(), at + 4 + length


def imatrix_bytes(
    sums: Mapping[str, Float[Tensor, "matrices cols"]],
    counts: Mapping[str, Sequence[float]],
    datasets: Sequence[str],
    chunks: int,
    length: int,
) -> bytes:
    """A file as `llama-imatrix` writes it.

    Args:
        sums: of squares, by name of llama.cpp's tensor.
        counts: rows that were summed, for each matrix.
        datasets: names of the texts.
        chunks: windows that were run, of `length` tokens.
    """
    values = {"general.type": encoded("imatrix"), "imatrix.datasets": encoded(list(datasets))}
    values |= {"imatrix.chunk_count": encoded(chunks), "imatrix.chunk_size": encoded(length)}
    entries, data = [], b""
    for name in sorted(sums):
        rows, total = sums[name].float(), torch.tensor(counts[name], dtype=torch.float32)[:, None]
        for part, tensor in ((SUMS, rows), (COUNTS, total)):
            shape = tuple(tensor.shape) if len(tensor) > 1 else tuple(tensor.shape[1:])
            entries.append(entry(name + part, shape, "f32", len(data)))
            data += tensor.contiguous().numpy().tobytes()
            data += bytes(padded(len(data)) - len(data))
    return header_of(values, entries) + data
