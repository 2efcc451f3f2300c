"""Recipes: `rotate+awq+gptq+tune`, the steps that a method's name may be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, final, get_args, get_origin, get_type_hints

from lowbit import plugins
from lowbit.corrections import Correction
from lowbit.errors import UnsupportedError, UsageError
from lowbit.methods import Method
from lowbit.transforms import Transform

ROTATE, TUNE = "rotate", "tune"  # steps that are stages of their own
_FOLDERS = ("transforms", "methods", "corrections")
T = TypeVar("T")


@final
@dataclass(frozen=True)
class Recipe:
    """What is done to a weight, in order.

    Attributes:
        rotate: whether the model is rotated first.
        transforms: plug-ins of `transforms/`, applied to the float weights of a block.
        method: plug-in of `methods/` that makes the codes.
        corrections: plug-ins of `corrections/`: low-rank terms beside the codes.
        tune: whether scales and norms are tuned last.
    """

    rotate: bool
    transforms: tuple[str, ...]
    method: str
    corrections: tuple[str, ...]
    tune: bool = False

    def __str__(self) -> str:
        steps = [*([ROTATE] if self.rotate else []), *self.transforms, self.method, *self.corrections]
        return "+".join([*steps, *([TUNE] if self.tune else [])])

    @property
    def _record(self) -> Method:
        record: Method = plugins.load("methods", self.method)
        return record

    @property
    def calibrated(self) -> bool:
        """Whether it needs windows of text."""
        return bool(self.transforms or self.corrections or self._record.needs or self.learns or self.tune)

    @property
    def weighs(self) -> bool:
        """Whether its method needs the mean square of inputs and nothing else."""
        return self._record.needs == {"mean_square"} and not self.learns

    @property
    def weighs_alone(self) -> bool:
        """Whether an importance matrix is all that it needs."""
        return self.weighs and not (self.rotate or self.transforms or self.corrections or self.tune)

    @property
    def smooths(self) -> bool:
        """Whether factors of inputs may stay beside a weight: corrections read inputs as they come, without these."""
        return bool(self.transforms) and not self.corrections

    @property
    def learns(self) -> bool:
        """Whether its method sees a whole block."""
        return self._record.learn is not None

    def informed(self, options: Mapping[str, Any]) -> bool:
        """Whether its method asks what errors at the outputs of blocks cost; `options`: of all, as a plan has them."""
        return self._record.informed(step_options(self._record, self.method, options))

    @property
    def paired(self) -> bool:
        """Whether its method compares inputs with the float model's."""
        return any(plugins.load("stats", name).paired for name in self._record.needs)


def parse_recipe(text: str, follower: str | None = None) -> Recipe:
    """The recipe that names joined by `+` stand for; without a method `follower`, the last transform's own, or `rtn`.

    Raises:
        UnsupportedError: a name that nothing has.
        UsageError: names in an order that makes no sense, or two methods.
    """
    names = [name.replace("-", "_") for name in text.split("+")]
    kinds = [_kind(name) for name in names]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"method {text!r} names {twice[0]} twice")
    order = [ROTATE, "transforms", "methods", "corrections", TUNE]
    if [order.index(kind) for kind in kinds] != sorted(order.index(kind) for kind in kinds):
        raise UsageError(f"method {text!r}: the order is rotate, transforms, one method, corrections, tune")
    of = {kind: tuple(name for name, own in zip(names, kinds, strict=True) if own == kind) for kind in order}
    if len(of["methods"]) > 1:
        raise UsageError(f"method {text!r} names {len(of['methods'])} methods that make codes; name one")
    method = of["methods"][0] if of["methods"] else follower or _follower(of["transforms"])
    recipe = Recipe(bool(of[ROTATE]), of["transforms"], method, of["corrections"], bool(of[TUNE]))
    if recipe.tune and recipe.corrections:
        raise UsageError(f"method {text!r}: {TUNE} would move scales from under their low-rank terms; leave one out")
    first = [name for name in recipe.corrections if plugins.load("corrections", name).before]
    if recipe.learns and first:
        raise UsageError(
            f"method {text!r}: {method} learns the weights of a block together, and {first[0]} changes one weight "
            "before its codes are made; name another method, or a correction of what the codes left"
        )
    return recipe


