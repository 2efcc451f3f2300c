"""Changes: what each weight of a checkpoint becomes in another format, found by doing it on the weights.

A quantized weight is tried on the schemes that the target fits to its own, those that change least first, with the
codes that it has: the first that holds every value is lossless. Where none does, its values are rounded onto the
nearest scheme, and the error is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain
from math import prod
from typing import final

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight, _float
from lowbit.formats._checks import row_chunks
from lowbit.formats._linear import SCALE_TYPES, declared_dtype, row_block
from lowbit.methods import Method
from lowbit.schemes import FAMILIES, FLOATS, Block, Scheme, parse
from lowbit.stages._carry import carried, gap, spelled, variants
from lowbit.stages._readers import kept_for
from lowbit.stages._rooms import Rooms
from lowbit.stages._store import Floats, Streamed, Value, packs_words, streamed
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Entry, Plan, arranged
from lowbit.stages.quantize import Error, quantize_weight
from lowbit.tensors import QTensor, view_shape

COPY, CARRY, ROUND, FLOAT = None, "carry", "round", "dequantize"
METHODS = ("mse", "rtn", "ggml_fit")  # what quantizes again, the first that supports the scheme
_GROUPS = (1024, 512, 256, 128, 64, 32, 16)
_SMALL = 1e-4  # relative squared error of rounded scales below which no other way is tried
_SAMPLE = 1 << 18
_FLOATS = 1 << 20  # of a run that is tried, or written and read back while it is in the cache
_ALIGN = 64
_TILE = Block(128, 128)  # the only blocks of some readers of FP8


@final
@dataclass(frozen=True)
class Goal:
    """What was asked for.

    Attributes:
        format: name of a format, or `float`.
        scheme: of every quantized weight, or of `float` the type (f16, bf16, f32); None for the nearest.
        lossy: whether weights may change.
    """

    format: str
    scheme: str | None = None
    lossy: bool = False

    @property
    def form(self) -> Format:
        """The format's record."""
        found: Format = _float.FORMAT if self.format == _float.NAME else plugins.load("formats", self.format)
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        """The float type that was asked for."""
        return FLOATS.get(self.scheme) if self.scheme else None  # type: ignore[call-overload]


@final
@dataclass(frozen=True)
class Change:
    """What becomes of one weight.

    Attributes:
        before: the weight as it was read.
        entry: what is written; its method is `carry`, `round`, `dequantize`, or the one that quantizes again.
        lossless: whether every value stays, to the bit, and what runtimes do with its inputs.
        error: of its values.
        why: the reason, where something changes.
    """

    before: Weight
    entry: Entry
    lossless: bool = True
    error: Error = field(default_factory=Error)
    why: str = ""


def model_dtype(source: Checkpoint) -> torch.dtype | None:
    """The float type of the model: as `config.json` declares it, else that of most weights that are not quantized."""
    counts: Counter[torch.dtype] = Counter()
    for weight in source.weights.values():
        if weight.scheme is None and weight.dtype in SCALE_TYPES:
            counts[weight.dtype] += prod(weight.shape)
    return declared_dtype(source.config) or (counts.most_common(1)[0][0] if counts else None)


def targets(
    weight: Weight, form: Format, dtypes: Sequence[torch.dtype], schemes: Iterable[Scheme], reasons: list[str]
) -> Iterator[Weight]:
    """The weight in each scheme that the format fits to these, in order, each once.

    `reasons` gets what the format says of those that it does not take. The type of a model decides in which
    type some formats store scales: `dtypes` are tried in order.
    """
    if weight.swapped and not form.swaps:
        transposed = (
            "experts in one tensor are transposed" if len(weight.shape) > 2 else "its layer is transposed (Conv1D)"
        )
        reasons.append(f"{transposed}, which readers of this format do not know")
        return
    seen = set()
    for scheme in schemes:
        for dtype in dtypes:
            bare = replace(weight, dtype=dtype, scheme=None, activations=None, input_scale=None)
            try:
                found = _with_inputs(weight, replace(bare, scheme=form.fit(scheme, bare)), form)
            except UnsupportedError as error:
                reasons.append(str(error))
                continue
            if found not in seen:
                seen.add(found)
                yield found


