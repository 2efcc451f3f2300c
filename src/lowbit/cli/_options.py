"""Options and output that several commands share."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, final

import click

from lowbit import plugins

if TYPE_CHECKING:
    from lowbit.stages.budgets.allocate import Budget
    from lowbit.stages.budgets.decide import Told
    from lowbit.stages.plan import Entry, Plan, Rules

F = TypeVar("F", bound=Callable[..., Any])
_STEPS = 100_000  # a stage with more is counted in bytes, not in blocks or windows


@final
class Size(click.ParamType[int]):
    """Bytes, written `4GiB` or `500MB`."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from lowbit.budget import parse_size

        return value if isinstance(value, int) else parse_size(value)


@final
class Share(click.ParamType[float]):
    """A share, written `1%` or `0.01`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r} is no share; write it like 1%", param, ctx)
        if not 0 < found < float("inf"):
            self.fail(f"{value!r} is not above 0", param, ctx)
        return found


@final
class Duration(click.ParamType[float]):
    """Seconds, written `25ms` or `0.1s`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is no duration; write it like 25ms", param, ctx)
        return float(match[1]) / (1000 if match[2] == "ms" else 1)


@final
class Finite(click.FloatRange):
    """A number within bounds; these let pass what is no number, or is infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return found


def seed(ctx: click.Context, param: click.Parameter, value: int) -> int:
    """A seed that generators of random numbers take."""
    if not 0 <= value < 2**64:
        raise click.BadParameter(f"{value} is not in the range 0 to 2^64 - 1")
    return value


def _stops(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("an empty string is everywhere: name some text")
    return values


def _set(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = [value.rpartition("=")[::2] for value in values]
    for value, (pattern, scheme) in zip(values, pairs, strict=True):
        if not pattern or not scheme:
            raise click.BadParameter(f"{value!r} is not REGEX=SCHEME")
    return [(pattern, scheme) for pattern, scheme in pairs]


def listed(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names between commas, each once; a comma within brackets is part of a name."""
    parts = re.split(r",(?![^\[]*\])", value or "")
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _option(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    def value_of(text: str) -> Any:
        try:
            return json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            return text

    if bare := [value for value in values if "=" not in value]:
        raise click.BadParameter(f"{bare[0]!r} has no value: NAME=VALUE")
    return {key: value_of(text) for key, _, text in (value.partition("=") for value in values)}


def _blocks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    first, colon, last = value.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise click.BadParameter(f"{value!r} is not A:B with A below B")
    return int(first), int(last)


# What people name in place of a format: who loads it, or what it lies in.
_SERVED = "compressed-tensors, gptq, awq, fp8 or modelopt"
_NO_FORMATS = {
    "vllm": _SERVED, "sglang": _SERVED,
    "tensorrt-llm": "modelopt", "llama.cpp": "gguf", "ollama": "gguf", "lm-studio": "gguf", "mlx-lm": "mlx",
    "transformers": "compressed-tensors, bitsandbytes, gptq, awq or hqq", "onnxruntime": "onnx",
    "safetensors": "compressed-tensors, gptq, awq and others; to convert into floats, float",
}  # fmt: skip


def format_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The name of a format in small letters.

    Raises:
        click.BadParameter: it is another thing's, with the formats of that.
    """
    name = value.lower()
    if name in _NO_FORMATS:
        raise click.BadParameter(f"{name} is no format of its own; its formats are {_NO_FORMATS[name]}")
    if re.fullmatch(r"(i?q|tq)[1-8]_\w+", name):
        raise click.BadParameter(f"{name} is a scheme of gguf: --format gguf --scheme {name}")
    return name


def _listed(folder: str) -> str:
    names = plugins.written() if folder == "formats" else plugins.names(folder)
    return ", ".join(name.replace("_", "-") for name in names if name not in plugins.CONVERTED)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_RULES = (
    click.option(
        "--scheme", metavar="S",
        help="Scheme for every matrix, as int4-g128, nf4-dq, fp8-e4m3, nvfp4; of gguf a mixture, as q4_k_m.",
    ),
    click.option(
        "--activations", metavar="S",
        help="Scheme of the inputs: int8-row or fp8-e4m3-row (a scale per token), int8-tensor (a stored one), nvfp4.",
    ),
    click.option(
        "--method", default=None, metavar="M", callback=lambda ctx, param, value: value and value.lower(),
        help=f"One of {_listed('methods')}; or steps joined by +, as awq+gptq+eora, of: rotate, "
        f"{_listed('transforms')} (before a method), {_listed('corrections')} (after it), tune (last). "
        "[default: rtn; for gguf ggml-fit, with --calibration or --imatrix imatrix-fit]",
    ),
    click.option(
        "--format", "form", default="compressed-tensors", show_default=True, metavar="F", callback=format_name,
        help=f"One of {_listed('formats')}.",
    ),
    click.option(
        "--policy", metavar="NAME|FILE.toml",
        help="Schemes by role and place: uniform, conservative, balanced, aggressive, or rules of your own.",
    ),
    click.option("--skip", multiple=True, metavar="REGEX", help="Leave matching tensors as they are; repeatable."),
    click.option(
        "--set", "sets", multiple=True, callback=_set, metavar="REGEX=SCHEME",
        help="Scheme (or keep) for matching tensors; wins over everything, first match first; repeatable.",
    ),
    click.option(
        "--option", "options", multiple=True, callback=_option, metavar="NAME=VALUE",
        help="Option of the method, as p=2.4 for mse, or of a step, as awq.windows=8; repeatable.",
    ),
    click.option(
        "--calibration", "sources", multiple=True, metavar="TEXT",
        help="Text to learn from: FILE, FILE.jsonl[:FIELD] or hf:NAME[:CONFIG[:SPLIT[:FIELD]]]; repeatable.",
    ),
    click.option(
        "--imatrix", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
        help="llama.cpp's importance matrix, in place of --calibration; for --method imatrix-fit or imatrix.",
    ),
    click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Windows of that text."),
    click.option(
        "--sequence-length", "length", type=click.IntRange(8), show_default="2048, or what the model takes",
        help="Tokens per window.",
    ),
    click.option(
        "--sampling", type=click.Choice(["random", "stratified", "length", "first"]), default="random",
        show_default=True, help="How windows are chosen.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, callback=seed, help="Of every choice at random."
    ),
    click.option(
        "--inputs", type=click.Choice(["quantized", "float"]), default="quantized", show_default=True,
        help="What a sub-layer is calibrated on: what the quantized ones before it produce, or the float model's.",
    ),
    click.option(
        "--compute", "dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True,
        help="Type in which calibration computes; auto: bfloat16 where the model has it and the processor is fast.",
    ),
    click.option(
        "--device", default="cpu", show_default=True,
        help="Where blocks run, as cpu, cuda, cuda:1; codes are made on the processor.",
    ),
    click.option(
        "--blocks", callback=_blocks, metavar="A:B", help="Quantize these blocks alone, as 0:4; the others stay.",
    ),
    click.option(
        "--plan", "plan_file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="A saved (and edited) plan instead of rules.",
    ),
)  # fmt: skip


_BUDGETS = "--bits-per-weight, --size, --memory, --max-kl and --max-ppl-increase"
_BUDGET = (
    click.option(
        "--bits-per-weight", "--bpw", "bits", type=click.FloatRange(0, min_open=True), metavar="X",
        help="Choose each weight's scheme so that they have X bits in the mean, scales included.",
    ),
    click.option("--size", type=Size(), help="Choose schemes so that the weight files take so many bytes, as 3.9GiB."),
    click.option(
        "--memory", type=Size(), metavar="BYTES",
        help="Choose schemes so that weights, cache and working memory take so many bytes at run time, as 12GiB.",
    ),
    click.option(
        "--latency", type=Duration(), metavar="TIME",
        help="Choose schemes so that one token is decoded in so much time, as 25ms; alone, or beside one of the above.",
    ),
    click.option(
        "--tokens-per-second", "rate", type=click.FloatRange(0, min_open=True), metavar="X",
        help="The same as a rate of each sequence.",
    ),
    click.option(
        "--hardware", metavar="NAME",
        help="Profile of `lowbit advise` that the result is to run on, or `this`: its memory, where --memory is not "
        "named, and its bandwidth.  [default: this for --latency]",
    ),
    click.option(
        "--runtime", metavar="NAME", help="What it is to run in.  [default: lowbit; on GPUs what is usual]"
    ),
    click.option("--run-context", type=click.IntRange(1), metavar="N", help="Tokens of a sequence.  [default: 4096]"),
    click.option("--run-batch", type=click.IntRange(1), metavar="N", help="Sequences at once.  [default: 1]"),
    click.option("--kv", "kept", metavar="TYPE", help="Type of the cache, one that the runtime has.  [default: f16]"),
    click.option(
        "--max-kl", "kl", type=click.FloatRange(0, min_open=True), metavar="X",
        help="The smallest result whose divergence from the original, in nats per token, is at most X on the text of "
        "--evaluate, the end of its interval included; at most five plans are made and measured.",
    ),
    click.option(
        "--max-ppl-increase", "perplexity", type=Share(), metavar="P%",
        help="The same for the increase of the perplexity, as 1%.",
    ),
    click.option(
        "--schemes", callback=listed, metavar="S,S,...",
        help="Schemes to choose from; keep is one. [default: int2-g64-asym,int3-g128,int4-g128,int4-g32,int8-g128; "
        "for gguf q2_k,q3_k,iq4_xs,q4_k,q5_k,q6_k,q8_0]",
    ),
    click.option(
        "--measure", type=click.Choice(["fisher", "output", "hessian", "kl"]), show_default="fisher",
        help="What errors cost: fisher (predicted divergence), output (error of a layer's output: the fastest, and no "
        "divergence), hessian (mean trace times square error, as HAWQ-V2; the whole model in memory), kl (the true "
        "divergence of each weight alone: slow). With --check N the decisions that are near are measured by kl.",
    ),
    click.option(
        "--sensitivity", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Where what was measured for a budget is saved, and taken from if it is there.",
    ),
    click.option(
        "--check", type=click.IntRange(0), default=0, metavar="N",
        help="Measure the true divergence of the N decisions that were nearest to another scheme, and choose again.",
    ),
    click.option(
        "--leave-out", "beside", is_flag=True,
        help="With --check: measure what each of these adds where all others are quantized as planned, and not what it "
        "costs alone.",
    ),
    click.option(
        "--narrow", callback=listed, metavar="S,S,...",
        help="Show what it costs to round the inputs of layers, keys and values to these schemes, with tokens as rows, "
        "as int8-row,int8-g32,fp8-e4m3-row, and where most of it is; with a budget or without. With --memory or "
        "--latency and without --kv the cache gets the one that is best, of those that the runtime has.",
    ),
    click.option(
        "--activations-within", "rounding", type=click.FloatRange(0), metavar="X",
        help="Round inputs to --activations only as far as that is predicted to cost at most X nats per token; those "
        "that cost the most for what they save stay wide.",
    ),
    click.option(
        "--unfused", is_flag=True,
        help="Let q, k and v, gate and up, and experts have schemes of their own: transformers can, vLLM cannot.",
    ),
)  # fmt: skip


_RUN = (
    click.option(
        "--ram", type=Size(), help="Anonymous memory that the run may hold, as 4GiB; checked first, then kept."
    ),
    click.option("--threads", type=click.IntRange(1), default=cores, show_default="all cores", help="Workers."),
    click.option(
        "--evaluate", "text", type=click.Path(path_type=Path), help="Text to compare original and result on."
    ),
    click.option(
        "--context", type=click.IntRange(8), default=512, show_default=True, help="Tokens per evaluation window."
    ),
    click.option("--tokens", type=click.IntRange(1), help="Evaluate on at most this many tokens."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings."),
    click.option(
        "--requantize", is_flag=True,
        help="Take a MODEL that is quantized already, where no float checkpoint is published, as what its codes stand "
        "for.",
    ),
)  # fmt: skip


def _with(options: Sequence[Callable[[F], F]], function: F) -> F:
    """The command with these options, in their order."""
    for option in reversed(options):
        function = option(function)
    return function


def run_options(function: F) -> F:
    """Add the options of a run: what it may use, and what it is measured on."""
    return _with(_RUN, function)


def rules_options(function: F) -> F:
    """Add the options that decide which tensor gets what."""
    return _with(_RULES, function)


def budget_options(function: F) -> F:
    """Add the options that have schemes found."""
    return _with(_BUDGET, function)


def make_budget(options: dict[str, Any], plan_file: Path | None) -> Budget | None:
    """Take the options of a budget out of a command's options, before `make_rules`; None where none is asked for."""
    from lowbit.cli._running import WORDS, make_wanted
    from lowbit.stages.budgets.allocate import Budget

    asked = {name: options.pop(name) for name in ("bits", "size", "kl", "perplexity")}
    words = ("schemes", "measure", "sensitivity", "check", "beside", "narrow", "rounding", "unfused")
    others = {name: options.pop(name) for name in words}
    run = {name: options.pop(name) for name in ("memory", "latency", "rate", *WORDS)}
    given = [name for name, value in {**asked, "memory": run["memory"]}.items() if value is not None]
    timed, placed = run["latency"] or run["rate"], run["hardware"] is not None
    if others["rounding"] is not None and (plan_file or not options["activations"]):
        raise click.UsageError("--activations-within decides with --activations, and not over a saved --plan")
    if not (given or timed or placed):
        shown = others["narrow"] or others["rounding"] is not None
        alone = {name: others[name] for name in ("schemes", "measure", "check", "beside", "unfused")}
        saved = {} if shown else {"sensitivity": others["sensitivity"]}
        _refuse_alone({**alone, **saved, **{word: run[name] for name, word in WORDS.items()}})
        return Budget(**{name: others[name] for name in ("sensitivity", "narrow", "rounding")}) if shown else None
    _check_budget(asked, given, options, plan_file)
    runs = bool(run["memory"] or timed or placed)
    if not runs and any(run[name] for name in WORDS):
        raise click.UsageError(f"{', '.join(WORDS.values())} go with --memory, --latency and --tokens-per-second")
    if others["beside"] and not others["check"]:
        raise click.UsageError("--leave-out says how decisions are measured: say how many with --check N")
    if (runs or others["check"]) and (asked["kl"] or asked["perplexity"]):
        raise click.UsageError("--max-kl and --max-ppl-increase are measured as a whole: no --check or other limit")
    sized = bool(asked["bits"] or asked["size"])
    wanted = make_wanted(run, options["form"], options["threads"], sized, others["narrow"]) if runs else None
    others["measure"] = others["measure"] or "fisher"
    if wanted and wanted.running.others and others["measure"] in ("output", "hessian"):
        raise click.UsageError(
            f"--measure {others['measure']} is no divergence, and does not compare with what a narrower cache costs: "
            "name the cache with --kv"
        )
    ran = {name: getattr(wanted, name) for name in ("memory", "latency", "running", "asked")} if wanted else {}
    return Budget(**asked, **ran, fused=not others.pop("unfused"), **others)


def _refuse_alone(others: dict[str, Any]) -> None:
    """What says more of a budget is nothing without one."""
    for name, value in others.items():
        if value:
            word = name if name.startswith("-") else {"beside": "--leave-out"}.get(name, f"--{name}")
            raise click.UsageError(f"{word} goes with a budget: {_BUDGETS}, --latency")


def _check_budget(asked: dict[str, Any], given: list[str], options: dict[str, Any], plan_file: Path | None) -> None:
    if len(given) > 1:
        raise click.UsageError(f"name one of {_BUDGETS}")
    if (asked["kl"] or asked["perplexity"]) and not options["text"]:
        raise click.UsageError("what is asked for is measured on a text: name it with --evaluate")
    if options["scheme"] or plan_file:
        raise click.UsageError("a budget chooses the schemes; leave out --scheme and --plan, or name --schemes")


_CONTEXT = (
    click.option("--context", type=click.IntRange(2), help="Most tokens of a text.  [default: what the model takes]"),
    click.option(
        "--kv",
        type=click.Choice(["float32", "float16", "int8"]),
        default="float16",
        show_default=True,
        help="How keys and values are kept.",
    ),
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder for what opening makes of the model, so that the next start takes no time.",
    ),
)

