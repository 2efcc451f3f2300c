"""Policies: rules that give weights a scheme by what they do and where they stand; presets: `arch/policies.toml`.

A rule says which weights it is for (role, name, blocks, experts and how often these are used, format) and which scheme
they get: one by its name, or a step above or below the run's scheme on a ladder. The first rule that is met counts.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any, final

from lowbit.errors import UsageError
from lowbit.formats import Weight
from lowbit.stages.checkpoint import arch_row, arch_rows

_BLOCK = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts?\.")
_NUMBERED = re.compile(r"^(.*\.experts?)\.(\d+)\.")
_MOST = re.compile(r"(most|least) (\d+(?:\.\d+)?)(%?)")
_ENDS = re.compile(r"(first|last) (\d+(?:\.\d+)?)(%?)")
_STEPS = {"lower": -1, "higher": 1}
_UNHELD = {
    "rows": "no public format holds rows of one tensor in different schemes, as an embedding by frequency of its "
    "tokens; name one scheme for all of it",
    "heads": "no public format holds heads of one tensor in different schemes; name one scheme for q, k, v or o",
}


@final
@dataclass(frozen=True)
class Rule:
    """One rule; a condition that is None or empty is met by all."""

    scheme: str
    reason: str = ""
    role: tuple[str, ...] = ()
    pattern: str = ""
    blocks: tuple[str | int, ...] = ()
    experts: bool | None = None
    frequency: str = ""
    formats: tuple[str, ...] = ()

    @property
    def special(self) -> bool:
        """Whether it names its weights outright, so that it also reaches those that are kept by default."""
        return bool(self.pattern) or bool({"embedding", "head"} & set(self.role))


@final
@dataclass(frozen=True)
class Policy:
    """Rules under a name, first match first."""

    name: str
    rules: tuple[Rule, ...]

    @property
    def counts(self) -> bool:
        """Whether it asks how often experts are used."""
        return any(rule.frequency for rule in self.rules)


def presets() -> Mapping[str, str]:
    """Name and one line of every preset."""
    return {name: row["about"] for name, row in _tables()["policy"].items()}


def read_policy(name: str) -> Policy:
    """A preset, or the rules of a TOML file.

    Raises:
        UsageError: no such preset or file, or one that cannot be read; the text names the rule.
    """
    if name in presets():
        return Policy(name, _rules(_tables()["policy"][name], name))
    path = Path(name)
    if not path.suffix and not path.exists():
        raise UsageError(f"no policy is called {name!r}; there are: {', '.join(presets())}, or FILE.toml with rules")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} is not a policy: {' '.join(str(error).split())}") from None
    return Policy(path.name, _rules(data, name))


@cache
def _tables() -> Mapping[str, Any]:
    return tomllib.loads(files("lowbit").joinpath("arch/policies.toml").read_text(encoding="utf-8"))


def _rules(data: Mapping[str, Any], where: str) -> tuple[Rule, ...]:
    rows = data.get("rule")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{where} is not a policy: it has no [[rule]]")
    return tuple(_rule(row, f"{where}, rule {number}") for number, row in enumerate(rows, 1))


def _rule(row: Mapping[str, Any], where: str) -> Rule:
    """One rule, every key and value checked."""
    for key in _UNHELD.keys() & row.keys():
        raise UsageError(f"{where}: {_UNHELD[key]}")
    known = [field.name for field in fields(Rule)]
    for key in row.keys() - set(known):
        raise UsageError(f"{where}: there is no {key!r}; a rule has {', '.join(known)}")
    lists = {key: _listed(row[key]) for key in ("role", "formats", "blocks") if key in row}
    for key, kind in (("scheme", str), ("reason", str), ("pattern", str), ("frequency", str), ("experts", bool)):
        if not isinstance(row.get(key, kind()), kind):
            raise UsageError(f"{where}: {key} is {row[key]!r}")
    if not row.get("scheme"):
        raise UsageError(f"{where} names no scheme")
    rule = Rule(**{**row, **lists})
    _check(rule, where)
    return rule


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def _check(rule: Rule, where: str) -> None:
    roles = [row["role"] for row in arch_rows("roles")]
    for role in rule.role:
        if role not in roles:
            raise UsageError(f"{where}: no role is called {role!r}; there are: {', '.join(roles)}")
    for place in rule.blocks:
        if isinstance(place, bool) or not (isinstance(place, int) or _ENDS.fullmatch(str(place))):
            raise UsageError(f"{where}: blocks {place!r} is not a number, 'first N', 'last N' or 'first N%'")
    if rule.frequency and not _MOST.fullmatch(rule.frequency):
        raise UsageError(f"{where}: frequency {rule.frequency!r} is not 'most N', 'most N%', 'least N' or 'least N%'")
    try:
        re.compile(rule.pattern)
    except re.error as error:
        raise UsageError(f"{where}: {rule.pattern!r} is not a regular expression: {error}") from None


def role_of(name: str) -> str | None:
    """What a weight of that name does (`arch/roles.toml`); None where it is not told."""
    return next((row["role"] for row in arch_rows("roles") if re.search(row["pattern"], name)), None)


def is_expert(name: str) -> bool:
    """Whether a weight belongs to an expert, or is a stack of them."""
    return _EXPERT.search(name) is not None


def expert_of(name: str) -> tuple[str, int] | None:
    """The stack that an expert's weight belongs to, as `model.layers.3.mlp.experts`, and the expert's number."""
    found = _NUMBERED.search(name)
    return (found[1], int(found[2])) if found else None


def _ranks(counts: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Of each expert's weight: experts of its stack that are used more, or as often and come first; and how many."""
    used: dict[str, dict[int, int]] = {}
    for name, count in counts.items():
        if place := expert_of(name):
            used.setdefault(place[0], {})[place[1]] = max(count, used.get(place[0], {}).get(place[1], 0))
    order = {stack: sorted(row, key=lambda expert: (-row[expert], expert)) for stack, row in used.items()}
    places = {name: place for name in counts if (place := expert_of(name))}
    return {name: (order[stack].index(number), len(order[stack])) for name, (stack, number) in places.items()}


