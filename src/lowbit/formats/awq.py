"""AWQ's checkpoint format: 4-bit integers with a zero point per group, eight to a word (docs/formats/awq.md).

A module with W `[N out, K in]` in G groups is stored as `qweight` int32 `[K, N/8]`, `qzeros` int32 `[G, N/8]` and
`scales` `[G, N]`: W[n, k] = scales[g, n] * (q[k, n] - zero[g, n]). That is version `gemm`; `gemv` is read too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Codes, CodeWords, Format, Spec, Weight
from lowbit.formats._checks import exact, finite, stored
from lowbit.formats._gptq import Read, hollow, override, zero_points
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    declared,
    divisor,
    planned,
    row_block,
    skipped_modules,
)
from lowbit.schemes import FLOATS, Scheme, parse
from lowbit.tensors import QTensor, scale_shape

GROUPS = (32, 64, 128)
_BITS, _WORD = 4, 8
_MIDDLE = 8


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme as AWQ stores it: float16 scales.

    Raises:
        UnsupportedError: the layout cannot hold it, or its readers refuse it.
    """
    check_matrix(weight, "awq", scheme)
    block = row_block(scheme.block, weight.shape[1])
    kept = scheme.block.cols == weight.shape[1] and scheme.block.cols in GROUPS  # a model has groups of one size
    fitted = replace(scheme, block=replace(block, cols=scheme.block.cols) if kept else block, scale="f16")
    reason = _misfit(fitted, weight)
    if reason:
        raise UnsupportedError(f"awq cannot hold {scheme}: {reason}")
    return fitted


def _misfit(scheme: Scheme, weight: Weight) -> str | None:
    (rows, cols), block = weight.shape, scheme.block
    if scheme.grid != parse("int4").grid or scheme.nested:
        return "it has integers of 4 bits with plain scales; use int4-g128-asym"
    if scheme.zero not in ("none", "int"):
        return "its zero points are integers; use asym"
    if block.rows != 1 or block.flat or block.cols not in (0, *GROUPS):
        return f"its readers know one scale per row or groups of {', '.join(map(str, GROUPS))} along it; use g128"
    if rows % _WORD:
        return f"it stores {_WORD} outputs in a word, and this has {rows}; leave it as it is (--skip)"
    if block.cols and cols % block.cols:
        return f"groups of {block.cols} do not divide rows of {cols}; use g{divisor(cols, block.cols, GROUPS)}"
    if weight.module.rpartition(".")[2] == "lm_head":
        return "transformers never looks for a quantized output head; leave it as it is (--skip)"
    return None


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    factors = Spec(FLOATS[planned(weight).scale], weight.shape[:1])
    return _layout(weight) | ({weight.scaled: factors} if weight.scaled else {})


