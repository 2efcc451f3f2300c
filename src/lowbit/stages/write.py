"""Write: finished tensors go into shards that appear whole or not at all, and a journal lets a killed run go on.

Every shard's header is known before the first tensor (`Plan.layout`), so a shard is a preallocated, memory-mapped
file under `OUT/.lowbit/` in which tensors are packed in place; when its last tensor is in, it is synced and renamed.
The journal has a line per finished tensor with checksums of what was read, meant and stored. On resume the stored
bytes are checked against it, so a line that outlived its data (power loss) costs one tensor, never correctness.
`_store` says in which order a tensor is written, read back and journalled.

safetensors files are written here and not through the `safetensors` package because that needs all tensors of a
shard in memory at once; they are read back, in `verify`, through the package.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, final

import torch
import xxhash
from torch import Tensor

from lowbit import __version__, native
from lowbit.budget import format_size
from lowbit.errors import JournalError, ResourceError
from lowbit.formats import Spec, Weight
from lowbit.stages._gguf_vocabulary import alone, told_by
from lowbit.stages._gguf_write import gguf_shards
from lowbit.stages._onnx_write import onnx_shard
from lowbit.stages._shard import Shard, safetensors_shard
from lowbit.stages._weightfile import WeightFile
from lowbit.stages.checkpoint import Checkpoint, read_unstacked
from lowbit.stages.plan import Entry, Plan
from lowbit.tensors import Shape, view_shape

WORK = ".lowbit"
SHARD_BYTES = 5 * 10**9
_ALIGN = 64
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WINDOW = 16 * 2**20
_CHANCES = 6  # windows after which a page that is still not clean stays


def digest(tensor: Tensor) -> str:
    """XXH3 (128 bits) of a contiguous tensor's bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(as_bytes(tensor))


def source_digest(checkpoint: Checkpoint, name: str) -> str:
    """Digest of what a weight was read from: its tensor, or the stored pieces of a quantized one, in order."""
    return pieces_digest(list(checkpoint.stored(name).values()))


def pieces_digest(pieces: Sequence[Tensor]) -> str:
    """Digest of the stored pieces of a weight."""
    hasher = xxhash.xxh3_128()
    for piece in pieces:
        hasher.update(as_bytes(piece.contiguous()))
    return hasher.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor as flat bytes, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@final
@dataclass(frozen=True)
class Record:
    """What the journal keeps of one finished weight.

    Attributes:
        name: the weight.
        source: digest of the bytes that were read.
        meant: digest of each part of the `QTensor` (or of the kept tensor) that was meant.
        stored: digest of each tensor in the file.
        facts: numbers for the report (error, seconds, method).
        verified: whether what is stored was read back and was what was meant.
    """

    name: str
    source: str
    meant: Mapping[str, str]
    stored: Mapping[str, str]
    facts: Mapping[str, Any]
    verified: bool = False


def make_shards(plan: Plan, limit: int | None = None, checkpoint: Checkpoint | None = None) -> list[Shard]:
    """Distribute the plan's tensors, in its order, over files of at most `limit` bytes each.

    Without a limit files are of 5 GB at most, but GGUF is one file.

    `checkpoint` is what the plan is for: a GGUF file holds its configuration and its tokenizer too, and beside the
    tensors of an ONNX model is the graph.
    """
    if plan.rules.container == "gguf" and checkpoint is not None:
        return gguf_shards(plan, checkpoint, limit)
    model_type = str(checkpoint.config.get("model_type")) if checkpoint else ""
    shards = _weight_shards(plan, limit or SHARD_BYTES, model_type)
    if plan.rules.container == "onnx" and checkpoint is not None:
        return [*shards, onnx_shard(plan, checkpoint, shards)]
    return shards


