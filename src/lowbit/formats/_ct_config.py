"""The `quantization_config` of compressed-tensors: written from weights, read into schemes.

A config group is a layout, the arguments of one quantization, and targets: exact module names, `re:` patterns that
are matched from the start of a module name, or names of module classes. Exact names win over patterns, these over
classes (`compressed_tensors.utils.match.match_targets`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lowbit.errors import FormatError
from lowbit.formats import Weight, _linear
from lowbit.formats._ct_tensors import DTYPES, container, strategy
from lowbit.formats._linear import SCALE_TYPES, kept_modules
from lowbit.schemes import Block, ScaleType, Scheme, parse
from lowbit.tensors import block_size

METHOD = "compressed-tensors"
_READ = {
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
}  # fmt: skip
_STACK = re.compile(r"(.*\.experts)\.\w+")
# Modules that torch's class `Linear` does not cover: they are named where they are quantized, and else need no mention.
EMBEDDING = re.compile(r"(.*[._])?(embed(ding)?s?(_tokens|_positions|_in)?|wte|wpe)")


# Fields of `QuantizationArgs` that say how activations are computed, as the package fills in what is absent.
_DEFAULTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": None,
    "group_size": None,
    "dynamic": False,
    "scale_dtype": None,
}


def quantization_config(weights: Sequence[Weight]) -> dict[str, Any] | None:
    """The `quantization_config` that declares how these weights are stored; None where all stay as they are."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.scheme:
            inputs = _input_arguments(weight.activations) if weight.activations else None
            kind = container(weight.scheme, weight.activations)
            key = json.dumps([kind, _arguments(weight, weight.scheme), inputs])
            groups.setdefault(key, []).append(weight)
    if not groups:
        return None
    kinds = {json.loads(key)[0] for key in groups}
    return {
        "quant_method": METHOD,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{i}": _group(key, _targets(members, weights, alone=len(groups) == 1))
            for i, (key, members) in enumerate(groups.items())
        },
        "ignore": _ignored(weights),
        "kv_cache_scheme": None,
    }


def _group(key: str, targets: list[str]) -> dict[str, Any]:
    kind, arguments, inputs = json.loads(key)
    activations = {"input_activations": inputs, "output_activations": None}
    return {"targets": targets, "weights": arguments, **activations, "format": kind}


def _arguments(weight: Weight, scheme: Scheme) -> dict[str, Any]:
    """Fields of compressed-tensors' `QuantizationArgs`; `scale_dtype` only where its own presets set it."""
    word = strategy(scheme)
    high, wide = block_size(weight.shape, scheme.block)
    arguments = {
        "num_bits": scheme.grid.bits,
        "type": "int" if scheme.grid.kind == "int" else "float",
        "symmetric": scheme.zero == "none",
        "strategy": word,
        "group_size": wide if word in ("group", "tensor_group") else None,
        "block_structure": [high, wide] if word == "block" else None,
        "dynamic": False,
        "actorder": None,
    }
    if scheme.scale in ("e8m0", "e4m3"):
        arguments["scale_dtype"] = str(DTYPES[scheme.scale])
    return arguments


def _input_arguments(scheme: Scheme) -> dict[str, Any]:
    """`QuantizationArgs` of activations: scales of tokens and their groups are made at run time, others stored."""
    word = strategy(scheme)
    dynamic: bool | str = "local" if scheme.nested else word != "tensor"
    arguments = {
        "num_bits": scheme.grid.bits,
        "type": "int" if scheme.grid.kind == "int" else "float",
        "symmetric": scheme.zero == "none",
        "strategy": "token" if word == "channel" else word,
        "group_size": scheme.block.cols or None,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
    }
    if scheme.scale in ("e8m0", "e4m3"):
        arguments["scale_dtype"] = str(DTYPES[scheme.scale])
    return arguments


def _targets(members: Sequence[Weight], weights: Sequence[Weight], alone: bool) -> list[str]:
    """What selects exactly these modules: the class where one scheme is alone, else names, numbered ones as patterns.

    The class `Linear` never stands beside another group: vLLM tries classes before the parts of a fused module.
    """
    if alone:
        return ["Linear", *(weight.module for weight in members if EMBEDDING.fullmatch(weight.module))]
    wanted = {weight.module for weight in members}
    others = {weight.module for weight in weights} - wanted
    forbidden = {_pattern(module) for module in others}
    return list(
        dict.fromkeys(m if _pattern(m) in forbidden else _pattern(m) for m in (weight.module for weight in members))
    )


