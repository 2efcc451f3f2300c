"""Samples: windows of tokens to calibrate on, from files, datasets or chats, and whether they are enough and alike.

Text is read a piece at a time and only until there is several times as much as the windows take, so that the size of a
source does not matter. Pieces are joined as the model expects documents to be, and cut into windows without padding.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.stages._model import open_tokenizer, refusals, silent_transformers
from lowbit.stages._weightfile import one_line, show
from lowbit.stages._words import counted
from lowbit.stages.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:  # the run-time check of annotations needs the name, and importing it costs a second
    PreTrainedTokenizerBase = object

__all__ = ["Samples", "Sampling", "Similarity", "Source", "parse_sources", "read_samples", "similarity"]

Sampling = Literal["random", "stratified", "length", "first"]
Tokens = NDArray[np.int64]

# A text up to so many bytes is split as a whole, which takes 150 times as much memory; a longer one in pieces.
_WHOLE = 2**21
# JSON lines up to so many bytes are read and shuffled; in a longer file, lines at random offsets are read.
_SHUFFLED = 2**26
# Characters of a piece per token of a window: about 16 windows, so that few of them cross the end of a piece.
_PIECE = 64
# Tokens to read per token that is taken. Short documents are a small part of the tokens, and one sampling wants more.
_SURPLUS: dict[Sampling, int] = {"random": 4, "stratified": 4, "length": 16, "first": 1}
_STRATA = 4
# Examples of a dataset among which the next one is drawn.
_BUFFER = 2048
# Lines in a row that were seen before: then there are hardly any others.
_REPEATS = 1000
# Bits. Samples of 2 to 128 windows of 512 tokens were farther from a whole split of their kind than from themselves by
# up to 0.036, from texts of other kinds by 0.097 to 0.47. Halves of 32 windows differ by 0.13 to 0.23, of 2 by 0.44 to
# 0.79.
_UNLIKE, _SMALL = 0.06, 0.3
# Bits times the root of tokens: texts of the same kind that are a few articles long were farther by up to so much.
_SUBJECTS = 16.0
# Standard deviations over which passages are of another kind, and what is added to them, times tokens of the text:
# those of one article may all be far. Passages have so many tokens, so many are looked at, of so many windows at least.
_FAR, _FEW = 2.0, 1024
_PASSAGE, _PASSAGES, _LEAST = 128, 64, 8
_TINY = 1e-9
# What is no text, whatever its bytes; learned from as text it would be braces and field names.
_NO_TEXT = {
    ".json": "is JSON; put the object of each document on a line of its own, and name the file NAME.jsonl",
    **dict.fromkeys((".parquet", ".arrow"), "is a table of a dataset; name its folder, as hf:FOLDER"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), "is packed; unpack it"),
}
_SPLITS = 8


@final
@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        name: path of a file, or name or folder of a dataset.
        dataset: whether it is a dataset.
        config: of a dataset; empty for its default.
        split: of a dataset.
        field: that holds the text or the messages; empty for `text`, else `messages`.
        weight: its share of the windows, relative to the other sources.
    """

    name: str
    dataset: bool = False
    config: str = ""
    split: str = "train"
    field: str = ""
    weight: float = 1.0


@final
@dataclass(frozen=True)
class Taken:
    """What was read of one source.

    Attributes:
        name: file name without its folder, or name of the dataset.
        sha256: of the UTF-8 text that was read and split into tokens, piece after piece; of a file that was read as a
            whole it is the file's.
        documents: pieces of text: a file, a run of a long file, a line or an example.
        tokens: that they gave, special ones included.
        windows: that were taken from them.
    """

    name: str
    sha256: str
    documents: int
    tokens: int
    windows: int


@final
@dataclass(frozen=True, eq=False)
class Samples:
    """Windows to calibrate on, and where they are from. Made by `read_samples`.

    Attributes:
        ids: tokens.
        sources: in the order in which they were named.
        sampling: how windows were chosen.
        seed: of the choice.
        special: tokens that begin or end every document.
        warnings: sentences that the user must see.
    """

    ids: Int64[Tensor, "samples length"]
    sources: tuple[Taken, ...]
    sampling: Sampling
    seed: int
    special: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the tokens as little-endian 64-bit integers, window after window."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What the report says of them, as JSON types: everything but tokens and warnings."""
        samples, length = self.ids.shape
        return {
            "samples": samples, "length": length, "sha256": self.sha256, "sampling": self.sampling, "seed": self.seed,
            "special": list(self.special), "sources": [asdict(source) for source in self.sources],
        }  # fmt: skip


