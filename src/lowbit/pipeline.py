"""The straight line: checkpoint -> plan -> quantize -> write -> verify -> evaluate -> report; and that of `convert`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit.budget import Estimate, MemoryWatch
from lowbit.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from lowbit.formats import _float
from lowbit.stages import convert, imatrix, quantize, tune
from lowbit.stages._adapter import Terms
from lowbit.stages._changes import Goal, model_dtype
from lowbit.stages._cost import Cost
from lowbit.stages._dequantized import taken_apart, told_dequantized
from lowbit.stages._directory import GGUF
from lowbit.stages._experts import apart, check_whole, finds, told_apart
from lowbit.stages._gguf_limits import limits
from lowbit.stages._gguf_vocabulary import untold
from lowbit.stages._model import open_blueprint
from lowbit.stages._observe import split_windows
from lowbit.stages._policy import read_policy
from lowbit.stages._quality import Interval, read_quality
from lowbit.stages._readers import told_unread
from lowbit.stages._recipe import ROTATE, parse_options
from lowbit.stages._room import with_factors
from lowbit.stages._row_views import apart_in_rows, joined_rows
from lowbit.stages._text_part import text_part
from lowbit.stages._windows import cut, encode
from lowbit.stages.budgets.allocate import Budget
from lowbit.stages.budgets.decide import Job, Read, Told, decide
from lowbit.stages.budgets.search import asked
from lowbit.stages.budgets.sensitivity import Way
from lowbit.stages.calibrate import Prepared, calibrate, default_length, forget, prepare
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint, require_explained
from lowbit.stages.evaluate import Text, evaluate, read_text
from lowbit.stages.evaluate import Way as EvaluationWay
from lowbit.stages.frequency import count_tokens, rank_tokens
from lowbit.stages.plan import (
    Calibration,
    Plan,
    Rules,
    as_planned,
    in_rows,
    load_plan,
    make_plan,
    read_format,
    read_names,
    read_recipe,
    read_rows,
)
from lowbit.stages.record import Clock, make_record
from lowbit.stages.report import RunRecord, write_report
from lowbit.stages.rotate import Options as Rotation
from lowbit.stages.rotate import prove, rotate
from lowbit.stages.samples import Samples, Similarity, read_samples, similarity
from lowbit.stages.verify import verify
from lowbit.stages.write import check_writable, open_output, refuse_foreign, write_atomic

Tell = Callable[[str | Told], None]

_UNJUDGED = (
    "there is one window, and none to judge by: what the method makes is not compared with what simpler methods make; "
    "raise --samples"
)


@final
@dataclass(frozen=True)
class Request:
    """One run, as asked for.

    Attributes:
        model: directory, file or hub name of a float checkpoint.
        out: directory for the result: new, empty, or holding an unfinished run of the same request.
        rules: which tensor gets what; ignored where `plan` names a saved plan.
        budget: what decides the schemes in place of `rules.scheme`.
        ram: anonymous memory allowed, in bytes; None for no limit.
        text: file to evaluate on; None to leave evaluation out.
        context: tokens per window of the evaluation.
        tokens: how many tokens to evaluate at most; None for all.
        shard_bytes: largest output file; None for 5 GB, or one file of GGUF.
        command: the command line, for the report.
        trust_remote_code: run Python code that the checkpoint brings.
        requantize: of a quantized checkpoint take the values that its codes stand for.
    """

    model: str
    out: Path
    rules: Rules = field(default_factory=Rules)
    plan: Path | None = None
    ram: int | None = None
    threads: int = 1
    text: Path | None = None
    context: int = 512
    tokens: int | None = None
    shard_bytes: int | None = None
    command: str = ""
    trust_remote_code: bool = False
    budget: Budget | None = None
    requantize: bool = False


def run(
    request: Request,
    progress: quantize.Progress = quantize.silent,
    announce: Callable[[Plan, Sequence[Estimate | Cost | tune.Cost]], None] | None = None,
    tell: Tell = lambda told: None,
) -> RunRecord:
    """Carry out a request and write its report into the output directory.

    Args:
        progress: called with `(stage, done, total)`.
        announce: called once with the plan and the estimates of its stages before anything is written.
        tell: called with what of the checkpoint is left out; with the estimate of what measuring for a budget takes;
            with each plan that is measured while one is searched that is as good as was asked for; with what rounding
            inputs and cache costs, what single decisions really cost, where these were asked for, and with what the
            plan is predicted to cost.

    Raises:
        LowbitError: see `lowbit.errors`; what is finished by then is kept, and the same request goes on.
    """
    return _line(request, None, progress, announce, tell)


@final
@dataclass(frozen=True)
class _Spoken:
    """The text of an evaluation, read and split into tokens once for all plans that are tried."""

    text: Text
    encoded: tuple[Int64[Tensor, "tokens"], tuple[str, ...]]


def _line(
    request: Request,
    spoken: _Spoken | None,
    progress: quantize.Progress,
    announce: Callable[[Plan, Sequence[Estimate | Cost | tune.Cost]], None] | None = None,
    tell: Tell = lambda told: None,
) -> RunRecord:
    """What `run` does; `spoken` of a plan that is only tried."""
    clock, scores, most, failed = Clock(), None, 0, None
    text = spoken.text if spoken else read_text(request.text) if request.text else None
    with MemoryWatch(request.ram).running() as watch, _open(request, tell) as source:
        read, decided = read_once(source), _Heard(tell)
        request, source = _in_rows(request, source, watch, progress, read)
        plan = _plan(_Work(request, source, watch, progress, decided, read))
        plan, samples = _with_samples(plan, read)
        source = as_planned(source, plan)
        scored = _scored(request, text, source) if text and not spoken else None
        blocks = prepare(source, plan, samples.ids, request.ram, request.threads) if samples else None  # needs more
        way = quantize.estimate_memory(plan, request.ram, request.threads, source.view.made_bytes)
        costs: list[Estimate | Cost | tune.Cost] = [way]
        if blocks:
            costs = [blocks.cost, *tune.estimate(blocks, request.ram), way]
        if announce:
            announce(plan, costs)
        learned = _calibration(plan, samples, blocks, scored) if samples and blocks else None
        warnings = _warnings(request, plan, samples, learned)
        for warning in warnings:
            tell(f"warning: {warning}")
        clock.lap("plan")
        with open_output(request.out, source, plan, request.shard_bytes) as output:
            if blocks:
                calibrate(blocks, output, watch, progress)
                clock.lap("calibrate")
            quantize.quantize(source, plan, output, way, watch, progress)
            adapter = Terms(request.out).finish(str(request.out)) if blocks else None
            output.finish(source)
            forget(output)
            clock.lap("quantize")
            tuned = tune.tune(blocks, output, watch, progress) if blocks else {}
            if tuned:
                clock.lap("tune")
            checked = verify(source, output, way, progress)
            clock.lap("verify")
            if text:
                scores, most, failed = _scores(
                    request, text, spoken and spoken.encoded, source.path, adapter and adapter.path, progress, tell
                )
                clock.lap("evaluate")
            most = max(most, *(cost.total for cost in costs))
            facts = learned and learned.facts | ({"tuned": tuned} if tuned else {})
            result = make_record(
                request.command, source, output, way, most, watch, checked, scores, clock.seconds, facts, adapter,
                tuple(decided.lines), failed, warnings,
            )  # fmt: skip
            write_report(result, request.out)
            watch.check()
    if failed:
        raise CheckpointError(f"{failed}; {request.out} is quantized, and its report has no scores")
    return result


def find_plan(
    request: Request,
    progress: quantize.Progress = quantize.silent,
    tell: Tell = lambda told: None,
) -> Plan:
    """The plan of a request, whose `out` is where the plan will be saved: saved, by rules, or for the budget.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    with MemoryWatch(request.ram).running() as watch, _open(request, tell) as source:
        read = read_once(source)
        request, source = _in_rows(request, source, watch, progress, read)
        return _plan(_Work(request, source, watch, progress, tell, read))


