"""Sweeps: frontier, knee and recommendations against slow definitions, resumption, the page, wrong commands."""

from __future__ import annotations

import html
import json
import random
import re
from itertools import product
from math import log, sqrt
from pathlib import Path

import pytest
from click.testing import CliRunner

from lowbit.advise import Question, advise
from lowbit.advise.hardware import find
from lowbit.cli.sweep import command
from lowbit.stages._frontier import USERS, Interval, Point, frontier, judge, knee, recommend, scores
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.sweep_report import Skipped, SweepRecord, write_sweep


def point(name: str, size: int, loss: float, speed: float | None = None, spread: float = 0.1) -> Point:
    around = Interval(loss, loss * (1 - spread), loss * (1 + spread))
    same = Interval(0.9, 0.8, 0.95)
    return Point(name, name, "rtn", "compressed-tensors", size, 4.0, around, around, same, 1.0, speed)


def cloud(seed: int, count: int) -> list[Point]:
    """Points with ties in both coordinates."""
    draw = random.Random(seed)
    return [point(f"p{n}", draw.randint(5, 14), draw.choice([0.01, 0.02, 0.05, 0.1, 0.3, 0.7])) for n in range(count)]


@pytest.mark.parametrize("seed", range(40))
def test_the_frontier_is_what_brute_force_finds(seed: int) -> None:
    points = cloud(seed, 1 + seed % 12)
    # By definition: b is dominated if something is at least as good in both and better in one.
    free = {
        b.name
        for b in points
        if not any(
            (a.bytes < b.bytes and a.divergence.value <= b.divergence.value)
            or (a.bytes <= b.bytes and a.divergence.value < b.divergence.value)
            for a in points
        )
    }
    assert {each.name for each in frontier(points)} == free
    for each in judge(points):
        assert (each.dominated is None) == (each.point.name in free)
        assert not each.surely or each.dominated


def test_surely_dominated_is_beyond_the_intervals() -> None:
    best, near, far = point("best", 10, 0.1), point("near", 11, 0.11), point("far", 12, 0.2)
    found = {each.point.name: each for each in judge([best, near, far])}
    assert found["near"].dominated == "best" and not found["near"].surely
    assert found["far"].dominated == "best" and found["far"].surely


@pytest.mark.parametrize("seed", range(30))
def test_the_knee_is_the_farthest_from_the_line_between_the_ends(seed: int) -> None:
    points = cloud(seed, 12)
    line = frontier(points)
    if len(line) < 3:
        assert knee(points) is None
        return
    places = [(log(each.bytes), log(each.divergence.value)) for each in line]
    (x0, y0), (x1, y1) = places[0], places[-1]
    unit = [((x - x0) / (x1 - x0), (y - y1) / (y0 - y1)) for x, y in places]
    # Distance of (x, y) from the line through (0, 1) and (1, 0), below it.
    away = [(1 - x - y) / sqrt(2) for x, y in unit]
    found = knee(points)
    if max(away) < 1e-6:
        assert found is None
    else:
        assert found is not None and away[line.index(found)] == pytest.approx(max(away))


def test_recommendations_have_the_least_shortfall() -> None:
    assert all(sum(weights) == pytest.approx(1) for weights in USERS.values())
    points = [point("small", 100, 1.0), point("middle", 200, 0.02), point("large", 800, 0.01), point("bad", 300, 0.5)]
    marks = scores([each for each in points if each.name != "bad"])
    assert marks["small"] == (0.0, 1.0, 1.0) and marks["large"] == (1.0, 0.0, 0.0)
    assert {each.name for each in recommend(points).values()} <= {"small", "middle", "large"}
    assert recommend(points)["balanced"].name == "middle"


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_recommendations_are_what_a_search_finds(seed: int, timed: bool) -> None:
    draw = random.Random(seed)
    sizes, losses = sorted(draw.sample(range(50, 900), 9)), sorted((draw.random() for _ in range(9)), reverse=True)
    points = [
        point(f"p{n}", size, loss, speed=draw.uniform(1, 9) if timed else None)
        for n, (size, loss) in enumerate(zip(sizes, losses, strict=True))
    ]

    def mark(values: list[float], at: int) -> float:
        return 1 - (values[at] - min(values)) / (max(values) - min(values))

    for user, (quality, size, speed) in USERS.items():
        worst = []
        for n in range(9):
            parts = [quality * (1 - mark([log(loss) for loss in losses], n))]
            smaller = 1 - mark([log(each) for each in sizes], n)
            if timed:
                slower = 1 - mark([-log(each.speed or 0) for each in points], n)
                parts += [size * smaller, speed * slower]
            else:
                parts += [(size + speed) * smaller]
            worst.append(max(parts))
        best = points.index(recommend(points)[user])
        assert worst[best] == pytest.approx(min(worst)), user


def test_a_point_that_is_faster_counts_though_it_is_dominated() -> None:
    points = [point("a", 100, 0.1, speed=10.0), point("b", 110, 0.12, speed=40.0), point("c", 120, 0.13, speed=20.0)]
    assert recommend(points)["speed first"].name == "b"
    assert "c" not in {each.name for each in recommend(points).values()}


