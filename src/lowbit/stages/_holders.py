"""Which other formats hold what one does not: each is asked itself, so that no hint names one that refuses it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lowbit import plugins
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Weight
from lowbit.schemes import Scheme
from lowbit.stages._readers import kept_for

_FIRST = "compressed_tensors"  # what most runtimes load
_MOST = 3


def held_by(holds: Callable[[str, Format], bool]) -> str:
    """The end of a sentence: which formats hold it, as `holds(name, format)` says of each, or raises that they do not.

    Formats of other containers, which need more of a model than its weights, are named where no others hold it.
    """
    found: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted(plugins.written(), key=lambda name: name != _FIRST):
        record: Format = plugins.load("formats", name)
        with suppress(UnsupportedError, FormatError):
            if holds(name, record):
                found[record.container == "safetensors"].append(name.replace("_", "-"))
        if len(found[True]) == _MOST:
            break
    return _said(found[True] or found[False][:_MOST])


def _said(names: Sequence[str]) -> str:
    if len(names) < 2:
        return f"; --format {names[0]} holds it" if names else "; no other format holds it"
    return f"; --format {', '.join(names[:-1])} or {names[-1]} holds it"


def takes(
    name: str, form: Format, weight: Weight, scheme: Scheme, activations: Scheme | None, config: Mapping[str, Any]
) -> Weight:
    """The weight as a plan may have it in this format.

    Raises:
        UnsupportedError: it may not.
    """
    if weight.swapped and not form.swaps:
        raise UnsupportedError("its readers know no transposed layers")
    fitted = replace(weight, scheme=form.fit(scheme, weight))
    fitted = replace(fitted, activations=form.fit_activations(activations, fitted) if activations else None)
    why = kept_for(name, config, fitted)
    if why:
        raise UnsupportedError(why)
    form.config([fitted], config)
    return fitted