def _pattern(module: str) -> str:
    """A module's name with each number in it free; the name itself where it has none."""
    parts = module.split(".")
    if not any(part.isdigit() for part in parts):
        return module
    return "re:" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts) + "$"


def _ignored(weights: Sequence[Weight]) -> list[str]:
    """Kept modules that may be Linear, and an output head without a tensor of its own (tied), which is Linear too.

    Experts that the checkpoint has in one tensor are Linear modules, one each, to a reader.
    """
    names = [module for module in kept_modules(weights) if module and not EMBEDDING.fullmatch(module)]
    stacks = {found[1]: None for w in weights if len(w.shape) == 3 and (found := _STACK.fullmatch(w.name))}
    if not any(weight.module == "lm_head" for weight in weights):
        names.append("lm_head")
    return [*names, *(f"re:{re.escape(stack)}\\..*" for stack in stacks)]


def anywhere(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same `quantization_config`, by patterns that hold wherever a model has its parts.

    Of models that see or hear too, files and the classes of readers name the parts apart: `model.layers` or
    `language_model.model.layers` may be `model.language_model.layers`, and `visual` `model.visual`.
    """
    groups = {
        name: {**group, "targets": [each if each == "Linear" else _anywhere(each) for each in group["targets"]]}
        for name, group in document["config_groups"].items()
    }
    return {**document, "config_groups": groups, "ignore": [_anywhere(each) for each in document["ignore"]]}


def _anywhere(target: str) -> str:
    body = target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$"
    stem = re.sub(r"^((model|language_model)\\\.)+", "", body)
    return "re:" + (r"(.*language_model\.)?(model\.)?" if stem.startswith("layers") else r"(.*\.)?") + stem


@final
@dataclass(frozen=True)
class Group:
    """One config group as it was read: where it applies, and `QuantizationArgs` of its weights and their inputs."""

    name: str
    targets: Sequence[str]
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None


@final
@dataclass(frozen=True)
class Declared:
    """A `quantization_config` as it was read."""

    groups: Sequence[Group]
    ignore: Sequence[str]

    def group(self, module: str) -> Group:
        """The group whose targets select a module that has stored scales.

        Raises:
            FormatError: none does, or the module is to be ignored.
        """
        if any(_matches(module, target) for target in self.ignore):
            raise FormatError(f"{module} has a weight_scale, but quantization_config says to ignore it")
        choices: list[Callable[[str], bool]] = [
            lambda target: target == module,
            lambda target: _matches(module, target),
            lambda target: target[:1].isupper() and "." not in target,
        ]
        for chosen in choices:
            for group in self.groups:
                if any(chosen(target) for target in group.targets):
                    return group
        raise FormatError(f"{module} has a weight_scale, but no group of quantization_config has it as a target")


def _matches(module: str, target: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        raise FormatError(f"quantization_config: {target!r} is no regular expression: {error}") from None


def declared(config: Mapping[str, Any]) -> Declared | None:
    """What a model's config.json declares; None where it is another method's or nobody's.

    Raises:
        FormatError: the declaration is malformed, or of a layout that is not read.
    """
    found = _linear.declared(config)
    if found.get("quant_method") != METHOD:
        return None
    if found.get("transform_config"):
        raise FormatError("quantization_config has a transform_config: rotated weights are not read yet")
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping):
        raise FormatError("quantization_config has no config_groups")
    ignore = found.get("ignore") or []
    if not _strings(ignore):
        raise FormatError("quantization_config: ignore is no list of names")
    return Declared([_read_group(name, group, found.get("format")) for name, group in groups.items()], ignore)


def _read_group(name: str, group: Any, default: Any) -> Group:
    if not isinstance(group, Mapping) or not _strings(group.get("targets")):
        raise FormatError(f"quantization_config: {name} has no list of targets")
    layout, weights = group.get("format") or default, group.get("weights")
    if layout not in _READ:
        raise FormatError(
            f"quantization_config: {name} is stored as {layout!r}, which is not read; {', '.join(sorted(_READ))} are"
        )
    if not isinstance(weights, Mapping):
        raise FormatError(f"quantization_config: {name} says nothing of its weights")
    inputs = group.get("input_activations")
    if group.get("output_activations") or not isinstance(inputs, Mapping | None):
        raise FormatError(f"quantization_config: {name} quantizes outputs of modules, which is not read, or no inputs")
    return Group(name, group["targets"], weights, inputs or None)


def _strings(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)


def read_scheme(group: Group, scale: torch.dtype, has_global_scale: bool) -> Scheme:
    """The scheme that a group's arguments and the type of the stored scales stand for.

    Raises:
        FormatError: arguments that contradict each other or the stored scales, or are not read.
    """
    bits, kind = group.weights.get("num_bits"), group.weights.get("type", "int")
    symmetric, block = group.weights.get("symmetric", True), _read_block(group)
    for fixed in map(parse, ("nvfp4", "mxfp4", "mxfp8")):
        described = ("float", fixed.grid.bits, True, fixed.block, DTYPES[fixed.scale], fixed.nested is not None)
        if (kind, bits, symmetric, block, scale, has_global_scale) == described:
            return fixed
    names = [("int", n, f"int{n}") for n in range(1, 9)] + [("float", 8, "fp8-e4m3")]
    grid = next((name for *known, name in names if known == [kind, bits]), None)
    stored_as = SCALE_TYPES.get(scale)
    if grid and stored_as and not has_global_scale and (symmetric or kind == "int"):
        return Scheme(parse(grid).grid, block, "none" if symmetric else "int", stored_as)
    raise FormatError(
        f"{group.name} of quantization_config declares {bits}-bit {kind}, symmetric {symmetric}, over scales of "
        f"{str(scale).removeprefix('torch.')}{' and a global scale' if has_global_scale else ''}, which is not read"
    )


def _read_block(group: Group) -> Block:
    size, structure = group.weights.get("group_size"), group.weights.get("block_structure")
    word = group.weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if word in ("tensor", "channel"):
        return Block(0 if word == "tensor" else 1, 0)
    if word in ("group", "tensor_group") and isinstance(size, int) and size > 0:
        return Block(1, size)
    sides = [side for side in structure if isinstance(side, int)] if isinstance(structure, list) else []
    if word == "block" and len(sides) == 2 and min(sides) > 0:
        return Block(sides[0], sides[1])
    raise FormatError(
        f"{group.name} of quantization_config: strategy {word!r} with group_size {size} "
        f"and block_structure {structure} is not read"
    )


def read_activations(group: Group, scale: torch.dtype | None) -> Scheme | None:
    """The scheme of the inputs of a group's weights; None where they are not quantized.

    Args:
        group: as it was read.
        scale: dtype of the stored `input_scale`; None where there is none.

    Raises:
        FormatError: arguments that are not read.
    """
    if group.inputs is None:
        return None
    found = _DEFAULTS | {key: value for key, value in group.inputs.items() if key in _DEFAULTS}
    found["strategy"] = found["strategy"] or ("group" if found["group_size"] else "tensor")
    for scheme in _activation_schemes(found["group_size"], SCALE_TYPES.get(scale or torch.float32, "f32")):
        arguments = _input_arguments(scheme)
        if found == _DEFAULTS | {key: arguments[key] for key in _DEFAULTS.keys() & arguments.keys()}:
            return scheme
    raise FormatError(
        f"{group.name} of quantization_config quantizes activations in a way that is not read: {dict(group.inputs)}"
    )


def _activation_schemes(size: Any, scale: ScaleType) -> Iterator[Scheme]:
    """Every scheme of activations that is read: one stored scale, or scales per token or per group of a token."""
    yield from map(parse, ("nvfp4", "mxfp4", "mxfp8"))
    blocks = [Block(1, 0), *([Block(1, size)] if isinstance(size, int) and size > 0 else [])]
    for name in (*(f"int{bits}" for bits in range(2, 9)), "fp8-e4m3"):
        grid = parse(name).grid
        yield Scheme(grid, Block(0, 0), "none", scale)
        yield from (Scheme(grid, block, "none", "f32") for block in blocks)
        if grid.kind == "int":
            yield from (Scheme(grid, block, "int", "f32") for block in blocks)
