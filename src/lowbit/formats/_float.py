"""No format: float weights under their own names, as every reader of safetensors takes them.

It is what a conversion back writes, and no plug-in: there is no scheme that it holds, and nothing in a checkpoint that
declares it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.formats import Format, Weight
from lowbit.formats._linear import declare
from lowbit.formats._refuse import never

NAME = "float"
_refuse = never(f"{NAME} holds no quantized weights")


def _config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {"config.json": declare(source, None)}


FORMAT = Format(
    about="float weights, dequantized",
    default="",
    fit=_refuse,
    layout=_refuse,
    pack=_refuse,
    unpack=_refuse,
    config=_config,
    recognise=lambda config, specs, read: None,
    owns=lambda weight: (),
)