@final
@dataclass(frozen=True)
class _Heard:
    """What was told of how a budget was met, for the report too."""

    tell: Tell
    lines: list[str] = field(default_factory=list)

    def __call__(self, told: str | Told) -> None:
        self.tell(told)
        if not isinstance(told, str | Way):
            self.lines.extend(told.lines())


@final
@dataclass(frozen=True)
class _Work:
    """A request with the checkpoint that is open for it, and what its steps share."""

    request: Request
    source: Checkpoint
    watch: MemoryWatch
    progress: quantize.Progress
    tell: Tell
    read: Read


def _plan(work: _Work) -> Plan:
    """The plan of a request: saved, by rules, or for the budget."""
    saved, source = work.request.plan, work.source
    plan = load_plan(saved, source) if saved else with_factors(_decided(work), source)
    for said in told_unread(plan.format, source.config, (entry.weight for entry in plan.entries)):
        work.tell(said)
    return plan


def _decided(work: _Work) -> Plan:
    """The plan by rules, or for the budget."""
    request, rules = work.request, work.request.rules
    if request.budget is None:
        return make_plan(work.source, rules)
    spoken = _spoken(work) if request.budget.quality is not None else None
    job = Job(
        work.source, rules, request.budget, request.out.absolute().parent, request.ram, request.threads,
        work.watch, work.progress, work.read, work.tell,
    )  # fmt: skip
    return decide(job, lambda plan: _try(work, with_factors(plan, work.source), spoken))


