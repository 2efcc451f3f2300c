"""Advice without running: what of a model fits on a machine, in which schemes its runtimes load it, and which to take.

All is worked out from the checkpoint's header and configuration, and from tables (`arch/*.toml`). Speed is a bound, no
forecast; loss of quality is what was measured on this model, or not said at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from math import exp, prod
from pathlib import Path
from typing import Any, final

from lowbit.advise.hardware import Hardware
from lowbit.budget import format_size
from lowbit.errors import LowbitError, UnsupportedError, UsageError
from lowbit.schemes import parse
from lowbit.stages._dequantized import taken_apart
from lowbit.stages._experts import nowhere
from lowbit.stages._told import Config, open_facts
from lowbit.stages.checkpoint import Checkpoint, arch_rows
from lowbit.stages.plan import Calibration, Entry, Rules, make_plan, tied_names
from lowbit.stages.running import Cache, Kept, Running, activation_bytes, cache_of, read_bytes

# Least bits per quantized weight that the rules of thumb hold to be safe, by millions of parameters (docs/advise.md).
_SAFE = ((1_000, 6.0), (3_000, 5.0))
_SAFE_LARGE = 4.0
# Sequences at once from which a GPU's multiplications, not its memory, are the limit.
_MANY = 16
# Bits per weight from which a quantized checkpoint is taken for one to quantize again: FP8 and INT8 with their scales.
_MANY_BITS = 8.0
_CONVERT = "the checkpoint is in {}: `lowbit convert` takes its codes into other formats, most without loss"
_TEXT = Calibration(("text",))
_ANY = Hardware("any", "", "", 0.0, 0, 0.0, "")
_USUAL = {"gguf": "llama.cpp", "mlx": "mlx", "onnx": "onnxruntime"}


@final
@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        context: tokens of every sequence.
        batch: sequences at once.
        memory: bytes to use; None for what the hardware has.
        runtime: one of `arch/runtimes.toml`; None for all.
        cache: name of the cache's type, one of the runtime's.
        max_loss: growth of perplexity that may not be passed, as 0.01.
    """

    hardware: Hardware
    context: int
    batch: int = 1
    memory: int | None = None
    runtime: str | None = None
    cache: str = "f16"
    max_loss: float | None = None


@final
@dataclass(frozen=True)
class Loss:
    """Measured growth of perplexity, with the limits of its interval."""

    value: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class Option:
    """One way to store the model for one runtime, judged.

    Attributes:
        runtime, kind, format, scheme, activations: what it is; `scheme` None: as the checkpoint is.
        file: bytes of the weights in the file; `weights`, `cache`, `working`: in memory.
        bits: per quantized weight, scales included.
        fits: whether the sum is within the memory; None where that is not known.
        bound: tokens a second of all sequences together that memory allows at most; no forecast.
        speed: what the runtime does with the weights (`arch/runtimes.toml`).
        reasons: why it is where it is in the list.
        refused: why it cannot be taken; empty where it can.
        loss: as measured on this model.
        requantize: whether it starts from the codes of a quantized checkpoint.
    """

    runtime: str
    kind: str
    format: str
    scheme: str | None
    activations: str | None = None
    text: str | None = None
    file: int = 0
    weights: int = 0
    cache: int = 0
    working: int = 0
    bits: float = 0.0
    fits: bool | None = None
    bound: float = 0.0
    speed: str = ""
    reasons: tuple[str, ...] = ()
    refused: str = ""
    loss: Loss | None = None
    requantize: bool = False

    @property
    def total(self) -> int:
        """Bytes of memory in all."""
        return self.weights + self.cache + self.working

    @property
    def command(self) -> str:
        """Options of `lowbit quantize` that make it."""
        if self.scheme is None:
            return ""
        words = f"{'--requantize ' if self.requantize else ''}--format {self.format} --scheme {self.scheme}"
        words += f" --activations {self.activations}" if self.activations else ""
        return words + (f" --method {self.text} --calibration TEXT" if self.text else "")


