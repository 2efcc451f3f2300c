"""Report: what a run did and how good the result is, as `report.json`, `report.md` and one `report.html`.

The page is one file that needs no network. Its charts are Vega-Lite specifications (`_charts.py`) beside a copy of
Vega (`data/report/vega.js`, from `vl_convert.javascript_bundle`; kept as a file because making it takes memory that
`--ram` does not allow for). Tensor names come from whoever wrote the checkpoint: templates escape them, and a content
security policy lets no script run but the two of the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any, final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowbit.budget import format_size
from lowbit.stages import _words as words
from lowbit.stages._charts import draw
from lowbit.stages._quality import Interval, Quality, read_quality
from lowbit.stages._records import (
    Count,
    Histogram,
    Machine,
    Memory,
    Outcome,
    Result,
    Row,
    RunRecord,
    Source,
    Starved,
    TermsRecord,
    Verification,
)
from lowbit.stages._verdict import BANDS, Verdict, judge, position
from lowbit.stages.write import write_atomic

__all__ = [
    "Count", "Histogram", "Machine", "Memory", "Outcome", "Result", "Row", "RunRecord", "Source", "Starved",
    "Verification", "render_page", "write_report",
]  # fmt: skip

VERSION = 1
_LISTED = 1000  # rows of the plan in the page: with the charts and their code it stays under 2 MB
_WORST = 5
_BLOCKS, _NAMED = 8, 8  # blocks with experts that saw few tokens, and experts of each, that are named
_CONDITIONS = {
    "tokens": "tokens read",
    "scored": "tokens scored",
    "special": "special tokens",
    "blocks": "blocks resampled",
}


@final
@dataclass(frozen=True)
class _Kept:
    """Weights that were not quantized for one reason: how many, their bytes, and their names with numbers as `*`."""

    reason: str
    tensors: int
    bytes: int
    names: str


def write_report(run: RunRecord, out_dir: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into a directory; each appears whole or not at all.

    Raises:
        OSError: the directory cannot be written to.
    """
    facts = _facts(run)
    texts = {
        "report.json": _to_json(run, facts["verdict"]),
        "report.md": _environment(page=False).get_template("report.md.j2").render(facts).rstrip() + "\n",
        "report.html": _page(run, facts),
    }
    for name, text in texts.items():
        # A tensor's name may hold half a surrogate pair, which UTF-8 has no bytes for.
        write_atomic(out_dir / name, text.encode(errors="backslashreplace"))


def _to_json(run: RunRecord, verdict: Verdict) -> str:
    """The whole record and the verdict, a tensor a line; what is not a number is null, as JSON has no NaN."""
    document = {"lowbit_report": VERSION, "verdict": _plain(verdict), **_plain(run)}
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in document.items()) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(f"  {json.dumps(each, allow_nan=False)}" for each in value) + "\n ]"


def _plain(value: Any) -> Any:
    """JSON's own types: records as objects."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _page(run: RunRecord, facts: Mapping[str, Any]) -> str:
    charts = draw(run)
    grids = [each for each in _grids(run) if each[0] in charts]
    more = {"charts": charts, "grids": grids, "bands": BANDS, "position": position, "percent": words.percent}
    return render_page("page.html.j2", "page.js", {**facts, **more})


def render_page(template: str, program: str, facts: Mapping[str, Any]) -> str:
    """A page that needs no network: a template of `data/report`, with style, Vega and programs of the same place.

    Args:
        program: what it runs after what every page does (`common.js`).
        facts: what the template shows; names in it are escaped.
    """
    vega, script = _data("vega.js"), _data("common.js") + _data(program)
    return _environment(page=True).get_template(template).render(
        facts, style=Markup(_data("page.css")), vega=Markup(vega), script=Markup(script), policy=_policy(vega, script)
    )  # fmt: skip


def _data(name: str) -> str:
    return files("lowbit").joinpath("data", "report", name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """Nothing is loaded, and no script runs but these."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@cache
