"""Store: a finished weight is packed, written, read back, compared with what was meant, and journalled, in that order.

What is read back comes from the system's pages of the file, from where the header in the file says. It must be what
was packed, byte for byte, and that the format's reader unpacks into memory that the method did not see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import lcm, prod
from pathlib import Path
from typing import Any, NoReturn, final

import torch
import xxhash
from jaxtyping import Int32
from torch import Tensor

from lowbit import native
from lowbit.errors import LowbitError, VerifyError
from lowbit.formats import Codes, CodeWords, Format, Weight
from lowbit.formats._gguf import to_file
from lowbit.stages.plan import Entry
from lowbit.stages.write import Output, Record, as_bytes, digest
from lowbit.tensors import QTensor, view_shape

Value = QTensor | Tensor
_RUN = 4 * 2**20  # bytes: little enough to be in the processor's cache from writing to reading
_PANEL = 2**22  # codes: few panels, which are still in the cache when they are hashed
_LINE = 16  # words of a line of the cache, which columns of rows are read by
_LINES = 128  # rows of a panel are a multiple of it: transposed words come in runs of several lines of the cache
# Parts that stand for `codes` where these were never there: what `native.pack_bits` makes of them, and that turned.
_WORDS, _TURNED = "words", "turned words"

Place = Callable[[int, int], Tensor | None]  # `(start, stop)`: where lines of words lie, or are to be made; or nowhere
Panels = Iterator[tuple[int, Int32[Tensor, "lines words"]]]  # the first line of each panel and its words, in order


def _nowhere(start: int, stop: int) -> Tensor | None:
    return None


@final
@dataclass(frozen=True)
class Words:
    """Lines of words: `(start, words)` makes some, `(start, stop)` finds them where they lie in what was read."""

    fill: Callable[[int, Tensor], None]
    lines: Place

    @staticmethod
    def of(codes: CodeWords, weight: Weight, tensors: Mapping[str, Tensor]) -> Words:
        """Those that a format has in contiguous tensors of a weight."""
        return Words(partial(codes.unpack, weight, tensors), partial(codes.lines, weight, tensors))


@final
@dataclass(frozen=True)
class Lines:
    """Rows of a quantized weight: `q` has all but the codes, of which there are words, a line for each row."""

    q: QTensor
    words: Int32[Tensor, "rows words"]

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """As `QTensor.parts`, words in place of codes."""
        yield _WORDS, self.words
        yield from ((name, part) for name, part in self.q.parts() if name != "codes")


@final
@dataclass(frozen=True)
class Streamed:
    """A quantized weight whose codes are made in parts, packed, and never are in memory together.

    Attributes:
        q: it, with codes on the device `meta`.
        rows: words of its rows (`Codes.rows`).
        turned: the same turned, where it can be read so (`Codes.turned`).
    """

    q: QTensor
    rows: Words
    turned: Words | None

    @property
    def over(self) -> int:
        """Bits of codes in the last word of a row, 0 where they end with it."""
        return self.q.codes.shape[1] * self.q.scheme.grid.bits % 32

    @property
    def size(self) -> tuple[int, int]:
        """Rows and words of each."""
        rows, cols = self.q.codes.shape
        return rows, -(-cols * self.q.scheme.grid.bits // 32)

    def step(self, together: int = 1) -> int:
        """Rows of a panel: not some only of those that are `together`."""
        least = lcm(_LINES, together)
        return max(_PANEL // max(self.q.codes.shape[1], 1) // least, 1) * least

    def panels(self, place: Place = _nowhere, turned: bool = False) -> Panels:
        """Words of all rows, or these turned; what is beyond the codes of a row is 0.

        `place`: where lines are to be made.
        """
        return self._turned(place) if turned else self._rows(place)

    def _rows(self, place: Place) -> Panels:
        if not self.over and (yield from _at_once(self.rows, place, self.size[0])):
            return
        yield from self._in_panels()

    def _in_panels(self, together: int = 1) -> Panels:
        (rows, wide), over, step = self.size, self.over, self.step(together)
        room = torch.empty(min(step, rows), wide, dtype=torch.int32)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            words = None if over else self.rows.lines(start, stop)
            if words is None:
                words = room[: stop - start]
                self.rows.fill(start, words)
            if over:
                words[:, -1] &= 2**over - 1
            yield start, words

    def _turned(self, place: Place) -> Panels:
        rows, wide = self.size
        if self.turned is None:
            there = place(0, wide)
            there = torch.empty(wide, rows, dtype=torch.int32) if there is None else there
            for start, words in self._rows(_nowhere):
                native.transpose_words(words, out=there[:, start : start + len(words)])
            yield 0, there
            return
        if (yield from _at_once(self.turned, place, wide)):
            return
        step = max(_PANEL * self.q.scheme.grid.bits // 32 // max(rows, 1) // _LINE, 1) * _LINE
        room = torch.empty(min(step, wide), rows, dtype=torch.int32)
        for start in range(0, wide, step):
            lines = room[: min(step, wide - start)]
            self.turned.fill(start, lines)
            yield start, lines

    def lines(self, together: int = 1) -> Iterator[Lines]:
        """Some rows each, in order, in memory that the next ones take; runs of so many rows stay together."""
        none = torch.empty(self.q.codes.shape, dtype=torch.uint8, device="meta")
        for start, words in self._in_panels(together):
            stop = start + len(words)
            yield Lines(self.q.some(start, stop, none[start:stop]), words)

    def pieces(self, together: int = 1) -> Iterator[QTensor]:
        """The same with codes."""
        bits, (rows, cols) = self.q.scheme.grid.bits, self.q.codes.shape
        codes = torch.empty(min(self.step(together), rows), cols, dtype=torch.uint8)
        for some in self.lines(together):
            if bits == 8 and not self.over:
                found = some.words.view(torch.uint8)
            else:
                found = native.unpack_bits(some.words, bits, cols, out=codes[: len(some.words)])
            yield replace(some.q, codes=found)

    def whole(self) -> QTensor:
        """It with its codes."""
        codes, bits = torch.empty(self.q.codes.shape, dtype=torch.uint8), self.q.scheme.grid.bits
        for start, words in self.panels():
            native.unpack_bits(words, bits, codes.shape[1], out=codes[start : start + len(words)])
        return replace(self.q, codes=codes)


def _at_once(words: Words, place: Place, count: int) -> Generator[tuple[int, Tensor], None, bool]:
    """All lines, in few calls, where no room is needed for them; returns whether that is so."""
    here = words.lines(0, count)
    if here is None:
        here = place(0, count)
        if here is None:
            return False
        words.fill(0, here)
    yield 0, here
    return True


@final
@dataclass(frozen=True)
class Rows:
    """A quantized weight whose rows are made some at a time, and stored and compared while they are in the cache.

    Attributes:
        pieces: some rows each, in order, once.
        seen: after the last, the digest of what was read and facts for the report.
        again: makes it whole, to name what differs.
    """

    pieces: Iterator[QTensor]
    seen: Callable[[], tuple[str, dict[str, Any]]]
    again: Callable[[], Value]


@final
@dataclass(frozen=True)
class Floats:
    """A weight that is not quantized, in the type that is stored: some rows each, in order, and it whole."""

    pieces: Iterator[Tensor]
    again: Callable[[], Tensor]


@final
class _Sums:
    """Digests of the parts of a weight that comes in rows: those of the whole."""

    def __init__(self) -> None:
        self._of: dict[str, xxhash.xxh3_128] = {}

    def add(self, parts: Iterable[tuple[str, Tensor]]) -> None:
        """The next rows."""
        for name, part in parts:
            self._of.setdefault(name, xxhash.xxh3_128()).update(as_bytes(part.contiguous()))

    def digests(self) -> dict[str, str]:
        """In hexadecimal, by part."""
        return {name: each.hexdigest() for name, each in self._of.items()}


def store(
    output: Output,
    entry: Entry,
    value: Value | Streamed | Rows | Floats,
    source: Tensor | str,
    facts: Mapping[str, Any],
    *,
    scratch: bool,
    workers: int = 1,
) -> None:
    """Finish one weight.

    Args:
        value: what was meant: contiguous, in the type that is stored, where the weight is not quantized; streamed only
            where the format packs rows of words of the scheme, or stores rows apart; in rows only where it does that.
        source: what was read, or its digest.
        facts: for the report; to its `seconds` those of packing and writing are added.
        scratch: packed and read back in mapped files, for little memory, and not in this thread's buffers.
        workers: threads that do this at the same time.

    Raises:
        FormatError: a value that the format cannot store.
        ResourceError: the disk is full.
        VerifyError: what was stored is not what was meant, naming tensor and element.
    """
    start, name = time.perf_counter(), entry.weight.name
    if isinstance(value, Floats):
        meant, reading = _copy(output, entry, value)
        stored = {name: meant["weight"]}
    elif isinstance(value, Tensor):
        packed = to_file(entry.weight, value).contiguous()
        written, reading = _copy(output, entry, Floats(_runs(packed), lambda: packed))
        meant = written if packed is value else {"weight": digest(value)}
        stored = {name: written["weight"]}
    elif isinstance(value, Streamed) and packs_words(output.plan.rules):
        meant, stored, reading = _stream(output, entry, value, scratch)
    elif isinstance(value, Streamed):
        rules = output.plan.rules
        in_words = rules.codes is not None and rules.codes.pack is not None and not value.over
        pieces = (value.lines if in_words else value.pieces)(rules.by_rows(entry.weight))
        meant, stored, reading = _by_rows(output, entry, pieces, value.whole)
    elif isinstance(value, Rows):
        meant, stored, reading = _by_rows(output, entry, value.pieces, value.again)
        source, more = value.seen()
        facts = {**more, **facts}
    else:
        meant = {part: digest(tensor.contiguous()) for part, tensor in value.parts()}
        stored, reading = _pack(output, entry, value, meant, scratch)
    read = source if isinstance(source, str) else meant["weight"] if source is value else digest(source.contiguous())
    facts = {**facts, "seconds": facts["seconds"] + time.perf_counter() - start - reading}
    output.commit(Record(name, read, meant, stored, facts, True), reading / workers)


def _runs(value: Tensor) -> Iterator[Tensor]:
    flat = value.reshape(-1).view(torch.uint8)
    return (flat[at : at + _RUN] for at in range(0, len(flat), _RUN))


def _copy(output: Output, entry: Entry, value: Floats) -> tuple[dict[str, str], float]:
    """Write what is not quantized, some bytes at a time, each read back at once; returns its digest, and seconds."""
    name, meant, same, at, reading = entry.weight.name, xxhash.xxh3_128(), True, 0, 0.0
    for run in value.pieces:
        data = as_bytes(run)
        meant.update(data)
        output.write(name, data, at)
        start = time.perf_counter()
        same = same and output.holds({name: run}, at)
        reading += time.perf_counter() - start
        output.let_go(name, run.nbytes, at)
        at += run.nbytes
    digests = {"weight": meant.hexdigest()}
    if not same:
        _refuse(output, entry, digests, lambda: output.read(entry)[name], value.again)
    return digests, reading


def _pack(
    output: Output, entry: Entry, value: QTensor, meant: Mapping[str, str], scratch: bool
) -> tuple[dict[str, str], float]:
    """Pack, write and read back; returns the digest of each stored tensor, and seconds of reading."""
    weight, rules, parts = entry.weight, output.plan.rules, output.into(entry, mapped=scratch)
    rules.pack(weight, value, parts)
    for name, part in () if scratch else parts.items():
        output.write(name, as_bytes(part))
    stored = {name: digest(part) for name, part in parts.items()}
    start = time.perf_counter()
    with output.codes(weight, scratch, "check") as codes:
        find = lambda: rules.unpack(weight, output.read(entry), codes)
        if not output.holds(parts):
            _refuse(output, entry, meant, find, lambda: value)
        compare(output.path, weight.name, meant, lambda: rules.unpack(weight, parts, codes), lambda: value)
    return stored, _let_go(output, parts, start)


def _by_rows(
    output: Output, entry: Entry, pieces: Iterator[QTensor] | Iterator[Lines], again: Callable[[], Value]
) -> tuple[dict[str, str], dict[str, str], float]:
    """As `_pack`, for rows at a time; returns what was meant, too."""
    weight, rules, name = entry.weight, output.plan.rules, entry.weight.name
    meant, found, stored, same, at, reading = _Sums(), _Sums(), _Sums(), True, 0, 0.0
    for piece in pieces:
        q = piece.q if isinstance(piece, Lines) else piece
        rows = weight.some(q.shape[0])
        parts = output.into(replace(entry, weight=rows), mapped=False)
        if isinstance(piece, Lines):
            assert rules.codes is not None and rules.codes.pack is not None
            rules.codes.pack(rows, q, piece.words, parts)
        else:
            rules.pack(rows, q, parts)
        output.write(name, as_bytes(parts[name]), at)
        begin = time.perf_counter()
        back = _unpacked(output, rows, parts, isinstance(piece, Lines)) if same and output.holds(parts, at) else None
        same = back is not None
        found.add(back.parts() if back else ())
        reading += time.perf_counter() - begin
        meant.add(piece.parts())
        stored.add(parts.items())
        output.let_go(name, parts[name].nbytes, at)
        at += parts[name].nbytes
    if not same or found.digests() != meant.digests():
        find = lambda: rules.unpack(weight, output.read(entry), None)
        _refuse(output, entry, meant.digests(), find, again)
    return meant.digests(), stored.digests(), reading


def _unpacked(output: Output, weight: Weight, parts: Mapping[str, Tensor], in_words: bool) -> QTensor | Lines | None:
    """What the format's reader makes of tensors, in memory of this thread; None where it refuses them."""
    rules, room = output.plan.rules, output.room("check", weight.shape)
    try:
        if not in_words:
            return rules.unpack(weight, parts, room)
        assert rules.codes is not None and weight.scheme is not None
        q = rules.unpack(weight, parts, room.to("meta"))
        value = streamed(q, rules.codes, weight, parts)
        words = room.view(-1)[: 4 * prod(value.size)].view(torch.int32).view(value.size)
        value.rows.fill(0, words)
        return Lines(q, words)
    except LowbitError:
        return None