@final
@dataclass(frozen=True)
class _Document:
    """Text, and whether special tokens are in it already."""

    text: str
    complete: bool = False


@final
@dataclass(frozen=True)
class _Request:
    """What a source is asked for: windows of `length` tokens, in the order of the text where there is no `rng`."""

    length: int
    sampling: Sampling
    rng: np.random.Generator | None

    @property
    def piece(self) -> int:
        """Most characters or bytes of a document."""
        return _PIECE * self.length


def parse_sources(text: str) -> list[Source]:
    """Sources as they are typed, separated by commas, each with `@WEIGHT` behind it where shares are not equal.

    A source is `FILE`, `FILE.jsonl:FIELD`, or `hf:NAME[:CONFIG[:SPLIT[:FIELD]]]` for a dataset of the hub or in a
    folder, where parts may be empty. A file whose name has such signs is found by its whole name.

    Raises:
        UsageError: an empty source, a weight that is not positive, too many parts.
    """
    parts = [text] if Path(text).is_file() else text.split(",")
    return [_parse_source(part) for part in parts]


def _parse_source(text: str) -> Source:
    if Path(text).is_file():
        return Source(text)
    typed, at, share = text.rpartition("@")
    text, weight = (typed, _weight(typed, share)) if at and not _is_part(share) else (text, 1.0)
    if not text:
        raise UsageError("a source of calibration text is empty; name a file, or leave out the comma")
    if not text.startswith("hf:"):
        lines = re.fullmatch(r"(.+\.jsonl):([^:/\\]+)", text)
        return Source(lines[1], field=lines[2], weight=weight) if lines else Source(text, weight=weight)
    name, config, split, field, *more = [*text.removeprefix("hf:").split(":"), "", "", ""][: max(text.count(":"), 4)]
    if more or not name:
        raise UsageError(f"{text} is no dataset; it is written hf:NAME[:CONFIG[:SPLIT[:FIELD]]]")
    return Source(name, True, config, split or "train", field, weight)


def _is_part(text: str) -> bool:
    """Whether what stands behind an `@` is still of a name: of a folder, a file or a dataset."""
    return any(sign in text for sign in "/\\:") or Path(text).suffix in (".txt", ".jsonl")