_ADAPTER = click.option(
    "--adapter", type=click.Path(path_type=Path), help="Folder with a LoRA of peft, in safetensors, to add to MODEL."
)


def context_options(function: F) -> F:
    """Options of commands that read texts."""
    return _with((*_CONTEXT, _ADAPTER), function)


def note_unused_terms(model: str, adapter: Path | None, what: str) -> str | None:
    """Say of a checkpoint in which low-rank terms lie that it is taken without them; what was said."""
    from lowbit.stages._adapter import adapter_beside

    beside = None if adapter else adapter_beside(model)
    unused = f"{what} without the low-rank terms that lie in it; with them: --adapter {beside}" if beside else None
    note(unused)
    return unused


def kept_options(function: F) -> F:
    """Those of them that say what is kept."""
    return _with(_CONTEXT[1:], function)


def sampling_options(tokens: int, temperature: float, top_p: float) -> Callable[[F], F]:
    """Options that are the fields of `runtime.generate.Sampling`, with these defaults."""
    probability = Finite(0, 1, min_open=True)
    options = [
        click.option(
            "-n", "--max-tokens", "tokens", type=click.IntRange(1), default=tokens, show_default=True,
            help="Most tokens to generate.",
        ),
        click.option(
            "--temperature", type=Finite(0), default=temperature, show_default=True,
            help="0: the likeliest token.",
        ),
        click.option("--top-k", type=click.IntRange(0), default=0, help="Only among so many.  [default: all]"),
        click.option(
            "--top-p", type=probability, default=top_p, show_default=True, help="Only among this probability."
        ),
        click.option(
            "--min-p", type=Finite(0, 1), default=0.0, help="Only those this share of the likeliest."
        ),
        click.option(
            "--repetition-penalty", type=Finite(0, min_open=True), default=1.0, help="Above 1: less of it."
        ),
        click.option(
            "--stop", multiple=True, callback=_stops, help="End right after this string; may be given again."
        ),
        click.option("--seed", type=int, default=0, show_default=True, callback=seed, help="Of the choices."),
    ]  # fmt: skip
    return lambda function: _with(options, function)


