"""What `arch/gguf.toml` says: names and layouts of a model's tensors in a GGUF file and in a checkpoint."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit.formats import Weight

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
        sparse_type: the one that is taken where a file has experts.
        classes: of transformers, by model type.
        names: module of llama.cpp, without the layer, to module of transformers with {} for numbers.
        keys: metadata key, without the architecture, to names in config.json.
        interleaved: rows of q and k are in another order in the file.
        plus_one: norms are stored with 1 added.
        tied: there is never an output layer.
        requires: what config.json must say, where it says anything of it.
        told: by model type the sizes of config.json that must be there to do without the defaults of transformers.
    """

    arch: str
    model_types: tuple[str, ...]
    sparse_type: str
    classes: Mapping[str, str]
    names: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]
    interleaved: bool
    plus_one: bool
    tied: bool
    requires: Mapping[str, Any]
    told: Mapping[str, tuple[str, ...]]

    def place(self, name: str) -> Place | None:
        """Where a tensor with this name in transformers belongs; None where llama.cpp has no such tensor."""
        module, _, part = name.rpartition(".")
        for stem, pattern in self._patterns.items():
            match = pattern.fullmatch(module)
            if match:
                layer, expert = (*match.groups(), None, None)[:2]
                prefix = "" if layer is None else f"blk.{layer}."
                return Place(f"{prefix}{stem}.{part}", None if expert is None else int(expert))
        return None

    def name(self, stored: str, expert: int = 0) -> str | None:
        """The name in transformers of a tensor of the file; None where there is none."""
        match = re.fullmatch(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", stored)
        module = self.names.get(match[2]) if match else None
        if match is None or module is None or ("{}" in module) != (match[1] is not None):
            return None
        return f"{module.format(match[1], expert)}.{match[3]}"

    def stacks(self, stored: str) -> bool:
        """Whether a tensor of the file holds that of every expert."""
        return self.names.get(stored.split(".")[-2] if "." in stored else "", "").count("{}") == 2

    @cached_property
    def _patterns(self) -> Mapping[str, re.Pattern[str]]:
        number = r"(0|[1-9]\\d*)"
        return {stem: re.compile(_PLACE.sub(number, re.escape(module))) for stem, module in self.names.items()}

    def layout(self, weight: Weight, config: Mapping[str, Any]) -> tuple[int, float]:
        """`Weight.interleaved` and `Weight.plus` of a weight; `config` is that of transformers."""
        place = self.place(weight.name)
        stem = place.name.split(".")[-2] if place else ""
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(stem)
        plus = float(self.plus_one and stem.endswith("norm") and weight.name.endswith(".weight"))
        if not self.interleaved or heads is None:
            return 0, plus
        return int(config.get(heads) or config["num_attention_heads"]), plus


@cache
def archs() -> tuple[Arch, ...]:
    """The rows of the table, in order."""
    table = tomllib.loads(files("lowbit").joinpath("arch/gguf.toml").read_text())
    told = table["told"]

    def joined(kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for name in row[kind] for key, value in table[kind][name].items()}

    return tuple(
        Arch(
            row["arch"],
            tuple(row["model_types"]),
            row.get("sparse_type", row["model_types"][0]),
            {kind: table["classes"][kind] for kind in row["model_types"]},
            joined("names", row),
            {key: tuple(names) for key, names in joined("keys", row).items()},
            row.get("interleaved", False),
            row.get("plus_one", False),
            row.get("tied", False),
            row.get("requires", {}),
            {kind: (*told["base"], *told[kind]) for kind in row["model_types"] if kind in told},
        )
        for row in table["gguf"]
    )


def arch_named(arch: str) -> Arch | None:
    """The row of an architecture of llama.cpp."""
    return next((row for row in archs() if row.arch == arch), None)


def arch_of(model_type: object) -> Arch | None:
    """The row of a model type of transformers."""
    return next((row for row in archs() if model_type in row.model_types), None)


def from_file(weight: Weight, tensor: Tensor) -> Tensor:
    """A float tensor of a GGUF file as transformers has it, in the same dtype."""
    if weight.interleaved:
        tensor = tensor[separate(len(tensor), weight.interleaved)]
    return tensor - weight.plus if weight.plus else tensor


def to_file(weight: Weight, tensor: Tensor) -> Tensor:
    """The inverse of `from_file`; what is added is rounded to the dtype of the tensor."""
    if weight.interleaved:
        tensor = tensor[interleave(len(tensor), weight.interleaved)]
    return tensor + weight.plus if weight.plus else tensor


def interleave(rows: int, heads: int) -> Int64[Tensor, "rows"]:
    """For each row as llama.cpp stores it the row of transformers: of a head 0, d/2, 1, d/2 + 1, ..."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def separate(rows: int, heads: int) -> Int64[Tensor, "rows"]:
    """The inverse of `interleave`: for each row of transformers the row as llama.cpp stores it."""
    return torch.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
