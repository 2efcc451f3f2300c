"""A checkpoint as a model of `transformers` whose linear layers compute on the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from lowbit.arguments import at_least_one, public
from lowbit.errors import CheckpointError, FormatError, UnsupportedError
from lowbit.formats import Weight
from lowbit.formats._ggml import BLOCKS, BlockType, type_of, unpack
from lowbit.formats._gguf import own_rows
from lowbit.native import WEIGHT_DTYPES, Room
from lowbit.runtime.linear import Linear
from lowbit.runtime.panels import Packed, pack, pack_blocks, pack_dense, pack_wide
from lowbit.runtime.stored import Stored, keep_stored, read_stored, stored_path
from lowbit.runtime.table import Table
from lowbit.stages._model import Blueprint, open_blueprint, open_generation, open_tokenizer
from lowbit.stages._rooms import Rooms
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint, swapped
from lowbit.tensors import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:  # the run-time check of annotations needs names, and importing these costs a second
    PreTrainedModel = PreTrainedTokenizerBase = object

EMBEDDING = "model.embed_tokens.weight"  # of all models that the native decoder knows
LOOKED_UP = "its rows are looked up, not multiplied"  # why a weight is not on the kernels
_CHECKED = 1024  # rows at a time, so that codes stay near


@final
@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that runs, and how.

    Attributes:
        checkpoint: where it comes from.
        model: of `transformers`; its `generate` works.
        kernels: weights that the kernels multiply, by name: their packed form.
        others: weights that are computed with in another way, with the reason.
        table: the embedding, where it is not in the model, which does not run then.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    kernels: dict[str, Packed]
    others: dict[str, str]
    table: Table | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That lies with the checkpoint.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        return open_tokenizer(self.checkpoint)


@public
def load(
    path: str | Path,
    *,
    exact: bool = False,
    reference: bool = False,
    threads: int | None = None,
    trust_remote_code: bool = False,
    cache: str | Path | None = None,
) -> PreTrainedModel:
    """A model of `transformers` from a checkpoint in any format that is read; see `open_model`.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    at_least_one(threads=threads)
    return open_model(path, exact, reference, threads, trust_remote_code, Path(cache) if cache else None).model


