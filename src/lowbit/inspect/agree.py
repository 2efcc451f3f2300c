"""Whether the name of a checkpoint and its content say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowbit.inspect.facts import Finding, TensorFacts
from lowbit.inspect.names import Name, names_table
from lowbit.schemes import Scheme, parse


def warnings(
    name: Name, form: str | None, declared: Mapping[str, Any] | None, tensors: Sequence[TensorFacts]
) -> list[Finding]:
    """Warnings of the name itself, and of what it says sure enough and the content does not.

    Args:
        name: the decoded name.
        form: the format, None for a float checkpoint.
        declared: the checkpoint's own `quantization_config`.
        tensors: its weights.
    """
    main = _main_scheme(tensors)
    found = [*name.warnings, *_method(name, form, declared), *_bits(name, main), *_group(name, main)]
    return [Finding("warning", None, f"the name: {text}") for text in found]


def _main_scheme(tensors: Sequence[TensorFacts]) -> Scheme | None:
    """The scheme of most quantized weights; where none is, the grid that most float ones lie on, if it has a name."""
    for names in ([facts.scheme for facts in tensors], [facts.grid and facts.grid.scheme for facts in tensors]):
        counts: Counter[str] = Counter()
        for name, facts in zip(names, tensors, strict=True):
            if name and not name.startswith("e2m1"):
                counts[name] += facts.parameters
        if counts:
            return parse(counts.most_common(1)[0][0])
    return None


def _method(name: Name, form: str | None, declared: Mapping[str, Any] | None) -> Iterator[str]:
    """A method that the format's files do not come from: the layout is one method's own, the name is another's."""
    said = name.facts.get("method")
    named = {method for row in names_table()["layouts"] for method in row["methods"]}
    rows = [row for row in names_table()["layouts"] if form in row["formats"]]
    if said and rows and said.value in named and said.value not in rows[0]["methods"]:
        config = f"its config says {declared['quant_method']}" if declared and "quant_method" in declared else ""
        yield f"{said.token} says {said.value}, {config or f'its format is {form}'}"


def _bits(name: Name, main: Scheme | None) -> Iterator[str]:
    said = name.facts.get("bits")
    if said is None or said.confidence == "low" or not isinstance(said.value, int):
        return
    if main is None and said.value < 16:
        yield f"{said.token} says {said.value} bits, every weight is stored as a float"
    if main and main.grid.bits != said.value and (said.confidence == "high" or said.value >= 16):
        yield f"{said.token} says {said.value} bits, most quantized weights have {main.grid.bits}"


def _group(name: Name, main: Scheme | None) -> Iterator[str]:
    said = name.facts.get("group")
    if said is None or main is None or said.confidence != "high" or not isinstance(said.value, int):
        return
    if main.block.cols != said.value and "type" not in name.facts:
        yield f"{said.token} says groups of {said.value}, most quantized weights have blocks {main.block}"
