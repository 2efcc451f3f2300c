"""The line from Python: the same steps as the command line's, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.arguments import at_least_one, pairs, public, several
from lowbit.budget import parse_size
from lowbit.pipeline import Request, find_plan, run, run_conversion
from lowbit.stages._changes import Goal
from lowbit.stages.convert import Converted
from lowbit.stages.plan import Calibration, Plan, Rules
from lowbit.stages.report import RunRecord


@public
def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    method: str | None = None,
    format: str = "compressed-tensors",
    skip: str | Sequence[str] = (),
    sets: str | Sequence[str] | Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    plan: str | Path | None = None,
    ram: int | str | None = None,
    threads: int = 1,
    evaluate: str | Path | None = None,
    context: int = 512,
    activations: str | None = None,
    calibration: str | Sequence[str] | None = None,
    imatrix: str | Path | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    requantize: bool = False,
    shard_size: int | str | None = None,
) -> RunRecord:
    """Quantize a checkpoint into a directory, verify what was written, evaluate it if a text is given, and report.

    Args:
        model: directory, file or hub name of a float checkpoint.
        out: new or empty directory, or one with an unfinished run of the same call: it goes on.
        scheme: as `int4-g128`; None for the format's default.
        skip: regular expression of tensors that stay as they are, or several.
        sets: regular expression to scheme name (or `keep`), or `REGEX=SCHEME`s; the first match wins over everything.
        method: a method, or steps joined by `+` as `awq+gptq`; None for `rtn`, or the format's own.
        options: options of the method, those of other steps as `step.name`.
        plan: a saved plan, instead of all rules above.
        ram: anonymous memory allowed, bytes or a size like `4GiB`.
        evaluate: text file to compare original and result on.
        context: tokens per window of that evaluation.
        activations: scheme of the weights' inputs, as `int8-row`; None leaves them as they are.
        calibration: text for methods that learn, as `--calibration` takes it, or several.
        imatrix: file with llama.cpp's importance matrix, in place of `calibration`, for method `imatrix`.
        samples, sequence_length: windows of that text; tokens of each, None for 2,048 or what the model takes.
        seed, device: of every choice at random; where blocks run while they are calibrated, as `cuda`.
        trust_remote_code: run Python code that the checkpoint brings.
        requantize: take a checkpoint that is quantized already as what its codes stand for.
        shard_size: largest output file, bytes or a size like `2GB`; None for 5 GB, or one file of GGUF.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    at_least_one(threads=threads)
    sources = several(calibration)
    learned = Calibration(sources, samples, sequence_length, seed, device=device) if sources else None
    rules = Rules(scheme, method, format, several(skip), pairs("sets", sets), options or {}, learned)
    rules = replace(rules, activations=activations, imatrix=_path(imatrix))
    request = Request(str(model), Path(out), rules, _path(plan), _size(ram), threads, _path(evaluate), context)
    more = replace(request, requantize=requantize, shard_bytes=_size(shard_size))
    return run(replace(more, trust_remote_code=trust_remote_code))


def _size(size: int | str | None) -> int | None:
    """Bytes, of these or of a size in words."""
    return parse_size(size) if isinstance(size, str) else size


@public
def convert(
    model: str | Path,
    out: str | Path,
    *,
    format: str,
    scheme: str | None = None,
    lossy: bool = False,
    ram: int | str | None = None,
    threads: int = 1,
    shard_size: int | str | None = None,
) -> Converted:
    """Convert a checkpoint into another format, weight by weight, and verify what was written.

    Args:
        model: directory, file or hub name of a checkpoint in any format that is read.
        out: new or empty directory, or one with an unfinished run of the same call: it goes on.
        format: of the result, or `float` for dequantized weights.
        scheme: of every quantized weight; of `float` the type (f16, bf16, f32). None for what is nearest.
        lossy: whether weights may change; without it nothing is written unless every value stays to the bit.
        ram: anonymous memory allowed, bytes or a size like `4GiB`.
        shard_size: largest output file, bytes or a size like `2GB`; None for 5 GB, or one file of GGUF.

    Raises:
        UnsupportedError: values would change, naming a weight and the reason.
        LowbitError: see `lowbit.errors`.
    """
    at_least_one(threads=threads)
    return run_conversion(str(model), Path(out), Goal(format, scheme, lossy), _size(ram), threads, _size(shard_size))


@public
def make_plan(
    model: str | Path,
    *,
    skip: str | Sequence[str] = (),
    sets: str | Sequence[str] | Mapping[str, str] | None = None,
    calibration: str | Sequence[str] | Calibration | None = None,
    imatrix: str | Path | None = None,
    **rules: Any,
) -> Plan:
    """The plan that `quantize` with the same rules would carry out; nothing is written.

    Args:
        skip, sets, imatrix: as `quantize` takes them.
        calibration: text, as `quantize` takes it; for a policy that asks how often experts are used it is run through
            the model, with hidden states in a temporary folder below the working directory.
        rules: the other fields of `stages.plan.Rules`.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    text = calibration if isinstance(calibration, Calibration) else None
    if calibration and not isinstance(calibration, Calibration):
        text = Calibration(several(calibration))
    asked = public(Rules)(
        skip=several(skip), sets=pairs("sets", sets), imatrix=_path(imatrix), calibration=text,
        **rules,
    )  # fmt: skip
    return find_plan(Request(str(model), Path("plan.json"), asked))


def _path(given: str | Path | None) -> Path | None:
    return Path(given) if given else None
