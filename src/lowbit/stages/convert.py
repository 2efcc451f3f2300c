"""Convert: the weights of a checkpoint into another format, lossless where that holds them, which is said before.

Nothing is written until it is known of every weight what becomes of it (`_changes`). Then weights go over one by one,
as `quantize` makes them: packed, written, read back, compared, journalled.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar, final

from torch import Tensor

from lowbit import plugins
from lowbit.budget import Estimate, MemoryWatch, plan_memory
from lowbit.errors import UnsupportedError
from lowbit.formats import Format, Weight, _float
from lowbit.methods import Method
from lowbit.schemes import Scheme
from lowbit.stages import _words as words
from lowbit.stages._adapter import ADAPTER, CONFIG, WEIGHTS
from lowbit.stages._changes import COPY, METHODS, Change, Changer, Goal, model_dtype, plan_of
from lowbit.stages._experts import apart
from lowbit.stages._history import CONVERSION, PLAN, conversion_note
from lowbit.stages._holders import held_by
from lowbit.stages._pages import kept_pages
from lowbit.stages._rooms import Rooms
from lowbit.stages._store import store, whole
from lowbit.stages._weightfile import read_json
from lowbit.stages.checkpoint import Checkpoint, require_explained, swapped
from lowbit.stages.plan import Entry, Plan, arranged, check_told, tied_names
from lowbit.stages.quantize import Error, Progress, as_done, one_torch_thread, silent
from lowbit.stages.write import Output, copy_atomic, pieces_digest, write_atomic
from lowbit.tensors import QTensor, scale_shape, scheme_bytes

R = TypeVar("R")
_TEMPORARY = 32.0  # bytes per element of a piece whose values are compared
_SPREAD = 64  # bytes per block, where blocks are cut into smaller ones
_OUTDATED = ("report.json", "report.md", "report.html", PLAN, CONVERSION)


@final
@dataclass(frozen=True)
class Conversion:
    """What a conversion does, known before it starts.

    Attributes:
        source: the checkpoint.
        goal: what was asked for.
        changes: one for each weight, in order.
        way: memory, and how it works to stay there.
        folder: where scratch files are made.
    """

    source: Checkpoint
    goal: Goal
    changes: tuple[Change, ...]
    way: Estimate
    folder: Path

    @property
    def plan(self) -> Plan:
        """The plan that is carried out."""
        return plan_of(self.goal, self.changes)

    @property
    def lossless(self) -> bool:
        """Whether every value stays."""
        return all(change.lossless for change in self.changes)

    def changer(self) -> Changer:
        """What makes the weights."""
        rooms = Rooms(self.folder, self.way.scratch)
        return Changer(self.source, self.goal, model_dtype(self.source), rooms, self.way.piece)


def plan_conversion(
    source: Checkpoint, goal: Goal, folder: Path, ram: int | None, threads: int, progress: Progress = silent
) -> Conversion:
    """Find out what becomes of every weight: quantized ones are read, tried, and measured where they change.

    Raises:
        UnsupportedError: the target holds nothing like one of them.
        FormatError: a weight is damaged.
        ResourceError: the memory limit is too small.
    """
    check_told(source, goal.form)
    require_explained(source)
    tied = tied_names(source)
    kept = {
        name: Change(weight, Entry(_kept(source, weight, goal), COPY, _reason(source, tied.get(name)), tied.get(name)))
        for name, weight in source.weights.items()
        if weight.scheme is None
    }
    left, reasons, changes = [source.weights[name] for name in source.weights if name not in kept], {}, dict(kept)
    way = _estimate(source, goal, left, ram, threads, again=goal.format == _float.NAME)
    if goal.format != _float.NAME:
        found = _each(source, goal, folder, way, left, lambda changer, weight: changer.lossless(weight), progress)
        changes |= {name: change for name, change in found.items() if isinstance(change, Change)}
        reasons = {name: reason for name, reason in found.items() if isinstance(reason, str)}
        left = [source.weights[name] for name in reasons]
    if left:
        way = _estimate(source, goal, left, ram, threads, again=True)

    def change(changer: Changer, weight: Weight) -> Change:
        if goal.format == _float.NAME:
            return changer.to_float(weight)
        return changer.lossy(weight, reasons[weight.name])

    def changed(goal: Goal) -> dict[str, Change]:
        return _each(source, goal, folder, way, left, change, progress)

    changes |= changed(goal)
    changer = Changer(source, goal, model_dtype(source), Rooms(folder, way.scratch), way.piece)
    changes = _agreeing(changer, changes, changed)
    return Conversion(source, goal, tuple(changes[name] for name in source.weights), way, folder)


def _agreeing(
    changer: Changer, changes: dict[str, Change], again: Callable[[Goal], dict[str, Change]]
) -> dict[str, Change]:
    """The changes; if the format does not take them beside each other, what is lost goes into the scheme of most.

    Raises:
        UnsupportedError: none of them is quantized in the target, or they are refused together all the same.
    """
    source, goal = changer.source, changer.goal
    quantized = [each for each in changes.values() if each.before.scheme]
    schemes = Counter(str(each.entry.weight.scheme) for each in quantized if each.entry.weight.scheme)
    if quantized and not schemes and goal.format != _float.NAME:
        why = Counter(each.why for each in quantized).most_common(1)[0][0]
        name = next(each.before.name for each in quantized if each.why == why)
        raise UnsupportedError(f"{name}: {why}{_held(changer, [each.before for each in quantized])}")
    try:
        goal.form.config([changes[name].entry.weight for name in source.weights], source.config)
        return changes
    except UnsupportedError:
        if goal.scheme or len(schemes) < 2:
            raise
    changes = changes | again(replace(goal, scheme=schemes.most_common(1)[0][0]))
    goal.form.config([changes[name].entry.weight for name in source.weights], source.config)
    return changes


def _held(changer: Changer, lost: Sequence[Weight]) -> str:
    """The end of a sentence: which formats have every value of weights that are lost; one of each kind is tried."""
    own, names = changer.source, {weight.name for weight in lost}

    def holds(name: str, form: Format) -> bool:
        source = apart(own, name)
        new = (each for each in source.weights.values() if each.name in names or each.name not in own.weights)
        some = {(weight.scheme, weight.shape): weight for weight in new if weight.scheme}.values()
        other = replace(changer, source=source, goal=replace(changer.goal, format=name))
        found = [other.lossless(weight) for weight in some] if name != own.format else []
        targets = [change.entry.weight for change in found if isinstance(change, Change)]
        form.config(targets, source.config)
        return 0 < len(targets) == len(some)

    with one_torch_thread():
        return held_by(holds)


def _kept(source: Checkpoint, weight: Weight, goal: Goal) -> Weight:
    """A weight that is not quantized, as the target's container has it: transposed ones turned where it turns them."""
    turns = goal.form.arrange is not None and swapped(source.config, weight)
    if turns != weight.swapped:
        weight = replace(weight, shape=weight.shape[::-1], swapped=turns)
    return arranged(weight, "keep", goal.form, source.config)


