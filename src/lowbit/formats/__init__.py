"""Formats: each file turns `QTensor`s into the tensors of one public checkpoint layout, and back.

A format is a frozen record of pure functions, `FORMAT = Format(...)`. It knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor, Shape


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weight:
    """One weight of a checkpoint as a format sees it.

    Attributes:
        name: full name of the float weight, `model.layers.0.mlp.up_proj.weight`.
        shape: its shape.
        dtype: float dtype of the original weight (of the dequantized one, where the original is unknown).
        scheme: how it is stored; None where it stays as it is.
        activations: how a runtime quantizes its inputs, tokens as rows; None where it does not.
        input_scale: what the activations' scheme stores: the scale of `-tensor`; of NVFP4 the number by which scales
            are multiplied before they are rounded. None where it stores nothing, or is not calibrated yet.
        swapped: whether the model holds its transpose, `[inputs, outputs]` (GPT-2's `Conv1D`; of each expert of a
            stack); `shape`, and all that formats and methods see, is `[outputs, inputs]`.
        interleaved: heads whose rows the file has in llama.cpp's order, for a rotation of neighbours; 0: none. All that
            is seen outside of the file is in the order of transformers.
        grouped: groups of heads and queries in each, where the rows are those of q, k and v: of each group the queries,
            a key and a value; the file has all queries, then all keys, then all values. None: no such rows.
        tiled: rows that come first, groups of heads, and heads in each, where the rows after these are heads by group;
            the file has the first head of every group, then the second of every group. None: no such rows.
        across: groups and heads in each, where the columns are such heads, in the file in that other order too.
        folded: rows of the matrix that the file has in place of this vector; 0: none.
        plus: what the file has added to each element (Gemma's norms, of which transformers stores what exceeds 1).
        decays: whether the file has -exp of each element (Mamba's A, of which transformers stores the logarithm).
        rows: runs `(first, after the last)` of rows of a larger weight that this one is (`stages/_rows.py`); none
            where it is no block of rows.
        scaled: name of the factors by which readers of AWQ divide what an activation makes of its outputs; empty where
            they do not.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    scheme: Scheme | None = None
    activations: Scheme | None = None
    input_scale: float | None = None
    swapped: bool = False
    interleaved: int = 0
    grouped: tuple[int, int] | None = None
    tiled: tuple[int, int, int] | None = None
    across: tuple[int, int] | None = None
    folded: int = 0
    plus: float = 0.0
    decays: bool = False
    rows: tuple[tuple[int, int], ...] = ()
    scaled: str = ""

    @property
    def module(self) -> str:
        """Name of the module that owns the weight: the name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def held(self) -> Shape:
        """Its shape in the model."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.swapped else self.shape

    def some(self, rows: int) -> Weight:
        """A weight of that many of its rows: of whole heads, where these are `interleaved`."""
        return replace(self, shape=(rows, *self.shape[1:]), interleaved=self.interleaved * rows // self.shape[0])


def no_activations(scheme: Scheme, weight: Weight) -> Scheme:
    """What a format says that stores weights alone.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(f"this format stores weights alone, it cannot declare activations in {scheme}")


def no_lines(weight: Weight, tensors: Mapping[str, Tensor], start: int, stop: int) -> Tensor | None:
    """What a format says that does not store words as they are asked for."""
    return None


def never_hollow(scheme: Scheme) -> bool:
    """What a format says that cannot tell whether it holds a weight without its codes."""
    return False


def never_by_rows(weight: Weight) -> int:
    """What a format says that packs a weight whole."""
    return 0


def never_stacked(name: str, model_type: str) -> tuple[str, int] | None:
    """What a format says that stores every tensor alone."""
    return None


@dataclass(frozen=True)
class CodeWords:
    """How a format stores codes alone, as lines of words: in part, from one line on.

    Attributes:
        unpack: `(weight, tensors, start, words)` fills lines from contiguous tensors that `unpack` of the format took.
        pack: `(weight, words, start, into)`: the inverse, for what `pack` of the format leaves out; None where codes
            are stored with all else.
        lines: `(weight, tensors, start, stop)`: these lines as they lie in the tensors, to read them there or to make
            them there, after which `pack` has nothing to do; None where they do not.
    """

    unpack: Callable[[Weight, Mapping[str, Tensor], int, Tensor], None]
    pack: Callable[[Weight, Tensor, int, Mapping[str, Tensor]], None] | None = None
    lines: Callable[[Weight, Mapping[str, Tensor], int, int], Tensor | None] = no_lines


@dataclass(frozen=True)
class Codes:
    """The same of a weight `[rows, cols]`: for most layouts words have only to be moved.

    Attributes:
        rows: a line is what `native.pack_bits` makes of a row. They are asked for in multiples of 32, the last apart;
            what is beyond the last code of a row may be anything in what is unpacked, and is 0 in what is packed.
            `lines` is asked only where codes end with the last word of a row.
        turned: the words of rows turned: a line is one of each row. None where the layout is by rows. Asked only where
            codes end with the last word.
        pack: `(weight, q, words, into)`: what `pack` of the format makes of a weight of which `q` has all but the
            codes, and `words` these, a line for each row; where codes are stored between all else. Asked only where
            they end with the last word.
    """

    rows: CodeWords
    turned: CodeWords | None = None
    pack: Callable[[Weight, QTensor, Tensor, Mapping[str, Tensor]], None] | None = None


@dataclass(frozen=True)
class Format:
    """One public layout.

    Attributes:
        about: one line for `--help`.
        default: name of the scheme used when the user names none.
        fit: `(scheme, weight) -> scheme` as this format stores it (type of the scales, flat blocks); raises
            `UnsupportedError` with the reason and, where known, a scheme or format that works.
        layout: `weight -> {tensor name: Spec}`, exactly the tensors that `pack` fills.
        pack: `(weight, qtensor, into)` fills tensors allocated as `layout` says (they may be views of a mapped file);
            raises `FormatError` where a value cannot be stored.
        unpack: `(weight, tensors, codes) -> QTensor`; raises `FormatError` naming tensor and fact where stored tensors
            break the layout (shape, dtype, code out of range, scale not finite). `codes`, where not None, is a buffer
            for the result's codes, `[rows, cols]` uint8: with it nothing large is allocated.
        config: `(weights, config.json of the source) -> {file name: JSON document}`: files that declare the format;
            `config.json` among them, complete. `weights` holds every weight, kept ones too.
        recognise: `(config, specs, read) -> {weight name: Weight}` for the quantized weights of a checkpoint in this
            format, or None where it is another's. `specs` are all stored tensors; `read(name)` loads one (small
            ones only).
        owns: `(weight) -> names` of the stored tensors that belong to a recognised weight.
        fit_activations: `(scheme, weight) -> scheme` of the inputs of a weight whose own scheme is fitted, as this
            format declares it; raises `UnsupportedError` with the reason.
        swaps: whether its readers put a weight `[outputs, inputs]` into the place of a `Conv1D`.
        shares: whether its readers take an embedding's codes for an output layer that has none of its own; so they do
            where there is `choose`.
        act_order: whether columns may be in groups of an order of their own (GPTQ's `g_idx`).
        container: kind of file that its tensors are in, or that says what they are; what is not quantized is `arrange`d
            for it.
        choose: `(name, weights, config.json, important) -> {weight name: (scheme name or float type, reason)}` for
            names of mixtures; where there is one, it decides in place of the general rules which weights are quantized;
            `important`: whether with an importance matrix.
        encoder: method that makes every scheme of those mixtures: its default, and for where the chosen one cannot.
        learned_encoder: its default where there is text to learn from, or an importance matrix.
        arrange: `(weight, float type or "keep" or a scheme's name, config.json) -> weight` as the container has it:
            dtype, order of rows; None where it has them as the checkpoint does.
        hollow: `(scheme) -> bool`: whether `unpack` and `pack` take codes on torch's device `meta`, which are a shape
            and no bytes. They then leave alone where codes are stored, and do and check all else. Only true where no
            code can be wrong.
        codes: those of the schemes that are `hollow`, in parts; None where they are not had so.
        by_rows: `(weight) -> number` of rows that stay together: its layout is one tensor, of which these, or several
            such in a run, are what `pack` makes of a weight of those rows alone (`Weight.some`); 0 if not so.
        stacks: `(tensor name, model_type of config.json) -> (name, number)` of the tensor of the file that has it,
            together with those of other experts, of which it is that one; None where it is stored alone.
    """

    about: str
    default: str
    fit: Callable[[Scheme, Weight], Scheme]
    layout: Callable[[Weight], dict[str, Spec]]
    pack: Callable[[Weight, QTensor, Mapping[str, Tensor]], None]
    unpack: Callable[[Weight, Mapping[str, Tensor], Tensor | None], QTensor]
    config: Callable[[Sequence[Weight], Mapping[str, Any]], dict[str, dict[str, Any]]]
    recognise: Callable[[Mapping[str, Any], Mapping[str, Spec], Callable[[str], Tensor]], dict[str, Weight] | None]
    owns: Callable[[Weight], Sequence[str]]
    fit_activations: Callable[[Scheme, Weight], Scheme] = no_activations
    swaps: bool = False
    shares: bool = False
    act_order: bool = False
    container: Literal["safetensors", "gguf", "onnx"] = "safetensors"
    choose: Callable[[str, Sequence[Weight], Mapping[str, Any], bool], dict[str, tuple[str, str]]] | None = None
    encoder: str = ""
    learned_encoder: str = ""
    arrange: Callable[[Weight, str, Mapping[str, Any]], Weight] | None = None
    hollow: Callable[[Scheme], bool] = never_hollow
    codes: Codes | None = None
    by_rows: Callable[[Weight], int] = never_by_rows
    stacks: Callable[[str, str], tuple[str, int] | None] = never_stacked
