"""Plan: which tensor gets which scheme and method, and why. All decisions are made here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, final

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.errors import LowbitError, UnsupportedError, UsageError
from lowbit.formats import Format, Spec, Weight, _float
from lowbit.formats._ggml import BLOCKS
from lowbit.methods import Method
from lowbit.methods._scales import shares_rows
from lowbit.schemes import Scheme, parse
from lowbit.stages._experts import finds, is_stack
from lowbit.stages._gguf_config import require_told
from lowbit.stages._gguf_vocabulary import alone
from lowbit.stages._holders import held_by, takes
from lowbit.stages._imatrix import Imatrix, Importance, read_importance
from lowbit.stages._model import open_blueprint
from lowbit.stages._policy import assign, in_blocks, read_policy, role_of
from lowbit.stages._readers import kept_for
from lowbit.stages._recipe import Recipe, dotted, parse_recipe, step_options
from lowbit.stages._row_views import apart_in_rows
from lowbit.stages._rows import HOLDS, Runs, is_places, said_rows, whole_of
from lowbit.stages._words import counted
from lowbit.stages.checkpoint import Checkpoint, arch_row, require_explained, swapped
from lowbit.tensors import scheme_bytes

VERSION = 2
_UNSEEN = "not in the importance matrix"
_OUTSIDE = "outside of the blocks, where no statistics are taken"
_END_ROLES = ("embedding", "head")
_ENDS = "outside of the blocks, where single weights are made"
_SWAPPED = "transposed linear layer (Conv1D)"
_SHARED = "shared with another layer, which no reader of this format would find"
_STACKED = "experts in one tensor; "
_WHOLE = "readers of this format do not know them apart, those of compressed-tensors, gptq and awq do"
_UNKNOWN = "how they lie in it is not known for this type of model"
_LOOSE = "no layer's weight: readers of quantized files know no other matrices"
_PLACES = "where each row is among the rows of the blocks"
_SWAPPING = "readers of this format know no such layer, those of gptq, gptq_v2 and bitsandbytes do"
_BLOCK = re.compile(r"\.(\d+)\.")
_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FLOATS = tuple(_NAMES)


@final
@dataclass(frozen=True)
class Calibration:
    """Which windows of text a run is calibrated on.

    Attributes:
        sources: files or datasets, as `samples.parse_sources` reads them.
        samples: number of windows.
        length: tokens per window; None for 2,048, or as many as the model takes.
        seed: of every choice at random.
        sampling: how windows are chosen.
        inputs: `quantized`: each sub-layer sees what the quantized ones before it produce; `float`: what the float
            model has there.
        dtype: of the computation; `auto`: bfloat16 where the model has it and the processor is fast at it.
        device: of `torch`, where blocks run, are observed and learned; codes are made on the processor.
        sha256: of the tokens; empty until they were read.
    """

    sources: tuple[str, ...]
    samples: int = 128
    length: int | None = None
    seed: int = 0
    sampling: Literal["random", "stratified", "length", "first"] = "random"
    inputs: str = "quantized"
    dtype: str = "auto"
    device: str = "cpu"
    sha256: str = ""


@dataclass(frozen=True)
class Rules:
    """What the user asked for.

    Attributes:
        scheme: name of the scheme for every weight that no other rule names; None for the format's default.
        method: name of the method, or a recipe of several steps as `awq+gptq`; None for the format's default.
        format: name of the format.
        skip: regular expressions, searched in tensor names: those stay as they are.
        sets: `(regular expression, scheme name or "keep")`, the first match wins over everything else.
        options: options of the method by name, those of other steps of a recipe as `step.name`.
        calibration: text for methods that need it.
        blocks: first block and the one after the last to quantize; None for all.
        activations: name of the scheme of the weights' inputs, tokens as rows; None where these stay as they are.
        imatrix: importance matrix of llama.cpp to take instead of calibrating, for methods that need nothing else.
        policy: preset, or TOML file of rules, that chooses schemes by role and place (`_policy.py`).
        counts: tokens that each expert's weight multiplied, for a policy that asks for it (`frequency.py`).
        tokens: rank of each token by how often it is used, for a policy that asks for it (`frequency.py`).
    """

    scheme: str | None = None
    method: str | None = None
    format: str = "compressed-tensors"
    skip: Sequence[str] = ()
    sets: Sequence[tuple[str, str]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    blocks: tuple[int, int] | None = None
    activations: str | None = None
    imatrix: Path | None = None
    policy: str | None = None
    counts: Mapping[str, int] | None = None
    tokens: Sequence[int] | None = None

    def recipe(self) -> tuple[Recipe, dict[str, Any]]:
        """The steps of the method, and their options by `step.name`; raises `UsageError` where these make no sense."""
        encoder = self._encoder()
        recipe = parse_recipe(self.method or encoder or "rtn", encoder)
        return recipe, dotted(self.options, recipe)

    def _encoder(self) -> str | None:
        """The method of the format's own types, where it has some."""
        form: Format = plugins.load("formats", self.format)
        learned = form.learned_encoder if self.calibration or self.imatrix else None
        return learned or form.encoder or None