def _layout(weight: Weight) -> dict[str, Spec]:
    """The same without the factors of an activation, which are not in all files."""
    scheme, (rows, cols) = planned(weight), weight.shape
    groups = scale_shape(weight.shape, scheme.block)[1]
    return {
        f"{weight.module}.qweight": Spec(torch.int32, (cols, rows // _WORD)),
        f"{weight.module}.qzeros": Spec(torch.int32, (groups, rows // _WORD)),
        f"{weight.module}.scales": Spec(FLOATS[scheme.scale], (groups, rows)),
    }


def _layout_gemv(weight: Weight) -> dict[str, Spec]:
    """The same of version `gemv`, whose scales and zero points are padded to whole loads of its kernel."""
    scheme, (rows, cols) = planned(weight), weight.shape
    unit = max(128 // (scheme.block.cols or cols), 1)
    words = ceil(ceil(scale_shape(weight.shape, scheme.block)[1] / _WORD) / unit) * unit
    return {
        f"{weight.module}.qweight": Spec(torch.int32, (rows, cols // _WORD)),
        f"{weight.module}.qzeros": Spec(torch.int32, (rows, words)),
        f"{weight.module}.scales": Spec(FLOATS[scheme.scale], (rows, words * _WORD)),
    }


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a scale that float16 does not have.
    """
    check_planned(weight, q)
    assert isinstance(q.scales, Tensor)
    scales = into[f"{weight.module}.scales"]
    scales.copy_(exact(f"{weight.module}.scales", q.scales, scales.dtype).T)
    if weight.scaled:
        into[weight.scaled].fill_(1)
    zeros = torch.full(q.scales.shape, _MIDDLE, dtype=torch.uint8) if q.zeros is None else q.zeros
    native.pack_awq(zeros.contiguous(), out=into[f"{weight.module}.qzeros"])
    if not q.codes.is_meta:
        native.pack_awq(q.codes, out=into[f"{weight.module}.qweight"])


def _pack_rows(weight: Weight, words: Tensor, start: int, into: Mapping[str, Tensor]) -> None:
    lines = slice(start // _WORD, (start + len(words)) // _WORD)
    native.pack_awq(native.unpack_bits(words, _BITS, weight.shape[1]), out=into[f"{weight.module}.qweight"][:, lines])


def _pack_turned(weight: Weight, words: Tensor, start: int, into: Mapping[str, Tensor]) -> None:
    native.lines_to_awq(words, out=into[f"{weight.module}.qweight"][_WORD * start : _WORD * (start + len(words))])


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored, in either version: their shapes differ.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
    if (tensors.get(weight.scaled, torch.ones(())) != 1).any():
        raise FormatError(f"{weight.scaled} are not all 1: factors of an activation are not read")
    if _is_gemv(weight, tensors):
        return _unpack_gemv(weight, _parts(tensors, _layout_gemv(weight)), codes)
    qweight, qzeros, scales = _parts(tensors, _layout(weight))
    zeros = native.unpack_awq(qzeros.contiguous()).T
    scales = finite(f"{weight.module}.scales", scales.T.float()).contiguous()
    if not codes.is_meta:
        native.unpack_awq(qweight.contiguous(), out=codes)
    return QTensor(planned(weight), weight.shape, codes, scales, zero_points(weight, zeros, offset=0))


def _unpack_rows(weight: Weight, tensors: Mapping[str, Tensor], start: int, words: Tensor) -> None:
    qweight, stop = tensors[f"{weight.module}.qweight"], start + len(words)
    if _is_gemv(weight, tensors):
        words.copy_(qweight[start:stop])
        return
    lines = qweight[:, start // _WORD : stop // _WORD]
    if weight.shape[1] % _WORD:
        native.pack_bits(native.unpack_awq(lines), _BITS, out=words)
    else:
        native.awq_to_rows(lines, out=words)


def _unpack_turned(weight: Weight, tensors: Mapping[str, Tensor], start: int, words: Tensor) -> None:
    qweight, stop = tensors[f"{weight.module}.qweight"], start + len(words)
    if _is_gemv(weight, tensors):
        native.transpose_words(qweight[:, start:stop], out=words)
    else:
        native.awq_to_lines(qweight[_WORD * start : _WORD * stop], out=words)


def _is_gemv(weight: Weight, tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are of version `gemv`: of a square weight codes alone do not tell."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    columns = _layout_gemv(weight)
    return all(shapes.get(name) == spec.shape for name, spec in columns.items()) and columns != _layout(weight)


def _parts(tensors: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> list[Tensor]:
    return [stored(tensors, name, spec.dtype, spec.shape) for name, spec in specs.items()]


def _unpack_gemv(weight: Weight, parts: Sequence[Tensor], codes: Tensor) -> QTensor:
    """`qweight` int32 `[N, K/8]`, `qzeros` and `scales` by row: nibbles in their order, padded at the end of a row."""
    (qweight, qzeros, scales), scheme = parts, planned(weight)
    groups = scale_shape(weight.shape, scheme.block)[1]
    zeros = native.unpack_bits(qzeros.contiguous(), _BITS, scales.shape[1])[:, :groups].T
    values = finite(f"{weight.module}.scales", scales[:, :groups].float()).contiguous()
    if not codes.is_meta:
        native.unpack_bits(qweight.contiguous(), _BITS, weight.shape[1], out=codes)
    return QTensor(scheme, weight.shape, codes, values, zero_points(weight, zeros, offset=0))


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `AwqConfig`, which knows one scheme for the whole model.

    Raises:
        UnsupportedError: weights in more than one scheme, or one that is kept and must have factors beside it.
    """
    schemes = {str(weight.scheme): weight.scheme for weight in weights if weight.scheme}
    if not schemes:
        return {"config.json": declare(source, None)}
    if len(schemes) > 1:
        raise UnsupportedError(f"awq declares one scheme for a model, and these are {', '.join(schemes)}; use one")
    left = next((weight for weight in weights if weight.scaled and weight.scheme is None), None)
    if left:
        raise UnsupportedError(
            f"transformers' reader of awq looks for {left.scaled}, which are stored with {left.name} where that is "
            "quantized, and it is kept; quantize it"
        )
    (scheme,) = schemes.values()
    quantization = {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": scheme.block.cols or -1,
        "zero_point": scheme.zero == "int",
        "version": "gemm",
        "modules_to_not_convert": skipped_modules(weights),
    }
    return {"config.json": declare(source, quantization)}


def recognise(config: Mapping[str, Any], specs: Mapping[str, Spec], read: Read) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares AWQ.

    Raises:
        FormatError: a declaration that contradicts the stored tensors, or a kind of AWQ that is not read.
    """
    quantization = declared(config)
    if quantization.get("quant_method") != "awq":
        return None
    version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise FormatError(f"version {version!r} of quant_method awq is not read, gemm and gemv are")
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    weights = [_recognised(module, quantization, version, specs) for module in modules]
    return {weight.name: weight for weight in weights}


def _recognised(module: str, quantization: Mapping[str, Any], version: str, specs: Mapping[str, Spec]) -> Weight:
    quantization = {**quantization, **override(module, quantization.get("dynamic") or {})}  # auto-round has several
    bits, group = quantization.get("bits"), quantization.get("group_size")
    if bits != _BITS or not isinstance(group, int) or not (group == -1 or group > 0):
        raise FormatError(f"{module}: awq with {bits!r} bits and group_size {group!r} is not read")
    words, scales = specs[f"{module}.qweight"].shape, specs.get(f"{module}.scales")
    if len(words) != 2:
        raise FormatError(f"{module}.qweight has {len(words)} axes, not 2")
    if scales is None or scales.dtype not in SCALE_TYPES:
        raise FormatError(f"{module}.scales is {scales.dtype if scales else 'missing'}, not a float tensor")
    rows, cols = (words[1] * _WORD, words[0]) if version == "gemm" else (words[0], words[1] * _WORD)
    if group > 0 and cols % group:
        raise FormatError(f"{module}: groups of {group} do not divide rows of {cols}")
    symmetric = quantization.get("zero_point", True) is False
    name = f"int4-{'row' if group == -1 else f'g{group}'}-{SCALE_TYPES[scales.dtype]}{'' if symmetric else '-asym'}"
    return Weight(f"{module}.weight", (rows, cols), scales.dtype, parse(name))


FORMAT = Format(
    about="AWQ (gemm): 4-bit integers with zero points, as AutoAWQ and vLLM have them",
    default="int4-g128-asym",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    hollow=hollow,
    codes=Codes(CodeWords(_unpack_rows, _pack_rows), CodeWords(_unpack_turned, _pack_turned)),
)
