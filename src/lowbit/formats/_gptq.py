"""What GPTQ's two checkpoint formats share; they differ in that v1 stores zero points less one (docs/formats/gptq.md).

A module with W `[N out, K in]` in G groups is stored as `qweight` int32 `[K*bits/32, N]`, `qzeros` int32
`[G, N*bits/32]`, `scales` `[G, N]` and `g_idx` int32 `[K]`: W[n, k] = scales[g, n] * (q[k, n] - zero[g, n]) with
g = g_idx[k].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Codes, CodeWords, Spec, Weight
from lowbit.formats._checks import exact, fill, finite, stored
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    declared,
    divisor,
    kept_modules,
    planned,
    row_block,
)
from lowbit.schemes import FLOATS, Scheme, parse
from lowbit.tensors import QTensor, block_size, scale_shape

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_WORD = 32
_PLANAR_ALIKE = (2, 4, 8)
_NUMBER = re.compile(r"\.\d+\.")
_LISTS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers",
          "h", "decoder.layers", "layers")  # fmt: skip
# How much of a name tells what it is: its last part, what is after the block's number, all of it.
_ENDS: tuple[Callable[[str], str], ...] = (
    lambda module: module.rpartition(".")[2],
    lambda module: _NUMBER.split(module, maxsplit=1)[1],
    lambda module: module,
)
Read = Callable[[str], Tensor]


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme as GPTQ stores it: float16 scales, a group per row where it would span one.

    Raises:
        UnsupportedError: the layout cannot hold it, or its readers refuse it.
    """
    check_matrix(weight, "gptq", scheme)
    fitted = replace(scheme, block=row_block(scheme.block, weight.shape[1]), scale="f16")
    reason = _misfit(fitted, weight)
    if reason:
        raise UnsupportedError(f"gptq cannot hold {scheme}: {reason}")
    return fitted


def _misfit(scheme: Scheme, weight: Weight) -> str | None:
    rows, cols = weight.shape
    block = scheme.block
    if scheme.grid.kind != "int" or scheme.grid.bits not in BITS or scheme.nested:
        return "it has integers of 2, 3, 4 or 8 bits with plain scales; use one of them"
    if scheme.zero == "min":
        return "it has no minima; use asym"
    if scheme.zero == "float":
        return "its zero points are integers; use asym"
    if block.rows != 1 or block.flat or block.cols not in (0, *GROUPS):
        return f"its readers know one scale per row or groups of {', '.join(map(str, GROUPS))} along it; use g128"
    if rows % _WORD or cols % _WORD:
        text = f"its readers take layers whose sides are multiples of {_WORD}, and this is {rows} x {cols}"
        return f"{text}; leave it as it is (--skip)"
    if block.cols and cols % block.cols:
        other = divisor(cols, block.cols, GROUPS)
        return f"most readers refuse a shorter last group, as {block.cols} leaves in rows of {cols}; use g{other}"
    return None


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    scheme = planned(weight)
    (rows, cols), bits = weight.shape, scheme.grid.bits
    groups = scale_shape(weight.shape, scheme.block)[1]
    specs = {
        "qweight": Spec(torch.int32, (ceil(cols * bits / _WORD), rows)),
        "qzeros": Spec(torch.int32, (groups, ceil(rows * bits / _WORD))),
        "scales": Spec(FLOATS[scheme.scale], (groups, rows)),
        "g_idx": Spec(torch.int32, (cols,)),
    }
    return {f"{weight.module}.{name}": spec for name, spec in specs.items()}


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor], offset: int) -> None:
    """Fill the tensors of one weight; zero points are stored less `offset`.

    Raises:
        FormatError: a zero point less than `offset`, or a scale that float16 does not have.
    """
    check_planned(weight, q)
    assert isinstance(q.scales, Tensor)
    scales, bits = into[f"{weight.module}.scales"], q.scheme.grid.bits
    scales.copy_(exact(f"{weight.module}.scales", q.scales, scales.dtype).T)
    native.pack_bits(_stored_zeros(weight, q, offset), bits, out=into[f"{weight.module}.qzeros"])
    into[f"{weight.module}.g_idx"].copy_(_consecutive(q) if q.group_index is None else q.group_index)
    if not q.codes.is_meta:
        native.pack_bits_transposed(q.codes, bits, out=into[f"{weight.module}.qweight"])


