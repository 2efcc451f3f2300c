"""The line from Python: the same steps as the command line's, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.budget import parse_size
from lowbit.pipeline import Request, run
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Plan, Rules
from lowbit.stages.plan import make_plan as _make_plan
from lowbit.stages.report import RunRecord


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    method: str = "rtn",
    format: str = "compressed-tensors",
    skip: Sequence[str] = (),
    sets: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    plan: str | Path | None = None,
    ram: int | str | None = None,
    threads: int = 1,
    evaluate: str | Path | None = None,
    context: int = 512,
) -> RunRecord:
    """Quantize a checkpoint into a directory, verify what was written, evaluate it if a text is given, and report.

    Args:
        model: directory, file or hub name of a float checkpoint.
        out: new or empty directory, or one with an unfinished run of the same call: it goes on.
        scheme: as `int4-g128`; None for the format's default.
        skip: regular expressions of tensors that stay as they are.
        sets: regular expression to scheme name (or `keep`), first match first; wins over everything.
        options: options of the method.
        plan: a saved plan, instead of all rules above.
        ram: anonymous memory allowed, bytes or a size like `4GiB`.
        evaluate: text file to compare original and result on.
        context: tokens per window of that evaluation.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    rules = Rules(scheme, method, format, skip, tuple((sets or {}).items()), options or {})
    text, saved = evaluate and Path(evaluate), plan and Path(plan)
    limit = parse_size(ram) if isinstance(ram, str) else ram
    return run(Request(str(model), Path(out), rules, saved or None, limit, threads, text or None, context))


def make_plan(model: str | Path, *, sets: Mapping[str, str] | None = None, **rules: Any) -> Plan:
    """The plan that `quantize` with the same rules would carry out; nothing is written.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    with open_checkpoint(str(model)) as checkpoint:
        return _make_plan(checkpoint, Rules(sets=tuple((sets or {}).items()), **rules))