def _spoken(work: _Work) -> _Spoken:
    """The text on which plans are measured; one that cannot be used is refused before anything is measured."""
    request = work.request
    if request.text is None:
        raise UsageError("what is asked for is measured on a text: name it with --evaluate")
    text = read_text(request.text)
    spoken = _Spoken(text, encode([work.source], text, request.tokens, request.ram))
    cut(text, spoken.encoded, request.context, None)
    return spoken


def counted(request: Request, source: Checkpoint, watch: MemoryWatch, progress: quantize.Progress, read: Read) -> Rules:
    """The rules, with how often experts or tokens are used, where the policy asks for it and there is text."""
    rules, folder = request.rules, request.out.absolute().parent
    if rules.policy is None or rules.calibration is None:
        return rules
    policy = read_policy(rules.policy)
    text = rules.calibration
    if policy.ranks and rules.tokens is None:
        rules = replace(rules, tokens=rank_tokens(source, read(text).ids))
    if policy.counts and rules.counts is None:
        counts = count_tokens(source, read(text).ids, folder, request.ram, watch, progress)
        rules = replace(rules, counts=counts)
    return rules


def _in_rows(
    request: Request, source: Checkpoint, watch: MemoryWatch, progress: quantize.Progress, read: Read
) -> tuple[Request, Checkpoint]:
    """The request with what its policy counts, and the checkpoint with rows that have schemes of their own apart."""
    if request.plan:
        return request, apart_in_rows(source, read_rows(request.plan))
    request = replace(request, rules=counted(request, source, watch, progress, read))
    return request, in_rows(source, request.rules)


def _try(work: _Work, plan: Plan, spoken: _Spoken | None) -> Interval:
    """What the budget limits, of a plan that is carried out in a temporary folder beside the result."""
    request = work.request
    with TemporaryDirectory(dir=request.out.absolute().parent, prefix=".search-") as folder:
        file = Path(folder) / "plan.json"
        write_atomic(file, plan.to_json().encode())
        record = _line(replace(request, out=Path(folder) / "out", plan=file, budget=None), spoken, work.progress)
        quality = read_quality(record.evaluation)
    assert quality is not None
    assert request.budget is not None
    return asked(request.budget, quality)


def _check_scheme(source: Checkpoint, goal: Goal) -> None:
    """A scheme for weights that are quantized already would be passed over where none is."""
    if goal.scheme and goal.format != _float.NAME and all(weight.scheme is None for weight in source.weights.values()):
        require_explained(source)
        raise UsageError(f"{source.path} is not quantized; `lowbit quantize` gives it a scheme")