@final
@dataclass(frozen=True)
class Entry:
    """One weight of the plan: how it is stored (`weight.scheme`, None: as it is), by which method, and why.

    `tied` names the weight whose storage this one shares: it is stored once, under that name. Where `weight.swapped`,
    it is the transpose of what the checkpoint holds (`as_planned`). `came`: the dtype that it had, where it is
    stored in another. `costs`: of a scheme that was chosen for a budget, and of those beside it by size, what each is
    predicted to cost, its own first; the reason has the unit. `instead`: why another method than the recipe's makes it.
    """

    weight: Weight
    method: str | None
    reason: str
    tied: str | None = None
    came: torch.dtype | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    instead: str | None = None

    @property
    def reasons(self) -> str:
        """Why it has its scheme, and its method."""
        return f"{self.reason}; {self.instead}" if self.instead else self.reason

    @property
    def why(self) -> str:
        """The reasons, after what was predicted."""
        if not self.costs:
            return self.reasons
        (_, own), *others = self.costs.items()
        return ", ".join([f"costs {own:.2g}", *(f"{name} {cost:.2g}" for name, cost in others)]) + f": {self.reasons}"

    @property
    def source_bytes(self) -> int:
        """Bytes of the weight as it came; none of what only tells where rows are."""
        return 0 if is_places(self.weight) else prod(self.weight.shape) * (self.came or self.weight.dtype).itemsize


