"""The page in a real browser: charts are drawn, tools work, it fits a telephone, and no name becomes a program."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit.stages.report import Outcome, RunRecord, write_report
from tests.reference.reports import HOSTILE, make_rows, make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--allow-file-access-from-files",
    "--virtual-time-budget=6000",
    "--window-size=1280,900",
    "--enable-logging=stderr",
    "--dump-dom",
)
# A frame shows the page at a width of our choosing; the script around it, which the page's policy does not bind,
# looks in and uses the page as a reader would.
FRAME = """<!doctype html><title>frame</title><body style="margin:0">
<iframe id="page" src="report.html" style="border:0;width:{width}px;height:900px"></iframe><pre id="found"></pre>
<script>
const errors = [];
const look = () => {{
  const doc = page.contentDocument, all = (query) => [...doc.querySelectorAll(query)];
  const shown = () => all("#tensors tbody tr").map((row) => row.cells[0].textContent);
  const found = {{
    title: doc.title,
    images: all("img").length,
    charts: all("svg.marks").length,
    marks: all("svg.marks path").length,
    widest: Math.max(...all("svg.marks").map((svg) => svg.getBoundingClientRect().right)),
    scroll: doc.documentElement.scrollWidth,
    background: page.contentWindow.getComputedStyle(doc.body).backgroundColor,
    line: page.contentWindow.getComputedStyle(all("#chart-error svg .mark-line path")[0]).stroke,
    first: shown(),
  }};
  doc.getElementById("theme").click();
  found.otherBackground = page.contentWindow.getComputedStyle(doc.body).backgroundColor;
  found.otherLine = page.contentWindow.getComputedStyle(all("#chart-error svg .mark-line path")[0]).stroke;
  const search = doc.getElementById("search");
  search.value = "LAYERS.2 down_proj";
  search.dispatchEvent(new Event("input"));
  found.searched = shown();
  search.value = "";
  search.dispatchEvent(new Event("input"));
  all("#tensors thead button").find((button) => button.textContent === "Error").click();
  found.sorted = shown();
  doc.getElementById("more").click();
  found.all = shown().length;
  document.getElementById("found").textContent = JSON.stringify(found);
}};
page.addEventListener("load", () => setTimeout(look, 1500));
</script>"""


def looked_at(run: RunRecord, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """What the script in the frame found, and under `console` what the browser complained of."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    write_report(run, folder)
    (folder / "frame.html").write_text(FRAME.format(width=width))
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}"] + ["--blink-settings=preferredColorScheme=0"] * dark
    done = subprocess.run(
        [browser, *flags, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    match = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-3000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {"console": console, **json.loads(html.unescape(match[1]))}


@pytest.fixture(scope="module")
def run() -> RunRecord:
    """Forty layers, the worst tensor in the middle of the plan."""
    rows = list(make_rows(40))
    at = next(at for at, row in enumerate(rows) if row.name == "model.layers.17.mlp.up_proj.weight")
    rows[at] = replace(rows[at], outcome=Outcome("rtn", 0.5, 0.1, 0.1))
    return make_run(tuple(rows))


@pytest.fixture(scope="module")
def wide(run: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The page on a desktop."""
    return looked_at(run, tmp_path_factory.mktemp("wide"), 1200)


def test_charts_are_drawn(wide: dict[str, Any]) -> None:
    assert wide["console"] == []
    assert wide["charts"] == 4
    assert wide["marks"] > 7 * 40 * 2  # a point and a cell for each matrix


def test_theme_changes_page_and_charts(wide: dict[str, Any], run: RunRecord, tmp_path: Path) -> None:
    dark = looked_at(run, tmp_path, 1200, dark=True)
    assert wide["background"] != wide["otherBackground"]
    assert wide["line"] != wide["otherLine"]
    assert (dark["background"], dark["line"]) == (wide["otherBackground"], wide["otherLine"])


def test_plan_is_collapsed_searched_and_sorted(wide: dict[str, Any], run: RunRecord) -> None:
    names = [row.name for row in run.rows]
    assert wide["first"] == names[:15]
    assert wide["searched"] == [name for name in names if "layers.2" in name and "down_proj" in name][:15]
    errors = sorted(((row.outcome.error, row.name) for row in run.rows if row.outcome), reverse=True)
    assert wide["sorted"][0] == "model.layers.17.mlp.up_proj.weight" == errors[0][1]
    assert wide["sorted"] == [name for _, name in errors[:15]]
    assert wide["all"] == len(names)


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_telephone(run: RunRecord, tmp_path: Path, width: int) -> None:
    found = looked_at(run, tmp_path, width)
    assert found["scroll"] <= width
    assert found["widest"] <= width
    assert found["charts"] == 4


def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    rows = tuple(replace(row, name=f"{row.name}.{HOSTILE}", reason=HOSTILE) for row in make_rows(2))
    named = replace(make_run().histograms[0], name=HOSTILE)
    run = make_run(rows, command=HOSTILE, histograms=(named,))
    found = looked_at(replace(run, source=replace(run.source, path=HOSTILE)), tmp_path, 320)
    assert found["title"].endswith("lowbit report")
    assert found["images"] == 0
    assert found["console"] == []
    assert found["charts"] == 4
    assert found["scroll"] <= 320
    assert found["first"][0].endswith("|`'{{7*7}}")
