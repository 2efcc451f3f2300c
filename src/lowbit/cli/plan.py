"""`lowbit plan`: the plan only; nothing is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lowbit.cli._options import (
    budget_options,
    make_budget,
    make_rules,
    print_plan,
    print_told,
    progress_bars,
    rules_options,
    run_options,
)

_EPILOG = """\b
Examples:
  lowbit plan MODEL --scheme int4-g128 --set 'down_proj=int8' --out plan.json
  lowbit plan MODEL --bits-per-weight 3.5 --method gptq --calibration wiki.txt --out plan.json
  lowbit plan MODEL --size 3.9GiB --format gguf --calibration wiki.txt --out plan.json
  lowbit plan MODEL --memory 12GiB --run-context 8192 --latency 40ms --calibration wiki.txt --out plan.json
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@rules_options
@budget_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Save the plan as JSON, to edit and use.")
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
def command(model: str, plan_file: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Show which tensor of MODEL gets which scheme and method, with bytes before and after, and why.

    With a budget (--bits-per-weight, --size, --memory, --latency, --max-kl, --max-ppl-increase), what each weight costs
    in each of --schemes is measured, and the schemes are chosen that cost least.
    """
    from lowbit.pipeline import Request, find_plan
    from lowbit.stages.write import check_writable, write_atomic

    if out:
        check_writable(out)
    budget, rules = make_budget(options, plan_file), make_rules(options)
    request = Request(model, out or Path("plan.json"), rules, plan_file, budget=budget, **options)
    with progress_bars() as progress:
        plan = find_plan(request, progress, print_told)
    if out:
        write_atomic(out, plan.to_json().encode())
    if as_json:
        click.echo(plan.to_json(), nl=False)
    else:
        print_plan(plan, err=False)