def _environment(page: bool) -> Environment:
    """Templates of the page, where everything is escaped, or of the Markdown, where cells are."""
    environment = Environment(
        loader=PackageLoader("lowbit", "data/report"),
        autoescape=page,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = (words.short, words.bits, words.percent, words.growth, words.limits, words.duration, words.moment)
    local = (words.breakable, words.cell, words.code)
    environment.filters.update({each.__name__: each for each in (*shared, *local)}, size=format_size, method=_method)
    return environment


_TOLD = ("padded", "fallback", "left out", "apart", "quantized again", "otherwise in llama.cpp")


def _facts(run: RunRecord) -> dict[str, Any]:
    """What both templates show, worked out from the record."""
    quality = read_quality(run.evaluation)
    made = [(row.outcome.error, row) for row in run.rows if row.outcome]
    seconds = {stage: time for stage, time in run.seconds.items() if quality or stage != "evaluate"}
    return {
        "run": run,
        "title": _title(run),
        "verdict": judge(run),
        "quality": quality,
        "quantized": any(row.scheme for row in run.rows),
        "errors": [row for _, row in sorted(made, key=lambda pair: -pair[0])[:_WORST]],
        "rows": run.rows[:_LISTED],
        "scored": any(row.outcome.against_rtn is not None for _, row in made if row.outcome),
        "terms": _terms(run.adapter) if run.adapter else "",
        "kept": _kept(run.rows),
        "starved": _starved(run.starved),
        "other": [count for count in run.counts if count.kind in _TOLD],
        "measures": _measures(quality) if quality else [],
        "protocol": _protocol(run.evaluation["conditions"]) if run.evaluation else [],
        "machine": _machine(run.machine),
        "memory_note": _memory_note(run.memory),
        "seconds": seconds,
        "stages": ", ".join(f"{stage} {words.duration(time)}" for stage, time in seconds.items()),
    }


def _title(run: RunRecord) -> str:
    name = Path(run.source.path).name or run.source.path
    schemes = Counter(row.scheme for row in run.rows if row.scheme)
    most = [scheme for scheme, _ in schemes.most_common(3)]
    return f"{name} in {', '.join(most)}{' and more' if len(schemes) > 3 else ''}" if most else name


def _terms(adapter: TermsRecord) -> str:
    """Bits per weight, and how ranks are spread."""
    found = sorted(adapter.ranks.values())
    least, most = found[0], found[-1]
    ranks = f"rank {least}" if least == most else f"ranks {least} to {most}, median {found[len(found) // 2]}"
    return f"{words.bits(adapter.bits)} bits per quantized weight, {ranks} in {len(found):,} tensors"


def _starved(experts: Sequence[Starved]) -> list[str]:
    """The experts that saw few tokens, a block a line, fewest first; of many, how many there are more."""
    blocks: dict[str, list[str]] = {each.block: [] for each in experts}
    for each in sorted(experts, key=lambda each: each.tokens):
        blocks[each.block].append(f"{each.expert} ({words.counted(each.tokens, 'token')})")
    lines = [f"{block}: {_first(said, 'expert')}" for block, said in list(blocks.items())[:_BLOCKS]]
    more = sum(map(len, list(blocks.values())[_BLOCKS:]))
    last = f"{words.counted(more, 'expert')} in {words.counted(len(blocks) - _BLOCKS, 'block')} more"
    return [*lines, last] if more else lines


def _first(said: Sequence[str], noun: str) -> str:
    more = f" and {words.counted(len(said) - _NAMED, noun)} more" if len(said) > _NAMED else ""
    return ", ".join(said[:_NAMED]) + more


def _grids(run: RunRecord) -> list[tuple[str, str, str]]:
    """Place in the page, name and note of each histogram."""
    rows = {row.name: row for row in run.rows}
    return [(f"grid-{at}", each.name, _grid_note(rows.get(each.name))) for at, each in enumerate(run.histograms)]


def _grid_note(row: Row | None) -> str:
    return f"{row.scheme}, error {words.percent(row.outcome.error)}" if row and row.outcome else ""


def _kept(rows: Iterable[Row]) -> list[_Kept]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.scheme is None:
            grouped.setdefault(row.reason, []).append(row)
    return [
        _Kept(reason, len(members), sum(row.after for row in members), _pattern(members))
        for reason, members in grouped.items()
    ]


def _pattern(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name) for row in rows))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _method(row: Row) -> str:
    """The method that made a weight, and the planned one where that is another."""
    if not row.outcome:
        return ""
    return row.outcome.method if row.outcome.method == row.method else f"{row.outcome.method}, not {row.method}"


def _measures(quality: Quality) -> list[tuple[str, str, str]]:
    """Name, value and interval of everything that was measured."""
    p_value = f" (p = {quality.p_value:.2g})" if quality.p_value is not None else ""
    found: list[tuple[str, Interval | None, Callable[[float], str]]] = [
        ("mean KL divergence, nats per token", quality.divergence, words.short),
        ("median KL divergence", quality.median, words.short),
        ("99th percentile of KL divergence", quality.p99, words.short),
        ("same most likely next token", quality.agreement, words.percent),
        ("perplexity", quality.perplexity, words.short),
        ("perplexity of the original", quality.reference, words.short),
        (f"change of perplexity{p_value}", quality.change, words.growth),
    ]
    return [(name, write(each.value), words.limits(each, write)) for name, each, write in found if each]


def _protocol(conditions: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions of the evaluation, as they were recorded."""
    return [(_CONDITIONS.get(name, name), _condition(value)) for name, value in conditions.items()]


def _condition(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _machine(machine: Machine) -> list[tuple[str, str]]:
    return [
        ("processor", f"{machine.cpu}, {machine.cores} core{'s' if machine.cores != 1 else ''}"),
        ("memory", format_size(machine.memory)),
        ("system", machine.system),
        ("Python", machine.python),
        ("PyTorch", machine.torch),
    ]


def _memory_note(memory: Memory) -> str:
    over = memory.peak > memory.estimate
    estimate = f"{'more than' if over else 'below'} the largest estimate, {format_size(memory.estimate)}"
    if memory.limit is None:
        return f"no limit set; {estimate}"
    return f"limit of {format_size(memory.limit)} {'kept' if memory.peak <= memory.limit else 'NOT kept'}; {estimate}"