@final
@dataclass(frozen=True)
class Advice:
    """The answer: what can be taken, the best first; what cannot, and why; whether training is called for."""

    question: Question
    model: str
    parameters: int
    memory: int
    options: tuple[Option, ...]
    refused: tuple[Option, ...]
    training: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The whole as JSON types."""
        data = asdict(self)
        for name in ("options", "refused"):
            rows: Sequence[Option] = getattr(self, name)
            data[name] = [{**asdict(row), "total": row.total, "command": row.command} for row in rows]
        return data


def advise(
    checkpoint: Checkpoint, question: Question, measured: Mapping[tuple[str, str], Loss] | None = None
) -> Advice:
    """What fits, what loads, and what to take.

    Args:
        measured: losses of this model by format and scheme (`read_measured`).

    Raises:
        UsageError: a runtime or type of cache that is not known, a context or batch below 1.
        UnsupportedError: a model whose cache is not worked out here.
        LowbitError: see `lowbit.errors`.
    """
    config, runtimes = open_facts(checkpoint), _runtimes(question)
    sizes = cache(partial(_sizes, checkpoint))
    found = [option for runtime in runtimes for option in _options(checkpoint, config, question, runtime, sizes)]
    parameters = _count(_as_it_is(checkpoint))
    judged = [_judge(option, question, parameters, measured or {}) for option in found]
    taken = sorted((each for each in judged if not each.refused), key=partial(_rank, question, parameters))
    refused = tuple(each for each in judged if each.refused)
    memory = question.memory or question.hardware.memory
    training = _training(question, taken, parameters, measured or {})
    notes = tuple(_notes(question, cache_of(config, question.context, question.batch, latent=True)))
    notes += (_CONVERT.format(checkpoint.format),) if checkpoint.format else ()
    return Advice(question, str(checkpoint.path), parameters, memory, tuple(taken), refused, training, notes)


def _runtimes(question: Question) -> list[dict[str, Any]]:
    if question.context < 1 or question.batch < 1:
        raise UsageError("context and batch are at least 1")
    rows = arch_rows("runtimes")
    names = [row["name"] for row in rows]
    if question.runtime and question.runtime not in names:
        raise UsageError(f"no runtime is called {question.runtime!r}; there are: {', '.join(names)}")
    chosen = [row for row in rows if question.runtime in (None, row["name"])]
    able = [row for row in chosen if question.cache in row["caches"]]
    if not able:
        offered = dict.fromkeys(name for row in chosen for name in row["caches"])
        raise UsageError(f"no such runtime has a cache of type {question.cache!r}; there are: {', '.join(offered)}")
    return able


@final
@dataclass(frozen=True)
class _Sizes:
    """Entries of a plan with the bytes of each in the file, and bits per quantized weight."""

    entries: tuple[Entry, ...]
    stored: tuple[int, ...]
    bits: float


def _sizes(checkpoint: Checkpoint, form: str, scheme: str | None, activations: str | None) -> _Sizes | str:
    """What the plan for a scheme takes, or why there is none; without a scheme the checkpoint as it is."""
    if scheme is None:
        entries = _as_it_is(checkpoint)
        stored = tuple(_held(checkpoint, entry) for entry in entries)
        judged = [pair for pair in zip(entries, stored, strict=True) if pair[0].weight.scheme or not checkpoint.format]
        count = _count([entry for entry, _ in judged])
        return _Sizes(entries, stored, 8 * sum(size for _, size in judged) / max(count, 1))
    # The method does not change a byte, and the text is not read.
    rules = Rules(scheme, None if form == "gguf" else "rtn", form, activations=activations, calibration=_TEXT)
    try:
        plan = make_plan(taken_apart(checkpoint, form, nowhere, checkpoint.format is not None), rules)
    except UnsupportedError as error:
        return " ".join(str(error).split())
    return _Sizes(plan.entries, tuple(map(plan.stored_bytes, plan.entries)), plan.bits_per_weight()[0])


def _options(
    checkpoint: Checkpoint,
    config: Config,
    question: Question,
    runtime: Mapping[str, Any],
    sizes: Callable[[str, str | None, str | None], _Sizes | str],
) -> Iterator[Option]:
    """Every candidate for one runtime, with its bytes, or why it cannot be taken; the checkpoint as it is first."""
    absent = _absent(runtime["name"], question.hardware)
    if absent:
        yield absent
        return
    as_is = _as_is(checkpoint)
    again = _again(checkpoint, sizes(as_is["format"], None, None))
    for row in [as_is, *(_rows(str(runtime["name"])) if again else ())]:
        option = Option(
            runtime["name"], row["kind"], row["format"], row["scheme"], row.get("activations"), row.get("text"),
            requantize=bool(checkpoint.format and row["scheme"]),
        )  # fmt: skip
        load = _load(option, question.hardware) if option.kind else _unjudged(str(checkpoint.format))
        found = load if isinstance(load, str) else sizes(option.format, option.scheme, option.activations)
        if isinstance(load, str) or isinstance(found, str):
            yield replace(option, refused=str(found))
        else:
            yield _sized(option, found, config, question, runtime, load)


def _again(checkpoint: Checkpoint, as_is: _Sizes | str) -> bool:
    """Whether to offer schemes: of what is quantized only where it has bits to lose."""
    return checkpoint.format is None or (isinstance(as_is, _Sizes) and as_is.bits >= _MANY_BITS)


def _as_is(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint itself as a candidate: of the kind that has its format and the grid of most of its weights."""
    row: dict[str, Any] = {"kind": "float", "format": "as it is", "scheme": None}
    if checkpoint.format is None:
        return row
    form, sizes = checkpoint.format.replace("_", "-"), Counter[tuple[str, bool]]()
    for weight in checkpoint.weights.values():
        if weight.scheme:
            sizes[weight.scheme.grid.name, weight.activations is not None] += prod(weight.shape)
    most = max(sizes, key=sizes.__getitem__, default=None)
    kinds = (each["kind"] for each in arch_rows("candidates") if _is_kind(each, form, most))
    return row | {"kind": next(kinds, "")}