def _stream(
    output: Output, entry: Entry, value: Streamed, scratch: bool
) -> tuple[dict[str, str], dict[str, str], float]:
    """As `_pack`, but codes are packed, and unpacked again, in panels; returns what was meant, too."""
    weight, rules, parts = entry.weight, output.plan.rules, output.into(entry, mapped=scratch)
    rules.pack(weight, value.q, parts)
    turned = _is_turned(rules, value)
    form = _codes_of(rules, turned)
    assert form.pack is not None
    place = partial(form.lines, weight, parts)
    pack = form.pack
    meant = _digests(value, turned, place, lambda start, words: pack(weight, words, start, parts))
    for name, part in () if scratch else parts.items():
        output.write(name, as_bytes(part))
    held = None if value.over else place(0, value.size[turned])  # these were hashed already
    at = held.data_ptr() if held is not None else None
    stored = {name: meant[_word(turned)] if part.data_ptr() == at else digest(part) for name, part in parts.items()}
    start = time.perf_counter()
    if not output.holds(parts) or _digests_of(weight, rules, parts) != meant:
        find = lambda: rules.unpack(weight, output.read(entry), None)
        _refuse(output, entry, meant, find, value.whole)
    return meant, stored, _let_go(output, parts, start)


def packs_words(rules: Format) -> bool:
    """Whether a format takes codes as words."""
    return rules.codes is not None and rules.codes.rows.pack is not None