def _with_inputs(weight: Weight, target: Weight, form: Format) -> Weight:
    """The target with the activations of the weight.

    Raises:
        UnsupportedError: the format declares none such.
    """
    wanted, scale = weight.activations, weight.input_scale
    if wanted is None:
        return target
    if weight.scheme and target.scheme and weight.scheme.smooth != target.scheme.smooth:
        raise UnsupportedError("its inputs are multiplied by factors before they are rounded")
    fitted = form.fit_activations(wanted, target)
    dtype = FLOATS.get(fitted.scale, torch.float32)
    if replace(fitted, scale=wanted.scale) != wanted:
        raise UnsupportedError(f"its inputs are rounded to {wanted}, which would become {fitted}")
    if scale is not None and torch.tensor(scale).to(dtype).item() != scale:
        raise UnsupportedError(f"the scale of its inputs, {scale:.9g}, is none of {fitted.scale}")
    return replace(target, activations=fitted, input_scale=scale)


def nearest(scheme: Scheme, cols: int) -> Iterator[list[list[Scheme]]]:
    """Schemes to quantize again in: for a number of bits, own first, then more, then fewer, a list for each grid.

    Each list is in the order in which it is tried: blocks like the weight's own, then smaller, then larger. Few bits do
    in plain integers what they do in vectors only as 4 bits in groups: vectors go on as those.
    """
    scheme = parse("int4-g128-asym") if scheme.grid.kind == "vectors" else scheme
    others = (family.grid for family in FAMILIES.values() if not family.grid.table)
    grids = dict.fromkeys([scheme.grid, *others])
    own = scheme.grid.bits
    for bits in [*range(own, 9), *range(own - 1, 0, -1)]:
        yield [_on_grid(scheme, grid.name, cols) for grid in grids if grid.bits == bits]


def _on_grid(scheme: Scheme, grid: str, cols: int) -> list[Scheme]:
    """The families of a grid with blocks and zero points as in `scheme`, or as near as can be."""
    families = [family for family in FAMILIES.values() if family.grid.name == grid]
    plain = row_block(scheme.block, cols)
    size = plain.cols or cols
    sizes = [group for group in _GROUPS if group < size] + [group for group in reversed(_GROUPS) if group >= size]
    blocks = dict.fromkeys([scheme.block, *(Block(1, group) for group in sizes), Block(1, 0), Block(0, 0), _TILE])
    zeros = ("int", "float", "none") if scheme.zero != "none" else ("none", "int", "float")
    found = []
    for family in families:
        kinds = zeros if family.grid.kind == "int" else ("none",)
        wanted = [replace(family, block=block, zero=zero, scale=scale)  # type: ignore[arg-type]
                  for scale in dict.fromkeys((scheme.scale if scheme.scale in FLOATS else family.scale, family.scale))
                  for block in blocks for zero in kinds]  # fmt: skip
        found += [family] if family.nested or family.scale == "e8m0" else [each for each in wanted if spelled(each)]
    return list(dict.fromkeys([*([scheme] if scheme.grid.name == grid else []), *found]))


def difference(one: QTensor, other: QTensor, elements: int = _SAMPLE) -> Error:
    """Of what two tensors of one shape stand for."""
    rows, cols = view_shape(one.shape, Block(1, 0))
    error = Error()
    for some in row_chunks(rows, cols, elements):
        error += gap(one, some.start, some.stop, other.rows(some.start, some.stop))
    return error