def _is_kind(row: Mapping[str, Any], form: str, most: tuple[str, bool] | None) -> bool:
    """Whether a checkpoint of a format, most of its weights on a grid and with inputs in few bits or not, is such."""
    if form in row.get("reads", ()) or form == row["format"] == "gguf":
        return True
    return form == row["format"] and most == (parse(row["scheme"]).grid.name, "activations" in row)


def _rows(runtime: str) -> list[dict[str, Any]]:
    """Candidates of kinds that are made for the runtime on any hardware."""
    rows = [row for row in _loads() if row["runtime"] == runtime and row.get("made", True)]
    kinds = {kind for row in rows for kind in row["kinds"]}
    return [row for row in arch_rows("candidates") if row["kind"] in kinds]


def _loads() -> list[dict[str, Any]]:
    return arch_rows("runtimes", "loads")


def _load(option: Option, hardware: Hardware) -> Mapping[str, Any] | str:
    """The row by which a runtime loads a kind on some hardware, or why it does not."""
    rows = [row for row in _loads() if row["runtime"] == option.runtime and option.kind in row["kinds"]]
    for row in rows:
        if _suits(row, hardware):
            return row
    where = "; ".join(
        f"{', '.join(row['vendors'])}"
        + (f" from {row['least']}" if "least" in row else "")
        + (f" to {row['most']}" if "most" in row else "")
        + (f" ({row['note']})" if "note" in row else "")
        for row in rows
    )
    elsewhere = f"; it does on {where}" if where else ""
    return f"it does not load {option.kind} on {hardware.maker}{elsewhere}"


def _absent(runtime: str, hardware: Hardware) -> Option | None:
    """One word for a runtime that loads nothing on some hardware, in place of one for each scheme."""
    rows = [row for row in _loads() if row["runtime"] == runtime]
    if any(_suits(row, hardware) for row in rows):
        return None
    where = ", ".join(dict.fromkeys(vendor for row in rows for vendor in row["vendors"]))
    refused = f"it loads nothing on {hardware.maker}; it does on {where}"
    return Option(runtime, "anything", "anything", None, refused=refused)


def _suits(row: Mapping[str, Any], hardware: Hardware) -> bool:
    return hardware.vendor in row["vendors"] and row.get("least", 0) <= hardware.level <= row.get("most", 1e9)


def running(
    form: str, hardware: Hardware | None, runtime: str | None, cache: str, context: int, batch: int
) -> tuple[Running, float]:
    """How a result in some format is to run, and the share of the memory that its runtime takes by default.

    `others` has all types of the cache below 16 bits that errors can be worked out for.

    Args:
        hardware: None for any.
        runtime: None for `lowbit` on processors and on any hardware, else for the one that is usual for the format.

    Raises:
        UsageError: a runtime or type of cache that is not known, or a runtime that does not load the format there, or
            expands it when it loads it.
    """
    own = hardware is None or hardware.vendor in ("x86", "arm")
    usual = "lowbit" if own else _USUAL.get(form, "vllm")
    name = runtime or usual
    question = Question(hardware or _ANY, context, batch, runtime=name, cache=cache)
    row = _runtimes(question)[0]
    kinds = {each["kind"] for each in arch_rows("candidates") if each["format"] == form.replace("_", "-")}
    loads = [each for each in _loads() if each["runtime"] == name and kinds & set(each["kinds"])]
    loads = [each for each in loads if hardware is None or _suits(each, hardware)]
    if kinds and not loads:
        where = f" on {hardware.name}" if hardware else ""
        raise UsageError(f"{name} does not load {form}{where}; name another --runtime, or another --format")
    if loads and all(each["speed"] == "unpacked" for each in loads):
        raise UsageError(f"{name} expands {form} to 16 bits when it loads it: no choice of schemes makes that smaller")
    others = tuple(Kept(each, float(row["caches"][each]), scheme) for each, scheme in row.get("rounds", {}).items())
    found = Running(
        name, context, batch, cache, float(row["caches"][cache]), int(row["chunk"]), int(row["value"]), row["latent"],
        others=others,
    )  # fmt: skip
    if hardware:
        found = replace(found, machine=hardware.name, bandwidth=hardware.bandwidth)
    return found, float(row["usable"])