def _reason(source: Checkpoint, tied: str | None) -> str:
    return f"shares the storage of {tied}" if tied else "not quantized"


def _each(
    source: Checkpoint,
    goal: Goal,
    folder: Path,
    way: Estimate,
    weights: Sequence[Weight],
    work: Callable[[Changer, Weight], R],
    progress: Progress,
) -> dict[str, R]:
    """Do something with every weight on all threads, by name."""
    changer = Changer(source, goal, model_dtype(source), Rooms(folder, way.scratch), way.piece)
    total, done, found = sum(prod(weight.shape) for weight in weights), 0, {}
    with one_torch_thread(), kept_pages(), ThreadPoolExecutor(way.threads, "check") as pool:
        for weight, result in as_done(pool, lambda weight: work(changer, weight), weights, 2 * way.threads):
            found[weight.name] = result
            done += prod(weight.shape)
            progress("check", done, total)
    return found


def _estimate(
    source: Checkpoint, goal: Goal, weights: Sequence[Weight], ram: int | None, threads: int, again: bool
) -> Estimate:
    """Memory to try weights with the codes that they have, or, `again`, to dequantize and quantize them."""
    methods: list[Method] = [plugins.load("methods", name) for name in METHODS]
    return plan_memory(
        limit=ram,
        threads=threads,
        element_bytes=max([_TEMPORARY, *(method.workspace for method in methods if again)]),
        buffers=max((_buffers(source, goal, weight, again) for weight in weights), default=0),
        fixed=max((_fixed(goal, weight) for weight in weights), default=0) + _joining(source),
    )


