"""`lowbit plan`: the plan only; nothing is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lowbit.cli._options import make_rules, print_plan, rules_options


@click.command(epilog="Example: lowbit plan MODEL --scheme int4-g128 --set 'down_proj=int8' --out plan.json")
@click.argument("model")
@rules_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Save the plan as JSON, to edit and use.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
def command(model: str, plan_file: Path | None, out: Path | None, as_json: bool, **rules: Any) -> None:
    """Show which tensor of MODEL gets which scheme and method, with bytes before and after, and why."""
    from lowbit.stages.checkpoint import open_checkpoint
    from lowbit.stages.plan import load_plan, make_plan
    from lowbit.stages.write import write_atomic

    with open_checkpoint(model) as checkpoint:
        plan = load_plan(plan_file, checkpoint) if plan_file else make_plan(checkpoint, make_rules(rules))
    if out:
        write_atomic(out, plan.to_json().encode())
    if as_json:
        click.echo(plan.to_json(), nl=False)
    else:
        print_plan(plan, err=False)
