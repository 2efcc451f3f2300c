"""GPTQ's original checkpoint format, v1: the one that most readers know (docs/formats/gptq.md)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lowbit.errors import UnsupportedError
from lowbit.formats import Format, Spec, Weight, _gptq
from lowbit.formats._gptq import Read
from lowbit.schemes import Scheme

_OFFSET = 1  # zero points are stored less one


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme as GPTQ v1 stores it.

    Raises:
        UnsupportedError: the layout cannot hold it, or its readers refuse it; asymmetric schemes among them.
    """
    fitted = _gptq.fit(scheme, weight)
    if fitted.zero == "int":
        raise UnsupportedError(
            f"gptq v1 cannot hold {scheme}: it stores zero points less one, so that a zero point of 0 has no place and "
            "gptqmodel and auto-round refuse such files"
        )
    return fitted


def recognise(config: Mapping[str, Any], specs: Mapping[str, Spec], read: Read) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares GPTQ and does not say v2.

    Raises:
        FormatError: a declaration that contradicts the stored tensors, or a kind of GPTQ that is not read.
    """
    return _gptq.recognise(config, specs, "gptq")


FORMAT = Format(
    about="GPTQ v1, which most runtimes load: symmetric integers of 2, 3, 4 and 8 bits",
    default="int4-g128",
    fit=fit,
    layout=_gptq.layout,
    pack=partial(_gptq.pack, offset=_OFFSET),
    unpack=partial(_gptq.unpack, offset=_OFFSET),
    config=partial(_gptq.config, format="gptq"),
    recognise=recognise,
    owns=_gptq.owns,
    swaps=True,
    act_order=True,
    hollow=_gptq.hollow,
    codes=_gptq.CODES,
)