def _is_turned(rules: Format, value: Streamed) -> bool:
    """Whether a format has words turned, as others then make them too."""
    return rules.codes is not None and rules.codes.turned is not None and not value.over


def _codes_of(rules: Format, turned: bool) -> CodeWords:
    assert rules.codes is not None
    found = rules.codes.turned if turned else rules.codes.rows
    assert found is not None
    return found


def _word(turned: bool) -> str:
    return _TURNED if turned else _WORDS


def _let_go(output: Output, parts: Mapping[str, Tensor], start: float) -> float:
    """Say that tensors were read back; returns the seconds that this took."""
    reading = time.perf_counter() - start
    for name, part in parts.items():
        output.let_go(name, part.nbytes)
    return reading


def _refuse(
    output: Output, entry: Entry, meant: Mapping[str, str], find: Callable[[], Value], again: Callable[[], Value]
) -> NoReturn:
    """Say what differs in a weight of which the file does not have what was written, or that does not unpack to it."""
    compare(output.path, entry.weight.name, meant, find, again)
    raise VerifyError(f"{output.path}: {entry.weight.name} is not stored as it was packed")


def _digests_of(weight: Weight, rules: Format, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Digests of the parts of a weight whose codes are read in panels; None where it cannot be read."""
    assert weight.scheme is not None and rules.codes is not None
    codes = torch.empty(view_shape(weight.shape, weight.scheme.block), dtype=torch.uint8, device="meta")
    try:
        q = rules.unpack(weight, tensors, codes)
    except LowbitError:
        return None
    value = streamed(q, rules.codes, weight, tensors)
    return _digests(value, _is_turned(rules, value))


def streamed(q: QTensor, codes: Codes, weight: Weight, tensors: Mapping[str, Tensor]) -> Streamed:
    """`q`, which has no codes, with those that a format has in contiguous tensors of a weight."""
    rows = Words.of(codes.rows, weight, tensors)
    if codes.turned is not None:
        return Streamed(q, rows, Words.of(codes.turned, weight, tensors))
    value = Streamed(q, rows, None)
    here = None if value.over else rows.lines(0, value.size[0])
    return value if here is None else replace(value, turned=Words(partial(_turn, here), _nowhere))


def _turn(rows: Int32[Tensor, "rows words"], start: int, out: Int32[Tensor, "lines rows"]) -> None:
    native.transpose_words(rows[:, start : start + len(out)], out=out)


def _digests(
    value: Streamed,
    turned: bool,
    place: Place = _nowhere,
    use: Callable[[int, Tensor], None] = lambda start, words: None,
) -> dict[str, str]:
    """Digest of each part; words are made at `place`, and `use` gets the first line of each panel, and its words."""
    hasher = xxhash.xxh3_128()
    for start, words in value.panels(place, turned):
        hasher.update(as_bytes(words))
        use(start, words)
    others = {name: digest(part.contiguous()) for name, part in value.q.parts() if name != "codes"}
    return {_word(turned): hasher.hexdigest(), **others}


def compare(
    path: Path, name: str, meant: Mapping[str, str], find: Callable[[], Value], again: Callable[[], Value | None]
) -> None:
    """Read one weight and compare the digests of its parts with those that were meant.

    Args:
        find: reads it.
        again: makes it, where that can be done, so that the first element that differs is named.

    Raises:
        VerifyError: it cannot be read, or a part differs.
    """
    try:
        found = find()
    except LowbitError as error:
        raise VerifyError(f"{path}: {name} cannot be read back: {error}") from error
    digests = {part: digest(tensor.contiguous()) for part, tensor in parts_of(found, meant).items()}
    wrong = [part for part in {**meant, **digests} if digests.get(part) != meant.get(part)]
    if wrong:
        part, value = "codes" if wrong[0] in (_WORDS, _TURNED) else wrong[0], again()
        where = f"its {part}" if value is None else _where(part, parts_of(found), parts_of(value))
        raise VerifyError(f"{path}: {name} differs from what was meant in {where}")


def whole(value: Value | Streamed | Floats) -> Value:
    """A weight in memory, with its codes."""
    if isinstance(value, Floats):
        return value.again()
    return value.whole() if isinstance(value, Streamed) else value


def parts_of(value: Value, meant: Iterable[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weight by name, as the journal has their digests; its codes as words where these were meant."""
    if not isinstance(value, QTensor):
        return {"weight": value}
    parts, names = dict(value.parts()), set(meant)
    if _WORDS in names:
        return {_WORDS: native.pack_bits(parts.pop("codes"), value.scheme.grid.bits), **parts}
    if _TURNED in names:
        return {_TURNED: native.pack_bits_transposed(parts.pop("codes"), value.scheme.grid.bits), **parts}
    return parts


def _where(part: str, found: dict[str, Tensor], meant: dict[str, Tensor]) -> str:
    """The first differing element of one part, with both values."""
    if part not in found or part not in meant or found[part].numel() != meant[part].numel():
        return f"its {part}: missing, not meant, or of another shape"
    left, right = found[part].reshape(-1), meant[part].reshape(-1)
    index = int((left.view(torch.uint8) != right.view(torch.uint8)).nonzero()[0]) // left.element_size()
    return f"element {index} of its {part}: {left[index].item()} is stored, {right[index].item()} was meant"