def _unjudged(form: str) -> Mapping[str, Any]:
    return {
        "speed": "weights",
        "note": f"the checkpoint is in {form}; whether the runtime loads that is not judged here",
    }


def _sized(
    option: Option,
    sizes: _Sizes,
    config: Config,
    question: Question,
    runtime: Mapping[str, Any],
    load: Mapping[str, Any],
) -> Option:
    """The option with its bytes, whether they fit, and the bound on its speed."""
    unpacked = load["speed"] == "unpacked"
    held = [_in_memory(*each, unpacked) for each in zip(sizes.entries, sizes.stored, strict=True)]
    keeps = cache_of(config, question.context, question.batch, runtime["latent"])
    kept = keeps.nbytes(runtime["caches"][question.cache])
    working = activation_bytes(config, question.context, question.batch, runtime["chunk"], runtime["value"])
    step = (read_bytes(sizes.entries, held, config) + kept) / question.hardware.bandwidth
    sized = replace(
        option, file=sum(sizes.stored), weights=sum(held), cache=kept, working=working, bits=sizes.bits,
        speed=load["speed"], bound=question.batch / step, reasons=(load["note"],) if "note" in load else (),
    )  # fmt: skip
    return _fitted(sized, question, 1.0 if question.memory else float(runtime["usable"]))


def _fitted(option: Option, question: Question, share: float) -> Option:
    """Whether it fits, and by how much it does not."""
    memory = (question.memory or question.hardware.memory) * share
    if not memory:
        return option
    if option.total <= memory:
        return replace(option, fits=True)
    taken = f", {share:.0%} of it as {option.runtime} takes by default" if share < 1 else ""
    refused = (
        f"needs {format_size(option.total)} (weights {format_size(option.weights)}, cache {format_size(option.cache)}, "
        f"working {format_size(option.working)}), {format_size(option.total - memory)} more than there is{taken}"
    )
    return replace(option, fits=False, refused=refused)


def _as_it_is(checkpoint: Checkpoint) -> tuple[Entry, ...]:
    """Every weight as it is stored; tied ones once."""
    tied = tied_names(checkpoint)
    return tuple(Entry(weight, None, "as it is", tied.get(name)) for name, weight in checkpoint.weights.items())


def _held(checkpoint: Checkpoint, entry: Entry) -> int:
    """Bytes of a weight in the checkpoint."""
    specs = [checkpoint.specs[piece] for piece in checkpoint.pieces(entry.weight.name)]
    return 0 if entry.tied else sum(spec.nbytes for spec in specs)


def _in_memory(entry: Entry, stored: int, unpacked: bool) -> int:
    """Bytes of a weight in memory: as stored, or in 16 bits where the runtime expands it."""
    return 2 * prod(entry.weight.shape) if unpacked and entry.weight.scheme else stored


def _count(entries: Sequence[Entry]) -> int:
    return sum(prod(entry.weight.shape) for entry in entries if not entry.tied)


def _safe(parameters: int) -> float:
    return next((bits for millions, bits in _SAFE if parameters < millions * 1e6), _SAFE_LARGE)


