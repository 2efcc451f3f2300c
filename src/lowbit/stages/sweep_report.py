"""Report of a sweep: `sweep.json` and one self-contained `sweep.html` with the frontier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lowbit.stages._frontier import USERS, Judged, Point, judge, knee, recommend, scores, worth
from lowbit.stages.report import render_page
from lowbit.stages.write import write_atomic

VERSION = 1
_WEIGHED = ("quality", "size", "speed")


@final
@dataclass(frozen=True)
class Skipped:
    """A combination that cannot be made, and why."""

    name: str
    reason: str


@final
@dataclass(frozen=True)
class SweepRecord:
    """Everything that a sweep measured."""

    model: str
    text: str
    lowbit: str
    context: int
    points: tuple[Point, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def judged(self) -> list[Judged]:
        """The points, the smallest first."""
        return sorted(judge(self.points), key=lambda each: (each.point.bytes, each.point.divergence.value))

    @property
    def recommended(self) -> dict[str, Point]:
        """The point for each kind of user."""
        return recommend(self.points)

    @property
    def knee(self) -> Point | None:
        """Where the frontier bends most."""
        return knee(self.points)

    @property
    def timed(self) -> bool:
        """Whether decoding was timed at every point."""
        return bool(self.points) and all(point.speed for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """The whole as JSON types."""
        bend = self.knee
        points = [{**asdict(each.point), "dominated_by": each.dominated, "surely": each.surely} for each in self.judged]
        return {
            "lowbit_sweep": VERSION, "model": self.model, "text": self.text, "lowbit": self.lowbit,
            "context": self.context, "points": points, "skipped": [asdict(each) for each in self.skipped],
            "knee": bend.name if bend else None,
            "recommended": {
                user: {"point": point.name, "weights": dict(zip(_WEIGHED, USERS[user], strict=True))}
                for user, point in self.recommended.items()
            },
            "speed": "measured" if self.timed else "not measured: its weight counts for the size",
        }  # fmt: skip


def write_sweep(record: SweepRecord, out: Path) -> None:
    """Write `sweep.json` and `sweep.html` into a directory; each appears whole or not at all."""
    write_atomic(out / "sweep.json", (json.dumps(record.to_dict(), indent=1) + "\n").encode())
    write_atomic(out / "sweep.html", _page(record).encode(errors="backslashreplace"))


def _page(record: SweepRecord) -> str:
    from lowbit.stages._charts import frontier_chart

    bend, marks = record.knee, scores(worth(record.points))
    facts = {
        "record": record, "judged": record.judged, "knee": bend, "recommended": record.recommended, "users": USERS,
        "model": Path(record.model).name or record.model,
        "charts": {"frontier": frontier_chart(_values(record.judged, bend))},
        "scores": {name: list(each) for name, each in marks.items()},
    }  # fmt: skip
    return render_page("sweep.html.j2", "sweep.js", facts)


def _values(judged: Sequence[Judged], bend: Point | None) -> list[dict[str, Any]]:
    """Rows of the chart."""
    return [
        {
            "name": each.point.name, "method": each.point.method, "scheme": each.point.scheme,
            "bytes": each.point.bytes, "divergence": each.point.divergence.value,
            "low": max(each.point.divergence.low, 1e-9), "high": each.point.divergence.high,
            "frontier": not each.dominated, "knee": bend is not None and each.point.name == bend.name,
        }
        for each in judged
    ]  # fmt: skip
