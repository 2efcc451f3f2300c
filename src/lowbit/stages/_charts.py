"""Charts of the report as Vega-Lite specifications: plain dictionaries, as its schema names their fields.

Altair would make them too, but importing it takes longer than quantizing a small model; the tests have it read them.

Colours are CSS custom properties (`var(--c0)`), which the page defines for light and for dark: the charts are drawn as
SVG, so they follow the page without being drawn again. Every chart has its own data and reaches for nothing outside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import ceil, floor, log10, prod
from typing import Any, final

from lowbit.budget import format_size
from lowbit.stages._records import Histogram, Row, RunRecord
from lowbit.stages._words import shorten

Spec = dict[str, Any]
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.4.1.json"
_TYPES = {"Q": "quantitative", "N": "nominal", "O": "ordinal"}
ROLES = 8  # more lines than this in one chart cannot be told apart
_USED = ("q", "k", "v", "o", "gate", "up", "down")
DRAWN = 1200  # marks in one chart; no real model has more layers times roles, and hostile names stay bounded
BEFORE, AFTER = "as it came", "as stored"
FLOAT, LEVEL = "float weights", "stored levels"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@final
@dataclass(frozen=True)
class Place:
    """Where a tensor sits: the number of its layer (None outside the numbered layers) and what it is there."""

    layer: int | None
    role: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """Layer and role of every tensor, from the names alone.

    The layer is the first number in a name. The role is the shortest ending of the name, numbers left out, that tells
    it from all others: `q`, `down`, `experts.gate`, or `attn.c_proj` beside `mlp.c_proj`.
    """
    paths = {name: _path(name) for name in names}
    endings = Counter(path[at:] for path in set(paths.values()) for at in range(len(path)))
    return {name: Place(_layer(name), _role(path, endings)) for name, path in paths.items()}


def _path(name: str) -> tuple[str, ...]:
    parts = tuple(part for part in name.split(".") if part and not part.isdecimal())[-8:]
    return parts[:-1] if len(parts) > 1 and parts[-1] == "weight" else parts


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d{1,5})(?=\.|$)", name)
    return int(found[1]) if found else None


def _role(path: tuple[str, ...], endings: Mapping[tuple[str, ...], int]) -> str:
    sizes = range(1, len(path) + 1)
    shortest = next((path[-size:] for size in sizes if endings[path[-size:]] == 1), path)
    return shorten(".".join(shortest).removesuffix("_proj"), 40)


@final
@dataclass(frozen=True)
class _Group:
    """Tensors that are drawn as one: of one role in one layer, more than one where there are experts."""

    layer: int | None
    role: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The tensor's name, or how many there are."""
        first = shorten(self.rows[0].name, 80)
        return first if len(self.rows) == 1 else f"{len(self.rows)} tensors like {first}"

    @property
    def schemes(self) -> str:
        """The schemes in use, or the dtype of what was kept."""
        return ", ".join(dict.fromkeys(row.scheme or f"kept, {row.dtype}" for row in self.rows))

    @property
    def before(self) -> int:
        """Bytes as they came."""
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        """Bytes as stored."""
        return sum(row.after for row in self.rows)

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.after / max(sum(prod(row.shape) for row in self.rows), 1)


def _group(
    rows: Sequence[Row], where: Mapping[str, Place], roles: int, least: float = 0.0, layers: bool = True
) -> list[_Group]:
    """Group rows by layer and role; the smallest roles, beyond `roles` or below `least` of all bytes, are `other`."""
    sizes: Counter[str] = Counter()
    for row in rows:
        sizes[where[row.name].role] += row.before
    floor = least * sizes.total()
    rare = [role for at, (role, size) in enumerate(sizes.most_common()) if at >= roles - 1 or size < floor]
    other = set(rare) if len(rare) > 1 else set()
    grouped: dict[tuple[int | None, str], list[Row]] = {}
    for row in rows:
        place = where[row.name]
        role = "other" if place.role in other else place.role
        grouped.setdefault((place.layer if layers else None, role), []).append(row)
    return [_Group(layer, role, tuple(members)) for (layer, role), members in grouped.items()][:DRAWN]