def assign(
    policy: Policy,
    weights: Iterable[Weight],
    config: Mapping[str, Any],
    base: str,
    form: str,
    counts: Mapping[str, int] | None = None,
) -> dict[str, tuple[str, str]]:
    """Scheme name (or `keep`) and reason of every weight that a rule is for.

    Args:
        config: of the model, `config.json`.
        base: the run's scheme.
        form: the output format.
        counts: tokens that each expert's weight multiplied (`frequency.py`), where the policy asks for it.

    Raises:
        UsageError: a step that the run's scheme has not; a policy that asks how often experts are used, without counts.
    """
    if policy.counts and counts is None:
        raise UsageError(
            f"policy {policy.name} asks how often experts are used; that is counted on text: name it with --calibration"
        )
    found, many, ranks = {}, list(weights), _ranks(counts or {})
    count = 1 + max((block for weight in many if (block := _block(weight.name)) is not None), default=-1)
    for weight in many:
        if len(weight.shape) != 2:
            continue
        kept = arch_row("keep", config, weight) is not None
        rule = next(
            (rule for rule in policy.rules if (rule.special or not kept) and _met(rule, weight, count, form, ranks)),
            None,
        )
        if rule:
            used = f" for experts used {rule.frequency}" if rule.frequency else ""
            reason = f"policy {policy.name}: {rule.reason or rule.scheme + used}"
            found[weight.name] = step(base, rule.scheme, policy.name), reason
    return found


def _block(name: str) -> int | None:
    number = _BLOCK.search(name)
    return int(number[1]) if number else None


def _met(rule: Rule, weight: Weight, count: int, form: str, ranks: Mapping[str, tuple[int, int]]) -> bool:
    return (
        (not rule.formats or form.replace("_", "-") in [each.replace("_", "-") for each in rule.formats])
        and (not rule.role or role_of(weight.name) in rule.role)
        and (rule.experts is None or rule.experts == is_expert(weight.name))
        and (not rule.frequency or _often(ranks.get(weight.name), rule.frequency))
        and re.search(rule.pattern, weight.name) is not None
        and (not rule.blocks or _inside(_block(weight.name), rule.blocks, count))
    )


def _often(rank: tuple[int, int] | None, wanted: str) -> bool:
    """Whether an expert is among the most, or the least, used ones of its stack."""
    if rank is None:
        return False
    end, number, percent = _MOST.fullmatch(wanted).groups()  # type: ignore[union-attr]  # checked when it was read
    at, count = rank
    width = max(1, ceil(float(number) / 100 * count)) if percent else float(number)
    return at < width if end == "most" else at >= count - width


def _inside(block: int | None, places: Sequence[str | int], count: int) -> bool:
    """Whether a block is at one of the places of a model of `count` blocks; numbers below 0 count from the end."""
    if block is None:
        return False
    for place in places:
        if isinstance(place, int):
            if block == (place + count if place < 0 else place):
                return True
            continue
        end, number, percent = _ENDS.fullmatch(place).groups()  # type: ignore[union-attr]  # checked when it was read
        width = max(1, ceil(float(number) / 100 * count)) if percent else float(number)
        if block < width if end == "first" else block >= count - width:
            return True
    return False


def step(base: str, wanted: str, policy: str) -> str:
    """The scheme that a rule's word stands for; any other word is a scheme itself.

    Raises:
        UsageError: the run's scheme is on no ladder, so that nothing is above or below it.
    """
    if wanted == "base":
        return base
    if wanted not in (*_STEPS, "highest"):
        return wanted
    grid, dash, rest = base.lower().partition("-")
    for ladder in (row["steps"] for row in _tables()["ladder"]):
        whole = base.lower() in ladder
        if whole or (grid in ladder and grid.startswith("int")):
            at = ladder.index(base.lower() if whole else grid)
            to = len(ladder) - 1 if wanted == "highest" else min(max(at + _STEPS[wanted], 0), len(ladder) - 1)
            return str(ladder[to] if whole else ladder[to] + dash + rest)
    ladders = "; ".join(" < ".join(row["steps"]) for row in _tables()["ladder"])
    raise UsageError(
        f"policy {policy} asks for a scheme {wanted} than {base}, which is on no ladder ({ladders}): take a scheme "
        "that is, or a policy of your own that names schemes"
    )