def test_the_page_is_whole_and_no_name_becomes_a_program(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    points = (point("small", 100, 1.0), point("middle", 200, 0.02), point(evil, 800, 0.01))
    write_sweep(SweepRecord("m/" + evil, "t.txt", "0", 512, points, (Skipped("x", evil),)), tmp_path)
    page = (tmp_path / "sweep.html").read_text()
    assert "<img src=x" not in page and html.escape(evil) in page
    assert not re.search(r"(?:src|href)=[\"']?http", page)
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert data["knee"] == "middle" and data["points"][0]["name"] == "small"
    assert data["recommended"]["balanced"]["weights"] == {"quality": 0.4, "size": 0.3, "speed": 0.3}
    spec = json.loads(re.findall(r'id="charts">(.*?)</script>', page, re.DOTALL)[0])["frontier"]
    kinds = [layer["mark"]["type"] for layer in spec["layer"]]
    assert kinds == ["line", "rule", "point", "text", "point"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "t.txt"
    file.write_text("The river runs from the hills to the sea, and the town stands on its left bank. " * 40)
    return file


def test_a_sweep_measures_goes_on_and_adds(tmp_path: Path, wiki_8m: Path, text: Path) -> None:
    out = tmp_path / "sweep"

    def ran(schemes: str, *more: str) -> tuple[str, dict[str, object]]:
        words = [str(wiki_8m), str(out), "--schemes", schemes, "--evaluate", str(text), "--context", "64"]
        done = CliRunner().invoke(command, [*words, "--tokens", "256", "--json", *more])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stderr, json.loads(done.stdout)

    said, first = ran("int2-g64")
    assert "point 1 of 1: int2-g64\n" in said
    assert [each["name"] for each in first["points"]] == ["int2-g64"]  # type: ignore[attr-defined]
    assert not any((out / "models").iterdir())
    said, second = ran("int2-g64,int8-row,gptq:nvfp4", "--keep")
    assert "point 1 of 2: int2-g64, done before\n" in said and "point 2 of 2: int8-row\n" in said
    assert {each["name"] for each in second["points"]} == {"int2-g64", "int8-row"}  # type: ignore[attr-defined]
    assert [each["name"] for each in second["skipped"]] == ["gptq-nvfp4"]  # type: ignore[attr-defined]
    for file in (out / "points").iterdir():
        found = json.loads(file.read_text())
        assert found["divergence"]["low"] <= found["divergence"]["value"] <= found["divergence"]["high"]
    page = (out / "sweep.html").read_text()
    assert "int8-row" in page and "gptq-nvfp4" in page
    _is_counted_as_it_is(next((out / "models").iterdir()))
    file = next((out / "points").glob("int2*"))
    file.write_text("{")
    words = [str(wiki_8m), str(out), "--schemes", "int2-g64", "--evaluate", str(text), "--context", "64"]
    broken = CliRunner().invoke(command, [*words, "--tokens", "256"])
    assert "is damaged" in str(broken.exception)


def _is_counted_as_it_is(folder: Path) -> None:
    """Advice for a checkpoint that is quantized already: its bytes as they are."""
    question = Question(find("rtx-4090"), 512, runtime="vllm")
    advice = advise(open_checkpoint(folder), question)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (as_is,) = [each for each in advice.options if each.scheme is None]
    assert 0 < stored - as_is.weights < 32_000  # the header


def test_a_wrong_sweep_is_one_sentence(tmp_path: Path, wiki_8m: Path, text: Path) -> None:
    base = [str(wiki_8m), str(tmp_path / "s"), "--evaluate", str(text)]
    for words, said in (
        (["--schemes", "int99"], "no scheme is called 'int99'"),
        (["--schemes", "gptq:nvfp4"], "nothing of this sweep can be made: gptq-nvfp4: "),
        (["--schemes", "int4", "--methods", "gptq"], "learned from text"),
        (["--schemes", "int4", "--plan", str(text)], "a sweep takes --schemes"),
        (["--schemes", "int4", "--scheme", "int8"], "a sweep takes --schemes"),
        (["--schemes", "int4", "--skip", "nothing_like_it"], "matches no tensor"),
    ):
        done = CliRunner().invoke(command, [*base, *words])
        assert done.exit_code and said in (str(done.exception) + done.output), words
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    done = CliRunner().invoke(
        command, [str(wiki_8m), str(tmp_path / "other"), "--schemes", "int4", "--evaluate", str(text)]
    )
    assert "holds something else" in str(done.exception)


def test_names_of_points_are_file_names(wiki_8m: Path, text: Path) -> None:
    from lowbit.pipeline import Request
    from lowbit.sweep import SweepRequest, _combinations

    schemes, methods = ("int4-g128", "levels[-1,0,1]", "gguf:q4_k_m", "int4-g128"), ("rtn", "awq+gptq")
    found = [name for name, _ in _combinations(SweepRequest(Request("m", text), schemes, methods))]
    assert len(found) == len(set(found)) == 6 == len(list(product(set(schemes), methods)))
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in found) and "int4-g128-awq+gptq" in found