def _buffers(source: Checkpoint, goal: Goal, weight: Weight, again: bool) -> int:
    """Bytes of a weight's codes as they are read, made and read back, of its values, and of what is stored."""
    count = prod(weight.shape)
    if goal.format == _float.NAME:
        return count * (1 + 4 * (2 if weight.swapped else 1))
    stored = sum(source.specs[piece].nbytes for piece in source.pieces(weight.name))
    return count * (8 if again else 4) + 2 * max(stored, count)


def _joining(source: Checkpoint) -> int:
    """Bytes of a weight that is joined from blocks of rows: the blocks, these as one, and in their order."""
    made = [weight for name, weight in source.weights.items() if weight.scheme is None and name in source.edits]
    return max((3 * prod(weight.shape) * weight.dtype.itemsize for weight in made), default=0)


def _fixed(goal: Goal, weight: Weight) -> int:
    assert weight.scheme is not None
    return _SPREAD * prod(scale_shape(weight.shape, weight.scheme.block))


def refuse(conversion: Conversion) -> None:
    """Stop a conversion that changes values, unless that was asked for.

    Raises:
        UnsupportedError: which weights, why, and by how much.
    """
    lost = [change for change in conversion.changes if not change.lossless]
    if not lost or conversion.goal.lossy:
        return
    first, error = lost[0], max(change.error.relative for change in lost)
    held = "" if conversion.goal.format == _float.NAME else _held(conversion.changer(), [each.before for each in lost])
    others = f" and {len(lost) - 1} more would not stay as they are" if lost[1:] else " would not stay as it is"
    raise UnsupportedError(
        f"{first.before.name} ({first.before.scheme}){others} in {conversion.goal.format}: "
        f"{first.why}; with --lossy the relative squared error is {words.short(error)} at most{held}"
    )


def convert(conversion: Conversion, output: Output, watch: MemoryWatch, progress: Progress = silent) -> None:
    """Make every weight that `output` does not have yet.

    Raises:
        ResourceError: the disk is full, or the memory limit was passed.
        VerifyError: what was stored is not what was meant.
    """
    changes = [change for change in conversion.changes if not change.entry.tied]
    todo = [change for change in changes if change.before.name not in output.records]
    total, way = sum(prod(change.before.shape) for change in changes), conversion.way
    done, changer = total - sum(prod(change.before.shape) for change in todo), conversion.changer()

    def work(change: Change) -> None:
        start, name = time.perf_counter(), change.before.name
        pieces = conversion.source.stored(name)
        source, error = pieces_digest(list(pieces.values())), change.error
        value = changer.value(change.before, change.entry, pieces)
        facts = {**error.facts, "method": change.entry.method}
        facts |= {"seconds": time.perf_counter() - start}
        store(output, change.entry, value, source, facts, scratch=way.scratch, workers=way.threads)

    progress("convert", done, total)
    with one_torch_thread(), kept_pages(), ThreadPoolExecutor(way.threads, "convert") as pool:
        for change, _ in as_done(pool, work, todo, 2 * way.threads):
            watch.check()
            done += prod(change.before.shape)
            progress("convert", done, total)


