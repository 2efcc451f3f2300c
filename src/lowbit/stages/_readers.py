"""What `transformers` does not read as it is meant, in formats that it reads: kept, or said (`arch/readers.toml`)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lowbit import plugins
from lowbit.formats import Format, Weight
from lowbit.stages.checkpoint import arch_rows


def kept_for(form: str, config: Mapping[str, Any], weight: Weight) -> str | None:
    """Why a weight with a scheme stays as it is in a format; None where it need not."""
    return next((row["reason"] for row in _rows(form, config, weight) if row.get("keep")), None)


def unread(form: str, config: Mapping[str, Any], weights: Iterable[Weight]) -> dict[str, list[str]]:
    """The weights that are quantized in a format and that `transformers` does not read there, by reason."""
    found = defaultdict[str, list[str]](list)
    for weight in weights:
        for row in _rows(form, config, weight):
            found[row["reason"]].append(weight.name)
    return dict(found)


def told_unread(form: str, config: Mapping[str, Any], weights: Iterable[Weight]) -> list[str]:
    """A sentence on each reason why `transformers` does not read some of these weights."""
    found = unread(form, config, weights)
    return [f"{len(names)} weights, as {names[0]}, are {reason}" for reason, names in found.items()]


def _rows(form: str, config: Mapping[str, Any], weight: Weight) -> Iterator[Mapping[str, Any]]:
    """The rows of the table that are for a weight as a format stores it."""
    form, kind = form.replace("-", "_"), config.get("model_type")
    for row in arch_rows("readers") if weight.scheme else ():
        kinds, scheme = row["model_types"], row.get("schemes", {}).get(form, "")
        if not (kind in kinds or "*" in kinds) or form not in row["formats"]:
            continue
        meant = re.search(row["pattern"], weight.name) and re.search(scheme, str(weight.scheme))
        tied = config.get("tie_word_embeddings") is True or not row.get("tied")
        if meant and tied and not (row.get("packed") and _is_plain(form, weight)):
            yield row


def _is_plain(form: str, weight: Weight) -> bool:
    """Whether codes are stored under the weight's own name, one an element."""
    record: Format = plugins.load("formats", form)
    spec = record.layout(weight).get(weight.name)
    return spec is not None and spec.shape == weight.shape
