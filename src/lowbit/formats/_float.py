"""No format: float weights under their own names, as every reader of safetensors takes them.

It is what a conversion back writes, and no plug-in: there is no scheme that it holds, and nothing in a checkpoint that
declares it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lowbit.errors import UnsupportedError
from lowbit.formats import Format, Weight
from lowbit.formats._linear import declare
from lowbit.schemes import Scheme

NAME = "float"


def _fit(scheme: Scheme, weight: Weight) -> NoReturn:
    raise UnsupportedError(f"{NAME} holds no quantized weights; leave out {scheme} of {weight.name}")


def _none(*_: object) -> NoReturn:
    raise UnsupportedError(f"{NAME} holds no quantized weights")


def _config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {"config.json": declare(source, None)}


FORMAT = Format(
    about="float weights, dequantized",
    default="",
    fit=_fit,
    layout=_none,
    pack=_none,
    unpack=_none,
    config=_config,
    recognise=lambda config, specs, read: None,
    owns=lambda weight: (),
)