@final
@dataclass(frozen=True)
class Plan:
    """The whole plan; data that is printed, saved, edited and compared."""

    format: str
    entries: tuple[Entry, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "rtn"
    calibration: Calibration | None = None
    imatrix: Imatrix | None = None

    @cached_property
    def rules(self) -> Format:
        """The format's record."""
        record: Format = _float.FORMAT if self.format == _float.NAME else plugins.load("formats", self.format)
        return record

    def layout(self, entry: Entry) -> dict[str, Spec]:
        """Names, dtypes and shapes of the tensors that one entry puts into the file."""
        if entry.tied:
            return {}
        if entry.weight.scheme is None:
            return {entry.weight.name: Spec(entry.weight.dtype, entry.weight.shape)}
        return self.rules.layout(entry.weight)

    def stored_bytes(self, entry: Entry) -> int:
        """Exact bytes of one entry in the file, without the container's header."""
        return sum(spec.nbytes for spec in self.layout(entry).values())

    def bits_per_weight(self) -> tuple[float, float]:
        """Mean bits of the quantized weights (codes, scales, zero points), and of all weights together."""
        chosen = [(entry, entry.weight.scheme) for entry in self.entries if entry.weight.scheme]
        codes = sum(scheme_bytes(scheme, entry.weight.shape) for entry, scheme in chosen)
        left = [entry.weight for entry in self.entries if not entry.weight.scheme]
        kept = sum(prod(weight.shape) * weight.dtype.itemsize for weight in left)
        count = sum(prod(entry.weight.shape) for entry, _ in chosen)
        total = sum(prod(entry.weight.shape) for entry in self.entries if not is_places(entry.weight))
        return 8 * codes / max(count, 1), 8 * (codes + kept) / max(total, 1)

    def to_json(self) -> str:
        """The plan as JSON, one tensor a line, stable to the byte."""
        head: dict[str, Any] = {"lowbit_plan": VERSION, "format": self.format, "recipe": self.recipe}
        head |= {"options": dict(self.options), "calibration": self.calibration and asdict(self.calibration)}
        head |= {"imatrix": asdict(self.imatrix)} if self.imatrix else {}
        rows = ",\n".join("  " + json.dumps(_row(entry)) for entry in self.entries)
        return json.dumps(head)[:-1] + ', "tensors": [\n' + rows + "\n]}\n"


def _row(entry: Entry) -> dict[str, Any]:
    weight = entry.weight
    return {
        "name": weight.name,
        "shape": list(weight.held),  # as the checkpoint has it
        "dtype": str(weight.dtype).removeprefix("torch."),
        "scheme": str(weight.scheme) if weight.scheme else None,
        "method": entry.method,
        "reason": entry.reason,
        **({"activations": str(weight.activations)} if weight.activations else {}),
        **({"tied": entry.tied} if entry.tied else {}),
        **({"rows": weight.rows} if weight.rows else {}),
        **({"costs": dict(entry.costs)} if entry.costs else {}),
        **({"instead": entry.instead} if entry.instead else {}),
    }


def make_plan(
    checkpoint: Checkpoint, rules: Rules, given: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> Plan:
    """The plan for a float checkpoint under the user's rules and the defaults of `arch/keep.toml`.

    Args:
        given: `{weight name: (scheme name or "keep", reason)}`, found for a budget; in place of the rules.

    Raises:
        UsageError: a rule that cannot be read or matches nothing, a checkpoint that is quantized already.
        UnsupportedError: a scheme that the format or the method cannot hold, naming the tensor.
    """
    maker = _maker(checkpoint, rules)
    entries = [maker.entry(weight, given.get(weight.name)) for weight in map(_plain, checkpoint.weights.values())]
    if rules.method and parse_recipe(rules.method).method == maker.recipe.method:
        _check_used(entries, maker.recipe.method)
    calibration = rules.calibration if maker.calibrated else None
    facts = maker.importance.facts if maker.importance else None
    return Plan(rules.format.replace("_", "-"), tuple(entries), maker.options, str(maker.recipe), calibration, facts)


def make_offers(checkpoint: Checkpoint, rules: Rules, schemes: Sequence[str]) -> dict[str, dict[str, Entry]]:
    """What a budget may choose from: weight name to scheme name to the entry that it would have in the plan.

    Weights that the rules quantize take part, but for those that `--set` names or a policy gives another scheme than
    the run's; with the schemes that format and method can hold for them: one that can have none has no choices.

    Raises:
        UsageError, UnsupportedError: as `make_plan`; a name that is no scheme.
    """
    maker, found = _maker(checkpoint, rules), dict[str, dict[str, Entry]]()
    base = rules.scheme or maker.form.default
    for scheme in schemes:
        if scheme != "keep":
            parse(scheme)
    for weight in map(_plain, checkpoint.weights.values()):
        wanted, reason = maker.decide(weight)
        if weight.name in maker.tied or wanted == "keep" or wanted in _NAMES.values() or reason.startswith("--set"):
            continue
        if reason.startswith("policy ") and wanted != base:
            continue
        found[weight.name] = {}
        for scheme in schemes:
            with suppress(UnsupportedError):
                found[weight.name][scheme] = maker.entry(weight, (scheme, ""))
    return found


@final
@dataclass(frozen=True)
class _Maker:
    """What the entries of a plan are made from."""

    checkpoint: Checkpoint
    rules: Rules
    form: Format
    recipe: Recipe
    options: Mapping[str, Any]
    importance: Importance | None
    calibrated: bool
    tied: Mapping[str, str]
    chosen: Mapping[str, tuple[str, str]]
    inside: AbstractSet[str]

    def swap(self, weight: Weight) -> bool:
        """Whether the model holds the transpose of what formats store."""
        return swapped(self.checkpoint.config, weight) and not weight.swapped

    def decide(self, weight: Weight) -> tuple[str, str]:
        """Scheme name, float type or `keep` by the rules, and the reason."""
        chosen = self.chosen.get(weight.name)
        wanted, reason = _decide(weight, self.rules, self.checkpoint.config, self.form.default, chosen)
        reason += said_rows(weight)
        if wanted == "keep" or reason.startswith("--set"):
            return wanted, reason
        if self.swap(weight) and not self.form.swaps:
            return "keep", f"{_SWAPPED}; {_SWAPPING}"
        if self._shared(weight):
            return "keep", _SHARED
        return wanted, reason

    def _shared(self, weight: Weight) -> bool:
        """Whether another layer has its values too, and readers would not find them."""
        return weight.name in self.tied.values() and not (self.form.choose or self.form.shares)

    def entry(self, weight: Weight, given: tuple[str, str] | None = None) -> Entry:
        """The entry of one weight, as decided or as given."""
        tied, form, recipe = self.tied, self.form, self.recipe
        if weight.name in tied:
            return Entry(weight, None, f"shares the storage of {tied[weight.name]}", tied[weight.name])
        wanted, reason = given or self.decide(weight)
        if wanted != "keep" and self._shared(weight):
            raise UnsupportedError(f"{weight.name} is {_SHARED}; keep it")
        inside = weight.name in self.inside and not self._moved(weight)
        method, instead = recipe.method, None
        seen = self._important(weight) if self.importance else inside
        beside = None if self.importance else _method(recipe.method).beside
        if not seen and recipe.calibrated and beside and role_of(weight.name) in _END_ROLES:
            method, instead, seen = beside, _ENDS if beside != recipe.method else None, True
        elif not seen and recipe.calibrated:
            outside, instead = _method(recipe.method).outside, _UNSEEN if self.importance else _OUTSIDE
            method = form.encoder if outside == "mse" and form.encoder and wanted in BLOCKS else outside
        if form.encoder and wanted in BLOCKS:
            learned = (beside or form.learned_encoder) if seen and recipe.calibrated else None
            able = _able(method, wanted, learned or form.encoder)
            instead = instead or (f"{method} cannot make {wanted}" if able != method else None)
            method = able
        activations = self.rules.activations if inside else None
        swap, config = self.swap(weight), self.checkpoint.config
        smooths, advise = inside and recipe.smooths, given is None
        entry = _entry(weight, wanted, reason, method, form, config, activations, swap, smooths, advise)
        left = None if reason.startswith("--set") else kept_for(self.rules.format, config, entry.weight)
        if left and given:
            raise UnsupportedError(f"{weight.name} is {left}; keep it")
        return Entry(weight, None, left) if left else replace(entry, instead=instead if entry.method else None)

    def _moved(self, weight: Weight) -> bool:
        """Whether a file has its columns in another order, in which no calibration has their inputs."""
        return (
            self.form.choose is not None
            and arranged(weight, "keep", self.form, self.checkpoint.config).across is not None
        )

    def _important(self, weight: Weight) -> bool:
        turned = replace(weight, shape=weight.shape[::-1]) if self.swap(weight) else weight
        return self.importance is not None and self.importance.of(turned) is not None


def _maker(checkpoint: Checkpoint, rules: Rules) -> _Maker:
    """Check the rules; raises as `make_plan` does."""
    _check_floats(checkpoint)
    form: Format = plugins.load("formats", rules.format)
    check_told(checkpoint, form)
    _check_patterns(checkpoint, rules)
    _check_blocks(checkpoint, rules)
    recipe, options = rules.recipe()
    _check_order(rules.format, recipe.method, options)
    importance = _importance(rules, recipe, checkpoint)
    calibrated = (recipe.calibrated and not importance) or _stores_scale(rules.activations)
    if calibrated and not rules.calibration:
        what = f"method {recipe}" if recipe.calibrated else f"a stored scale of activations ({rules.activations})"
        raise UsageError(f"{what} is learned from text: name some with --calibration FILE")
    tied = tied_names(checkpoint)
    chosen = {**_chosen(checkpoint, rules, form, tied, recipe.weighs), **_by_policy(checkpoint, rules, form, tied)}
    inside = _inside(checkpoint, calibrated)
    return _Maker(checkpoint, rules, form, recipe, options, importance, calibrated, tied, chosen, inside)


def _check_floats(checkpoint: Checkpoint) -> None:
    if checkpoint.format:
        raise UsageError(
            f"{checkpoint.path} is already quantized ({checkpoint.format}); quantizing it again would add error to "
            "error: start from the float checkpoint, or, where there is none, say --requantize"
        )
    require_explained(checkpoint)


def _inside(checkpoint: Checkpoint, calibrated: bool) -> AbstractSet[str]:
    """Weights of the blocks. Of several lists of blocks only one is calibrated: the model's class tells which."""
    numbers = {name: number for name in checkpoint.weights if (number := _BLOCK.search(name))}
    lists = {name[: number.start()] for name, number in numbers.items() if len(checkpoint.weights[name].shape) == 2}
    if not calibrated or len(lists) < 2:
        return numbers.keys()
    return frozenset[str]().union(*open_blueprint(checkpoint, torch.float32).blocks.values())


def _importance(rules: Rules, recipe: Recipe, checkpoint: Checkpoint) -> Importance | None:
    """The importance matrix that was named."""
    if rules.imatrix is None:
        return None
    if not recipe.weighs_alone:
        raise UsageError(
            f"--imatrix is for a method that needs the mean square of inputs and nothing else, as imatrix; {recipe} "
            "is none"
        )
    if rules.calibration:
        raise UsageError("--imatrix takes the place of --calibration; name one of them")
    return read_importance(rules.imatrix, checkpoint.config, checkpoint.weights)


def importance_of(plan: Plan, checkpoint: Checkpoint) -> Importance | None:
    """The importance matrix of a plan.

    Raises:
        CheckpointError: it is damaged, or gone.
        UsageError: it is another than the plan was made with.
    """
    if plan.imatrix is None:
        return None
    found = read_importance(Path(plan.imatrix.path), checkpoint.config, checkpoint.weights)
    if found.facts.sha256 != plan.imatrix.sha256:
        raise UsageError(f"{plan.imatrix.path} is not the importance matrix that the plan was made with")
    return found


def check_told(checkpoint: Checkpoint, form: Format) -> None:
    """A GGUF file alone must tell the configuration that another container needs.

    Raises:
        UnsupportedError: its architecture or its rope is none that is known.
    """
    if alone(checkpoint) and form.container != "gguf":
        if not checkpoint.config:
            raise UnsupportedError(
                f"{checkpoint.path} is of an architecture that is not known here, and has no config.json beside it: "
                "name the checkpoint that it was made from"
            )
        require_told(checkpoint.config, checkpoint.path)


def _able(method: str, wanted: str, encoder: str) -> str:
    """The method, or the format's own one (or `mse`) for a scheme of a mixture that it cannot make."""
    return next((n for n in (method, encoder, "mse") if _method(n).objection(parse(wanted)) is None), encoder)


def _check_used(entries: Sequence[Entry], method: str) -> None:
    """Raise UnsupportedError where others make all weights, because the method that was asked for makes none."""
    others = [(entry, entry.weight.scheme) for entry in entries if entry.weight.scheme and entry.method != method]
    found = [(e, why) for e, scheme in others if scheme and (why := _method(method).objection(scheme)) is not None]
    if found and not any(entry.method == method for entry in entries):
        entry, why = found[0]
        raise UnsupportedError(f"{entry.weight.name}: method {method} cannot use {entry.weight.scheme}: {why}")


def _plain(weight: Weight) -> Weight:
    """A weight without what concerns the file that it came from alone."""
    return replace(weight, interleaved=0, grouped=None, tiled=None, across=None, folded=0, plus=0.0, decays=False)


def arranged(weight: Weight, wanted: str, form: Format, config: Mapping[str, Any]) -> Weight:
    """A weight as the container of a format has it.

    Args:
        wanted: name of its scheme, or `keep`.
        config: of the model, `config.json`.

    Raises:
        UnsupportedError: the format does not know such a model.
    """
    return form.arrange(_plain(weight), wanted, config) if form.arrange else _plain(weight)


def _chosen(
    checkpoint: Checkpoint, rules: Rules, form: Format, tied: Mapping[str, str], important: bool
) -> Mapping[str, tuple[str, str]]:
    """What the format's mixture says of each weight that is stored."""
    if form.choose is None:
        return {}
    weights = [weight for weight in checkpoint.weights.values() if weight.name not in tied]
    turned = [
        replace(w, shape=w.shape[::-1]) if swapped(checkpoint.config, w) and not w.swapped else w for w in weights
    ]
    return form.choose((rules.scheme or form.default).lower(), turned, checkpoint.config, important)


def _by_policy(
    checkpoint: Checkpoint, rules: Rules, form: Format, tied: Mapping[str, str]
) -> Mapping[str, tuple[str, str]]:
    """What the policy says of each weight that is stored."""
    if rules.policy is None:
        return {}
    weights = [weight for weight in checkpoint.weights.values() if weight.name not in tied]
    base = rules.scheme or form.default
    policy, config = read_policy(rules.policy), checkpoint.config
    found = assign(policy, weights, config, base, rules.format, rules.counts, rules.tokens)
    # What stays in the run's scheme is left to a format that has mixtures: these know what fits a row.
    return {name: said for name, said in found.items() if not (form.choose and said[0] == base)}


def in_rows(checkpoint: Checkpoint, rules: Rules) -> Checkpoint:
    """A view in which rows that the policy has in schemes of their own are weights (`_rows.py`).

    Raises:
        UsageError: as `assign`.
        UnsupportedError: such rows for a format that does not hold them.
    """
    if rules.policy is None or checkpoint.format:
        return checkpoint
    patterns, tied = [*rules.skip, *(pattern for pattern, _ in rules.sets)], tied_names(checkpoint)
    named = finds(patterns)
    weights = [weight for name, weight in checkpoint.weights.items() if name not in tied and not named(name)]
    policy, form = read_policy(rules.policy), rules.format.replace("_", "-")
    found = in_blocks(policy, weights, checkpoint.config, form, rules.tokens, rules.counts)
    if found and form != HOLDS:
        raise UnsupportedError(
            f"policy {policy.name} has rows of {next(iter(found))} in schemes of their own, which {form} cannot hold; "
            f"use --format {HOLDS}, or one scheme for all of it"
        )
    return apart_in_rows(checkpoint, found)


def _stores_scale(activations: str | None) -> bool:
    """Whether the scale of such activations is stored with the weight, found by calibration."""
    scheme = parse(activations) if activations else None
    return scheme is not None and (shares_rows(scheme) or scheme.nested is not None)


def tied_names(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Aliases that need not be stored: the loader ties them again because the configuration says so."""
    return checkpoint.tied if checkpoint.config.get("tie_word_embeddings") is True else {}


def as_planned(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint with every weight as the plan quantizes it: a view, in which some are transposed."""
    turned = [entry.weight.name for entry in plan.entries if entry.weight.swapped]
    chosen = {name for name in turned if not checkpoint.weights[name].swapped}
    if not chosen:
        return checkpoint
    weights = {
        name: replace(weight, shape=weight.shape[::-1], swapped=True) if name in chosen else weight
        for name, weight in checkpoint.weights.items()
    }
    edits = {name: _transposed(checkpoint.edits.get(name)) for name in chosen}
    return replace(checkpoint, weights=weights, edits={**checkpoint.edits, **edits})


def _transposed(edit: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (edit(tensor) if edit else tensor).T.contiguous()


def _entry(
    weight: Weight,
    wanted: str,
    reason: str,
    name: str,
    form: Format,
    config: Mapping[str, Any],
    activations: str | None = None,
    swap: bool = False,
    smooths: bool = False,
    advise: bool = True,
) -> Entry:
    """The entry of one weight.

    `swap`: the model holds it as `[inputs, outputs]`, and formats store the transpose; `smooths`: a transform may make
    factors of its inputs; `advise`: a refusal says which formats would do.
    """
    turned = replace(weight, shape=weight.shape[::-1], swapped=True) if swap else weight
    turned = arranged(turned, wanted, form, config)
    if wanted == "keep" or (form.arrange and wanted in _NAMES.values()):
        kept = turned if form.arrange else weight
        return Entry(kept, None, reason, came=weight.dtype)
    scheme, method = parse(wanted), _method(name)
    if swap and not form.swaps:
        raise UnsupportedError(f"{weight.name} is a {_SWAPPED}; {_SWAPPING}")
    weight, rounded = turned, parse(activations) if activations else None
    told = config if advise and not form.choose else None  # where the scheme is the one that was asked for
    try:
        fitted = form.fit(scheme, weight)
    except UnsupportedError as error:
        raise _refused(error, weight, scheme, rounded, method, told) from None
    objection = method.objection(replace(fitted, smooth=fitted.smooth and not smooths))
    if objection:
        raise UnsupportedError(f"{weight.name}: method {name} cannot use {fitted}: {objection}")
    made = replace(weight, scheme=fitted)
    try:
        inputs = form.fit_activations(rounded, made) if rounded else None
    except UnsupportedError as error:
        raise _refused(error, weight, scheme, rounded, method, told) from None
    return Entry(replace(made, activations=inputs), name, reason)


def _refused(
    error: UnsupportedError, weight: Weight, scheme: Scheme, inputs: Scheme | None, method: Method, config: Any
) -> UnsupportedError:
    """What a format says of a weight; with the formats that take it, unless `config` is None."""

    def holds(name: str, form: Format) -> bool:
        taken = takes(name, form, weight, scheme, inputs, config)
        return form.encoder != "" or (taken.scheme is not None and method.objection(taken.scheme) is None)

    hint = held_by(holds) if config is not None else ""
    return UnsupportedError(f"{weight.name} {list(weight.shape)}: {error}{hint}")


def _check_order(name: str, method: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError where a method would leave columns in an order that a format has no place for."""
    form: Format = plugins.load("formats", name)
    record = _method(method)
    if record.act_order(step_options(record, method, options)) and not form.act_order:
        raise UsageError(
            f"option {method}.order=group needs an index of groups (act-order), which gptq and gptq_v2 store and "
            f"{name} does not; static (the default) and aware take columns in such an order without it"
        )


def _decide(
    weight: Weight, rules: Rules, config: Mapping[str, Any], default: str, chosen: tuple[str, str] | None = None
) -> tuple[str, str]:
    """Scheme name or `keep`, and the reason."""
    for pattern, scheme in rules.sets:
        if re.search(pattern, weight.name):
            return scheme, f"--set {pattern}={scheme}"
    for pattern in rules.skip:
        if re.search(pattern, weight.name):
            return "keep", f"--skip {pattern}"
    number = _BLOCK.search(weight.name)
    if rules.blocks and number and not rules.blocks[0] <= int(number[1]) < rules.blocks[1]:
        return "keep", "not among --blocks"
    if is_places(weight):
        return "keep", _PLACES
    if weight.dtype not in _FLOATS:
        return "keep", f"not a float weight ({str(weight.dtype).removeprefix('torch.')})"
    if chosen:
        return chosen
    if len(weight.shape) != 2:
        if is_stack(config, weight.name):
            return "keep", _STACKED + _WHOLE
        experts = len(weight.shape) == 3 and ".experts." in weight.name
        return "keep", _STACKED + _UNKNOWN if experts else f"not a matrix ({len(weight.shape)}-D)"
    row = arch_row("keep", config, weight)
    if row:
        return "keep", row["reason"]
    if not weight.name.endswith(".weight"):
        return "keep", _LOOSE
    return rules.scheme or default, "--scheme" if rules.scheme else "default scheme of the format"


def _method(name: str) -> Method:
    record: Method = plugins.load("methods", name)
    return record


def _check_patterns(checkpoint: Checkpoint, rules: Rules) -> None:
    """A pattern that matches nothing is a typing error, not a wish."""
    flags = [("--skip", pattern) for pattern in rules.skip] + [("--set", pattern) for pattern, _ in rules.sets]
    for flag, pattern in flags:
        try:
            found = any(re.search(pattern, name) for name in checkpoint.weights)
        except re.error as error:
            raise UsageError(f"{flag} {pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise UsageError(f"{flag} {pattern!r} matches no tensor of {checkpoint.path}")


def _check_blocks(checkpoint: Checkpoint, rules: Rules) -> None:
    """Blocks that are not there would be left out without a word."""
    found = [int(number[1]) for name in checkpoint.weights if (number := _BLOCK.search(name))]
    count = max(found, default=-1) + 1
    if rules.blocks and rules.blocks[1] > count:
        first, last = rules.blocks
        raise UsageError(f"--blocks {first}:{last}: {checkpoint.path} has {counted(count, 'block')}, 0:{count} at most")


def load_plan(path: Path, checkpoint: Checkpoint) -> Plan:
    """A saved, perhaps edited, plan for this checkpoint.

    Raises:
        UsageError: not a plan, or one for other tensors; the text names the first tensor that differs. A checkpoint
            that is quantized already.
        UnsupportedError: an edited scheme that the format or method cannot hold.
    """
    _check_floats(checkpoint)
    try:
        data = json.loads(path.read_text())
        rows, name, options = data["tensors"], data["format"], data["options"]
        recipe, calibration = data["recipe"], data["calibration"] and _calibration(data["calibration"])
        imatrix = Imatrix(**data["imatrix"]) if data.get("imatrix") else None
        if data["lowbit_plan"] != VERSION:
            raise UsageError(f"{path}: plan version {data['lowbit_plan']}, this lowbit reads {VERSION}")
        form: Format = plugins.load("formats", name)
        _check_same(path, rows, checkpoint)
        dotted(options, parse_recipe(recipe))
        weights = checkpoint.weights
        smooths, config = parse_recipe(recipe).smooths, checkpoint.config
        entries = [_read_row(row, _plain(weights[row["name"]]), form, config, smooths) for row in rows]
    except LowbitError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path} is not a plan: {type(error).__name__}: {error}") from None
    return Plan(name, tuple(entries), options, recipe, calibration, imatrix)


def _calibration(row: Mapping[str, Any]) -> Calibration:
    return Calibration(**{**row, "sources": tuple(row["sources"])})


def read_recipe(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a saved plan and its options; the rest is left to `load_plan`."""
    try:
        data = json.loads(path.read_text())
        recipe = parse_recipe(data["recipe"])
        return recipe, dotted(data["options"], recipe)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a plan: {type(error).__name__}: {error}") from None


def read_format(path: Path) -> str | None:
    """The format of a saved plan; None where it has none, which `load_plan` refuses."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["format"])
    return None


def read_names(path: Path) -> frozenset[str]:
    """Names of the weights of a saved plan; none where it has none, which `load_plan` refuses."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return frozenset(str(row["name"]) for row in json.loads(path.read_text())["tensors"])
    return frozenset()


def read_rows(path: Path) -> dict[str, list[Runs]]:
    """The blocks of rows of a saved plan by weight; none where it has none, or what `load_plan` refuses."""
    found: dict[str, list[Runs]] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        for row in json.loads(path.read_text())["tensors"]:
            if row.get("rows"):
                runs = tuple((int(first), int(last)) for first, last in row["rows"])
                found.setdefault(whole_of(row["name"]) or row["name"], []).append(runs)
    return found


def _read_row(row: Mapping[str, Any], weight: Weight, form: Format, config: Mapping[str, Any], smooths: bool) -> Entry:
    if row.get("tied"):
        return Entry(weight, None, row["reason"], row["tied"])
    types = {str(dtype).removeprefix("torch."): name for dtype, name in _NAMES.items()}
    kept = types.get(row["dtype"], "keep") if form.arrange else "keep"
    scheme, method, swap = row["scheme"] or kept, row["method"] or "rtn", swapped(config, weight) and not weight.swapped
    smooths = smooths and _BLOCK.search(weight.name) is not None
    entry = _entry(weight, scheme, row["reason"], method, form, config, row.get("activations"), swap, smooths)
    costs = {str(name): float(cost) for name, cost in row.get("costs", {}).items()}
    return replace(entry, costs=costs, instead=row.get("instead") if entry.method else None)


def _check_same(path: Path, rows: Sequence[Mapping[str, Any]], checkpoint: Checkpoint) -> None:
    named = {row["name"]: tuple(row["shape"]) for row in rows}
    real = {name: weight.shape for name, weight in checkpoint.weights.items()}
    for name in sorted(named.keys() | real.keys()):
        if named.get(name) != real.get(name):
            raise UsageError(
                f"{path} is a plan for another model: {name} is {named.get(name)} there, {real.get(name)} in "
                f"{checkpoint.path}"
            )