def _ordered(roles: Iterable[str]) -> list[str]:
    """Roles in the order in which a transformer block uses them; the others after, as they come."""
    return sorted(dict.fromkeys(roles), key=lambda role: _USED.index(role) if role in _USED else len(_USED))


def _of(field: str, **more: Any) -> Spec:
    """A channel: a field with the letter of its type behind, as `layer:Q`, and what else is said of it."""
    name, letter = field.rsplit(":", 1)
    return {"field": name, "type": _TYPES[letter], **more}


def _mark(kind: str, encoding: Spec, only: str | None = None, data: str | None = None, **look: Any) -> Spec:
    """One layer; `only`: the rows for which this holds, `data`: its own dataset."""
    spec: Spec = {"mark": {"type": kind, **look}, "encoding": encoding}
    if only:
        spec["transform"] = [{"filter": only}]
    if data:
        spec["data"] = {"name": data}
    return spec


def _picked(field: str, layers: Sequence[Spec]) -> Spec:
    """Layers of which the legend picks one value of a field; the others then fade where they have `_FADED`."""
    pick = {"name": "pick", "select": {"type": "point", "fields": [field]}, "bind": "legend", "views": ["first"]}
    return {"layer": [{**layers[0], "name": "first"}, *layers[1:]], "params": [pick]}


_FADED: Spec = {"condition": {"param": "pick", "value": 1}, "value": 0.12}


