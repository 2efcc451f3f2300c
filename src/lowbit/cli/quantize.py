"""`lowbit quantize`: the whole line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from lowbit.cli._options import (
    Size,
    budget_options,
    make_budget,
    make_rules,
    note,
    print_plan,
    print_told,
    progress_bars,
    rules_options,
    run_options,
)
from lowbit.collector import paused

_EPILOG = """\b
Schemes are GRID[-BLOCK][-OPTION...], as int4-g128-asym:
  GRID    int1 to int8, nf4, fp4, fp8-e4m3, fp8-e5m2, mxfp4, mxfp8, nvfp4
          llama.cpp's q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, tq1_0, tq2_0,
          iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s
  BLOCK   what shares a scale: tensor, row, gN (N weights of a row), RxC (rows by columns)
  OPTION  asym, fzero (whole or fractional zero points), dq (8-bit scales), f16, bf16, f32 (type of scales)

\b
Examples:
  lowbit quantize ./llama ./llama-w4 --scheme int4-g128
  lowbit quantize ./llama ./llama-nf4 --format bitsandbytes --scheme nf4-dq
  lowbit quantize ./llama ./out --scheme int4-g64-asym --method mse --format gptq-v2 --ram 2GiB
  lowbit quantize ./llama ./llama-gptq --method gptq --calibration wiki.txt --ram 6GiB
  lowbit quantize ./llama ./out --set 'down_proj=int8-row' --skip 'layers\\.0\\.' --evaluate wiki.txt
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@rules_options
@budget_options
@run_options
@click.option(
    "--shard-size", "shard_bytes", type=Size(), show_default="5GB, or one file of gguf", help="Largest output file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
def command(model: str, out: Path, as_json: bool, plan_file: Path | None, **options: Any) -> None:
    """Quantize MODEL (a directory, file or hub name) into the directory OUT.

    Killed at any moment, the same command goes on where it was. Everything written is read back and compared.
    OUT/report.html shows the result.
    """
    with paused(freeze=True):
        from lowbit.pipeline import Request, run, without_tokenizer

    budget, rules = make_budget(options, plan_file), make_rules(options)
    request = Request(
        model, out, rules, plan_file, budget=budget, command=shlex.join(["lowbit", *sys.argv[1:]]), **options
    )

    def announce(plan: Any, ways: Any) -> None:
        if not as_json:
            print_plan(plan, err=True)
        for way in ways:
            click.echo(f"memory: at most {way}", err=True)

    with progress_bars() as progress:
        result = run(request, progress, announce, print_told)
    click.echo((out / ("report.json" if as_json else "report.md")).read_text(), nl=as_json)
    note(without_tokenizer(model, out))
    if not as_json:
        click.echo(f"report: {result and (out / 'report.html').resolve()}")
