"""What `arch/gguf.toml` says: names and layouts of a model's tensors in a GGUF file and in a checkpoint."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from math import prod
from typing import Any, final

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.formats import Weight
from lowbit.tensors import QTensor, block_size

_ROWS = 256  # whose columns are put into another order at a time
_PLACE = re.compile(r"\\\{\\\}")


@final
@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint is in a GGUF file: the tensor there, and which of its slices (None: all of it)."""

    name: str
    expert: int | None = None


@final
@dataclass(frozen=True)
class Arch:
    """One row of the table.

    Attributes:
        arch: of llama.cpp.
        model_types: of transformers; the first is taken where a file does not tell.
        parts: of what reads in a model that sees too, which becomes the first of these and says `when`.
        sparse_type: the one that is taken where a file has experts.
        classes: of transformers, by model type.
        names: module of llama.cpp, without the layer, to module of transformers with {} for numbers.
        whole: the same of tensors whose last part is not the same in both.
        keys: metadata key, without the architecture, to names in config.json.
        products: metadata key to names in config.json whose product it is.
        sums: metadata key to names in config.json whose sum it is.
        constants: metadata key to what it always is.
        when: what config.json says of the models that the row is for; of several the first fits.
        has: names in config.json to what one of these lists or texts has; empty for any.
        marked: a module that all of these have, and none of the row's without one.
        interleaved: rows of q and k are in another order in the file.
        grouped: name in config.json of the number of groups in which transformers has the rows of q, k and v.
        tiled: what has heads by group that the file has in another order. `heads`: names in config.json of how many
            groups and heads there are. Of tensors `rows` are all such heads, `after` are such after rows of queries and
            of keys, each the product of `first`, and `columns` are such heads.
        plus_one: norms are stored with 1 added.
        plain: norms that are not.
        defaults: what llama.cpp needs of config.json, and has no default of its own for.
        decays: tensors that are stored as -exp of what transformers has.
        squeezed: tensors whose last axis but one is 1 in transformers and not there in the file.
        folded: vectors that are matrices in the file, to the name in config.json of their rows; empty for a column.
        kinds: name in config.json of what layers are.
        layers: what `layer_types` in config.json may say of a layer, to the keys that are lists, with 0 for layers of
            other kinds; a header tells the kind of a layer by the first of them.
        local: kind of layer that has a plain rope of its own in `rope_parameters`, which are by kind then.
        equal: names in config.json that must say the same.
        in_rope: names in config.json that are among the parameters of its rope.
        stretch: `mscale_all_dim` of a yarn is multiplied by it in a file; 0 where llama.cpp knows of none.
        rows: metadata key to a tensor whose number of rows it is.
        tied: there is never an output layer.
        rotary: name in config.json of the share of a head that is rotated.
        partial: whether llama.cpp rotates a part of a head.
        requires: what config.json must say, where it says anything of it; a list has what it may say.
        every: every so manieth layer is of the last of `layers`, where a file does not tell.
        needs: what config.json must not leave empty.
        rhythm: lists in config.json that have 0 for every so manieth layer, and 1 for the others.
        largest: number of layers of the model whose `query_pre_attn_scalar` is the width over the number of heads;
            that of others is the width of a head. 0 where there is none.
        ranks: numbers of layers, alone or with the size of the vocabulary, with which there is no `q_lora_rank`.
        boundless: model types of which llama.cpp attends to all tokens, whatever window there is.
        biases: name in config.json of whether there are biases, to a tensor of the first layer that is there if so.
        told: by model type the sizes of config.json that must be there to do without the defaults of transformers.
    """

    arch: str
    model_types: tuple[str, ...]
    sparse_type: str
    classes: Mapping[str, str]
    names: Mapping[str, str]
    whole: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]
    when: Mapping[str, Any]
    requires: Mapping[str, tuple[Any, ...]]
    told: Mapping[str, tuple[str, ...]]
    parts: tuple[str, ...] = ()
    products: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    has: Mapping[str, str] = field(default_factory=dict)
    marked: str = ""
    interleaved: bool = False
    grouped: str = ""
    tiled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    plus_one: bool = False
    plain: tuple[str, ...] = ()
    decays: tuple[str, ...] = ()
    squeezed: tuple[str, ...] = ()
    folded: Mapping[str, str] = field(default_factory=dict)
    kinds: str = "layer_types"
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    local: str = ""
    equal: tuple[str, ...] = ()
    in_rope: tuple[str, ...] = ()
    stretch: float = 0.0
    tied: bool = False
    rotary: str = "partial_rotary_factor"
    partial: bool = False
    every: int = 4
    needs: tuple[str, ...] = ()
    rhythm: Mapping[str, int] = field(default_factory=dict)
    largest: int = 0
    ranks: tuple[tuple[int, ...], ...] = ()
    boundless: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)

    def place(self, name: str) -> Place | None:
        """Where a tensor with this name in transformers belongs; None where llama.cpp has no such tensor."""
        module, _, part = name.rpartition(".")
        for (stem, whole), pattern in self._patterns.items():
            match = pattern.fullmatch(name if whole else module)
            if match:
                layer, expert = (*match.groups(), None, None)[:2]
                prefix = "" if layer is None else f"blk.{layer}."
                end = "" if whole else f".{part}"
                return Place(f"{prefix}{stem}{end}", None if expert is None else int(expert))
        return None

    def name(self, stored: str, expert: int = 0) -> str | None:
        """The name in transformers of a tensor of the file; None where there is none."""
        match = re.fullmatch(r"(?:blk\.(0|[1-9]\d*)\.)?(\w[\w.]*)", stored)
        if match is None:
            return None
        stem, _, part = match[2].rpartition(".")
        whole, module = self.whole.get(match[2]), self.names.get(stem)
        if whole is None and module is not None and part in ("weight", "bias"):
            whole = f"{module}.{part}"
        if whole is None or ("{}" in whole) != (match[1] is not None):
            return None
        return whole.format(match[1], expert)

    def stacks(self, stored: str) -> bool:
        """Whether a tensor of the file holds that of every expert."""
        return self.names.get(_tail(stored).rpartition(".")[0], "").count("{}") == 2

    def file_shape(self, stored: str, weight: Weight) -> tuple[int, ...]:
        """Shape in the file of one member of a tensor, as which transformers has this weight."""
        shape = weight.shape
        if weight.folded:
            return weight.folded, prod(shape) // weight.folded
        return (*shape[:-2], *shape[-1:]) if _tail(stored) in self.squeezed else shape

    def own_shape(self, stored: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape in transformers of one member of a tensor of the file; None where that is impossible."""
        if self.stacks(stored):
            return shape[1:] if len(shape) == (3 if stored.endswith("weight") else 2) else None
        if _tail(stored) in self.folded:
            return (prod(shape),)
        return (*shape[:-1], 1, *shape[-1:]) if _tail(stored) in self.squeezed else shape

    @cached_property
    def _patterns(self) -> Mapping[tuple[str, bool], re.Pattern[str]]:
        """By tensor of the file and whether all of its name is told."""
        number = r"(0|[1-9]\\d*)"
        rows = [(True, self.whole), (False, self.names)]
        return {
            (stem, whole): re.compile(_PLACE.sub(number, re.escape(name)))
            for whole, names in rows
            for stem, name in names.items()
        }

    def arranged(self, weight: Weight, config: Mapping[str, Any]) -> Weight:
        """A weight with what is other about it in the file; `config` is that of transformers.

        Raises:
            UnsupportedError: the configuration does not tell the number of heads.
        """
        place = self.place(weight.name)
        tail = _tail(place.name) if place else ""
        stem = tail.removesuffix(".weight").removesuffix(".bias")
        norm = stem.endswith("norm") and weight.name.endswith(".weight") and stem not in self.plain
        plus = float(self.plus_one and norm)
        weight = replace(weight, plus=plus, decays=tail in self.decays)
        if tail in self.folded:
            name = self.folded[tail]
            return replace(weight, folded=_count(config, name) if name else prod(weight.shape))
        queries = self.keys.get("attention.head_count", ())
        if self.interleaved and stem in ("attn_q", "attn_k"):
            names = self.keys["attention.head_count_kv"] if stem == "attn_k" else queries
            return replace(weight, interleaved=_count(config, *names))
        if self.grouped and stem == "attn_qkv":
            groups = _count(config, self.grouped)
            return replace(weight, grouped=(groups, _count(config, *queries) // groups))
        return self._tiled(weight, stem, config) if self.tiled else weight

    def _tiled(self, weight: Weight, stem: str, config: Mapping[str, Any]) -> Weight:
        """A weight that may have heads by group; where a group has one head alone, the order is the same."""
        groups, heads = (_count(config, name) for name in self.tiled["heads"])
        each = heads // groups
        if each <= 1 or heads % groups:
            return weight
        if stem in self.tiled["columns"] and len(weight.shape) == 2:
            return replace(weight, across=(groups, each))
        first = 2 * prod(_count(config, name) for name in self.tiled["first"]) if stem in self.tiled["after"] else 0
        return replace(weight, tiled=(first, groups, each)) if first or stem in self.tiled["rows"] else weight

    def wants(self, key: str, value: object) -> bool:
        """Whether llama.cpp computes a model of which config.json says this."""
        return key not in self.requires or value in self.requires[key]

    @property
    def implied(self) -> Mapping[str, Any]:
        """What config.json says of a model that comes from a file."""
        return {**{key: values[0] for key, values in self.requires.items()}, **self.when}


def _tail(stored: str) -> str:
    """The name of a tensor of a file without its layer."""
    return re.sub(r"^blk\.\d+\.", "", stored)


def layer_of(stored: str) -> int:
    """The number of the layer that a tensor of a file belongs to; -1 for those of none."""
    match = re.match(r"blk\.(\d+)\.", stored)
    return int(match[1]) if match else -1


def _count(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that the configuration tells."""
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if type(value) is not int or value < 1:
        raise UnsupportedError(f"the configuration does not tell one number of heads for all layers ({names[0]})")
    return value


def shapes_of(stored: str) -> list[list[str]]:
    """For each axis of a tensor of a file the metadata keys whose product it is; empty where none is told."""
    stem, _, part = _tail(stored).rpartition(".")
    return _table()["shapes"].get(stem, []) if part == "weight" else []


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(files("lowbit").joinpath("arch/gguf.toml").read_text())


@cache
def archs() -> tuple[Arch, ...]:
    """The rows of the table, in order."""
    return tuple(_row(_table(), row) for row in _table()["gguf"])


def _row(table: Mapping[str, Any], row: Mapping[str, Any]) -> Arch:
    """A row with the tables that it names, joined."""

    def joined(kind: str) -> dict[str, Any]:
        return {key: value for name in row.get(kind, ()) for key, value in table[kind][name].items()}

    told, kinds = table["told"], row["model_types"]
    made = {
        "sparse_type": row.get("sparse_type", kinds[0]),
        "classes": {kind: table["classes"][kind] for kind in kinds},
        "names": joined("names"),
        "whole": joined("whole"),
        "keys": joined("keys"),
        "tiled": table["tiled"][row["tiled"]] if "tiled" in row else {},
        "when": row.get("when", {}) | dict.fromkeys(row.get("lacks", ())),
        "requires": _required(row),
        "told": {kind: (*told["base"], *told[kind]) for kind in kinds if kind in told},
    }
    given = {key: value for key, value in row.items() if key not in ("lacks", "without")}
    return Arch(**{key: _frozen(value) for key, value in (given | made).items()})


def _frozen(value: Any) -> Any:
    """With tuples in place of lists."""
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _required(row: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    told = row.get("requires", {}) | dict.fromkeys(row.get("without", ()))
    return {key: tuple(value) if isinstance(value, list) else (value,) for key, value in told.items()}


def arch_named(arch: str, tensors: Collection[str], value: Callable[[str], Any]) -> Arch | None:
    """The row of an architecture of llama.cpp that a file has with these tensors, and these values of its keys."""
    rows = [row for row in archs() if row.arch == arch and _told(row, value)]
    modules = {_tail(name).rpartition(".")[0] for name in tensors}
    marked = (row for row in rows if row.marked in modules)
    return next(marked, None) or next((row for row in rows if not row.marked), None)


def _told(row: Arch, value: Callable[[str], Any]) -> bool:
    """Whether a file says what the row is for, where it has a key for that."""
    keys = {names[0]: f"{row.arch}.{key}" for key, names in row.keys.items()}
    truths = {key: wanted for key, wanted in row.constants.items() if isinstance(wanted, bool)}
    told = all(value(keys[name]) == wanted for name, wanted in row.when.items() if name in keys)
    return told and all(value(f"{row.arch}.{key}") == wanted for key, wanted in truths.items())


def arch_of(config: Mapping[str, Any]) -> Arch | None:
    """The row of a model of transformers, or of what reads in one that sees too."""
    kind = config.get("model_type")
    rows = [row for row in archs() if kind in row.model_types or kind in row.parts]
    part = next((row for row in rows if kind in row.parts), None)
    return part or next((row for row in rows if _fits(row, config)), None)


def _fits(row: Arch, config: Mapping[str, Any]) -> bool:
    """Whether a row is for a model of its types of which config.json says this."""
    has = not row.has or any(each in (config.get(key) or ()) for key, each in row.has.items())
    return has and all(config.get(key) == value for key, value in row.when.items())


def is_other(weight: Weight) -> bool:
    """Whether a file has a weight in another way than transformers."""
    moved = weight.interleaved or weight.grouped or weight.tiled or weight.across
    return bool(moved or weight.plus or weight.decays)


def parts(weight: Weight) -> tuple[int, int]:
    """Length of the side of a weight that is of equal parts for what is other about it, and the number of these."""
    rows = weight.shape[0] if weight.shape else 0
    if weight.tiled:
        first, groups, heads = weight.tiled
        return max(rows - first, -1), groups * heads
    if weight.across:
        return weight.shape[-1], prod(weight.across)
    if weight.grouped:
        return rows, weight.grouped[0] * (weight.grouped[1] + 2)
    return rows, weight.folded or 2 * weight.interleaved or 1


def from_file(weight: Weight, tensor: Tensor) -> Tensor:
    """A float tensor of a GGUF file as transformers has it, in the same dtype."""
    rows, columns = own_rows(weight), file_columns(weight)
    tensor = tensor if rows is None else tensor[rows]
    tensor = tensor if columns is None else tensor[:, columns.argsort()]
    tensor = _logarithm(tensor) if weight.decays else tensor
    return tensor - weight.plus if weight.plus else tensor


def to_file(weight: Weight, tensor: Tensor) -> Tensor:
    """The inverse of `from_file`; what is added, and a power of e, is rounded to the dtype of the tensor."""
    rows, columns = file_rows(weight), file_columns(weight)
    tensor = tensor if rows is None else tensor[rows]
    tensor = tensor if columns is None else tensor[:, columns]
    tensor = _power(tensor) if weight.decays else tensor
    return tensor + weight.plus if weight.plus else tensor


def _logarithm(tensor: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Of the powers of e in a tensor, negated; of all numbers that have the same one, that with the fewest digits.

    So a logarithm that was bfloat16 or float16 comes back as it was, and what is written again is what was read.
    """
    exact = (-tensor.double()).log()
    near = found = exact.to(tensor.dtype)
    others = [torch.nextafter(near, near + step) for step in (1, -1)]
    short = [exact.to(dtype).to(tensor.dtype) for dtype in (torch.float16, torch.bfloat16)]
    for each in (*others, near, *short):
        found = torch.where(_power(each) == tensor, each, found)
    return found


def _power(tensor: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return -tensor.double().exp().to(tensor.dtype)


def file_rows(weight: Weight) -> Int64[Tensor, "rows"] | None:
    """For each row as llama.cpp stores it the row of transformers; None where the order is the same."""
    if weight.interleaved:
        return interleave(weight.shape[0], weight.interleaved)
    if weight.tiled:
        first, *heads = weight.tiled
        return torch.cat([torch.arange(first), first + _tiles(weight.shape[0] - first, *heads)])
    if weight.grouped is None:
        return None
    groups, queries = weight.grouped
    rows = torch.arange(weight.shape[0]).reshape(groups, queries + 2, -1)
    return torch.cat([rows[:, :queries].reshape(-1), rows[:, queries].reshape(-1), rows[:, queries + 1].reshape(-1)])


def file_columns(weight: Weight) -> Int64[Tensor, "cols"] | None:
    """For each column as llama.cpp stores it the column of transformers; None where the order is the same."""
    return None if weight.across is None else _tiles(weight.shape[1], *weight.across)


def across_index(q: QTensor, columns: Int64[Tensor, "cols"]) -> Int32[Tensor, "cols"]:
    """The block of each column of transformers, where blocks are of these columns, one after the other."""
    return (columns.argsort() // block_size(q.shape, q.scheme.block)[1]).int()


def turned_back(q: QTensor, columns: Int64[Tensor, "cols"]) -> QTensor:
    """A tensor of these columns of transformers, with its columns in the order of transformers; codes stay in place."""
    back = columns.argsort()
    for start in range(0, 0 if q.codes.is_meta else len(q.codes), _ROWS):
        rows = q.codes[start : start + _ROWS]
        rows.copy_(rows[:, back])
    return replace(q, group_index=across_index(q, columns))


def _tiles(count: int, groups: int, heads: int) -> Int64[Tensor, "count"]:
    """Of heads by group the first of every group, then the second of every group."""
    return torch.arange(count).reshape(groups, heads, -1).swapaxes(0, 1).reshape(-1)


def own_rows(weight: Weight) -> Int64[Tensor, "rows"] | None:
    """For each row of transformers the row as llama.cpp stores it; None where the order is the same."""
    order = file_rows(weight)
    return None if order is None else order.argsort()


def interleave(rows: int, heads: int) -> Int64[Tensor, "rows"]:
    """For each row as llama.cpp stores it the row of transformers: of a head 0, d/2, 1, d/2 + 1, ..."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def separate(rows: int, heads: int) -> Int64[Tensor, "rows"]:
    """The inverse of `interleave`: for each row of transformers the row as llama.cpp stores it."""
    return torch.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