def run_conversion(
    model: str,
    out: Path,
    goal: Goal,
    ram: int | None = None,
    threads: int = 1,
    shard_bytes: int | None = None,
    progress: quantize.Progress = quantize.silent,
    announce: Callable[[convert.Converted, Estimate], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> convert.Converted:
    """Convert a checkpoint into another format: checkpoint -> check -> write -> verify.

    Args:
        announce: called once, before anything is written or refused, with what will be done, and the estimate.
        note: called with a sentence on each thing in the checkpoint that is not carried.

    Raises:
        LowbitError: see `lowbit.errors`; what is finished by then is kept, and the same call goes on.
    """
    clock = Clock()
    refuse_foreign(out)
    with MemoryWatch(ram).running() as watch, open_checkpoint(model) as source:
        _check_scheme(source, goal)
        source = text_part(apart(source, goal.format), goal.format)
        check_whole(source, goal.format)
        source = joined_rows(source, goal.format, goal.dtype or model_dtype(source), goal.lossy)
        folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
        for text in (*source.notes, *(limit.reason for limit in limits(source, goal.format))):
            note(text)
        conversion = convert.plan_conversion(source, goal, folder, ram, threads, progress)
        result = convert.summary(conversion, out)
        if announce:
            announce(result, conversion.way)
        convert.refuse(conversion)
        for text in told_unread(goal.format, source.config, (entry.weight for entry in conversion.plan.entries)):
            note(text)
        clock.lap("check")
        with open_output(out, source, conversion.plan, shard_bytes) as output:
            convert.convert(conversion, output, watch, progress)
            convert.finish(conversion, output)
            clock.lap("convert")
            checked = verify(source, output, conversion.way, progress, convert.remake(conversion))
            clock.lap("verify")
            watch.check()
        memory = (watch.peak, conversion.way.total, watch.limit)
        largest = max((record.facts["largest_error"] for record in output.records.values()), default=0.0)
        return replace(
            result, largest=largest, verified=checked.tensors, resumed=output.resumed, seconds=clock.seconds,
            memory=memory,
        )  # fmt: skip


def run_imatrix(
    model: str,
    out: Path,
    text: Calibration,
    progress: quantize.Progress = quantize.silent,
    trust_remote_code: bool = False,
    ram: int | None = None,
    announce: Callable[[Cost], None] | None = None,
) -> None:
    """Write the importance matrix of a float checkpoint: checkpoint -> samples -> imatrix.

    Args:
        announce: called once with the estimate, before the work.

    Raises:
        UsageError: `out` is there already.
        LowbitError: see `lowbit.errors`.
    """
    if out.exists():
        raise UsageError(f"{out} is there already and is left alone; name a new file")
    check_writable(out)
    with MemoryWatch(ram).running() as watch, open_checkpoint(model, trust_remote_code) as source:
        source = text_part(source, "gguf")
        samples = _read(text, source)
        cost = imatrix.estimate(source, (samples.ids.shape[0], samples.ids.shape[1]), ram)
        if announce:
            announce(cost)
        folder, names = out.absolute().parent, list(text.sources)
        data = imatrix.measure(source, samples.ids, names, folder, cost.tokens, watch, progress)
        watch.check()
    write_atomic(out, data)


def without_tokenizer(model: str, out: Path) -> str | None:
    """Why a result that was made of a GGUF file has no tokenizer; None where it has one, or needs none."""
    made = model.endswith(GGUF) or any(Path(model).glob(f"*{GGUF}"))  # only such a file is opened again
    reason = untold(open_checkpoint(model)) if made and not any(out.glob(f"*{GGUF}")) else None
    return reason and f"no tokenizer was written: {reason}"


def _open(request: Request, tell: Tell) -> Checkpoint:
    """The checkpoint, or a view of it that is rotated where the recipe says so and was proved to compute the same."""
    opened = open_checkpoint(request.model, request.trust_remote_code)
    form = read_format(request.plan) if request.plan else request.rules.format
    whole = read_names(request.plan).__contains__ if request.plan else finds(request.rules.skip)
    spread = taken_apart(opened, form, whole, request.requantize)
    source = text_part(spread, form)
    told = (limit.reason for limit in limits(source, form))
    for said in (source.left_out, told_apart(opened, spread, form), told_dequantized(source), *told):
        if said:
            tell(said)
    recipe, options = read_recipe(request.plan) if request.plan else request.rules.recipe()
    if not recipe.rotate:
        return source
    original = open_blueprint(source, torch.float32)
    rotated = rotate(original, parse_options(Rotation, ROTATE, options))
    prove(original, rotated, streamed=True)
    return rotated.checkpoint


def _with_samples(plan: Plan, read: Read) -> tuple[Plan, Samples | None]:
    """The windows that the plan is calibrated on, and the plan with their hash: another text is another run."""
    if plan.calibration is None:
        return plan, None
    samples = read(plan.calibration)
    return replace(plan, calibration=replace(plan.calibration, sha256=samples.sha256)), samples


def read_once(source: Checkpoint) -> Read:
    """The windows of a text, in tokens of a checkpoint, which are kept."""
    return cache(partial(_read, source=source))


def _read(wanted: Calibration, source: Checkpoint) -> Samples:
    usual = default_length(source)
    length = wanted.length or usual
    # What the model takes is asked only where it may be too little: opening it takes a while.
    long = open_blueprint(source, torch.float32).too_long(length) if length > usual else None
    samples = read_samples(
        wanted.sources, source, samples=wanted.samples, length=length, seed=wanted.seed, sampling=wanted.sampling
    )
    return replace(samples, warnings=(long, *samples.warnings)) if long else samples


@final
@dataclass(frozen=True)
class _Learned:
    """What the report says of the text that was learned from, and how far it is enough and like the evaluation's."""

    facts: dict[str, Any]
    likeness: Similarity


def _calibration(
    plan: Plan, samples: Samples, blocks: Prepared, scored: Int64[Tensor, "windows context"] | None
) -> _Learned:
    """The text that is learned from, beside the windows that will be evaluated."""
    likeness = similarity(samples.ids, None if scored is None else scored.flatten(), blocks.blueprint.vocabulary)
    facts = {**samples.to_dict(), "recipe": plan.recipe, "dtype": str(blocks.blueprint.dtype).removeprefix("torch.")}
    return _Learned({**facts, "likeness": asdict(likeness)}, likeness)


def _warnings(request: Request, plan: Plan, samples: Samples | None, learned: _Learned | None) -> tuple[str, ...]:
    """What the user should know before the work begins."""
    rules = request.rules
    if samples is None or learned is None:
        used = request.budget is not None or rules.counts is not None or rules.tokens is not None
        return (f"the text of --calibration is not used: {plan.recipe} learns from none",) * bool(
            rules.calibration and not used
        )
    held = split_windows(samples.ids, samples.ids.shape[1]).held
    return (*samples.warnings, *(() if held else (_UNJUDGED,)), *learned.likeness.warnings)


def _scored(request: Request, text: Text, source: Checkpoint) -> Int64[Tensor, "windows context"]:
    """The windows that will be evaluated; a text that cannot be used is refused now, not after hours of calibration."""
    return cut(text, encode([source], text, request.tokens, request.ram), request.context, None).ids


def _scores(
    request: Request,
    text: Text,
    encoded: tuple[Int64[Tensor, "tokens"], tuple[str, ...]] | None,
    original: Path,
    adapter: Path | None,
    progress: quantize.Progress,
    tell: Tell,
) -> tuple[dict[str, Any] | None, int, str | None]:
    """Original and result on the same tokens, the anonymous memory that was planned for it, and why it failed."""
    planned, scores, failed = [0], None, None

    def announce(way: EvaluationWay) -> None:
        planned.append(way.total)
        tell(f"memory: at most {way}, for the evaluation")

    try:
        scores = evaluate(
            request.out,
            text,
            reference=original,
            context=request.context,
            tokens=request.tokens,
            ram=request.ram,
            progress=progress,
            announce=announce,
            adapter=adapter,
            encoded=encoded,
            trust_remote_code=request.trust_remote_code,
        )
    except (CheckpointError, ResourceError, UnsupportedError) as error:  # hours of work keep their report
        failed = str(error)
    return scores and scores.to_dict(), max(planned), failed
