"""A checkpoint with blocks of rows of some weights apart (`_rows.py`), or joined again; nothing is copied to look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError, UsageError
from lowbit.formats import Spec, Weight
from lowbit.stages._experts import spread
from lowbit.stages._rows import HOLDS, Runs, block_name, blocks_of, joined, places, places_name, rows_of
from lowbit.stages._weightfile import Slot, WeightFile
from lowbit.stages.checkpoint import Checkpoint


def apart_in_rows(source: Checkpoint, wanted: Mapping[str, Sequence[Runs]]) -> Checkpoint:
    """A view in which blocks of rows of some weights are weights; what is tied to one of these is not there.

    Raises:
        UsageError: rows that are not those of the weight, each once.
    """
    if not wanted:
        return source
    made = {name: _apart(source, name, blocks) for name, blocks in wanted.items()}
    tied = source.tied if source.config.get("tie_word_embeddings") is True else {}
    made |= {alias: {} for alias, name in tied.items() if name in wanted}
    new = {weight.name: (weight, file) for found in made.values() for weight, file in found.values()}
    whole = {block: name for name, found in made.items() for block in found}
    edits = {name: partial(_rows, w.rows, source.edits.get(whole[name])) for name, (w, _) in new.items() if w.rows}
    return replace(
        source,
        specs=spread(
            source.specs, {n: {b: Spec(w.dtype, w.shape) for b, (w, _) in f.items()} for n, f in made.items()}
        ),
        weights=spread(source.weights, {name: {b: w for b, (w, _) in found.items()} for name, found in made.items()}),
        files=spread(source.files, {name: {b: file for b, (_, file) in found.items()} for name, found in made.items()}),
        edits={name: edit for name, edit in source.edits.items() if name not in made} | edits,
    )


def _apart(source: Checkpoint, name: str, blocks: Sequence[Runs]) -> dict[str, tuple[Weight, WeightFile]]:
    """The blocks of a weight, and the places of its rows, each with a file that has it alone."""
    weight, file = source.weights.get(name), source.files.get(name)
    if weight is None or file is None or sum(b - a for runs in blocks for a, b in runs) != weight.shape[0]:
        raise UsageError(f"{name} of {source.path} is not the weight whose rows are to be in blocks")
    try:
        order = places(blocks)
    except FormatError as error:
        raise UsageError(f"{name}: {error}") from None
    found = {}
    for number, runs in enumerate(blocks):
        shape = (sum(b - a for a, b in runs), *weight.shape[1:])
        block = replace(weight, name=block_name(name, number), shape=shape, rows=runs)
        found[block.name] = (block, file.alone(name, block.name))
    if order is not None:
        at = Weight(places_name(name), tuple(order.shape), order.dtype)
        slot = Slot(Spec(at.dtype, at.shape), 0, 0)
        found[at.name] = (at, WeightFile(file.path, file.size, {at.name: slot}, values={at.name: order}))
    return found


def _rows(runs: Runs, edit: Callable[[Tensor], Tensor] | None, tensor: Tensor) -> Tensor:
    """Some rows of a weight: a view where they are one run."""
    whole = edit(tensor) if edit else tensor
    return whole[runs[0][0] : runs[0][1]] if len(runs) == 1 else whole.index_select(0, rows_of(runs))


def joined_rows(source: Checkpoint, form: str, dtype: torch.dtype | None = None, lossy: bool = False) -> Checkpoint:
    """A view for another format than the one that holds blocks: float weights, in `dtype` or their own, that are whole.

    Raises:
        UnsupportedError: a format of quantized weights; a type that does not have the values, unless `lossy`.
    """
    blocks = blocks_of(source.weights)
    if not blocks or form == HOLDS:
        return source
    if form != "float":
        raise UnsupportedError(
            f"{next(iter(blocks))} is in blocks of rows, each in a scheme of its own, which --format {HOLDS} alone "
            "holds; convert it to float first"
        )
    whole = {name: _whole(name, parts, dtype) for name, parts in blocks.items()}
    for name, weight in whole.items() if not lossy else ():
        _check_exact(source, blocks[name], weight.dtype)
    names = {name: [each.name for each in parts] + [places_name(name)] for name, parts in blocks.items()}
    pieces = {
        name: [p for n in found if n in source.weights for p in source.pieces(n)] for name, found in names.items()
    }
    # Read is the first piece of the first block, which the edit then replaces.
    files = {name: source.files[found[0]].alone(found[0], name) for name, found in pieces.items()}
    edits = {name: partial(_dequantized, source, blocks[name], weight.dtype) for name, weight in whole.items()}
    specs = {name: Spec(weight.dtype, weight.shape) for name, weight in whole.items()}
    gone = {piece for found in pieces.values() for piece in found}
    return replace(
        source,
        specs=spread(source.specs, at_first(pieces, specs)),
        weights=spread(source.weights, at_first(names, whole)),
        files=spread(source.files, at_first(pieces, files)),
        edits={name: edit for name, edit in source.edits.items() if name not in gone} | edits,
    )


def at_first(names: Mapping[str, Sequence[str]], values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of several names the value of the whole at the first, and nothing at the others."""
    return {
        name: {whole: values[whole]} if at == 0 else {}
        for whole, found in names.items()
        for at, name in enumerate(found)
    }


def _whole(name: str, blocks: Sequence[Weight], dtype: torch.dtype | None) -> Weight:
    rows = sum(block.shape[0] for block in blocks)
    return Weight(name, (rows, *blocks[0].shape[1:]), dtype or blocks[0].dtype)


def _check_exact(source: Checkpoint, blocks: Sequence[Weight], dtype: torch.dtype) -> None:
    for block in blocks:
        values = source.dequantized(block.name, torch.float32)
        if not torch.equal(values.to(dtype).float(), values):
            raise UnsupportedError(
                f"{block.name} would not stay as it is in {str(dtype).removeprefix('torch.')}, which does not have its "
                "values; --scheme f32 does, and --lossy rounds them"
            )


def _dequantized(source: Checkpoint, blocks: Sequence[Weight], dtype: torch.dtype, _: Tensor) -> Tensor:
    return joined([source.dequantized(each.name, dtype) for each in blocks], [each.rows for each in blocks])