def _weight_shards(plan: Plan, limit: int, model_type: str) -> list[Shard]:
    def stacks(name: str) -> tuple[str, int] | None:
        return plan.rules.stacks(name, model_type)

    groups: list[dict[str, Spec]] = [{}]
    filled = 0
    for specs in _together(plan, stacks):
        size = sum(spec.nbytes for spec in specs.values())
        if filled and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1] |= specs
        filled += size
    numbers = range(1, len(groups) + 1)
    files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in numbers]
    files = files if len(groups) > 1 else ["model.safetensors"]
    read = partial(read_unstacked, model_type=model_type)
    return [safetensors_shard(file, group, stacks, read) for file, group in zip(files, groups, strict=True)]


def _together(plan: Plan, stacks: Callable[[str], tuple[str, int] | None]) -> Iterable[dict[str, Spec]]:
    """What is in one file each: a weight, or all experts of a layer that are one tensor."""
    found: dict[str, dict[str, Spec]] = {}
    for entry in plan.entries:
        specs = plan.layout(entry)
        whole = next((held[0] for name in specs if (held := stacks(name))), entry.weight.name)
        found.setdefault(whole, {}).update(specs)
    return found.values()


@final
class Output:
    """The output directory of one run: hands out tensors to fill, and remembers what is finished.

    Made by `open_output`. All but `close` and `finish` may be called from several threads. `reading`: seconds
    of this run that reading back took, as they were given to `commit`.
    """

    def __init__(
        self, path: Path, plan: Plan, shards: Sequence[Shard], journal: int, records: dict[str, Record]
    ) -> None:
        self.path, self.plan, self.records = path, plan, records
        self.resumed, self.reading = len(records), 0.0
        self._journal, self._lock, self._local = journal, threading.Lock(), threading.local()
        self._shard_of = {name: shard for shard in shards for name in shard.offsets}
        self._files: dict[str, _File] = {}
        self._headers: dict[str, WeightFile] = {}
        self._left = {shard.file: set(shard.offsets) for shard in shards}
        self.shards = shards

    def by_size(self, entries: Sequence[Entry]) -> list[Entry]:
        """Largest first within each file, so that no thread is left with a large one while the others have none."""
        places = {shard.file: place for place, shard in enumerate(self.shards)}

        def key(entry: Entry) -> tuple[int, int]:
            return places[self._shard_of[next(iter(self.plan.layout(entry)))].file], -entry.source_bytes

        return sorted(entries, key=key)

    def into(self, entry: Entry, mapped: bool) -> dict[str, Tensor]:
        """Room for the stored tensors of one weight: this thread's buffer, for `write`, or views of the mapped shard.

        Raises:
            ResourceError: the disk is full.
        """
        layout = self.plan.layout(entry)
        if not mapped:
            return self._room(layout)
        for shard in {self._shard_of[name].file: self._shard_of[name] for name in layout}.values():
            self._file(shard).reserve()
        return {name: self._view(name) for name in layout}

    def _room(self, layout: Mapping[str, Spec]) -> dict[str, Tensor]:
        sizes = [spec.nbytes for spec in layout.values()]
        starts = [sum(-(-size // _ALIGN) * _ALIGN for size in sizes[:i]) for i in range(len(sizes) + 1)]
        room = self._buffer("packed", starts[-1])
        parts = zip(layout.items(), starts, sizes, strict=False)
        return {name: room[at : at + n].view(spec.dtype).view(spec.shape) for (name, spec), at, n in parts}

    def write(self, name: str, data: memoryview, at: int = 0) -> None:
        """Write bytes of a stored tensor from byte `at` on; pages made so cost a fraction of those made by a mapping.

        Raises:
            ResourceError: the disk is full.
        """
        shard = self._shard_of[name]
        with disk_errors(self.path):
            self._file(shard).write(data, shard.offsets[name][0] + at)

    def holds(self, parts: Mapping[str, Tensor], at: int = 0) -> bool:
        """Whether the file has, where its header says, the bytes of contiguous stored tensors, or some from `at` on.

        Raises:
            CheckpointError: the header is damaged.
        """
        for shard in {self._shard_of[name].file: self._shard_of[name] for name in parts}.values():
            header = self._header(shard).slots
            own = {name: part for name, part in parts.items() if self._shard_of[name] is shard}
            if any(name not in header or header[name].spec != shard.offsets[name][1] for name in own):
                return False
            if not self._file(shard).holds([(part, header[name].start + at) for name, part in own.items()]):
                return False
        return True

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The stored tensors of one weight as views of the file, where and as its header says.

        Raises:
            CheckpointError: the header is damaged.
        """
        weight, shard = entry.weight, self._shard_of[next(iter(self.plan.layout(entry)))]
        header, names = self._header(shard), self.plan.rules.owns(weight) if weight.scheme else [weight.name]
        return {name: header.tensor(name) for name in names if name in header.slots}

    def let_go(self, name: str, nbytes: int, at: int = 0) -> None:
        """Say of bytes of a stored tensor that they were read back, so that their pages may leave the page cache."""
        shard = self._shard_of[name]
        self._file(shard).let_go(shard.offsets[name][0] + at, nbytes)

    def commit(self, record: Record, reading: float = 0.0) -> None:
        """Journal one finished weight; when it completes a shard, sync the shard and give it its name.

        `reading`: seconds that reading it back took.
        """
        fields = {key: getattr(record, key) for key in ("source", "meant", "stored", "facts", "verified")}
        line = json.dumps({"tensor": record.name, **fields})
        with self._lock:
            self.records[record.name] = record
            self.reading += reading
            append(self._journal, line)
        self.settle(record)

    def close(self) -> None:
        """Let go of the files; what was committed stays."""
        while self._files:
            self._files.popitem()[1].close()

    def settle(self, record: Record) -> None:
        """Count a finished weight's tensors as done, and seal each shard that has none left."""
        with self._lock:
            done = []
            for name in record.stored:
                shard = self._shard_of[name]
                self._left[shard.file].discard(name)
                if not self._left[shard.file] and shard not in done:
                    done.append(shard)
        for shard in done:
            self._seal(shard)

    def matches(self, record: Record) -> bool:
        """Whether the file holds, byte for byte, what the journal says of this weight."""
        return all(digest(self._view(name)) == wanted for name, wanted in record.stored.items())

    def forget(self, record: Record) -> None:
        """Drop a journalled weight whose bytes did not survive; it will be made again, in a shard without its name."""
        del self.records[record.name]
        for shard in {self._shard_of[name].file: self._shard_of[name] for name in record.stored}.values():
            with self._lock:
                self._left[shard.file] |= shard.offsets.keys() & record.stored.keys()
            self._drop(shard)
            if (self.path / shard.file).exists():
                os.replace(self.path / shard.file, self._partial(shard))

    @contextmanager
    def codes(self, weight: Weight, scratch: bool, name: str = "codes") -> Iterator[Tensor | None]:
        """A buffer for the codes of a weight (None for a kept one): memory, or a mapped file if the limit is small.

        Each thread has one buffer of a name that grows to its largest weight: fresh pages for every weight cost more
        than the packing does. What was in it is gone when the thread asks again.
        """
        if weight.scheme is None:
            yield None
            return
        shape = view_shape(weight.shape, weight.scheme.block)
        if not scratch:
            yield self.room(name, shape)
            return
        path = self.path / WORK / "scratch" / f"{weight.name}.{name}"
        path.parent.mkdir(exist_ok=True)
        with path.open("w+b") as file:
            allocate(file.fileno(), prod(shape), path)
        scratch_file = _File(path)
        yield scratch_file.slice(0, prod(shape)).view(shape)
        scratch_file.close()
        path.unlink()

    def room(self, name: str, shape: Shape) -> Tensor:
        """Bytes of that shape in this thread's buffer of a name, which has been `codes`' too."""
        return self._buffer(name, prod(shape)).view(shape)

    def _buffer(self, name: str, count: int) -> Tensor:
        held: dict[str, Tensor] = self._local.__dict__
        if name not in held or held[name].numel() < count:
            held.pop(name, None)  # before the larger one is made, so that both never exist at once
            held[name] = torch.empty(count, dtype=torch.uint8)
        return held[name][:count]

    def _view(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        offset, spec = shard.offsets[name]
        size = spec.nbytes
        return self._file(shard).slice(offset, size).view(spec.dtype).view(spec.shape)

    def _file(self, shard: Shard) -> _File:
        with self._lock:
            if shard.file not in self._files:
                self._files[shard.file] = self._open(shard)
            return self._files[shard.file]

    def _header(self, shard: Shard) -> WeightFile:
        """What the file says of itself."""
        path = self._file(shard).path
        with self._lock:
            if shard.file not in self._headers:
                self._headers[shard.file] = shard.read(path)
            return self._headers[shard.file]

    def _open(self, shard: Shard) -> _File:
        final_path, partial = self.path / shard.file, self._partial(shard)
        path = final_path if final_path.exists() else partial
        if path == partial:
            with partial.open("r+b" if partial.exists() else "w+b") as file:
                os.ftruncate(file.fileno(), shard.nbytes)
                file.write(shard.header)
        return _File(path)

    def _drop(self, shard: Shard) -> None:
        with self._lock:
            file = self._files.pop(shard.file, None)
            self._headers.pop(shard.file, None)
        if file:
            file.close()

    def _partial(self, shard: Shard) -> Path:
        return self.path / WORK / f"{shard.file}.partial"

    def _seal(self, shard: Shard) -> None:
        partial = self._partial(shard)
        self._drop(shard)
        if partial.exists():
            with disk_errors(self.path):
                sync(partial)
            os.replace(partial, self.path / shard.file)
            sync(self.path)

    def finish(self, checkpoint: Checkpoint) -> None:
        """Write what is not a weight: index, carried files, and, last, the format's configuration."""
        for shard in self.shards:
            if not shard.offsets:
                self._seal_empty(shard)
        if len([shard for shard in self.shards if shard.offsets]) > 1 and self.plan.rules.container != "gguf":
            write_atomic(self.path / "model.safetensors.index.json", self._index())
        documents = self._documents(checkpoint)
        for extra in checkpoint.extras:
            place = extra.relative_to(checkpoint.root)
            if str(place) not in documents:
                copy_atomic(extra, self.path / place)
        write_atomic(self.path / "lowbit-plan.json", self.plan.to_json().encode())
        for name in sorted(documents, reverse=True):
            write_atomic(self.path / name, (json.dumps(documents[name], indent=2) + "\n").encode())
        shutil.rmtree(self.path / WORK / "scratch", ignore_errors=True)

    def _documents(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """JSON files by name: what declares the format, and what a GGUF file alone tells that becomes none."""
        stays = self.plan.rules.container == "gguf"
        if stays and alone(checkpoint):
            return {}
        told = {} if stays else told_by(checkpoint)
        return told | self.plan.rules.config([entry.weight for entry in self.plan.entries], checkpoint.config)

    def _seal_empty(self, shard: Shard) -> None:
        self._file(shard)
        self._seal(shard)

    def _index(self) -> bytes:
        where = {name: shard.file for shard in self.shards for name in shard.tensors}
        total = sum(shard.nbytes - len(shard.header) for shard in self.shards)
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        return (json.dumps(document, indent=2) + "\n").encode()


@contextmanager
def open_output(path: Path, checkpoint: Checkpoint, plan: Plan, shard_bytes: int | None = None) -> Iterator[Output]:
    """Open an empty directory, or go on in one that holds this very run.

    Raises:
        JournalError: the directory is the input, holds something else, or a run with other inputs or another plan, or
            is in use.
        ResourceError: not enough disk space.
    """
    shards = make_shards(plan, shard_bytes, checkpoint)
    if path.exists() and path.samefile(checkpoint.root):  # of other runs it is said to delete them
        raise JournalError(f"{path} is the checkpoint that is read; name another directory")
    refuse_foreign(path)
    with disk_errors(path):
        (path / WORK).mkdir(parents=True, exist_ok=True)
        journal = os.open(path / WORK / "journal.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(journal, path)
            records = _read_journal(journal, path, _identity(checkpoint, plan, shard_bytes, shards))
            _check_disk(path, shards)
            with closing(Output(path, plan, shards, journal, records)) as output:
                _keep_intact(output, checkpoint)
                yield output
        finally:
            os.close(journal)


def refuse_foreign(path: Path) -> None:
    """Raise `JournalError` where `path` is a file, or holds something else than a run."""
    if path.exists() and not path.is_dir():
        raise JournalError(f"{path} is a file; name a directory that is new, empty, or holds an unfinished run")
    if path.is_dir() and any(path.iterdir()) and not (path / WORK / "journal.jsonl").exists():
        raise JournalError(f"{path} holds something else and is left alone; name a directory that is new or empty")


def _lock(journal: int, path: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(f"another run is writing to {path}; wait for it or name another directory") from None


def _identity(checkpoint: Checkpoint, plan: Plan, shard_bytes: int | None, shards: Sequence[Shard]) -> dict[str, Any]:
    """What must be equal for a run to go on: version, inputs by size and header, plan, shard size, headers.

    Contents of inputs are compared tensor by tensor (`Record.source`).
    """
    inputs = {name: [str(spec.dtype), list(spec.shape)] for name, spec in checkpoint.specs.items()}
    return {
        "lowbit": __version__,
        "inputs": xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode()),
        "config": xxhash.xxh3_128_hexdigest(json.dumps(checkpoint.config, sort_keys=True).encode()),
        "plan": json.loads(plan.to_json()),
        "shard_bytes": shard_bytes,
        "headers": xxhash.xxh3_128_hexdigest(b"".join(shard.header for shard in shards)),
    }


def _read_journal(journal: int, path: Path, identity: dict[str, Any]) -> dict[str, Record]:
    """Records of a journal with this identity, which is a fresh one's first line. A torn last line is cut off."""
    data = os.pread(journal, os.fstat(journal).st_size, 0)
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        os.ftruncate(journal, 0)
        append(journal, json.dumps(identity))
        return {}
    os.ftruncate(journal, len(whole))
    first, *lines = [json.loads(line) for line in whole.splitlines()]
    reason = _difference(first, identity)
    if reason:
        raise JournalError(f"{path} holds a run that differs from this one: {reason}; name another, or delete it")
    return {line["tensor"]: Record(line.pop("tensor"), **line) for line in lines}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first difference between two identities, in words."""
    if old["lowbit"] != new["lowbit"]:
        return f"it was begun by lowbit {old['lowbit']}, this is {new['lowbit']}"
    for key, text in (("inputs", "other tensors in the input"), ("config", "another config.json in the input")):
        if old[key] != new[key]:
            return text
    for key in ("format", "options"):
        if old["plan"][key] != new["plan"][key]:
            return f"{key} {old['plan'][key]} there, {new['plan'][key]} here"
    for before, after in zip(old["plan"]["tensors"], new["plan"]["tensors"], strict=True):
        for key in ("scheme", "method"):
            if before[key] != after[key]:
                return f"{key} of {before['name']} is {before[key]} there, {after[key]} here"
    if old["plan"].get("imatrix") != new["plan"].get("imatrix"):
        return "another importance matrix"
    if old["shard_bytes"] != new["shard_bytes"]:
        return "another shard size"
    return None if old["headers"] == new["headers"] else "other headers, as of another tokenizer in the input"


def _keep_intact(output: Output, checkpoint: Checkpoint) -> None:
    """Compare journalled weights with input and files: another input is refused, damaged weights are forgotten."""
    for record in list(output.records.values()):
        if source_digest(checkpoint, record.name) != record.source:
            raise JournalError(
                f"{output.path} holds a run over another input: {record.name} has changed since; name another directory"
            )
        if output.matches(record):
            output.settle(record)
        else:
            output.forget(record)
    output.resumed = len(output.records)


def _check_disk(path: Path, shards: Sequence[Shard]) -> None:
    missing = [shard for shard in shards if not (path / shard.file).exists()]
    partial = sum(file.stat().st_blocks * 512 for file in (path / WORK).glob("*.partial"))
    need, free = sum(shard.nbytes for shard in missing) - partial, shutil.disk_usage(path).free
    if need > free:
        raise ResourceError(
            f"{path} needs {format_size(need)} more disk space and has {format_size(free)}; "
            "make room or name another directory: what is there is kept and the same command goes on"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's words for a full disk, and for a place that cannot be written to, into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            _refuse(path, path, error)
            raise
        raise ResourceError(
            f"the disk of {path} is full; what is finished is kept: make room and give the same command to go on"
        ) from error


def _refuse(path: Path, within: Path, error: OSError) -> None:
    """Say that a path cannot be written, if the error is of a file there; what it is read from is elsewhere."""
    at = Path(error.filename or within)
    if within in (at, *at.parents) or at in within.parents:
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from error


@final
class _File:
    """A file that is written at offsets, and seen through a mapping; slices are tensors that keep the mapping alive.

    What was let go goes to the disk while more is written, and leaves the page cache, whose pages then take what comes
    next. Fresh ones are dear: in a virtual machine the host may have to find each, at ten times a write's cost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = path.open("r+b", buffering=0)
        self._map = mmap.mmap(self._handle.fileno(), 0)
        self._lock = threading.Lock()
        self._written: list[tuple[int, int]] = []
        self._leaving: deque[list[tuple[int, int]]] = deque(maxlen=_CHANCES)

    def reserve(self) -> None:
        """Take all blocks of the file now: what is written through the mapping could not say that the disk is full."""
        allocate(self._handle.fileno(), len(self._map), self.path)

    def close(self) -> None:
        """End writing; slices stay."""
        self._handle.close()

    def slice(self, start: int, nbytes: int) -> Tensor:
        """Bytes as flat, writable, shared uint8."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=start)

    def write(self, data: memoryview, start: int) -> None:
        """Write all of `data` at an offset."""
        while data:
            written = os.pwrite(self._handle.fileno(), data, start)
            data, start = data[written:], start + written

    def holds(self, parts: Sequence[tuple[Tensor, int]]) -> bool:
        """Whether these bytes are at these offsets (`native.file_holds`)."""
        return native.file_holds(self._handle.fileno(), parts)

    def let_go(self, start: int, nbytes: int) -> None:
        """Advise with every window: the first advice starts a dirty page's way to the disk, a later one frees it."""
        with self._lock:
            self._written += [(start, nbytes)] if nbytes else []  # to the system 0 is all that follows
            if sum(size for _, size in self._written) < _WINDOW:
                return
            self._leaving.append(self._written)
            self._written, places = [], [place for window in self._leaving for place in window]
        for place in places:
            os.posix_fadvise(self._handle.fileno(), *place, os.POSIX_FADV_DONTNEED)


def allocate(file: int, nbytes: int, path: Path) -> None:
    """Reserve the blocks of a file, so that writing through its mapping cannot run out of disk."""
    with disk_errors(path):
        os.posix_fallocate(file, 0, max(nbytes, 1))
        os.ftruncate(file, nbytes)


def append(journal: int, line: str) -> None:
    """One line in one write, so that a kill leaves at most one torn line at the end."""
    os.write(journal, line.encode() + b"\n")


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Temporary file beside, fsync, rename."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def check_writable(path: Path) -> None:
    """Raise `ResourceError` where a file could not be written, before the work that makes it."""
    with _beside(path) as temporary:
        temporary.touch()
        temporary.unlink()


def copy_atomic(source: Path, path: Path) -> None:
    """A file's contents under another name, in small pieces: temporary file beside, fsync, rename."""
    with _replacing(path) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    with _beside(path) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary file for `path`; what goes wrong with either is said of `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path.with_name(f".{path.name}.partial")
    except OSError as error:
        if error.errno in _FULL:
            error.filename = error.filename or str(path)  # the system does not say
        else:
            _refuse(path, path.parent, error)
        raise
