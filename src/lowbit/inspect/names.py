"""What the name of a file, folder or model says about it. The facts are in `names.toml`; nothing is opened here."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files as package
from math import log2
from typing import Any, Literal, final, get_args

# high: the name says it. medium: what is so by default. low: a guess, or the name contradicts itself.
Confidence = Literal["high", "medium", "low"]
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)  # the surest first
Value = int | float | str | bool

_LONGEST = 300
_ORDER = ("publisher", "model", "version", "size", "variant", "method", "type", "mixture", "grid", "bits", "group")
# Fields that speak of quantization: a name that has one of them is worth showing where nothing was opened.
_TELLING = ("method", "bits", "group", "grid", "type", "act_order", "quantized")


@final
@dataclass(frozen=True)
class Said:
    """One thing that a name says: its value, how sure that is, and the part of the name that says so."""

    value: Value
    confidence: Confidence
    token: str


@final
@dataclass(frozen=True)
class Name:
    """What a name says, field by field.

    Attributes:
        text: the name.
        facts: `model`, `size`, `variant`, `method`, `bits`, `group`, `act_order`, `container`, ... to what is said.
        warnings: what cannot be so, or means something else than it seems to.
    """

    text: str
    facts: Mapping[str, Said] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def telling(self) -> bool:
        """Whether it speaks of quantization."""
        return any(key in self.facts for key in _TELLING)

    def value(self, key: str) -> Value | None:
        """What is said in one field; None where nothing is."""
        said = self.facts.get(key)
        return said.value if said else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def decode(text: str) -> Name:
    """Read the name of a file, a folder, or a model of the hub (`publisher/name`, with `:branch` or `@branch`).

    Bits are read where they are said; what is left before the first thing understood is the model's own name.
    """
    text = "".join(char for char in text[:_LONGEST] if char.isprintable()).strip()
    folder, _, last = text.rstrip("/").rpartition("/")
    facts: dict[str, Said] = {}
    ending = next((end for end in names_table()["containers"] if last.lower().endswith(end)), "")
    if ending:
        facts["container"] = Said(names_table()["containers"][ending], "high", ending)
    elif re.fullmatch(r"\w[\w.-]*", folder):
        facts["publisher"] = Said(folder, "high", folder)
    rest = last[: len(last) - len(ending)]
    spoken: list[tuple[str, Said]] = []
    for row in names_table()["tokens"]:
        rest = _take(row, last, rest, spoken)
    warnings = [*_settle(facts, spoken), *_conflicts(facts)]
    stem = rest.split("\0")[0].strip("-_.:@ ") or re.split(r"[-_.]", last)[0]
    if stem:
        facts["model"] = Said(stem, "medium", stem)
    facts |= _derived(facts)
    order = {key: at for at, key in enumerate(_ORDER)}
    return Name(text, dict(sorted(facts.items(), key=lambda item: order.get(item[0], len(order)))), tuple(warnings))


@cache
def names_table() -> dict[str, Any]:
    """The tables of `names.toml`."""
    return tomllib.loads(package("lowbit").joinpath("inspect/names.toml").read_text())


def _take(row: Mapping[str, Any], whole: str, rest: str, spoken: list[tuple[str, Said]]) -> str:
    """Add what one row finds to `spoken`; the rest of the name, with NULs where something was taken."""
    if "where" in row and not re.search(row["where"], whole, re.IGNORECASE):
        return rest
    pattern = rf"(?<![a-z0-9])(?:{row['pattern']})(?![a-z0-9])"
    for match in re.finditer(pattern, rest, re.IGNORECASE):
        spoken += _spoken(row, match)
        rest = rest[: match.start()] + "\0" * len(match[0]) + rest[match.end() :]
    return rest


def _spoken(row: Mapping[str, Any], match: re.Match[str]) -> Iterator[tuple[str, Said]]:
    """What a row makes of one match."""
    tables: dict[str, Confidence] = {"says": "high", "usual": "medium", "guess": "low"}
    for table, confidence in tables.items():
        for key, value in row.get(table, {}).items():
            said = _value(match, value)
            if said != "":
                yield key, Said(said, confidence, match[0])


def _value(match: re.Match[str], value: Value) -> Value:
    """A row's value with the groups of its pattern in it: a number where it is one, else in lower case."""
    if not isinstance(value, str) or "\\" not in value:
        return value
    text = match.expand(value).lower()
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    return float(text) if re.fullmatch(r"\d\.\d+", text) else text


def _settle(facts: dict[str, Said], spoken: list[tuple[str, Said]]) -> Iterator[str]:
    """Keep of each field what is said most surely; what contradicts it is a warning, or a mixture that is declared."""
    mixed = any(said.value == "mixed" for _, said in spoken)
    for key, said in sorted(spoken, key=lambda pair: CONFIDENCES.index(pair[1].confidence)):
        known = facts.get(key)
        if known is None:
            facts[key] = said
        elif said.confidence == known.confidence == "high" and said.value != known.value:
            if mixed and key in ("bits", "grid"):
                facts[key] = Said(f"{known.value}+{said.value}", "high", f"{known.token} {said.token}")
            elif key != "method":  # an algorithm and a container, or two steps, as smoothquant and gptq
                facts[key] = Said(known.value, "low", known.token)
                yield f"{known.token} says {key} {known.value}, {said.token} says {said.value}"


def _derived(facts: Mapping[str, Said]) -> dict[str, Said]:
    """What follows from what was said: bits of codes for whole vectors, and of llama.cpp's types with their scales."""
    found: dict[str, Said] = {}
    if "vector" in facts and "bits" not in facts:
        found["bits"] = Said(_vector_bits(facts), "high", facts["vector"].token)
    kind = str(facts["type"].value).upper() if "type" in facts else ""
    if kind:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind in GGMLQuantizationType.__members__:
            weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
            found["bits_per_weight"] = Said(8 * nbytes / weights, "high", facts["type"].token)
    return found


def _vector_bits(facts: Mapping[str, Said]) -> float:
    """Bits per weight of codes for whole vectors (VPTQ): those of all its codebooks, over the length of a vector."""
    sizes = [facts[key].value for key in ("centroids", "residual_centroids")]
    length = facts["vector"].value
    bits = sum(log2(size) for size in sizes if isinstance(size, int) and size > 1)
    return bits / length if isinstance(length, int) and length else 0.0


def _conflicts(facts: dict[str, Said]) -> Iterator[str]:
    """Sentences for what does not go together; what they name is not sure then."""
    for row in names_table()["conflicts"]:
        wanted = {key: value if isinstance(value, list) else [value] for key, value in row["when"].items()}
        if all(key in facts and facts[key].value in values for key, values in wanted.items()):
            yield f"{' with '.join(facts[key].token for key in wanted)}: {row['because']}"
            for key in wanted:
                facts[key] = replace(facts[key], confidence="low" if len(wanted) > 1 else facts[key].confidence)
