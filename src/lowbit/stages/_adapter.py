"""Low-rank terms as a PEFT adapter (LoRA) beside a quantized checkpoint: `up @ down` is added to each weight's output.

The layout is that of the `peft` package: `adapter_model.safetensors` with a pair of matrices per weight, and
`adapter_config.json`. A LoRA adds `B A x * alpha / r`; here alpha is each weight's own rank, so that the factor is 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lowbit.corrections import LowRank
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.stages._weightfile import one_line, open_regular, read_json, show
from lowbit.stages.write import WORK, write_atomic

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = "adapter"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def write_adapter(path: Path, terms: Mapping[str, LowRank], base: str, dtype: torch.dtype) -> None:
    """Write the terms, by name of the weight that each stands beside, into the directory `path`.

    Args:
        path: directory; it may hold a checkpoint.
        terms: name of a linear layer's weight to `(down, up)`, whose values should be exact in `dtype`.
        base: name or directory of the model that the adapter belongs to, as it is told to `peft`.
        dtype: of the file.

    Raises:
        UnsupportedError: no terms, or one beside something that is no linear layer's weight.
    """
    if not terms:
        raise UnsupportedError("an adapter needs at least one low-rank term")
    tensors = {}
    for name, (down, up) in terms.items():
        module = _module(name)
        tensors[f"{_PREFIX}{module}{_DOWN}"] = down.to(dtype).contiguous()
        tensors[f"{_PREFIX}{module}{_UP}"] = up.to(dtype).contiguous()
    ranks = {_module(name): len(down) for name, (down, _) in terms.items()}
    write_atomic(path / WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomic(path / CONFIG, json.dumps(_config(ranks, base), indent=2).encode() + b"\n")


def adapter_beside(model: str | Path) -> Path | None:
    """The adapter that lies in a checkpoint's directory, where `lowbit quantize` writes it."""
    path = Path(model).expanduser() / ADAPTER
    return path if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() else None


def read_adapter(path: Path) -> dict[str, LowRank]:
    """The terms of a LoRA adapter, float32, by name of the weight; its factors are in them.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedError: the adapter is more than pairs of matrices whose product is added.
    """
    config = read_json(path / CONFIG)
    more = next(_beyond(config), None)
    if more:
        raise UnsupportedError(f"{path / CONFIG} says {more}; only plain pairs of matrices (LoRA) are read here")
    with open_regular(path / WEIGHTS) as file:
        try:
            tensors = load(file.read())
        except SafetensorError as error:
            raise CheckpointError(f"{path / WEIGHTS} is damaged: {one_line(error)}") from None
    found = {}
    for name in [name for name in tensors if name.endswith(_DOWN)]:
        module = name.removeprefix(_PREFIX).removesuffix(_DOWN)
        down, up = tensors.pop(name), tensors.pop(name.removesuffix(_DOWN) + _UP, None)
        if up is None or down.ndim != 2 or up.shape[1:] != down.shape[:1] or _said(config, "r", module) != len(down):
            raise CheckpointError(f"{path / WEIGHTS}: the term of {module} is not as {CONFIG} says; write it again")
        found[f"{module}.weight"] = (down.float(), up.float() * _factor(config, module, len(down)))
    if tensors or not found:
        what = f"{show(min(tensors))}, which is none of a pair" if tensors else "no pair of matrices"
        raise UnsupportedError(f"{path / WEIGHTS} has {what}; only plain pairs of matrices (LoRA) are read here")
    return found


def _beyond(config: Mapping[str, Any]) -> Iterator[str]:
    """What an adapter is beside pairs whose product is added to a weight."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type {show(config.get('peft_type'))}"
    if config.get("bias", "none") != "none":
        yield f"bias {show(config['bias'])}"
    for key in ("use_dora", "use_qalora", "fan_in_fan_out", "modules_to_save", "layer_replication", "lora_bias"):
        if config.get(key):
            yield f"{key} {show(config[key])}"
    for pattern in ("rank_pattern", "alpha_pattern"):
        told = config.get(pattern) or {}
        if not isinstance(told, Mapping) or not all(re.fullmatch(r"[\w.]+", key) for key in told):
            yield f"{pattern} {show(told)}"


def _said(config: Mapping[str, Any], key: str, module: str) -> Any:
    """The rank (`r`) or `lora_alpha` of a module: by the end of its name, or of all."""
    told = config.get("rank_pattern" if key == "r" else "alpha_pattern") or {}
    return next((value for end, value in told.items() if f".{module}".endswith(f".{end}")), config.get(key))


def _factor(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Of the product (LoRA, arXiv 2106.09685, section 4.1; by the root of the rank in rsLoRA, arXiv 2312.03732)."""
    alpha = _said(config, "lora_alpha", module)
    if type(alpha) not in (int, float) or not isfinite(alpha):
        raise CheckpointError(f"{CONFIG} has {show(alpha)} as lora_alpha of {module}, where a number should be")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


@final
@dataclass(frozen=True)
class Adapter:
    """An adapter that was written: its directory, bytes of its terms, and their ranks by weight."""

    path: Path
    nbytes: int
    ranks: Mapping[str, int]


@final
@dataclass(frozen=True)
class Terms:
    """The low-rank terms of a run, each in a file of its own until the adapter is whole.

    Attributes:
        out: the output directory; the adapter is its folder `adapter`.
    """

    out: Path

    @property
    def _folder(self) -> Path:
        return self.out / WORK / "terms"

    def add(self, name: str, step: str, down: Tensor, up: Tensor) -> None:
        """Keep the term that one step made for a weight."""
        write_atomic(
            self._folder / f"{name}+{step}.safetensors", save({"down": down.contiguous(), "up": up.contiguous()})
        )

    def collect(self) -> dict[str, LowRank]:
        """All terms, those of one weight joined."""
        found: dict[str, list[dict[str, Tensor]]] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            found.setdefault(path.stem.rpartition("+")[0], []).append(load(path.read_bytes()))
        return {
            name: (torch.cat([part["down"] for part in parts]), torch.cat([part["up"] for part in parts], 1))
            for name, parts in found.items()
        }

    def finish(self, base: str) -> Adapter | None:
        """Write the adapter, where there are terms, in the smallest dtype that has their values."""
        terms = self.collect()
        if not terms:
            return None
        parts = [part for pair in terms.values() for part in pair]
        fits = (d for d in (torch.bfloat16, torch.float16) if all(torch.equal(p, p.to(d).float()) for p in parts))
        dtype = next(fits, torch.float32)
        write_adapter(self.out / ADAPTER, terms, base, dtype)
        ranks = {name: len(down) for name, (down, _) in terms.items()}
        return Adapter(self.out / ADAPTER, dtype.itemsize * sum(part.numel() for part in parts), ranks)


def _module(name: str) -> str:
    module, _, last = name.rpartition(".")
    if last != "weight" or not module:
        raise UnsupportedError(f"{name} is no weight of a linear layer, and an adapter has no place for its term")
    return module


def _config(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """`adapter_config.json`: the most frequent rank, and the weights that have another by their full names."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
