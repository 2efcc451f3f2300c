"""Checkpoints that auto-round declares as its own: the layouts of others under another name (`packing_format`).

They are handed on, in the words of the layout that they are: gptq, gptq_v2, awq or compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowbit.errors import FormatError

METHODS = ("auto-round", "intel/auto-round")
_GPTQ = {"auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2"}
_AWQ = "auto_round:auto_awq"
_FLOATS = "auto_round:llm_compressor"
_REGEX = frozenset("*+?^$|()[]{}\\")
# What compressed-tensors says of these pairs of data type (its first word) and bits.
_GROUPS: dict[tuple[str, int], tuple[str, str, int, str]] = {
    ("nv", 4): ("nvfp4-pack-quantized", "tensor_group", 16, "torch.float8_e4m3fn"),
    ("mx", 4): ("mxfp4-pack-quantized", "group", 32, "torch.uint8"),
    ("mx", 8): ("mxfp8-quantized", "group", 32, "torch.uint8"),
}


def as_layout(declared: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` that a checkpoint of auto-round would have as what it is.

    Raises:
        FormatError: a packing that is not read, rotated weights, or integer activations.
    """
    packing = declared.get("packing_format", "auto_round:auto_gptq")
    rotated = [key for key in declared if "rotation" in key and declared[key]]
    if rotated:
        raise FormatError(f"quantization_config of auto-round has a {rotated[0]}: rotated weights are not read yet")
    if packing == _FLOATS:
        return _compressed(declared)
    if packing not in (*_GPTQ, _AWQ) or declared.get("data_type", "int") != "int":
        raise FormatError(
            f"packing_format {packing!r} of auto-round with data type {declared.get('data_type')!r} is not read; "
            f"integers in {', '.join((*_GPTQ, _AWQ))} and floats in {_FLOATS} are"
        )
    if isinstance(declared.get("act_bits"), int) and declared["act_bits"] <= 8:
        raise FormatError(f"auto-round's {declared['act_bits']}-bit activations beside packed integers are not read")
    named = {"quant_method": "gptq", "checkpoint_format": _GPTQ.get(packing)}
    named = {"quant_method": "awq", "version": "gemm"} if packing == _AWQ else named
    return {**_parameters(declared), **named, "dynamic": _dynamic(declared.get("extra_config") or {})}


def _parameters(table: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: table[key] for key in ("bits", "group_size", "sym") if table.get(key) is not None}
    return found | ({"zero_point": not found["sym"]} if "sym" in found else {})


def _dynamic(extra: Any) -> dict[str, dict[str, Any]]:
    """What differs, by layer: names first, then patterns, as auto-round looks them up."""
    if not isinstance(extra, Mapping) or not all(isinstance(each, Mapping) for each in extra.values()):
        raise FormatError("extra_config of auto-round is no table of tables")
    patterns = {name: bool(_REGEX & set(name)) for name in extra}
    names = sorted(extra, key=lambda name: patterns[name])
    return {name if patterns[name] else f"{re.escape(name)}$": _parameters(extra[name]) for name in names}


def _compressed(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Small floats as compressed-tensors declares them; activations as its presets of the same name have them."""
    kind, bits = str(declared.get("data_type")), declared.get("bits")
    known = _GROUPS.get((kind[:2], bits)) if isinstance(bits, int) else None
    if known is None or declared.get("extra_config"):
        raise FormatError(
            f"auto-round's {bits!r}-bit {kind} in {_FLOATS}, "
            f"{'with' if declared.get('extra_config') else 'without'} extra_config, is not read; "
            "nvfp4, mxfp4 and mxfp8 in one scheme for all layers are"
        )
    layout, strategy, size, stored = known
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size}
    inputs = {**weights, "dynamic": "local" if strategy == "tensor_group" else True, "scale_dtype": stored}
    quantized = isinstance(declared.get("act_bits"), int) and declared["act_bits"] == bits
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if quantized else None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