@final
@dataclass(frozen=True)
class Changer:
    """Finds what weights become, and makes it; called from several threads.

    Attributes:
        source: the checkpoint.
        goal: what was asked for.
        dtype: float type of the model.
        rooms: memory.
        piece: elements that a method takes at a time.
    """

    source: Checkpoint
    goal: Goal
    dtype: torch.dtype | None
    rooms: Rooms
    piece: int

    def dtypes(self, weight: Weight) -> list[torch.dtype]:
        """Float types to store a weight in, the model's first, at last one of 16 bits that its scales have."""
        own = FLOATS.get(weight.scheme.scale) if weight.scheme else None
        narrow = [own] if own and own.itemsize == 2 else []
        return list(dict.fromkeys([self.dtype or weight.dtype, weight.dtype, *narrow]))

    def targets(self, weight: Weight, reasons: list[str]) -> Iterator[Weight]:
        """What the weight may become with the codes that it has; `reasons` gets why it cannot be as it is."""
        assert weight.scheme is not None
        wanted = [parse(self.goal.scheme)] if self.goal.scheme else variants(weight.scheme)
        return self._read(targets(self.arranged(weight), self.goal.form, self.dtypes(weight), wanted, reasons), reasons)

    def _read(self, found: Iterable[Weight], reasons: list[str]) -> Iterator[Weight]:
        """Of these the ones that readers of the format know for what they are."""
        for target in found:
            why = kept_for(self.goal.format, self.source.config, target)
            if why:
                reasons.append(f"it is {why}")
            else:
                yield target

    def arranged(self, weight: Weight) -> Weight:
        """The weight as the target's container has it."""
        return arranged(weight, str(weight.scheme or "keep"), self.goal.form, self.source.config)

    def load(self, weight: Weight, hollow: bool = False, pieces: Mapping[str, Tensor] | None = None) -> QTensor:
        """The weight, its codes in this thread's room where they are not a view of the file; none, where `hollow`.

        `pieces`: its stored tensors, where they are at hand.
        """
        assert weight.scheme is not None
        if hollow:
            codes = torch.empty(view_shape(weight.shape, weight.scheme.block), dtype=torch.uint8, device="meta")
        else:
            codes = self.rooms.codes("codes", weight.shape, weight.scheme)
        found = self.source.unpacked(weight.name, pieces or self.source.stored(weight.name), codes)
        assert isinstance(found, QTensor)
        return found

    def _hollow(self, weight: Weight, target: Weight) -> bool:
        """Whether the scales and zero points of a weight tell if it is lossless there, whatever its codes."""
        old, new = weight.scheme, target.scheme
        assert old is not None and new is not None and self.source.format is not None
        form: Format = plugins.load("formats", self.source.format)
        return (
            old.grid == new.grid
            and (old.zero == new.zero or new.zero != "min" != old.zero or _exact_minima(old, new))
            and form.hollow(old)
            and self.goal.form.hollow(new)
        )

    def lossless(self, weight: Weight) -> Change | str:
        """The change that keeps every value, or why there is none.

        Raises:
            FormatError: the weight is damaged.
        """
        q, reasons, tried = None, list[str](), list[Weight]()
        for target in self.targets(weight, reasons):
            hollow = self._hollow(weight, target)
            q = q if q and (hollow or not q.codes.is_meta) else self.load(weight, hollow)
            tried.append(target)
            try:
                made = self.checked(q, target)
            except (UnsupportedError, FormatError) as error:
                reasons.append(str(error))
                continue
            return Change(weight, Entry(target, CARRY, _spelling(made, weight) + self._cast(target, tried)))
        return reasons[0]

    def _cast(self, target: Weight, others: Sequence[Weight]) -> str:
        """A warning where the format has a type for the scales of such a model, and this is another."""
        assert target.scheme is not None
        usual = [each for each in others if each.dtype == self.dtype != target.dtype and each.scheme]
        alike = [each for each in usual if replace(each.scheme, scale=target.scheme.scale) == target.scheme]  # type: ignore[type-var]
        if not alike:
            return ""
        return f"; scales stay {target.scheme.scale}, which readers may cast to the model's {_name(alike[0].dtype)}"

    def checked(self, q: QTensor, target: Weight, rounding: bool = False) -> QTensor:
        """The same codes as the target has them, which its format packs.

        Raises:
            UnsupportedError, FormatError: it does not.
        """
        assert target.scheme is not None
        before = (q.scheme.grid, q.scheme.zero, row_block(q.scheme.block, q.shape[-1]))
        after = (target.scheme.grid, target.scheme.zero, row_block(target.scheme.block, q.shape[-1]))
        made = carried(q if before[0] == after[0] else self._copy(q), target.scheme, rounding)
        # Codes of one grid with equal scales and zero points are equal values; minima are products, which are rounded.
        minima = "min" in (before[1], after[1]) and before[1] != after[1] and not _exact_minima(q.scheme, made.scheme)
        if (minima or before[0] != after[0]) and not rounding and difference(q, made).largest:
            raise UnsupportedError(f"its values are others in {target.scheme}")
        parts = self._room(self.goal.form.layout(target))
        self.goal.form.pack(target, made, parts)
        if made.group_index is not None:
            codes = (
                made.codes if made.codes.is_meta else self.rooms.get("again", made.codes.numel()).view(made.codes.shape)
            )
            index = self.goal.form.unpack(target, parts, codes).group_index
            if index is None or not torch.equal(index, made.group_index):
                raise UnsupportedError(
                    "its columns are in groups of an order of their own (act-order), with no place here"
                )
        return made

    def _copy(self, q: QTensor) -> QTensor:
        """The same with codes of its own, which may be changed."""
        codes = self.rooms.get("made", q.codes.numel()).view(q.codes.shape)
        return replace(q, codes=codes.copy_(q.codes))

    def _room(self, layout: Mapping[str, Spec]) -> dict[str, Tensor]:
        sizes = [spec.nbytes for spec in layout.values()]
        starts = [0, *accumulate(-(-size // _ALIGN) * _ALIGN for size in sizes)]
        room = self.rooms.get("packed", starts[-1])
        parts = zip(layout.items(), starts, sizes, strict=False)
        return {name: room[at : at + n].view(spec.dtype).view(spec.shape) for (name, spec), at, n in parts}

    def lossy(self, weight: Weight, why: str) -> Change:
        """The change with the least error that the target holds, at last floats; `why` there is none without loss.

        Raises:
            UnsupportedError: it holds neither.
        """
        bare = replace(weight, activations=None, input_scale=None)
        if weight.activations:
            found = self.lossless(bare)
            if isinstance(found, Change):
                return replace(found, before=weight, lossless=False, why=f"its inputs are no longer rounded: {why}")
        rounded = self._rounded(weight, why) or (self._rounded(bare, why) if weight.activations else None)
        if rounded and rounded.error.relative < _SMALL:
            return rounded
        again = self._again(weight, why)
        if rounded and (again is None or rounded.error.relative <= again.error.relative):
            return rounded
        return again or self._unquantized(weight, self._objection(weight, why))

    def _unquantized(self, weight: Weight, why: str) -> Change:
        """Kept as floats beside weights that are quantized.

        Raises:
            UnsupportedError: the target's container has no plain floats.
        """
        if self.goal.form.arrange is not None:
            raise UnsupportedError(f"{weight.name}: {why}")
        dtype, error = self._rounding(weight, self.dtypes(weight))
        entry = Entry(Weight(weight.name, weight.held, dtype), FLOAT, f"stays in {_name(dtype)}")
        return Change(weight, entry, not error.largest and weight.activations is None, error, why)

    def _objection(self, weight: Weight, why: str) -> str:
        """What is against the scheme that was asked for or is the format's own; `why`, if nothing is."""
        form, reasons = self.goal.form, list[str]()
        wanted = [parse(self.goal.scheme or form.default)]
        bare = replace(self.arranged(weight), activations=None, input_scale=None)
        fitting = self._read(targets(bare, form, self.dtypes(weight), wanted, reasons), reasons)
        return why if next(fitting, None) else reasons[0]

    def _rounded(self, weight: Weight, why: str) -> Change | None:
        """The codes as they are, scales and zero points rounded to what the target has."""
        q = self.load(weight)
        for target in (each for each in self.targets(weight, []) if each.scheme and each.scheme.grid == q.scheme.grid):
            try:
                error = difference(q, self.checked(q, target, rounding=True))
            except (UnsupportedError, FormatError):
                continue
            return Change(
                weight, Entry(target, ROUND, "codes as they are, scales or zero points rounded"), False, error, why
            )
        return None

    def _again(self, weight: Weight, why: str) -> Change | None:
        """Quantized again: of the grids with the bits nearest to its own, the one with the least error."""
        chosen = self._choose(weight)
        if chosen is None:
            return None
        target, method = chosen
        entry = Entry(target, method, "quantized again")
        error = self.quantized(self.load(weight), entry)[1]
        return Change(weight, entry, False, error, why)

    def _choose(self, weight: Weight) -> tuple[Weight, str] | None:
        assert weight.scheme is not None
        bare = replace(weight, activations=None, input_scale=None)
        asked = [[[parse(self.goal.scheme)]]] if self.goal.scheme else nearest(weight.scheme, weight.shape[-1])
        for grids in asked:
            choices = [self._first(each, schemes) for schemes in grids for each in (weight, bare)]
            known = list(dict.fromkeys(choice for choice in choices if choice))
            own = [choice for choice in known if _is_own(choice[0].scheme, weight.scheme)]
            if own:
                return own[0]
            if len(known) > 1:
                q = self.load(weight)
                return min(known, key=lambda choice: self._sampled(q, choice[0]))
            if known:
                return known[0]
        return None

    def _first(self, weight: Weight, schemes: Sequence[Scheme]) -> tuple[Weight, str] | None:
        """The first scheme that the target holds, and what quantizes in it."""
        some = targets(self.arranged(weight), self.goal.form, self.dtypes(weight)[:1], schemes, [])
        for target in self._read(some, []):
            assert target.scheme is not None
            for name in METHODS:
                method: Method = plugins.load("methods", name)
                if method.objection(target.scheme) is None:
                    return target, name
        return None

    def _sampled(self, q: QTensor, target: Weight) -> float:
        """Relative error of round to nearest on the first rows."""
        rows, cols = view_shape(q.shape, Block(1, 0))
        part = q.rows(0, min(max(_SAMPLE // 4 // max(cols, 1), 1), rows))
        sample = replace(target, shape=tuple(part.shape))
        assert sample.scheme is not None
        codes = torch.empty(view_shape(sample.shape, sample.scheme.block), dtype=torch.uint8)
        return quantize_weight({}, Entry(sample, "rtn", ""), part, codes, self.piece)[2].relative

    def quantized(self, q: QTensor, entry: Entry) -> tuple[QTensor, Error]:
        """What `q` stands for, quantized again as the entry says."""
        assert entry.weight.scheme is not None
        values = self.rooms.get("values", 4 * prod(q.shape)).view(torch.float32).view(view_shape(q.shape, Block(1, 0)))
        self._fill(q, values)
        codes = self.rooms.codes("made", q.shape, entry.weight.scheme)
        _, made, error = quantize_weight({}, entry, values.view(q.shape), codes, self.piece)
        return made, error

    def _fill(self, q: QTensor, out: Tensor) -> None:
        """Rows of `q` into `out`, in its type."""
        for some in row_chunks(len(out), out.shape[1], _SAMPLE):
            q.rows(some.start, some.stop, out[some])

    def pieces(self, weight: Weight, tensors: Mapping[str, Tensor] | None = None) -> Iterator[QTensor]:
        """Rows of a weight with their codes, in order: some at a time where no code can be wrong."""
        assert weight.scheme is not None and self.source.format is not None
        form: Format = plugins.load("formats", self.source.format)
        found = tensors or self.source.stored(weight.name)
        block = weight.scheme.block
        apart = block.rows == 1 and not block.flat and len(weight.shape) == 2
        codes = form.codes if apart and form.hollow(weight.scheme) else None
        q = self.load(weight, codes is not None, found)
        if codes is None:
            return iter([q])
        if q.group_index is not None:
            return iter([self.load(weight, pieces=found)])
        return streamed(q, codes, weight, _contiguous(found)).pieces()

    def _rounding(self, weight: Weight, dtypes: Sequence[torch.dtype]) -> tuple[torch.dtype, Error]:
        """The first of some float types that has every value; where none has, the first, and what that changes."""
        left, error, whole = list(dtypes), Error(), True
        for q in self.pieces(weight) if left[0] != torch.float32 else ():
            for some in row_chunks(*view_shape(q.shape, Block(1, 0)), _FLOATS):
                for dtype in left[:] or dtypes[:1]:
                    found = gap(q, some.start, some.stop, dtype)
                    error += found if dtype == dtypes[0] else Error()
                    left = [each for each in left if each != dtype or not found.largest]
                whole = whole and (not left or left[0] == dtypes[0])  # else the first is not measured from here on
                if left[:1] == [torch.float32]:
                    return left[0], Error()
        if left:
            return left[0], Error()
        return (dtypes[0], error) if whole else self._rounding(weight, dtypes[:1])

    def floats(
        self, weight: Weight, dtype: torch.dtype, tensors: Mapping[str, Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Rows of the weight in a float type, in order, in memory that the next ones take."""
        return chain.from_iterable(_floats(q, dtype) for q in self.pieces(weight, tensors))

    def made_float(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """The weight as the model holds it, in a float type."""
        rows, cols = view_shape(weight.shape, Block(1, 0))
        out = self.rooms.get("values", prod(weight.shape) * dtype.itemsize).view(dtype).view(rows, cols)
        self._fill(self.load(weight), out)
        return out.view(weight.shape).mT.contiguous() if weight.swapped else out.view(weight.shape)

    def to_float(self, weight: Weight) -> Change:
        """The float type that has every value, else the model's own, and the error in that."""
        named = self.goal.dtype
        if self.goal.scheme and named is None:
            raise UnsupportedError(f"--scheme {self.goal.scheme}: {_float.NAME} holds f16, bf16 or f32")
        dtype, error = self._rounding(weight, [named] if named else self.dtypes(weight))
        target = Weight(weight.name, weight.held, dtype)
        why = "" if not error.largest else f"{_name(dtype)} does not have its values; --scheme f32 does"
        why = why or ("its inputs are no longer rounded" if weight.activations else "")
        return Change(weight, Entry(target, FLOAT, "dequantized"), not why, error, why)

    def value(
        self, weight: Weight, entry: Entry, pieces: Mapping[str, Tensor] | None = None
    ) -> Value | Streamed | Floats:
        """What a change stores; in parts where codes alone go from one layout into another, or as floats."""
        target = entry.weight
        pieces = pieces or self.source.stored(weight.name)
        if weight.scheme is None:
            kept = pieces[weight.name].to(target.dtype)
            return (kept.T if weight.swapped != target.swapped else kept).contiguous()
        if target.scheme is None:
            again = partial(self.made_float, weight, target.dtype)
            return again() if weight.swapped else Floats(self.floats(weight, target.dtype, pieces), again)
        if entry.method not in (CARRY, ROUND):
            return self.quantized(self.load(weight, pieces=pieces), entry)[0]
        form: Format = plugins.load("formats", str(self.source.format))
        in_parts = packs_words(self.goal.form) or self.goal.form.by_rows(target) > 0
        streams = form.codes is not None and in_parts and self._hollow(weight, target)
        q = carried(self.load(weight, streams, pieces), target.scheme, rounding=entry.method == ROUND)
        if not streams:
            return q
        assert form.codes is not None
        return streamed(q, form.codes, weight, _contiguous(pieces))


def _floats(q: QTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of a tensor in a float type, a run at a time, in memory that the next ones take."""
    rows, cols = view_shape(q.shape, Block(1, 0))
    chunks = list(row_chunks(rows, cols, _FLOATS))
    room = torch.empty(chunks[0].stop if chunks else 0, cols, dtype=dtype)
    return (q.rows(some.start, some.stop, room[: some.stop - some.start]) for some in chunks)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _is_own(scheme: Scheme | None, before: Scheme) -> bool:
    """Whether it has the grid of what was before, under scales that are no coarser."""
    return scheme is not None and scheme.grid == before.grid and scheme.scale in (before.scale, *FLOATS)


def _exact_minima(old: Scheme, new: Scheme) -> bool:
    """Whether minima that come in for integer zero points change no value.

    Products of a code of 8 bits and a float16, and differences of such products of one float, are exact in float32, and
    none is infinite; so are the minima, which are then stored exactly or refused.
    """
    plain = old.scale == "f16" and not old.nested and not new.nested
    return plain and old.zero in ("none", "int") and new.zero == "min"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spelling(made: QTensor, weight: Weight) -> str:
    """What is spelled otherwise in a weight whose codes are carried over."""
    old, new = weight.scheme, made.scheme
    assert old is not None
    words = ["codes as they are"] if old.grid == new.grid else [f"codes of {new.grid.name}, which has its levels"]
    words += [f"scales in {new.scale}, exact"] if old.scale != new.scale and not new.nested else []
    words += ["quantized scales written out"] if old.nested and not new.nested else []
    words += ["zero points respelled"] if old.zero != new.zero else []
    if row_block(old.block, made.shape[-1]) != row_block(new.block, made.shape[-1]):
        words.append(f"each scale of {old.block} repeated for {new.block}")
    return "; ".join(words)


def plan_of(goal: Goal, changes: Sequence[Change]) -> Plan:
    """The plan that is carried out."""
    return Plan(goal.format.replace("_", "-"), tuple(change.entry for change in changes), {}, "convert")