def finish(conversion: Conversion, output: Output) -> None:
    """Write what is not a weight: configuration, files that are carried along, low-rank terms beside the weights."""
    source = conversion.source
    adapter = source.root / ADAPTER
    if source.path.is_dir() and (adapter / CONFIG).exists():
        copy_atomic(adapter / WEIGHTS, output.path / ADAPTER / WEIGHTS)
        config = {**read_json(adapter / CONFIG), "base_model_name_or_path": str(output.path)}
        write_atomic(output.path / ADAPTER / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    write_atomic(output.path / CONVERSION, conversion_note(source))
    output.finish(replace(source, extras=lasting(source)))


def lasting(source: Checkpoint) -> tuple[Path, ...]:
    """Files beside the weights that are true of what is made of a checkpoint too.

    Its reports are not, nor those in which its format declares itself, nor what says that an adapter is for it.
    """
    found = {*_OUTDATED, f"{ADAPTER}/{CONFIG}"}
    if source.format:
        form: Format = plugins.load("formats", source.format)
        with suppress(UnsupportedError):  # some are read in mixtures that are not written
            found |= set(form.config(list(source.weights.values()), source.config))
    gone = found - {"config.json"}
    return tuple(extra for extra in source.extras if str(extra.relative_to(source.root)) not in gone)


def remake(conversion: Conversion) -> Callable[[Entry], QTensor | Tensor]:
    """What makes a weight again, for `verify`."""
    changer, before = conversion.changer(), {change.before.name: change.before for change in conversion.changes}
    return lambda entry: whole(changer.value(before[entry.weight.name], entry))


@final
@dataclass(frozen=True)
class Group:
    """Weights to which the same happens: how many, their schemes, how, why, and the largest error among them.

    `tensors` is the name of the first, `lossless` whether their values stay.
    """

    name: str
    tensors: int
    before: str | None
    after: str | None
    method: str | None
    note: str
    lossless: bool
    error: float
    largest: float


@final
@dataclass(frozen=True)
class Converted:
    """What a conversion did, or would do.

    Attributes:
        path: of the result.
        format: its format.
        source: path and format of what was read.
        lossless: whether every value stayed, to the bit.
        largest: greatest deviation of a value.
        error: greatest relative squared error of a weight.
        before, after: bytes of the weights.
        bits: mean bits of the weights that were quantized, before and after.
        groups: what happened, weights to which the same did together.
        verified: weights that were read back and compared.
        resumed: weights taken over from an interrupted run.
        seconds: of each stage.
        memory: peak, estimate and limit, bytes.
    """

    path: str
    format: str
    source: tuple[str, str | None]
    lossless: bool
    largest: float
    error: float
    before: int
    after: int
    bits: tuple[float, float]
    groups: tuple[Group, ...]
    verified: int = 0
    resumed: int = 0
    seconds: Mapping[str, float] | None = None
    memory: tuple[int, int, int | None] = (0, 0, None)


def groups(conversion: Conversion) -> tuple[Group, ...]:
    """What happens, in order; names that differ in numbers alone count as one."""
    found: dict[tuple[Any, ...], list[Change]] = {}
    for change in conversion.changes:
        entry, after = change.entry, change.entry.weight.scheme
        stem = re.sub(r"\d+", "*", entry.weight.name) if not change.lossless else ""
        how = (_named(change.before.scheme), _named(after), entry.method, change.why or entry.reason, change.lossless)
        found.setdefault((stem, *how), []).append(change)
    return tuple(
        Group(
            members[0].before.name, len(members), before, after, method, note, lossless,
            max(each.error.relative for each in members), max(each.error.largest for each in members),
        )
        for (_, before, after, method, note, lossless), members in found.items()
    )  # fmt: skip


def _named(scheme: Scheme | None) -> str | None:
    return str(scheme) if scheme else None


def summary(conversion: Conversion, path: Path) -> Converted:
    """What the conversion would do."""
    source, plan, changes = conversion.source, conversion.plan, conversion.changes
    error = sum((change.error for change in changes), Error())
    chosen = [change for change in changes if change.before.scheme]
    count = max(sum(prod(change.before.shape) for change in chosen), 1)
    bits = [sum(_bytes(weight) for weight in side) * 8 / count for side in
            ([each.before for each in chosen], [each.entry.weight for each in chosen])]  # fmt: skip
    return Converted(
        path=str(path),
        format=plan.format,
        source=(str(source.path), source.format),
        lossless=conversion.lossless,
        largest=error.largest,
        error=max((change.error.relative for change in changes), default=0.0),
        before=source.nbytes,
        after=sum(plan.stored_bytes(entry) for entry in plan.entries),
        bits=(bits[0], bits[1]),
        groups=groups(conversion),
    )


def _bytes(weight: Weight) -> int:
    return scheme_bytes(weight.scheme, weight.shape) if weight.scheme else prod(weight.shape) * weight.dtype.itemsize
