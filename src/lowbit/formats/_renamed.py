"""Layouts whose tensors are those of compressed-tensors under other names: FP8 and small floats of several makers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Spec, Weight
from lowbit.formats import _ct_tensors as tensors_of
from lowbit.formats._linear import check_planned, planned
from lowbit.tensors import QTensor

Names = Mapping[str, str]  # local name in `_ct_tensors` to the last part of the stored one


def layout(weight: Weight, names: Names) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    scheme = planned(weight)
    specs = tensors_of.layout(scheme, weight.shape, tensors_of.container(scheme))
    return {f"{weight.module}.{names[name]}": spec for name, spec in specs.items()}


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor], names: Names) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a value that the layout cannot hold, or a tensor of another scheme or shape than the weight's.
    """
    check_planned(weight, q)
    with named(weight, names):
        tensors_of.pack(q, {name: into[full] for name, full in _full(weight, names).items() if full in into})


def unpack(weight: Weight, tensors: Mapping[str, Tensor], names: Names, codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; codes of FP8 weights are a view of the stored tensor.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    local = {name: tensors[full] for name, full in _full(weight, names).items() if full in tensors}
    with named(weight, names):
        return tensors_of.unpack(planned(weight), weight.shape, local, codes)


def _full(weight: Weight, names: Names) -> dict[str, str]:
    return {name: f"{weight.module}.{stored}" for name, stored in names.items()}


@contextmanager
def named(weight: Weight, names: Names) -> Iterator[None]:
    """Put the stored name where an error begins with a local one, and the module before any other."""
    try:
        yield
    except FormatError as error:
        word, rest = re.fullmatch(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
        text = f"{weight.module}.{names[word]}{rest}" if word in names else f"{weight.module}: {error}"
        raise FormatError(text) from None


def powers(exponents: Tensor) -> Tensor:
    """E8M0 bytes as float32; NaN (255) stays NaN."""
    return exponents.view(torch.uint8).contiguous().view(torch.float8_e8m0fnu).float()