def _judge(option: Option, question: Question, parameters: int, measured: Mapping[tuple[str, str], Loss]) -> Option:
    """The option with the reasons that the rules give, and what was measured of it."""
    if option.refused:
        return option
    loss = measured.get((option.format.replace("_", "-"), option.scheme or ""))
    reasons = list(option.reasons)
    safe = _safe(parameters)
    if option.bits >= safe:
        reasons.insert(
            0, f"{option.bits:.2f} bits: at or above the {safe:g} that are held safe for a model of this size"
        )
    else:
        reasons.insert(
            0, f"{option.bits:.2f} bits: below the {safe:g} that are held safe for a model of this size; measure"
        )
    if _multiplies(option, question):
        reasons.append(f"{question.batch} sequences at once: multiplication is the limit, and it is done in few bits")
    elif option.speed == "unpacked":
        reasons.append("only the file is smaller: memory holds 16 bits a weight")
    if loss and question.max_loss is not None and loss.high > question.max_loss:
        said = f"measured loss {loss.value:.2%} [{loss.low:.2%}, {loss.high:.2%}]"
        return replace(option, loss=loss, refused=f"{said} is not surely below {question.max_loss:.2%}")
    return replace(option, reasons=tuple(reasons), loss=loss)


def _multiplies(option: Option, question: Question) -> bool:
    """Whether so many sequences, on a GPU, gain from a multiplication in few bits, and this kind has one."""
    few = option.speed == "native" and option.kind not in ("float", "gguf")
    return few and question.batch >= _MANY and question.hardware.vendor in ("nvidia", "amd", "intel")


def _rank(question: Question, parameters: int, option: Option) -> tuple[float, ...]:
    """Lower is better: measured to be within the loss; safe bits; a multiplication in few bits where that is the limit;
    neither unpacked nor slow; then fewer bytes to read among safe ones, more bits among others."""
    safe = option.bits >= _safe(parameters)
    many = question.batch >= _MANY and question.hardware.vendor in ("nvidia", "amd", "intel")
    return (
        float(question.max_loss is not None and option.loss is None),
        float(not safe),
        float(many and not _multiplies(option, question)),
        float(option.speed in ("unpacked", "slow")),
        -option.bound if safe else -option.bits,
        float(option.total),
    )


def _training(
    question: Question, taken: Sequence[Option], parameters: int, measured: Mapping[tuple[str, str], Loss]
) -> str:
    """Whether quantization-aware training is called for, and why."""
    safe = _safe(parameters)
    if not taken:
        return "nothing can be taken: a smaller model, more memory or another runtime is called for before training is"
    if any(option.scheme is None for option in taken):
        return "not called for: the model fits as it is"
    best = max(taken, key=lambda option: option.bits)
    if question.max_loss is not None and measured and not any(option.loss for option in taken):
        return (
            f"perhaps: no scheme that was measured stays below {question.max_loss:.2%}; measure the ones left, then "
            "mixed precision (`lowbit plan`), then training"
        )
    if best.bits < safe:
        return (
            f"perhaps: the most that fits is {best.bits:.2f} bits ({best.scheme}), below the {safe:g} that are held "
            "safe for a model of this size; measure a calibrated method first, train where that is not enough"
        )
    return f"not called for: {best.scheme} with {best.bits:.2f} bits fits; a calibrated method comes first"


def _notes(question: Question, cache: Cache) -> Iterator[str]:
    hardware = question.hardware
    rate = "measured" if hardware.measured else "the vendor's peak"
    yield (
        f"tokens/s is a bound, no forecast: {hardware.bandwidth / 1e9:,.1f} GB/s ({rate}) over the bytes of weights "
        "and cache that a token reads at the full context; runtimes reach less"
    )
    yield f"hardware: {hardware.source}"
    yield "working memory is an estimate from shapes; what drivers and the runtime itself take is not in it"
    if cache.windowed:
        yield f"{cache.windowed} layers keep a window of the context alone; runtimes that keep all of it need more"
    if not (question.memory or hardware.memory):
        yield f"how much memory {hardware.name} has depends on the machine: say it with --memory"
    if question.max_loss is not None:
        yield "losses are those measured on this model by `lowbit sweep`; without a measurement none is said"


def read_measured(path: Path) -> dict[tuple[str, str], Loss]:
    """Losses by format and scheme from the `sweep.json` of this model, of each the method with the least.

    Raises:
        UsageError: no such file, or not one of `lowbit sweep`.
    """
    found: dict[tuple[str, str], Loss] = {}
    try:
        for point in json.loads(path.read_text(encoding="utf-8"))["points"]:
            change, name = point["change"], (str(point["format"]), str(point["scheme"]))
            value, low, high = (exp(change[key]) - 1 for key in ("value", "low", "high"))
            if name not in found or value < found[name].value:
                found[name] = Loss(value, low, high)
    except (OSError, ValueError, KeyError, TypeError, LowbitError) as error:
        raise UsageError(f"{path} is not a sweep's result: {type(error).__name__}: {error}") from None
    return found