def _weight(source: str, text: str) -> float:
    """The share of a source."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(f"{source}: its weight is {text!r}; behind the @ stands a number above 0, as @3 or @0.5")
    return weight


def read_samples(
    source: str | Path | Sequence[str | Path],
    checkpoint: Checkpoint,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    sampling: Sampling = "random",
) -> Samples:
    """Windows of tokens to calibrate on. Less text than asked for gives fewer windows, and a warning.

    Several sources are strata: each gives its share of the windows, and where it has too little text the others fill
    in. Within a source `random` takes windows that do not overlap, `length` takes as many from short documents as from
    long ones (quarters by number of tokens), `first` takes them from its beginning. `stratified` is `random` for
    several sources.

    Args:
        source: one source or several, as `parse_sources` reads them; a `Path` is a file.
        checkpoint: its tokenizer splits the text, adds special tokens and writes chats.
        samples: number of windows.
        length: tokens per window.
        seed: of the choice.
        sampling: how windows are chosen.

    Raises:
        UsageError: a source that cannot be read, or text for no window at all.
        CheckpointError: the checkpoint has no usable tokenizer.
    """
    given = [source] if isinstance(source, str | Path) else source
    sources = [each for one in given for each in ([Source(str(one))] if isinstance(one, Path) else parse_sources(one))]
    _check(sources, samples, length, sampling)
    tokenizer = open_tokenizer(checkpoint)
    with silent_transformers(), refusals(f"the tokenizer of {checkpoint.path} fails on the calibration text"):
        special = tuple(map(str, tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])))
        reader = _Reader(tokenizer, str(checkpoint.path))
        generators = [np.random.default_rng([seed, index]) for index in range(len(sources))]
        requests = [_Request(length, sampling, None if sampling == "first" else rng) for rng in generators]
        pools = [reader.read(*both, samples) for both in zip(sources, requests, strict=True)]
    shares = _apportion(samples, [each.weight for each in sources], [pool.windows(length) for pool in pools])
    chosen = [pool.take(number, request) for pool, number, request in zip(pools, shares, requests, strict=True)]
    ids = np.concatenate(chosen)
    if sampling != "first":
        np.random.default_rng(seed).shuffle(ids)
    _refuse_nothing(ids, sources, pools, length)
    taken = tuple(map(_Pool.facts, pools, [_label(each) for each in sources], shares))
    said = (*_warnings(sources, taken, samples, length), *_lengths(taken, sampling))
    return Samples(torch.from_numpy(ids), taken, sampling, seed, special, said)


def _check(sources: Sequence[Source], samples: int, length: int, sampling: Sampling) -> None:
    if samples < 1 or length < 2:
        asked = f"{counted(samples, 'window')} of {counted(length, 'token')}"
        raise UsageError(f"{asked}; at least 1 window of 2 tokens is needed")
    if sampling not in get_args(Sampling):
        raise UsageError(f"no sampling is called {sampling!r}; there are: {', '.join(get_args(Sampling))}")
    if sampling == "stratified" and len(sources) < 2:
        raise UsageError("stratified sampling takes its share from each of several sources; name more than one")


def _refuse_nothing(ids: Tokens, sources: Sequence[Source], pools: Sequence[_Pool], length: int) -> None:
    if not len(ids):
        names, tokens = ", ".join(map(_label, sources)), sum(pool.tokens for pool in pools)
        raise UsageError(
            f"{names}: {counted(tokens, 'token')} in all, fewer than one window of {length:,}; take more text"
        )


def _warnings(sources: Sequence[Source], taken: Sequence[Taken], samples: int, length: int) -> tuple[str, ...]:
    found = sum(each.windows for each in taken)
    few = f"the calibration text gives {counted(found, 'window')} of {length:,} tokens, {samples:,} were asked for"
    texts = [few] if found < samples else []
    fair = _apportion(samples, [each.weight for each in sources], [samples] * len(sources))
    for one, share in zip(taken, fair, strict=True):
        if one.windows < share and len(taken) > 1:
            given = counted(one.windows, "window")
            texts.append(f"{given} of {length:,} tokens came from {one.name}, whose share is {share:,}")
    return tuple(texts)


def _lengths(taken: Sequence[Taken], sampling: Sampling) -> Iterator[str]:
    for one in taken if sampling == "length" else ():
        if one.documents == 1:
            yield f"{one.name} is one document, of which --sampling length takes what random does"


def _label(source: Source) -> str:
    return ":".join(filter(None, [source.name, source.config])) if source.dataset else Path(source.name).name


def _apportion(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Whole shares of `total` in proportion to weights, none over its `most`; what one cannot take goes to the others.

    One at a time, each to whoever is furthest behind (the method of Webster and Sainte-Laguë).
    """
    shares = [0] * len(weights)
    for _ in range(min(total, sum(most))):
        open_ = [index for index, share in enumerate(shares) if share < most[index]]
        shares[max(open_, key=lambda index: weights[index] / (2 * shares[index] + 1))] += 1
    return shares