def _pack_rows(weight: Weight, words: Int32[Tensor, "rows words"], start: int, into: Mapping[str, Tensor]) -> None:
    native.transpose_words(words, out=into[f"{weight.module}.qweight"][:, start : start + len(words)])


def hollow(scheme: Scheme) -> bool:
    """Whether the layout can be checked without the codes: every pattern of bits is one."""
    return True


def _stored_zeros(weight: Weight, q: QTensor, offset: int) -> UInt8[Tensor, "groups rows"]:
    if q.zeros is None:
        return torch.full(q.scales.shape[::-1], _half(q.scheme) - offset, dtype=torch.uint8)
    low = q.zeros < offset
    if low.any():
        row, group = low.nonzero()[0].tolist()
        raise FormatError(
            f"{weight.module}.qzeros: the zero point of row {row}, group {group} is 0, and gptq v1 stores zero points "
            "less one; --format gptq-v2 does not"
        )
    return (q.zeros - offset).T.contiguous()


def _half(scheme: Scheme) -> int:
    return int(2 ** (scheme.grid.bits - 1))


def _consecutive(q: QTensor) -> Int32[Tensor, "cols"]:
    return torch.arange(q.codes.shape[1], dtype=torch.int32) // block_size(q.shape, q.scheme.block)[1]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None, *, offset: int) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout, or a zero point that readers disagree on.
    """
    scheme, bits, specs = planned(weight), planned(weight).grid.bits, layout(weight)
    parts = {name: stored(tensors, name, spec.dtype, spec.shape) for name, spec in specs.items() if name in tensors}
    missing = [name for name in specs if name not in parts and not name.endswith(".g_idx")]
    if missing:
        raise FormatError(f"{missing[0]} is missing")
    qweight, qzeros, scales, *index = parts.values()
    codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
    if not codes.is_meta:
        native.unpack_bits_transposed(qweight.contiguous(), bits, codes.shape[1], out=codes)
    scales = finite(f"{weight.module}.scales", scales.T.float()).contiguous()
    zeros = zero_points(weight, native.unpack_bits(qzeros.contiguous(), bits, weight.shape[0]), offset)
    q = QTensor(scheme, weight.shape, codes, scales, zeros)
    return replace(q, group_index=_group_index(weight, q, index[0])) if index else q


def _unpack_rows(weight: Weight, tensors: Mapping[str, Tensor], start: int, words: Int32[Tensor, "rows words"]) -> None:
    native.transpose_words(tensors[f"{weight.module}.qweight"][:, start : start + len(words)], out=words)


def _pack_turned(weight: Weight, words: Int32[Tensor, "lines rows"], start: int, into: Mapping[str, Tensor]) -> None:
    fill(into[f"{weight.module}.qweight"][start : start + len(words)], words)


def _unpack_turned(
    weight: Weight, tensors: Mapping[str, Tensor], start: int, words: Int32[Tensor, "lines rows"]
) -> None:
    words.copy_(tensors[f"{weight.module}.qweight"][start : start + len(words)])


def _turned(weight: Weight, tensors: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    return tensors[f"{weight.module}.qweight"][start:stop]


CODES = Codes(CodeWords(_unpack_rows, _pack_rows), CodeWords(_unpack_turned, _pack_turned, _turned))


def zero_points(weight: Weight, raw: UInt8[Tensor, "groups rows"], offset: int) -> UInt8[Tensor, "rows groups"] | None:
    """Zero points of an asymmetric weight; None for a symmetric one, whose zero points must all be the middle.

    Raises:
        FormatError: a symmetric weight with another zero point, or one that readers of gptq v1 disagree on.
    """
    scheme = planned(weight)
    name, last = f"{weight.module}.qzeros", 2**scheme.grid.bits - 1
    if scheme.zero == "none":
        middle = _half(scheme) - offset
        if raw.numel() and [int(end) for end in raw.aminmax()] != [middle, middle]:
            group, row = (raw != middle).nonzero()[0].tolist()
            raise FormatError(
                f"{name} holds zero point {int(raw[group, row]) + offset} for row {row}, group {group}; the checkpoint "
                f"says `sym`, which is {_half(scheme)} everywhere"
            )
        return None
    if raw.numel() and raw.amax() > last - offset:
        group, row = (raw > last - offset).nonzero()[0].tolist()
        raise FormatError(
            f"{name} stores {last} for row {row}, group {group}, which some readers of gptq v1 take for {last + 1} and "
            "others for 0"
        )
    return (raw + offset).T.contiguous()


def _group_index(weight: Weight, q: QTensor, index: Int32[Tensor, "cols"]) -> Int32[Tensor, "cols"] | None:
    """The group of each column, or None where groups are consecutive."""
    if torch.equal(index, _consecutive(q)):
        return None
    wrong = (index < 0) | (index >= q.scales.shape[1])
    if wrong.any():
        column = int(wrong.nonzero()[0])
        raise FormatError(
            f"{weight.module}.g_idx puts column {column} into group {int(index[column])}; groups are 0 to "
            f"{q.scales.shape[1] - 1}"
        )
    return index


def config(weights: Sequence[Weight], source: Mapping[str, Any], format: str) -> dict[str, dict[str, Any]]:
    """config.json and its duplicate quantize_config.json; both spellings of each key that readers disagree on.

    There is no `meta`: with it, `transformers` refuses to hand the checkpoint to auto-round.
    """
    chosen = [weight for weight in weights if weight.scheme]
    if not chosen:
        return {"config.json": declare(source, None)}
    common = Counter(tuple(_parameters(planned(weight)).items()) for weight in chosen).most_common(1)[0][0]
    quantization = {
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": format,
        "format": format,
        **dict(common),
        "desc_act": _act_order(declared(source)),
        "lm_head": any(_is_head(weight.module) for weight in chosen),
        "pack_dtype": "int32",
    }
    dynamic = _dynamic(weights, dict(common))
    quantization |= {"dynamic": dynamic} if dynamic else {}
    quantization |= _for_optimum(weights)
    return {"config.json": declare(source, quantization), "quantize_config.json": quantization}


def _for_optimum(weights: Sequence[Weight]) -> dict[str, Any]:
    """What transformers' reader (optimum) must be told, for it does not look at `dynamic`.

    Which list the blocks are in, where it would not find it; what is quantized in them, where not everything is: ends
    of names, of which vLLM looks for any part.
    """
    chosen = [weight.module for weight in weights if weight.scheme and _NUMBER.search(weight.module)]
    kept = [module for module in kept_modules(weights) if _NUMBER.search(module)]
    lists = {_NUMBER.split(module, maxsplit=1)[0] for module in chosen}
    found: dict[str, Any] = {}
    if len(lists) == 1 and not min(lists).startswith(_LISTS):
        found["block_name_to_quantize"] = min(lists)
    if kept and chosen:
        ends = [{cut(module) for module in chosen} for cut in _ENDS]
        clear = (each for each in ends if not any(end in module for end in each for module in kept))
        found["modules_in_block_to_quantize"] = [sorted(next(clear, ends[-1]))]
    return found


def _act_order(found: Mapping[str, Any]) -> bool:
    """Whether the source declares groups in an order of their own: without that, some readers do not look at g_idx.

    It says so as gptq does, or as compressed-tensors did.
    """
    groups = found.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    orders = [each.get("actorder") for each in weights if isinstance(each, Mapping)]
    return bool(found.get("desc_act", False)) or "group" in orders


def _parameters(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.grid.bits, "group_size": scheme.block.cols or -1, "sym": scheme.zero == "none"}


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] == "lm_head"


def _dynamic(weights: Sequence[Weight], common: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What differs from the common parameters, by regular expression: `-:` keeps a module, `+:` overrides.

    A quantized head is always named: auto-round looks for layers in the blocks, and elsewhere only where told.
    """
    kept: dict[str, dict[str, Any]] = {
        f"-:^{re.escape(module)}$": {} for module in kept_modules(weights) if not _is_head(module)
    }
    chosen = {weight.module: _parameters(weight.scheme) for weight in weights if weight.scheme}
    other = {name: each for name, each in chosen.items() if each != common or _is_head(name)}
    return kept | {f"+:^{re.escape(name)}$": each for name, each in other.items()}