def _legend(labels: Sequence[str]) -> Spec:
    """A legend above the chart whose columns fit a telephone."""
    widest = max((len(label) for label in labels), default=1)
    columns = max(1, min(len(labels), 250 // (7 * min(widest, 16) + 26)))
    return {"orient": "top", "title": None, "columns": columns, "labelLimit": 130}


def error_chart(rows: Sequence[Row], where: Mapping[str, Place]) -> Spec | None:
    """Relative squared error of quantized weights along the layers, one line per role; None without numbered layers."""
    inside = [row for row in rows if row.outcome and where[row.name].layer is not None]
    values = [_error_point(group) for group in _group(inside, where, ROLES)]
    if not values:
        return None
    labels = _ordered(value["role"] for value in values)
    axis = {"title": "layer", "format": "d", "tickMinStep": 1, "grid": False}
    base = {
        "x": _of("layer:Q", axis=axis, scale={"zero": False, "nice": False}),
        "y": _error_axis([value["error"] for value in values]),
        "color": _ordinal("role", labels, [f"var(--c{index})" for index in range(len(labels))]),
        "opacity": _FADED,
        "tooltip": _tips(tensor="name:N", scheme="schemes:N", error="shown:N", method="method:N"),
    }
    shape = _of("role:N", scale={"domain": labels}, legend=_legend(labels))
    line = _mark("line", base, strokeWidth=1.5)
    point = _mark("point", {**base, "shape": shape}, filled=True, size=40 if len(values) <= 200 else 14)
    about = "Relative squared error of each quantized tensor, by layer"
    return _finish(_picked("role", [line, point]), {"values": values}, about, 280)


def _error_axis(errors: Sequence[float]) -> Spec:
    """Linear, or logarithmic where errors differ by more than a factor of 25; a log axis leaves zeros out."""
    title, positive = "relative squared error", [error for error in errors if error > 0]
    if not positive or max(positive) <= 25 * min(positive):
        axis: Spec = {"title": title, "format": ".3~p", "tickCount": 5}
        return _of("error:Q", scale={"zero": False, "nice": True}, axis=axis)
    powers = [10.0**power for power in range(floor(log10(min(positive))), ceil(log10(max(positive))) + 1)]
    axis = {"title": f"{title} (log scale)", "format": ".3~p", "values": powers}
    return _of("error:Q", scale={"type": "log", "domain": [powers[0], powers[-1]]}, axis=axis)


def _error_point(group: _Group) -> dict[str, Any]:
    outcomes = [row.outcome for row in group.rows if row.outcome]
    errors = [outcome.error for outcome in outcomes]
    mean = sum(errors) / len(errors)
    spread = f" ({min(errors):.3%} to {max(errors):.3%})" if len(errors) > 1 else ""
    methods = ", ".join(dict.fromkeys(outcome.method for outcome in outcomes))
    return {
        "layer": group.layer, "role": group.role, "error": mean, "shown": f"{mean:.3%}{spread}",
        "name": group.name, "schemes": group.schemes, "method": methods,
    }  # fmt: skip


def bytes_chart(rows: Sequence[Row], where: Mapping[str, Place]) -> Spec | None:
    """Bytes before and after by role, all layers together, largest first."""
    groups = _group([row for row in rows if row.after], where, 12, least=0.002, layers=False)
    if not groups:
        return None
    groups.sort(key=lambda group: (group.role == "other", -group.before))
    factor, unit = _unit(max(max(group.before, group.after) for group in groups))
    values = [
        {"role": group.role, "what": what, "size": size / factor, "shown": format_size(size), "scheme": group.schemes}
        for group in groups
        for what, size in ((BEFORE, group.before), (AFTER, group.after))
    ]
    words = [{"role": each.role, "words": f"{format_size(each.before)} → {format_size(each.after)}"} for each in groups]
    return _bars(values, words, unit)


def _bars(values: list[dict[str, Any]], words: list[dict[str, str]], unit: str) -> Spec:
    """A wide pale bar of the bytes before under a narrow strong one of the bytes after, both in words above."""
    y = _of("role:N", sort=[each["role"] for each in words], axis=_plain_axis())
    base = {
        "y": y,
        "x": _of("size:Q", scale={"nice": False}, axis={"title": unit, "tickCount": 5}),
        "color": _ordinal("what", [BEFORE, AFTER], ["var(--before)", "var(--accent)"]),
        "tooltip": _tips(tensors="role:N", what="what:N", bytes="shown:N", scheme="scheme:N"),
    }
    bars = [
        _mark("bar", base, f"datum.what === '{what}'", height=height, yOffset=8, cornerRadiusEnd=2)
        for what, height in ((BEFORE, 14), (AFTER, 7))
    ]
    said = {"y": y, "x": {"value": 1}, "text": _of("words:N")}
    labels = _mark("text", said, data="words", align="left", baseline="middle", dy=-9, fontSize=11)
    about = "Bytes before and after, by kind of tensor"
    return _finish({"layer": [*bars, labels]}, {"values": values, "words": words}, about, 38 * len(words))


def _unit(largest: int) -> tuple[int, str]:
    """Divisor and name of the unit in which the axis is written."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if largest >= 2**power:
            return 2**power, name
    return 1, "bytes"


def bits_chart(rows: Sequence[Row], where: Mapping[str, Place]) -> Spec | None:
    """Stored bits per weight of every matrix, role against layer; None without numbered layers."""
    matrices = [row for row in rows if row.after and len(row.shape) > 1 and where[row.name].layer is not None]
    groups = _group(matrices, where, 16)
    if not groups:
        return None
    values = [
        {"layer": g.layer, "role": g.role, "label": f"{g.bits:.3g}", "class": _bit_class(g.bits), "name": g.name,
         "schemes": g.schemes, "shown": f"{g.bits:.3f}", "size": f"{format_size(g.before)} → {format_size(g.after)}"}
        for g in groups
    ]  # fmt: skip
    layers = sorted({group.layer for group in groups if group.layer is not None})
    classes = [name for name, _ in _BIT_CLASSES]
    present = [name for name in classes if any(value["class"] == name for value in values)]
    written = {"title": "layer", "labelAngle": 0, "ticks": False, "domain": False}
    base = {
        "x": _of("layer:O", axis={**written, "values": layers[:: _step(len(layers))]}),
        "y": _of("role:N", sort=_ordered(group.role for group in groups), axis=_plain_axis()),
        "tooltip": _tips(tensor="name:N", scheme="schemes:N", bits="shown:N", bytes="size:N"),
    }
    colour = _ordinal("class", present, [f"var(--bits{classes.index(name)})" for name in present])
    edge = 1.5 if len(layers) < 50 else 0.3
    drawn = [_mark("rect", {**base, "color": colour}, stroke="var(--card)", strokeWidth=edge)]
    if len(layers) <= 10:
        drawn.append(_mark("text", {**base, "text": _of("label:N")}, fontSize=11))
    about, high = "Stored bits per weight, by layer and kind of tensor", 26 * len({group.role for group in groups})
    return _finish({"layer": drawn}, {"values": values}, about, high)


_BIT_CLASSES = (
    ("2 bits or less", 2.5),
    ("3 bits", 3.5),
    ("4 bits", 4.75),
    ("5 or 6 bits", 6.75),
    ("8 bits", 9.5),
    ("16 bits or more", 1e9),
)


def _bit_class(bits: float) -> str:
    return next(name for name, top in _BIT_CLASSES if bits <= top)


def _step(count: int) -> int:
    """Every how many layers to write a number under the axis, so that some ten are written."""
    return next((step for step in (1, 2, 5, 10, 20, 50, 100) if count <= 12 * step), count)


def _plain_axis() -> Spec:
    return {"title": None, "labelLimit": 110, "ticks": False, "domain": False}


def _ordinal(field: str, labels: Sequence[str], colours: Sequence[str]) -> Spec:
    return _of(f"{field}:N", scale={"domain": list(labels), "range": list(colours)}, legend=_legend(labels))


def histogram_chart(histogram: Histogram) -> Spec | None:
    """Density of the float weights (line) over what is stored (a bar per level, as wide as what it stands for)."""
    total = sum(histogram.counts)
    bars = _level_bars(histogram)
    if not total or not bars:
        return None
    curve = [
        {"at": (low + high) / 2, "density": count / total / (high - low), "what": FLOAT}
        for (low, high), count in zip(pairwise(histogram.edges), histogram.counts, strict=True)
    ]
    ends = [histogram.edges[0], histogram.edges[-1]]
    axis = {"title": histogram.unit, "grid": False, "tickCount": 8}
    x = _of("low:Q", axis=axis, scale={"domain": ends, "nice": False})
    y = _of("density:Q", axis={"title": "density", "labels": False, "ticks": False, "tickCount": 4}, stack=None)
    colour = _ordinal("what", [FLOAT, LEVEL], ["var(--text)", "var(--accent)"])
    tips = _tips(level="level:N", weights="count:N", share="share:N")
    stored = {"x": x, "x2": {"field": "high"}, "y": y, "y2": {"datum": 0}, "color": colour, "tooltip": tips}
    look: Spec = {"opacity": 0.55, "stroke": "var(--card)", "strokeWidth": 0.5, "clip": True}
    levels = _mark("rect", stored, data="levels", **look)
    meant = {"x": _of("at:Q"), "y": y, "color": colour}
    line = _mark("line", meant, data="curve", strokeWidth=1.3, interpolate="step", clip=True)
    about = f"Weights of {shorten(histogram.name, 80)} against the levels of their grid"
    return _finish({"layer": [levels, line]}, {"levels": bars, "curve": curve}, about, 170)


def _level_bars(histogram: Histogram) -> list[dict[str, Any]]:
    """A bar per distinct level (small floats have two zeros), between the middles to the levels beside it."""
    merged: dict[float, int] = {}
    for level, count in zip(histogram.levels, histogram.codes, strict=True):
        merged[level] = merged.get(level, 0) + count
    levels = sorted(merged)
    if len(levels) < 2:
        return []
    total = max(sum(merged.values()), 1)
    middle = [(low + high) / 2 for low, high in pairwise(levels)]
    edges = [2 * levels[0] - middle[0], *middle, 2 * levels[-1] - middle[-1]]
    return [
        {"low": low, "high": high, "density": merged[level] / total / (high - low), "what": LEVEL,
         "level": f"{level:.4g}", "count": f"{merged[level]:,}", "share": f"{merged[level] / total:.2%}"}
        for level, (low, high) in zip(levels, pairwise(edges), strict=True)
    ]  # fmt: skip


def _tips(**fields: str) -> list[Spec]:
    return [_of(field, title=title) for title, field in fields.items()]


@cache
def _config() -> Mapping[str, Any]:
    text = {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "labelFontSize": 11, "titleFontSize": 12}
    return {
        "font": _FONT,
        "background": "transparent",
        "view": {"continuousWidth": 300, "continuousHeight": 300, "stroke": None},
        "axis": text
        | {
            "titleFontWeight": "normal",
            "gridColor": "var(--line)",
            "domainColor": "var(--line)",
            "tickColor": "var(--line)",
        },
        "legend": text
        | {"labelColor": "var(--text)", "symbolSize": 70, "rowPadding": 4, "columnPadding": 12, "offset": 8},
        "text": {"color": "var(--text)"},
    }


def _finish(layers: Spec, data: Mapping[str, Sequence[Any]], description: str, height: int) -> Spec:
    """Size, accessible description, colours and data, of which `values` is that of all layers without their own."""
    common = {"data": {"name": "values"}} if "values" in data else {}
    return {
        "$schema": _SCHEMA, "config": _config(), "width": "container", "height": height, "description": description,
        "autosize": {"type": "fit-x", "contains": "padding"}, "datasets": dict(data), **common, **layers,
    }  # fmt: skip


def frontier_chart(values: Sequence[Mapping[str, Any]]) -> Spec | None:
    """Divergence against size with intervals, a colour per method; a line through what nothing dominates.

    Args:
        values: a row per point: name, method, scheme, bytes, divergence, low, high, frontier, knee.
    """
    if not values:
        return None
    rows = [{**row, "MiB": row["bytes"] / 2**20, "shown": f"{row['divergence']:.4g} ({row['low']:.4g} to "
             f"{row['high']:.4g})", "size": format_size(row["bytes"])} for row in values]  # fmt: skip
    labels = list(dict.fromkeys(row["method"] for row in rows))[:ROLES]
    log = {"type": "log", "nice": False, "padding": 30}
    x = {"x": _of("MiB:Q", scale=log, axis={"title": "weights, MiB (log scale)", "format": "~s", "grid": False})}
    lows, highs = [row["low"] for row in rows if row["low"] > 0], [row["high"] for row in rows]
    powers = [10.0**at for at in range(floor(log10(min(lows, default=1e-9))), ceil(log10(max(*highs, 1e-9))) + 1)]
    axis = {"title": "KL divergence, nats per token (log scale)", "format": ".2~g", "values": powers}
    base = {**x, "y": _of("divergence:Q", scale=log, axis=axis)}
    colour = _ordinal("method", labels, [f"var(--c{index})" for index in range(len(labels))])
    shown = {"color": colour, "opacity": _FADED}
    tips = _tips(point="name:N", method="method:N", divergence="shown:N", size="size:N")
    ends = {**x, "y": _of("low:Q", scale=log), "y2": {"field": "high"}}
    best, knee = "datum.frontier", "datum.knee"
    drawn = [
        _mark("line", {**base, "order": _of("MiB:Q")}, best, strokeWidth=1.5, color="var(--muted)"),
        _mark("rule", {**ends, **shown}, strokeWidth=1.5),
        _mark("point", {**base, **shown, "tooltip": tips}, filled=True, size=36),
        _mark("text", {**base, "text": _of("scheme:N")}, best, align="left", dx=7, dy=-7, fontSize=11),
        _mark("point", base, knee, size=260, strokeWidth=2, color="var(--accent)"),
    ]
    return _finish(_picked("method", drawn), {"values": rows}, "Divergence against size", 380)


def draw(run: RunRecord) -> dict[str, Spec]:
    """Every chart that this run has data for, by the name of its place in the page."""
    where = places(row.name for row in run.rows)
    charts = {
        "error": error_chart(run.rows, where),
        "bytes": bytes_chart(run.rows, where),
        "bits": bits_chart(run.rows, where),
        **{f"grid-{at}": histogram_chart(each) for at, each in enumerate(run.histograms)},
    }
    return {name: spec for name, spec in charts.items() if spec}
