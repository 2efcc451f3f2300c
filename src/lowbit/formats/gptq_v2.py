"""GPTQ's second checkpoint format: zero points as they are, so that asymmetric schemes fit (docs/formats/gptq.md)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lowbit.formats import Format, Spec, Weight, _gptq
from lowbit.formats._gptq import Read


def recognise(config: Mapping[str, Any], specs: Mapping[str, Spec], read: Read) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares GPTQ v2.

    Raises:
        FormatError: a declaration that contradicts the stored tensors, or a kind of GPTQ that is not read.
    """
    return _gptq.recognise(config, specs, "gptq_v2")


FORMAT = Format(
    about="GPTQ v2, for gptqmodel: integers of 2, 3, 4 and 8 bits, symmetric and asymmetric",
    default="int4-g128",
    fit=_gptq.fit,
    layout=_gptq.layout,
    pack=partial(_gptq.pack, offset=0),
    unpack=partial(_gptq.unpack, offset=0),
    config=partial(_gptq.config, format="gptq_v2"),
    recognise=recognise,
    owns=_gptq.owns,
    swaps=True,
    act_order=True,
    hollow=_gptq.hollow,
    codes=_gptq.CODES,
)