def recognise(config: Mapping[str, Any], specs: Mapping[str, Spec], format: str) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares GPTQ in this checkpoint format.

    Raises:
        FormatError: a declaration that contradicts the stored tensors, or a kind of GPTQ that is not read.
    """
    quantization = declared(config)
    if (quantization.get("quant_method") or quantization.get("method")) != "gptq":
        return None
    if _checkpoint_format(quantization) != format:
        return None
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    weights = [_recognised(module, quantization, specs) for module in modules]
    return {weight.name: weight for weight in weights}


def _checkpoint_format(quantization: Mapping[str, Any]) -> str:
    """`gptq` or `gptq_v2`; gptq_p stores 2, 4 and 8 bits as v2 does."""
    found = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if found == "gptq_p" and quantization.get("bits") in _PLANAR_ALIKE:
        return "gptq_v2"
    if found not in ("gptq", "gptq_v2"):
        raise FormatError(
            f"checkpoint_format {found!r} of quant_method gptq is not read; load it with gptqmodel and save it as "
            "gptq_v2"
        )
    return str(found)


def _recognised(module: str, quantization: Mapping[str, Any], specs: Mapping[str, Spec]) -> Weight:
    parameters = {**quantization, **override(module, quantization.get("dynamic") or {})}
    bits, group, sym = (parameters.get(key) for key in ("bits", "group_size", "sym"))
    if bits not in BITS or not isinstance(group, int) or not (group == -1 or group > 0):
        raise FormatError(f"{module}: gptq with {bits!r} bits and group_size {group!r} is not read")
    rows, cols = _shape(module, int(bits), specs)
    scales = specs.get(f"{module}.scales")
    if scales is None or scales.dtype not in SCALE_TYPES:
        raise FormatError(f"{module}.scales is {scales.dtype if scales else 'missing'}, not a float tensor")
    block = "row" if group == -1 or group >= cols else f"g{group}"
    name = f"int{bits}-{block}-{SCALE_TYPES[scales.dtype]}" + ("-asym" if sym is False else "")
    return Weight(f"{module}.weight", (rows, cols), scales.dtype, parse(name))


def _shape(module: str, bits: int, specs: Mapping[str, Spec]) -> tuple[int, int]:
    """Rows and columns of a weight; the columns are what g_idx counts, where it is there."""
    words, index = specs[f"{module}.qweight"].shape, specs.get(f"{module}.g_idx")
    if len(words) != 2:
        raise FormatError(f"{module}.qweight has {len(words)} axes, not 2")
    cols = index.shape[0] if index and len(index.shape) == 1 else words[0] * _WORD // bits
    if ceil(cols * bits / _WORD) != words[0]:
        raise FormatError(f"{module}.qweight has {words[0]} rows, which {cols} codes of {bits} bits do not fill")
    return words[1], cols


def override(module: str, dynamic: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters of the first rule of `dynamic` that matches a module."""
    for rule, parameters in dynamic.items():
        try:
            matched = re.match(rule.removeprefix("+:").removeprefix("-:"), module)
        except re.error as error:
            raise FormatError(f"{rule!r} in `dynamic` is no regular expression: {error}") from None
        if matched:
            return parameters if isinstance(parameters, Mapping) else {}
    return {}
