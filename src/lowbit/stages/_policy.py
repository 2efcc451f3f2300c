"""Policies: rules that give weights a scheme by what they do and where they stand; presets: `arch/policies.toml`.

A rule says which weights it is for (role, name, blocks, experts and how often these are used, format), or which rows of
them (tokens by how often they are used, heads), and which scheme they get: one by its name, or a step above or below
the run's scheme on a ladder. The first rule that is met counts.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any, final

from lowbit.errors import UsageError
from lowbit.formats import Weight
from lowbit.stages._rows import Runs, runs_of, whole_of
from lowbit.stages.checkpoint import arch_row, arch_rows

_BLOCK = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts?\.")
_NUMBERED = re.compile(r"^(.*\.experts?)\.(\d+)\.")
_MOST = re.compile(r"(most|least) (\d+(?:\.\d+)?)(%?)")
_ENDS = re.compile(r"(first|last) (\d+(?:\.\d+)?)(%?)")
_STEPS = {"lower": -1, "higher": 1}
_RANGE = re.compile(r"(\d*):(\d*)")
_BY_TOKENS, _BY_HEADS = ("embedding", "head"), ("q", "k", "v")


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
    tokens: str = ""
    heads: tuple[str | int, ...] = ()

    @property
    def rows(self) -> bool:
        """Whether it is for some rows of a weight."""
        return bool(self.tokens or self.heads)

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

    @property
    def ranks(self) -> bool:
        """Whether it asks how often tokens are used."""
        return any(rule.tokens for rule in self.rules)


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
    known = [field.name for field in fields(Rule)]
    for key in row.keys() - set(known):
        raise UsageError(f"{where}: there is no {key!r}; a rule has {', '.join(known)}")
    lists = {key: _listed(row[key]) for key in ("role", "formats", "blocks", "heads") if key in row}
    texts = ("scheme", "reason", "pattern", "frequency", "tokens")
    for key, kind in [*((text, str) for text in texts), ("experts", bool)]:
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
    for key, often in (("frequency", rule.frequency), ("tokens", rule.tokens)):
        if often and not _MOST.fullmatch(often):
            raise UsageError(f"{where}: {key} {often!r} is not 'most N', 'most N%', 'least N' or 'least N%'")
    _check_rows(rule, where)
    try:
        re.compile(rule.pattern)
    except re.error as error:
        raise UsageError(f"{where}: {rule.pattern!r} is not a regular expression: {error}") from None


def _check_rows(rule: Rule, where: str) -> None:
    for key, said, roles in (("tokens", rule.tokens, _BY_TOKENS), ("heads", rule.heads, _BY_HEADS)):
        if said and not (rule.role and set(rule.role) <= set(roles)):
            raise UsageError(f"{where}: {key} are rows of {', '.join(roles)}; name role as one of these")
    for head in rule.heads:
        number = isinstance(head, int) and not isinstance(head, bool) and head >= 0
        if not number and not _RANGE.fullmatch(str(head)):
            raise UsageError(f"{where}: heads {head!r} is not a number, a list of numbers or a range as '0:4'")


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
    tokens: Sequence[int] | None = None,
) -> dict[str, tuple[str, str]]:
    """Scheme name (or `keep`) and reason of every weight, or block of rows, that a rule is for.

    Args:
        config: of the model, `config.json`.
        base: the run's scheme.
        form: the output format.
        counts: tokens that each expert's weight multiplied (`frequency.py`), where the policy asks for it.
        tokens: rank of each token (`frequency.py`), where the policy asks for it.

    Raises:
        UsageError: a step that the run's scheme has not; a policy that asks how often experts or tokens are used,
            without what was counted; heads that a weight does not have.
    """
    found = {}
    for weight, rules in _met_by(policy, weights, config, form, counts, tokens):
        row = weight.rows[0][0] if weight.rows else 0
        rule = next((rule for rule in rules if _of_row(rule, weight, row, config, tokens)), None)
        if rule:
            used = f" for experts used {rule.frequency}" if rule.frequency else ""
            used = f" for tokens used {rule.tokens}" if rule.tokens else used
            used = f" for heads {', '.join(map(str, rule.heads))}" if rule.heads else used
            reason = f"policy {policy.name}: {rule.reason or rule.scheme + used}"
            found[weight.name] = step(base, rule.scheme, policy.name), reason
    return found


def in_blocks(
    policy: Policy,
    weights: Iterable[Weight],
    config: Mapping[str, Any],
    form: str,
    tokens: Sequence[int] | None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, list[Runs]]:
    """The rows of each weight of which some meet other rules than others, in blocks that meet the same.

    Tokens of a rule are one block; heads, which calibration sees where they lie, one for each run. Takes and raises
    what `assign` does.
    """
    found = {}
    for weight, rules in _met_by(policy, weights, config, form, counts, tokens):
        if not any(rule.rows for rule in rules):
            continue
        at = range(weight.shape[0])
        first = [next((n for n, r in enumerate(rules) if _of_row(r, weight, row, config, tokens)), -1) for row in at]
        groups = {rule: [row for row in at if first[row] == rule] for rule in dict.fromkeys([*range(len(rules)), -1])}
        blocks = [runs_of(rows) for rows in groups.values() if rows]
        if not any(rule.tokens for rule in rules):
            blocks = sorted((run,) for runs in blocks for run in runs)
        if len(blocks) > 1:
            found[weight.name] = blocks
    return found


def _met_by(
    policy: Policy,
    weights: Iterable[Weight],
    config: Mapping[str, Any],
    form: str,
    counts: Mapping[str, int] | None,
    tokens: Sequence[int] | None,
) -> Iterator[tuple[Weight, list[Rule]]]:
    """Matrices with the rules that are for them, or for some of their rows, up to the first that is for all of it."""
    for what, asked, known in (("experts", policy.counts, counts), ("tokens", policy.ranks, tokens)):
        if asked and known is None:
            raise UsageError(
                f"policy {policy.name} asks how often {what} are used; that is counted on text: name it with "
                "--calibration"
            )
    many, ranks = list(weights), _ranks(counts or {})
    count = 1 + max((block for weight in many if (block := _block(weight.name)) is not None), default=-1)
    for weight in [weight for weight in many if len(weight.shape) == 2]:
        whole = replace(weight, name=whole_of(weight.name) or weight.name)
        kept = arch_row("keep", config, whole) is not None
        met = [rule for rule in policy.rules if (rule.special or not kept) and _met(rule, whole, count, form, ranks)]
        last = next((at for at, rule in enumerate(met) if not rule.rows), len(met))
        yield weight, met[: last + 1]


def _of_row(rule: Rule, weight: Weight, row: int, config: Mapping[str, Any], tokens: Sequence[int] | None) -> bool:
    """Whether a rule that is for a weight is for this row of it."""
    if rule.tokens:
        if tokens is None or not row < len(tokens):
            raise UsageError(f"{weight.name} has a row {row}, and the model has no such token")
        return _often((tokens[row], len(tokens)), rule.tokens)
    if rule.heads:
        heads, size = heads_of(weight, config)
        return row // size in _numbers(rule, heads, weight)
    return True


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


def heads_of(weight: Weight, config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of a matrix of q, k or v, and rows of each, as the configuration says.

    Raises:
        UsageError: it says nothing, or the weight, where it is whole, has other rows.
    """
    text = config.get("text_config")
    facts = {**config, **text} if isinstance(text, Mapping) else config
    queries = facts.get("num_attention_heads")
    heads = queries if role_of(weight.name) == "q" else facts.get("num_key_value_heads") or queries
    size = facts.get("head_dim") or (facts.get("hidden_size") or 0) // (queries or 1)
    if not isinstance(heads, int) or not isinstance(size, int) or size < 1:
        raise UsageError(f"config.json does not say how many heads {weight.name} has, and how large they are")
    if not weight.rows and heads * size != weight.shape[0]:
        raise UsageError(f"{weight.name} has {weight.shape[0]} rows, which are not {heads} heads of {size}")
    return heads, size


def _numbers(rule: Rule, heads: int, weight: Weight) -> set[int]:
    """The heads that a rule names."""
    found: set[int] = set()
    for said in rule.heads:
        ends = _RANGE.fullmatch(str(said))
        first, last = (int(ends[1] or 0), int(ends[2] or heads)) if ends else (int(said), int(said) + 1)
        if last > heads or first >= last:
            raise UsageError(f"heads {said!r}: {weight.name} has heads 0 to {heads - 1}")
        found |= set(range(first, last))
    return found


def _often(rank: tuple[int, int] | None, wanted: str) -> bool:
    """Whether an expert, or a token, is among the most, or the least, used ones of those beside it."""
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
