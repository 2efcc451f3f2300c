"""What `lowbit inspect` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.table import Table

    from lowbit.inspect.facts import Finding, Inspection
    from lowbit.inspect.names import Name

SHOWN = 20
WORST = 4
_PIPED = 200  # columns of a table that goes into a file or a pipe


def table_console(stderr: bool = False) -> Console:
    """Where tables are printed: as wide as the terminal; wide enough for most where there is none."""
    from rich.console import Console

    screen = Console(stderr=stderr, highlight=False)
    return screen if screen.is_terminal else Console(stderr=stderr, highlight=False, width=_PIPED)


def name_lines(name: Name) -> Iterator[str]:
    """What a name says, a line; the parts that are not said outright with how sure they are."""
    sure = {"high": "", "medium": " (likely)", "low": " (not sure)"}
    parts = (f"{key.replace('_', ' ')} {said.value}{sure[said.confidence]}" for key, said in name.facts.items())
    yield f"name says   {', '.join(parts)}"


def show(found: Inspection) -> None:
    """Print an inspection: a head, weights by kind and scheme, what was found, and a verdict."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for line in _head(found):
        console.print(line, markup=False)
    table_console().print(_table(found))
    for line in _compared(found):
        console.print(line, markup=False)
    order = ["error", "warning", "note"]
    errors = [finding for finding in found.findings if finding.level == "error"]
    for finding in sorted(found.findings, key=lambda finding: order.index(finding.level))[:SHOWN]:
        console.print(_line(finding), markup=False)
    if len(found.findings) > SHOWN:
        console.print(f"... and {len(found.findings) - SHOWN} more: lowbit inspect --json has them all")
    verdict = f"not sound: {len(errors)} errors" if errors else "sound: every value finite, every code on its grid"
    console.print(verdict, style="bold red" if errors else "bold green")


def _line(finding: Finding) -> str:
    return f"{finding.level}: {finding.tensor + ': ' if finding.tensor else ''}{finding.fact}"


def _head(found: Inspection) -> Iterator[str]:
    from lowbit.budget import format_size

    kinds = [found.model.get("model_type"), *(found.model.get("architectures") or [])]
    size, count = format_size(sum(found.files.values())), len(found.files)
    yield f"{found.path}: {' '.join(map(str, filter(None, kinds))) or 'no config.json'}"
    if found.name.telling:
        yield from name_lines(found.name)
    yield f"container   {found.container}, {count} file{'s' * (count != 1)}, {size}"
    yield f"format      {found.format or 'float, not quantized'}"
    yield from _grids(found)
    methods = sorted({facts.method for facts in found.tensors if facts.method})
    if methods:
        yield f"method      {', '.join(methods)}"
    for text in found.zero_points:
        yield f"zeros       {text}"
    if found.made_by:
        yield f"made by     {', '.join(f'{tool} {detail}' for tool, detail in found.made_by.items())}"
    for alias, name in found.tied.items():
        yield f"tied        {alias} = {name}"
    parameters = sum(facts.parameters for facts in found.stored)
    bits = f"{found.bits_per_weight(quantized=False):.4f} over all {parameters:,} weights"
    if found.format:
        bits = f"{found.bits_per_weight(quantized=True):.4f} per quantized weight, {bits}"
    yield f"bits        {bits}"


def _grids(found: Inspection) -> Iterator[str]:
    """Float matrices that lie on a grid, by scheme, with the evidence."""
    grids = [(facts.parameters, facts.grid) for facts in found.stored if facts.grid]
    for scheme in sorted({grid.scheme for _, grid in grids}):
        own = [(count, grid) for count, grid in grids if grid.scheme == scheme]
        weights, most = sum(count for count, _ in own), max(grid.distinct for _, grid in own)
        residual, share = max(grid.residual for _, grid in own), min(grid.fitting for _, grid in own)
        yield (
            f"on a grid   {scheme}: {len(own)} float matrices, {weights:,} weights; {share:.0%} of the blocks fit, "
            f"at most {most} values in one, residual {residual:.2g} of a step"
        )


def _compared(found: Inspection) -> Iterator[str]:
    """What the comparison with the original gave: methods that weights look like with their numbers, worst errors."""
    from lowbit.inspect.compare import methods_of
    from lowbit.inspect.names import CONFIDENCES

    if found.original is None:
        return
    changed, plain = found.changed
    yield f"beside      {found.original}: {changed} of {plain} float tensors changed"
    seen = found.verdict
    if seen:
        yield f"verdict     {seen.method}, as {seen.weights} of {seen.total} weights look; confidence {seen.confidence}"
    for method, count in methods_of(found.compared).items():
        own = [each for each in found.compared if each.method == method]
        sure = sorted({each.confidence for each in own}, key=CONFIDENCES.index)
        middle = sorted(own, key=lambda each: each.moved)[count // 2]
        yield (
            f"looks like  {method}: {count} weights, confidence {' to '.join(sure)}; as {middle.name}: "
            f"{middle.moved:.1%} off the nearest code, {middle.farthest:.2f} steps at most, "
            f"columns together {middle.together:.2f}, "
            f"spread of columns' factors {middle.spread:.3f}, rows' {middle.rows:.3f}"
        )
    for each in sorted(found.compared, key=lambda each: -each.error)[:WORST]:
        yield f"error       {each.error:.3e} of the squares, {each.snr:.1f} dB: {each.name}"


def _table(found: Inspection) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from lowbit.budget import format_size

    table = Table("kind", "scheme", "tensors", "weights", "stored", "bits each", box=SIMPLE, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for group in found.groups():
        counts = (f"{group.tensors:,}", f"{group.parameters:,}", format_size(group.stored))
        scheme = _with_type(group.scheme, found.format) if group.scheme else "as it is"
        table.add_row(group.kind, scheme, *counts, f"{group.bits_per_weight:.4f}")
    return table


def _with_type(scheme: str, form: str | None) -> str:
    """A scheme; in GGUF with the name of its type, where that is another word."""
    from lowbit.schemes import ALIASES

    word = next((word for word, name in ALIASES.items() if name == scheme and form == "gguf"), None)
    return f"{scheme} ({word})" if word else scheme