@final
@dataclass(frozen=True)
class _Pool:
    """Tokens of the documents that were read from a source."""

    documents: list[Tokens]
    sha256: str

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.documents))

    def windows(self, length: int) -> int:
        """Most windows of that many tokens."""
        return self.tokens // length

    def facts(self, name: str, windows: int) -> Taken:
        """What is reported of it."""
        return Taken(name, self.sha256, len(self.documents), self.tokens, windows)

    def take(self, number: int, request: _Request) -> Tokens:
        """So many windows, in the order of the documents."""
        if request.sampling != "length":
            return _cut(self.documents, number, request)
        order = np.argsort([len(each) for each in self.documents], kind="stable")
        strata = [[self.documents[index] for index in part] for part in np.array_split(order, _STRATA)]
        most = [sum(map(len, part)) // request.length for part in strata]
        shares = _apportion(number, [1.0] * _STRATA, most)
        return np.concatenate([_cut(part, share, request) for part, share in zip(strata, shares, strict=True)])


def _cut(documents: Sequence[Tokens], number: int, request: _Request) -> Tokens:
    """Windows at random offsets that do not overlap, each such set equally likely; or the first ones."""
    stream = np.concatenate([*documents, np.zeros(0, np.int64)])
    starts = np.arange(number) * request.length
    if request.rng is not None:
        starts += np.sort(request.rng.integers(0, len(stream) - number * request.length + 1, number))
    windows: Tokens = stream[starts[:, None] + np.arange(request.length)]
    return windows


@final
@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads sources with one tokenizer; `path` is the checkpoint's, for messages."""

    tokenizer: PreTrainedTokenizerBase
    path: str

    def read(self, source: Source, request: _Request, samples: int) -> _Pool:
        """Documents until there are enough tokens, or all there are."""
        wanted = samples * request.length * _SURPLUS[request.sampling]
        digest, found, tokens = hashlib.sha256(), list[Tokens](), 0
        for document in self._documents(source, request):
            digest.update(document.text.encode())
            found.append(self._split(document, first=not found))
            tokens += len(found[-1])
            if tokens >= wanted:
                break
        return _Pool(found, digest.hexdigest())

    def _split(self, document: _Document, first: bool) -> Tokens:
        """Tokens with what the tokenizer adds; where it adds nothing, the end of the text before is marked."""
        special = not document.complete
        ids = self.tokenizer(document.text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        between = self.tokenizer.eos_token_id
        marked = not first and special and between is not None and not self.tokenizer("")["input_ids"]
        return np.array([between] * marked + list(ids["input_ids"]), np.int64)

    def _documents(self, source: Source, request: _Request) -> Iterator[_Document]:
        if not source.dataset and not source.name.endswith(".jsonl"):
            return map(_Document, _runs(Path(source.name), request))
        records = _examples(source, request) if source.dataset else _lines(Path(source.name), request)
        texts = (self._text(where, record, source.field) for where, record in records)
        return (_shortened(each, request) for each in texts if each.text)

    def _text(self, where: str, record: Any, field: str) -> _Document:
        names = list(record) if isinstance(record, dict) else []
        key = field or next((name for name in ("text", "messages") if name in names), "")
        if key not in names:
            there = ", ".join(map(show, names)) or "no fields"
            wanted = key or "text or messages"
            raise UsageError(f"{where} has no field {wanted}, but {there}; name the field behind a colon")
        value = record[key]
        if isinstance(value, list):
            return _Document(self._chat(where, value), complete=True)
        if not isinstance(value, str | None):
            raise UsageError(f"{where}: the field {key} holds {type(value).__name__}, neither text nor messages")
        return _Document(value or "")

    def _chat(self, where: str, messages: list[Any]) -> str:
        if not self.tokenizer.chat_template:
            raise UsageError(f"{where} holds messages, and the tokenizer of {self.path} has no chat template for them")
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise errors of their own making
            raise UsageError(f"{where}: the chat template refuses these messages: {one_line(error)}") from error


def _shortened(document: _Document, request: _Request) -> _Document:
    """At most a piece, from a random place, so that one long document does not fill all windows."""
    extra = len(document.text) - request.piece
    if extra <= 0:
        return document
    start = int(request.rng.integers(extra + 1)) if request.rng else 0
    return _Document(document.text[start : start + request.piece], document.complete)


def _size(path: Path) -> int:
    try:
        if path.is_file():
            return path.stat().st_size
    except OSError as error:
        raise UsageError(f"the text {path} cannot be read: {error.strerror}") from None
    if path.is_dir():
        raise UsageError(f"{path} is a folder, no text file; name a file in it, or hf:{path} where it holds a dataset")
    raise UsageError(f"there is no text file {path}; a dataset is written hf:NAME[:CONFIG[:SPLIT[:FIELD]]]")


def _runs(path: Path, request: _Request) -> Iterator[str]:
    """The whole text, or of a long one runs of equal length, in random order."""
    size, other = _size(path), _NO_TEXT.get(path.suffix.lower())
    if other:
        raise UsageError(f"{path} {other}")
    if size <= _WHOLE:
        starts, length = np.zeros(1, np.int64), size
    else:
        starts, length = np.arange(0, size, request.piece), request.piece
        starts = request.rng.permutation(starts) if request.rng else starts
    with path.open("rb") as file:
        for start in map(int, starts):
            file.seek(start)
            yield _decoded(path, file.read(length), start)


def _decoded(path: Path, raw: bytes, start: int) -> str:
    """UTF-8 of a run of a file, from the first line that begins early in it; without parts of characters at its ends.

    The part of a character at the end of the whole file is an error like others.
    """
    if start:
        head = raw.find(b"\n", 0, len(raw) // 4) + 1 or raw.find(b" ", 0, len(raw) // 4) + 1
        head = head or next((at for at in range(min(4, len(raw))) if raw[at] & 0xC0 != 0x80), 0)
        raw, start = raw[head:], start + head
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and start + len(raw) < path.stat().st_size:
            return raw[: error.start].decode()
        raise UsageError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {start + error.start}; convert it to UTF-8"
        ) from None


def _lines(path: Path, request: _Request) -> Iterator[tuple[str, Any]]:
    """JSON values, and where they are."""
    size = _size(path)
    if request.rng is None:
        lines = _ordered(path)
    elif size <= _SHUFFLED:
        whole = list(_ordered(path))
        lines = (whole[index] for index in request.rng.permutation(len(whole)))
    else:
        lines = _drawn(path, size, request.rng)
    for offset, line in lines:
        where = f"{path} at offset {offset}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is no line of JSON: {one_line(error)}") from None


def _ordered(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        offset = 0
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def _drawn(path: Path, size: int, rng: np.random.Generator) -> Iterator[tuple[int, bytes]]:
    """Lines behind random offsets, each once, until no new ones are found."""
    seen, repeats = set[int](), 0
    with path.open("rb") as file:
        while repeats < _REPEATS:
            file.seek(int(rng.integers(size)))
            file.readline()
            offset = file.tell() if file.tell() < size else 0
            file.seek(offset)
            line = file.readline()
            repeats = repeats + 1 if offset in seen or not line.strip() else 0
            if not repeats:
                seen.add(offset)
                yield offset, line


def _examples(source: Source, request: _Request) -> Iterator[tuple[str, Any]]:
    """Examples of a dataset, streamed; a shuffled one draws each from those that are in a buffer."""
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise UsageError(
            f"reading {source.name} needs the package datasets; install it with: pip install 'lowbit[datasets]'"
        ) from None
    try:
        data = _opened(datasets, source)
        if request.rng is not None:
            data = data.shuffle(seed=int(request.rng.integers(2**31)), buffer_size=_BUFFER)
        for index, example in zip(count(), data):
            yield f"{source.name}, example {index}", example
    except Exception as error:  # readers of the hub and of a dozen file types raise what they like
        raise UsageError(f"the dataset {source.name} cannot be read: {one_line(error)}") from error


def _opened(datasets: Any, source: Source) -> Any:
    folder = Path(source.name)
    if not any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(source.name, source.config or None, split=source.split, streaming=True)
    saved = datasets.load_from_disk(source.name)
    return (saved[source.split] if isinstance(saved, dict) else saved).to_iterable_dataset()


@final
@dataclass(frozen=True)
class Similarity:
    """Whether a sample is enough, and how far it stands for a text, by the frequencies of tokens.

    Divergences are Jensen-Shannon's, in bits. One between finite samples is never zero, so that each is seen beside
    what chance alone gives: that between random halves of the same text, cut into the same windows.

    Attributes:
        unseen: share of further tokens of the sample's kind that are of no type in it, estimated as the share of
            tokens whose type occurs once (Good 1953, doi:10.1093/biomet/40.3-4.237).
        noise: divergence between halves of the sample.
        tokens: of the evaluation text; 0 without one, and what follows is then None.
        missing: share of its tokens whose type is not in the sample.
        excess: divergence between sample and evaluation text over that within each of them, at equal sizes.
        distance: how much farther from the sample the passages of the evaluation text are than those of the sample
            from the rest of it, in standard deviations of these; None where the sample has too few windows.
    """

    unseen: float
    noise: float
    tokens: int = 0
    missing: float | None = None
    excess: float | None = None
    distance: float | None = None

    @property
    def small(self) -> bool:
        """Whether there is too little text."""
        return self.noise > _SMALL

    @property
    def limit(self) -> float:
        """Excess over which the evaluation text is of another kind: a short text has few subjects, and differs more."""
        tokens = max(self.tokens, 1)
        far = self.distance is not None and self.distance > _FAR + _FEW / tokens
        return _UNLIKE if far else _UNLIKE + _SUBJECTS / tokens**0.5

    @property
    def unlike(self) -> bool:
        """Whether the evaluation text is of another kind."""
        return self.excess is not None and self.excess > self.limit

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, with the measure that says so."""
        small = (
            f"the calibration sample is small: its halves differ by {self.noise:.2f} bits (limit {_SMALL}), and an "
            f"estimated {self.unseen:.0%} of text like it are tokens that it does not hold; raise --samples"
        )
        unlike = (
            f"the calibration text is unlike the evaluation text: they differ by {self.excess or 0:.2f} bits more than "
            f"their own halves do (limit {self.limit:.2f}), {self.missing or 0:.0%} of the evaluation text are tokens "
            "that it does not hold; take text like that the model will see"
        )
        return (small,) * self.small + (unlike,) * self.unlike


def similarity(
    samples: Int64[Tensor, "samples length"], evaluation: Int64[Tensor, "tokens"] | None, vocabulary: int
) -> Similarity:
    """Judge a sample, and compare it with a text to evaluate on; what limits rest on is in `docs/calibration.md`.

    Args:
        samples: windows of tokens.
        evaluation: tokens that will be evaluated, in the order of their text, at least two; None: there is no such
            text.
        vocabulary: number of tokens that there are.
    """
    text = samples.flatten() if evaluation is None else evaluation
    run = max(min(samples.shape[1], samples.numel() // 2, len(text) // 2), 1)
    one, other = (ids.flatten()[: ids.numel() // run * run].view(-1, run).numpy() for ids in (samples, text))
    counts, rng = np.bincount(one.ravel(), minlength=vocabulary), np.random.default_rng(0)
    alone = Similarity(
        unseen=float((counts == 1).sum() / counts.sum()),
        noise=_divergence(one, one, len(one) // 2, vocabulary, rng),
    )
    if evaluation is None:
        return alone
    size = min(len(one), len(other)) // 2
    within = (_divergence(one, one, size, vocabulary, rng) + _divergence(other, other, size, vocabulary, rng)) / 2
    return replace(
        alone,
        tokens=len(evaluation),
        missing=float((counts[other] == 0).mean()),
        excess=_divergence(one, other, size, vocabulary, rng) - within,
        distance=_distance(samples.numpy(), evaluation.numpy(), vocabulary, rng),
    )


def _distance(samples: Tokens, text: Tokens, vocabulary: int, rng: np.random.Generator) -> float | None:
    """How many standard deviations farther passages of a text are from the sample than the sample's own from its rest.

    Each is compared with the sample without one window: passages of the sample with all but their own.
    """
    size = min(samples.shape[1], _PASSAGE)
    if len(samples) < _LEAST or len(text) < size:
        return None
    whole = np.bincount(samples.ravel(), minlength=vocabulary)
    rest = [whole - np.bincount(window, minlength=vocabulary) for window in samples[:_PASSAGES]]

    def divergences(passages: Tokens, at: Tokens) -> NDArray[np.float64]:
        counts = (np.bincount(passage, minlength=vocabulary) for passage in passages)
        return np.array([_jensen_shannon(count, rest[i]) for count, i in zip(counts, at, strict=True)])

    windows = np.arange(len(rest))
    starts = rng.integers(0, samples.shape[1] - size + 1, len(rest))
    own = divergences(samples[windows[:, None], starts[:, None] + np.arange(size)], windows)
    passages = text[: len(text) // size * size].reshape(-1, size)
    chosen = passages[rng.permutation(len(passages))[:_PASSAGES]]
    other = divergences(chosen, np.arange(len(chosen)) % len(rest))
    return float((other.mean() - own.mean()) / max(own.std(ddof=1), _TINY))


def _divergence(one: Tokens, other: Tokens, size: int, vocabulary: int, rng: np.random.Generator) -> float:
    """Mean over random choices of `size` windows of each; of separate ones, where both are the same."""
    found = []
    for _ in range(_SPLITS):
        first, second = rng.permutation(len(one)), rng.permutation(len(other))
        chosen = (one[first[:size]], one[first[size : 2 * size]] if other is one else other[second[:size]])
        found.append(_jensen_shannon(*(np.bincount(part.ravel(), minlength=vocabulary) for part in chosen)))
    return float(np.mean(found))


def _jensen_shannon(one: Tokens, other: Tokens) -> float:
    """Divergence in bits of two distributions that are given as counts."""
    p, q = one / one.sum(), other / other.sum()
    return (_relative(p, (p + q) / 2) + _relative(q, (p + q) / 2)) / 2


def _relative(p: NDArray[np.float64], mean: NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence in bits."""
    at = p > 0
    return float((p[at] * np.log2(p[at] / mean[at])).sum())