def open_model(
    path: str | Path,
    exact: bool = False,
    reference: bool = False,
    threads: int | None = None,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> Loaded:
    """Fill the model's class with the weights of a checkpoint; matrices stay packed and are multiplied as they are.

    Activations and everything that is no matrix are in float32. Gradients reach inputs, not quantized weights.

    Args:
        path: directory, file or hub name of a checkpoint, float or quantized.
        exact: whether the kernels take inputs as they are; else they round them to int8 in blocks of 32, where the grid
            of the weight is one of integers, and them and weights of floats to 16 bits.
        reference: whether every weight is dequantized and multiplied by `torch` instead: slow and obviously right.
        threads: of the kernels; None for those of `torch`.
        trust_remote_code: run Python code that the checkpoint brings.
        cache: folder where the weights are kept in the order in which they are multiplied, for the next call.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    return open_weights(open_checkpoint(path, trust_remote_code), exact, reference, threads, cache).loaded()


@final
@dataclass(frozen=True, eq=False)
class Opened:
    """The weights of a checkpoint as they are multiplied, and the class that they belong to, not filled yet.

    Attributes:
        checkpoint: where they come from.
        blueprint: of the model.
        places: paths of the linear layers of each matrix.
        packed: matrices that the kernels multiply.
        others: weights that are computed with in another way, with the reason.
        rest: weights that something else reads, too.
        threads: of the kernels.
    """

    checkpoint: Checkpoint
    blueprint: Blueprint
    places: Mapping[str, list[str]]
    packed: dict[str, Packed]
    others: dict[str, str]
    rest: frozenset[str]
    threads: int

    def loaded(self) -> Loaded:
        """The whole model."""
        model, generation = self.blueprint.with_parts(self.rest), open_generation(self.checkpoint)
        if generation and model.can_generate():
            model.generation_config = generation
        _put(model, self.places, self.packed, self.threads)
        return Loaded(self.checkpoint, model, self.packed, self.others)

    def bare(self) -> Loaded | None:
        """The model without its embedding, which is left as it is stored; None where it is not all that is missing."""
        matrices = [name for name in self.rest if len(self.checkpoint.weights[name].shape) != 1]
        readers = [path for path, sources in self.blueprint.sources("").items() if {*sources} & {*matrices}]
        one = len(matrices) == 1 and readers == [EMBEDDING]
        table = table_of(self.checkpoint, matrices[0], self.threads) if one else None
        if table is None:
            return None
        model = self.blueprint.taken()
        _put(model, self.places, self.packed, self.threads)
        others = {name: why for name, why in self.others.items() if name != matrices[0]}
        return Loaded(self.checkpoint, model, self.packed, others, table)


def open_weights(
    checkpoint: Checkpoint,
    exact: bool = False,
    reference: bool = False,
    threads: int | None = None,
    cache: Path | None = None,
) -> Opened:
    """As `open_model`, up to the model itself; raises like it."""
    blueprint = open_blueprint(checkpoint, torch.float32, vectors=True)
    places = _matrices(blueprint)
    others, workers = dict(_left_out(blueprint, places.keys(), reference)), threads or torch.get_num_threads()
    file = stored_path(cache, checkpoint, f"weights, exact {exact}") if cache and not reference else None
    stored = read_stored(file) if file and file.exists() else None
    if stored is None:
        stored = pack_all(checkpoint, [name for name in places if name not in others], exact, workers)
        if file:
            keep_stored(file, stored)
    packed, others = dict(stored.matrices), others | stored.facts["others"]
    if not packed.keys() <= places.keys():
        raise CheckpointError(f"{file} has weights that the model does not have; delete it")
    rest = checkpoint.weights.keys() - (packed.keys() - _shared(blueprint))
    return Opened(checkpoint, blueprint, places, packed, others, frozenset(rest), workers)


def table_of(checkpoint: Checkpoint, name: str, threads: int) -> Table | None:
    """An embedding as rows that are looked up; None where it is none that is read so."""
    weight = checkpoint.weights[name]
    if weight.swapped or weight.rows or name in checkpoint.terms or name in checkpoint.edits:
        return None
    kind = type_of(weight.scheme) if weight.scheme and checkpoint.format == "gguf" else ""
    stored = checkpoint.tensor(name) if kind or not weight.scheme else None
    if kind == "nvfp4" or stored is None or stored.dtype not in (torch.uint8, *WEIGHT_DTYPES):
        return None
    if kind:
        _check_blocks(checkpoint, weight, BLOCKS[kind], stored, threads)
    return Table(Room().take(tuple(stored.shape), stored.dtype).copy_(stored), kind or "")


def _check_blocks(checkpoint: Checkpoint, weight: Weight, kind: BlockType, stored: Tensor, threads: int) -> None:
    """Raise FormatError where rows of blocks cannot be looked up."""
    try:
        with ThreadPoolExecutor(threads) as pool:
            parts = torch.split(stored, _CHECKED)
            list(pool.map(lambda rows: unpack(kind.name, rows, (len(rows), weight.shape[1])).shape, parts))
    except FormatError:
        checkpoint.load(weight.name)  # says where it is
        raise


def _matrices(blueprint: Blueprint) -> dict[str, list[str]]:
    """Weights of the checkpoint that are the whole matrix of linear layers, and the paths of these."""
    found: dict[str, list[str]] = {}
    for path, shape, names in blueprint.linear_layers():
        weight = blueprint.checkpoint.weights[next(iter(names))] if len(names) == 1 else None
        if weight and weight.shape[:: -1 if _turned(blueprint.checkpoint, weight) else 1] == shape:
            found.setdefault(weight.name, []).append(path)
    return found


def _shared(blueprint: Blueprint) -> set[str]:
    """Weights that something else than linear layers reads too (an embedding that is tied to the output layer)."""
    layers = {f"{path}.weight" for path, _, _ in blueprint.linear_layers()}
    sources = blueprint.sources("", aliases=True)
    return {name for parameter, names in sources.items() if parameter not in layers for name in names}


def _left_out(blueprint: Blueprint, whole: AbstractSet[str], reference: bool) -> Iterator[tuple[str, str]]:
    """Matrices that the kernels do not multiply, and why; `whole`: those that a linear layer has alone."""
    readers = blueprint.readers()
    for name, weight in blueprint.checkpoint.weights.items():
        if reference and (weight.scheme or name in whole):
            yield name, "reference"
        elif name not in whole and weight.scheme:
            yield name, _why(*readers.get(name, (None, 0)))


def _why(reader: type[nn.Module] | None, count: int) -> str:
    """Why no linear layer has a weight as it is."""
    if reader is None:
        return "the model does not read it"
    if count > 1:
        return "the model joins it with others"
    if issubclass(reader, nn.Embedding):
        return LOOKED_UP
    return f"{reader.__name__} does more than multiply by it"


def pack_all(checkpoint: Checkpoint, names: list[str], exact: bool, threads: int) -> Stored:
    """Weights as products read them, and why others are not; the largest first, so that no thread is left with it."""

    rooms = Rooms(Path(), scratch=False)  # fresh memory for each weight's codes would take longer than unpacking them
    room = Room()

    def work(name: str) -> Packed | str:
        try:
            return _pack(checkpoint, checkpoint.weights[name], exact, rooms, room)
        except UnsupportedError as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        order = sorted(names, key=lambda name: -prod(checkpoint.weights[name].shape))
        found = dict(zip(order, pool.map(work, order), strict=True))
    packed = {name: each for name in names if isinstance(each := found[name], Packed)}
    others = {name: each for name in names if isinstance(each := found[name], str)}
    return Stored({"others": others}, packed, {})


def _pack(checkpoint: Checkpoint, weight: Weight, exact: bool, rooms: Rooms, room: Room) -> Packed:
    if not exact and (found := _from_blocks(checkpoint, weight, room)):
        return found
    codes = rooms.codes("codes", weight.shape, weight.scheme) if weight.scheme else None
    value = checkpoint.load(weight.name, codes)
    if isinstance(value, QTensor):
        return pack(value, exact)
    turned = value.T if _turned(checkpoint, weight) else value
    return pack_dense(turned) if exact else pack_wide(turned)


def _from_blocks(checkpoint: Checkpoint, weight: Weight, room: Room) -> Packed | None:
    """A weight of a GGUF file at once, where there is such a way."""
    name = type_of(weight.scheme) if weight.scheme and checkpoint.format == "gguf" else None
    if name is None or weight.across:
        return None
    return pack_blocks(BLOCKS[name], checkpoint.tensor(weight.name), own_rows(weight), room=room)


def _turned(checkpoint: Checkpoint, weight: Weight) -> bool:
    """Whether a weight is stored as `[inputs, outputs]`; quantized ones are seen the other way."""
    return weight.scheme is None and swapped(checkpoint.config, weight)


def _put(model: PreTrainedModel, places: Mapping[str, list[str]], packed: dict[str, Packed], threads: int) -> None:
    """Set the layers that multiply on the kernels in the places of those that would not."""
    for name, weight in packed.items():
        for path in places[name]:
            parent, _, last = path.rpartition(".")
            bias = getattr(model.get_submodule(path), "bias", None)
            layer = Linear(weight, bias, threads)
            setattr(model.get_submodule(parent), last, layer)
