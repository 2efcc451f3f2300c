"""Sweep: many points through the pipeline, each measured on the same text; goes on where it was, ends with a page."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, final

from lowbit import __version__
from lowbit.budget import MemoryWatch
from lowbit.errors import CheckpointError, QualityError, UnsupportedError, UsageError
from lowbit.pipeline import Request, counted, read_once, run
from lowbit.runtime.bench import bench
from lowbit.stages import quantize
from lowbit.stages._dequantized import taken_apart
from lowbit.stages._experts import finds
from lowbit.stages._frontier import Interval, Point, read_point
from lowbit.stages._text_part import text_part
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.evaluate import read_text
from lowbit.stages.plan import Plan, Rules, in_rows, make_plan
from lowbit.stages.report import RunRecord
from lowbit.stages.sweep_report import Skipped, SweepRecord, write_sweep
from lowbit.stages.write import disk_errors, write_atomic

_SCORES = {"divergence": "kl_mean", "change": "log_perplexity_change", "agreement": "top1_agreement"}


@final
@dataclass(frozen=True)
class SweepRequest:
    """What to sweep over.

    Attributes:
        base: a request as for one point; its model, text and rules hold for all, its `out` is the sweep's directory.
        schemes: as `int4-g128`, or `FORMAT:SCHEME` for another format than the rules'.
        methods: names of methods or recipes; empty for the format's default.
        keep: whether the quantized models stay.
        timed: whether decoding is timed on this machine.
    """

    base: Request
    schemes: Sequence[str]
    methods: Sequence[str] = ()
    keep: bool = False
    timed: bool = False


def sweep(
    request: SweepRequest,
    progress: quantize.Progress = quantize.silent,
    announce: Callable[[str, int, int, bool], None] = lambda name, number, total, done: None,
) -> SweepRecord:
    """Quantize and evaluate every point that is not done yet, and write `sweep.json` and `sweep.html`.

    A combination that cannot be made is left out, with its reason. What is done is in `points/`, one file each, under a
    name that hangs on all that the point hangs on: another text or another model is another point.

    Args:
        announce: called before each point with its name, number, how many there are, and whether it is done already.

    Raises:
        UsageError: no text to evaluate on, a directory of something else, or nothing that can be made.
        LowbitError: see `lowbit.errors`; points that are done by then stay.
    """
    out = request.base.out
    if request.base.text is None:
        raise UsageError("a sweep compares by a text: name one with --evaluate FILE")
    _check_output(out)
    wanted, skipped = _plans(request, progress)
    if not wanted:
        raise UsageError(f"nothing of this sweep can be made: {skipped[0].name}: {skipped[0].reason}")
    points = []
    for number, (name, rules, identity) in enumerate(wanted, 1):
        file = out / "points" / f"{name}-{identity}.json"
        announce(name, number, len(wanted), file.exists())
        if not file.exists():
            point = _measure(request, rules, name, out / "models" / f"{name}-{identity}", progress)
            write_atomic(file, (json.dumps(asdict(point), indent=1) + "\n").encode())
        points.append(_read(file))
    record = SweepRecord(
        request.base.model, str(request.base.text), __version__, request.base.context, tuple(points), tuple(skipped)
    )
    write_sweep(record, out)
    return record


def _check_output(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "points").is_dir())):
        raise UsageError(f"{out} holds something else and is left alone; name a directory that is new, or a sweep's")
    with disk_errors(out):
        (out / "points").mkdir(parents=True, exist_ok=True)


def _plans(request: SweepRequest, progress: quantize.Progress) -> tuple[list[tuple[str, Rules, str]], list[Skipped]]:
    """Name, rules and identity of every point that can be made, and what cannot, with the reason."""
    wanted, skipped = [], []
    base, text = request.base, request.base.text
    assert text is not None
    hashed = read_text(text).sha256
    with (
        MemoryWatch(base.ram).running() as watch,
        open_checkpoint(base.model, base.trust_remote_code) as checkpoint,
    ):
        held = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in checkpoint.shards]
        rules = counted(base, _apart(base, checkpoint, base.rules), watch, progress, read_once(checkpoint))
        request = replace(request, base=replace(base, rules=rules))
        for name, rules in _combinations(request):
            try:
                plan = make_plan(in_rows(_apart(base, checkpoint, rules), rules), rules)
            except UnsupportedError as error:
                skipped.append(Skipped(name, " ".join(str(error).split())))
                continue
            asked = (__version__, held, hashed, base.context, base.tokens, request.timed, plan.to_json(), _said(plan))
            wanted.append((name, rules, hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]))
    return wanted, skipped


def _apart(base: Request, checkpoint: Checkpoint, rules: Rules) -> Checkpoint:
    """As the line takes it, but for rows that have schemes of their own."""
    return text_part(taken_apart(checkpoint, rules.format, finds(rules.skip), base.requantize), rules.format)


def _said(plan: Plan) -> list[tuple[str, int, int]]:
    """Name, size and time of the files that the plan is calibrated on."""
    files = [Path(source) for source in (plan.calibration.sources if plan.calibration else ())]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _combinations(request: SweepRequest) -> Iterator[tuple[str, Rules]]:
    """Every scheme with every method, once."""
    seen = set()
    for scheme in request.schemes:
        form, _, plain = scheme.rpartition(":")
        for method in request.methods or (None,):
            rules = replace(request.base.rules, scheme=plain, method=method, format=form or request.base.rules.format)
            name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join(filter(None, (form, plain, method))))
            if name not in seen:
                seen.add(name)
                yield name, rules


def _measure(request: SweepRequest, rules: Rules, name: str, folder: Path, progress: quantize.Progress) -> Point:
    """One point through the pipeline; its files are removed afterwards, unless they are to stay."""
    record = run(replace(request.base, out=folder, rules=rules), progress)
    speed = _speed(folder) if request.timed else None
    point = _point(record, rules, name, speed)
    if not request.keep:
        shutil.rmtree(folder)
    return point


def _speed(folder: Path) -> float | None:
    """Tokens a second; None where the native decoder does not run the result."""
    found = bench(folder, prompt=32, tokens=32)
    return found.decode if found.decoder == "native" else None


def _point(record: RunRecord, rules: Rules, name: str, speed: float | None) -> Point:
    scores: dict[str, Any] = record.evaluation["scores"] if record.evaluation else {}
    parts = {key: _interval(scores[score], name, score) for key, score in _SCORES.items()}
    methods = dict.fromkeys(row.method for row in record.rows if row.method)
    seconds = sum(time for stage, time in record.seconds.items() if stage != "evaluate")
    return Point(
        name=name, scheme=rules.scheme or "", method=rules.method or ", ".join(methods), format=record.result.format,
        bytes=record.result.bytes, bits=record.result.bits_quantized, seconds=seconds, speed=speed, **parts,
    )  # fmt: skip


def _interval(score: dict[str, Any], name: str, what: str) -> Interval:
    """Raises `QualityError` where a score is no number: such a model is destroyed."""
    value = score["value"]
    low, high = (value if score[key] is None else score[key] for key in ("low", "high"))
    if value is None or not all(map(isfinite, (value, low, high))):
        raise QualityError(f"{name}: {what} is not a number; the model is destroyed, leave the scheme out")
    return Interval(value, low, high)


def _read(file: Path) -> Point:
    try:
        return read_point(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}); remove it, and it is measured again"
        ) from None