def standard_input() -> TextIO:
    """Where texts come from that are not on the command line; who reads them judges bytes that are no text."""
    if sys.stdin is None:  # as Python has it where it was closed
        raise click.UsageError("standard input is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def make_rules(options: dict[str, Any]) -> Rules:
    """Take the options of `rules_options` out of a command's options, and make the `Rules` that they stand for."""
    from lowbit.stages.plan import Calibration, Rules

    names = ("sources", "samples", "length", "sampling", "seed", "inputs", "dtype", "device")
    text = {name: options.pop(name) for name in names}
    if not text["sources"] and text["device"] != "cpu":
        raise click.UsageError(
            f"--device {text['device']} is for --calibration; what needs no text is done on the processor"
        )
    others = ("scheme", "method", "skip", "sets", "options", "blocks", "activations", "imatrix", "policy")
    rules = {name: options.pop(name) for name in others}
    calibration = Calibration(**text) if text["sources"] else None
    return Rules(**rules, format=options.pop("form"), calibration=calibration)


def note(text: str | None) -> None:
    """Say what is worth knowing beside the result, where there is something."""
    if text:
        click.echo(f"lowbit: {text}", err=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback `(stage, done, total)`: bars with rate and time left on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich import progress
    from rich.console import Console

    from lowbit.budget import format_size

    columns = (
        progress.TextColumn("{task.description:>10}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with progress.Progress(*columns, console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            task = bars.tasks[tasks[stage]]
            if done < task.completed:  # the stage of another model
                bars.reset(task.id, total=total)
            rate = f"{format_size(int(task.speed))}/s" if task.speed and total > _STEPS else ""
            bars.update(task.id, completed=done, total=total, rate=rate)

        yield show


@final
class _Lines:
    """Plain progress: the end of a stage, and a line every five seconds before it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stages: dict[str, tuple[float, int, int]] = {}  # when it began, what was done then, and what is done
        self._last = 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        begun, first, before = self._stages.get(stage, (now, done, done))
        if done < before:  # the stage of another model
            begun, first = now, done
        self._stages[stage] = begun, first, done
        if done < total and now - self._last < 5:
            return
        self._last = now
        share = 100 * done / total if total else 100.0
        left = f", {(now - begun) * (total - done) / (done - first):.0f} s left" if first < done < total else ""
        click.echo(f"{stage}: {share:.0f}%, {now - begun:.1f} s{left}", err=True)


def print_told(told: str | Told) -> None:
    """A plan that was measured for what was asked, or what else there is to say of measuring and of plans."""
    for line in [told] if isinstance(told, str) else told.lines():
        click.echo(line, err=True)


_WIDE = 120  # columns that reasons need
_NUMBER = re.compile(r"\.\d+\.")


def print_plan(plan: Plan, err: bool) -> None:
    """The plan as a table, runs of alike tensors folded, with bytes before and after."""
    from rich.table import Column, Table

    from lowbit.budget import format_size
    from lowbit.cli._screen import table_console

    console = table_console(err)
    wide = console.width >= _WIDE
    # Where there is no room, reasons would be a letter a line.
    headers = ["shape", "scheme", "method", "before", "after", *(["reason"] if wide else [])]
    table = Table(Column("tensors", overflow="fold"), *headers)
    for row in fold(plan):
        table.add_row(*row[: 1 + len(headers)])
    before = sum(entry.source_bytes for entry in plan.entries if not entry.tied)
    after = sum(plan.stored_bytes(entry) for entry in plan.entries)
    bits, all_bits = plan.bits_per_weight()
    console.print(f"plan: {plan.format}" + ("" if wide else f" (reasons: in {_WIDE} columns, or --json)"))
    console.print(table)
    console.print(
        f"{format_size(before)} -> {format_size(after)} ({before / max(after, 1):.2f} times smaller); "
        f"{bits:.4f} bits per quantized weight, {all_bits:.4f} over all weights"
    )


def fold(plan: Plan) -> list[tuple[str, ...]]:
    """Rows of the plan's table: tensors that differ only in numbers (layers, experts) share one.

    So do those that have a scheme for a budget, of which the least and the greatest cost are shown.
    """
    from lowbit.budget import format_size

    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in plan.entries:
        weight = entry.weight
        shape = "x".join(map(str, weight.shape))
        key = (_NUMBER.sub(".*.", weight.name), shape, str(weight.scheme or "keep"), entry.method or "", entry.reasons)
        groups.setdefault(key, []).append(entry)
    times = Counter(name for name, *_ in groups)
    return [
        (
            _together(name, members, times[name] > 1), shape, scheme, method,
            format_size(sum(entry.source_bytes for entry in members)),
            format_size(sum(plan.stored_bytes(entry) for entry in members)),
            _reason(members),
        )
        for (name, shape, scheme, method, reason), members in groups.items()
    ]  # fmt: skip


def _together(name: str, members: Sequence[Entry], split: bool) -> str:
    """What tensors are called in one row; with the numbers of their layers, where others are in another row."""
    if len(members) == 1:
        return members[0].weight.name
    numbers = [_NUMBER.findall(entry.weight.name) for entry in members]
    if split and all(len(each) == 1 for each in numbers):
        name = name.replace("*", f"{{{_runs(sorted(int(each[0].strip('.')) for each in numbers))}}}")
    return f"{len(members)} x {name}"


def _runs(numbers: Sequence[int]) -> str:
    """`0,5-7` of 0, 5, 6, 7."""
    starts = [at for at in numbers if at - 1 not in numbers]
    ends = [at for at in numbers if at + 1 not in numbers]
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in zip(starts, ends, strict=True))


def _reason(members: Sequence[Entry]) -> str:
    """Why weights that share a row have their scheme, after what they are predicted to cost."""
    costs = [cost for entry in members for cost in list(entry.costs.values())[:1]]
    if len(costs) < 2:
        return members[0].why
    said = f"cost {min(costs):.2g} to {max(costs):.2g} each, {sum(costs):.2g} together"
    return f"{said}: {members[0].reasons}"