def _kind(name: str) -> str:
    if name in (ROTATE, TUNE):
        return name
    found = next((folder for folder in _FOLDERS if name in plugins.names(folder)), None)
    if found is None:
        steps = [ROTATE, *(each for folder in _FOLDERS for each in plugins.names(folder)), TUNE]
        raise UnsupportedError(f"no step is called {name!r}; there are: {', '.join(steps)}")
    return found


def _follower(transforms: tuple[str, ...]) -> str:
    """The method where none is named."""
    record: Transform | None = plugins.load("transforms", transforms[-1]) if transforms else None
    return record.method if record else "rtn"


def dotted(options: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Options by `step.name`; a plain name is the method's.

    Raises:
        UsageError: an option of a step that the recipe does not have, a name or value that the step does not take.
    """
    found = {key if "." in key else f"{recipe.method}.{key}": value for key, value in options.items()}
    steps: dict[str, Any] = {name: None for name, there in ((ROTATE, recipe.rotate), (TUNE, recipe.tune)) if there}
    steps |= {name: plugins.load("transforms", name) for name in recipe.transforms}
    steps |= {recipe.method: plugins.load("methods", recipe.method)}
    steps |= {name: plugins.load("corrections", name) for name in recipe.corrections}
    for key in found:
        if key.partition(".")[0] not in steps:
            raise UsageError(f"option {key}: the recipe {recipe} has no step {key.partition('.')[0]}")
    _refuse_another_steps(options, recipe, {name: record.options for name, record in steps.items() if record})
    for name, record in steps.items():
        if record is not None:
            step_options(record, name, found)
    _check_budget(found, recipe)
    return found


def _refuse_another_steps(options: Mapping[str, Any], recipe: Recipe, kinds: Mapping[str, type]) -> None:
    """A plain name is the method's; where another step has it alone, say how it is written."""
    for key in options.keys() - get_type_hints(kinds[recipe.method]).keys():
        for name, kind in kinds.items():
            if key in get_type_hints(kind):
                raise UsageError(f"{recipe.method} has no option {key!r}, but {name} has: write it {name}.{key}")


def _check_budget(options: Mapping[str, Any], recipe: Recipe) -> None:
    """A budget is spent when all errors of a block are known: on the last term that is fitted to them."""
    for at, name in enumerate(recipe.corrections, 1):
        record: Correction = plugins.load("corrections", name)
        if step_options(record, name, options).budget is None:
            continue
        if record.before:
            raise UsageError(f"option {name}.budget: {name} comes before the codes and their errors; give it a rank")
        if at < len(recipe.corrections):
            raise UsageError(f"option {name}.budget: corrections follow {name}, and fit what it leaves; give it a rank")


def step_options(record: Method | Transform | Correction, name: str, options: Mapping[str, Any]) -> Any:
    """The options of one step as its dataclass, defaults filled in.

    Raises:
        UsageError: an option that the step does not have, or a value of the wrong kind.
    """
    return parse_options(record.options, name, options)


def parse_options(kind: type[T], name: str, options: Mapping[str, Any]) -> T:
    """The options named `name.*` as this dataclass; raises like `step_options`."""
    own = {key.partition(".")[2]: value for key, value in options.items() if key.partition(".")[0] == name}
    known = get_type_hints(kind)
    try:
        return kind(**{key: _checked(name, key, value, known) for key, value in own.items()})
    except ValueError as error:
        raise UsageError(f"options of {name}: {error}") from None


def _checked(step: str, key: str, value: Any, known: Mapping[str, Any]) -> Any:
    """The value; raises UsageError where a step has no such option, or it is of another kind than its type says."""
    if key not in known:
        raise UsageError(f"{step} has no option {key!r}; its options are: {', '.join(known) or 'none'}")
    kinds = get_args(known[key]) if isinstance(known[key], UnionType) else (known[key],)
    if not any(_is(value, each) for each in kinds):
        raise UsageError(f"option {step}.{key} is {value!r}; it must be {' or '.join(map(_words, kinds))}")
    return float(value) if float in kinds and value is not None else value


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and isfinite(value)
    return type(value) is kind


def _words(kind: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a name", NoneType: "null"}
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else words[kind]
