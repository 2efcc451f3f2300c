"""The report's three files: verdict, numbers, hostile names, size; the page as the standard library parses it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowbit
from lowbit.methods import NoOptions
from lowbit.plugins import load
from lowbit.schemes import parse
from lowbit.stages import _charts, _words, record
from lowbit.stages._records import TermsRecord
from lowbit.stages._verdict import BANDS, judge, position
from lowbit.stages._words import cell
from lowbit.stages.report import Count, Histogram, Memory, Outcome, RunRecord, Starved, Verification, write_report
from lowbit.tensors import QTensor, block_size
from tests.conftest import ROOT
from tests.reference.reports import HOSTILE, make_evaluation, make_rows, make_run

DATA = Path(lowbit.__file__).parent / "data" / "report"


class Page(HTMLParser):
    """Elements with their attributes, the texts of scripts, and the visible text of the rest."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of one kind."""
        return [attributes for found, attributes in self.tags if found == tag]


def written(run: RunRecord, folder: Path) -> tuple[dict[str, Any], str, Page]:
    """The three files as a reader sees them."""
    write_report(run, folder)
    html = (folder / "report.html").read_text()
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text(), Page(html)


# Means are well inside the bands that docs/report.md names, or on their borders, which belong to the worse band.
@pytest.mark.parametrize(
    ("mean", "tone", "words"),
    [
        (0.001, "good", "Very close to the original"),
        (0.0099, "good", "Very close to the original"),
        (0.01, "good", "Close to the original"),
        (0.049, "good", "Close to the original"),
        (0.05, "fair", "Noticeably changed"),
        (0.15, "poor", "Far from the original"),
        (0.5, "bad", "Broken: do not use this result"),
        (7.0, "bad", "Broken: do not use this result"),
        (inf, "bad", "Broken: do not use this result"),
        (nan, "bad", "Broken: do not use this result"),
        (None, "bad", "Broken: do not use this result"),
    ],
)
def test_verdict_follows_mean_divergence(mean: Any, tone: str, words: str) -> None:
    verdict = judge(make_run(evaluation=make_evaluation(kl=(mean, mean, mean))))
    assert verdict.tone == tone
    assert verdict.headline.startswith(words)


def test_verdict_takes_the_worse_end_and_says_so() -> None:
    verdict = judge(make_run(evaluation=make_evaluation(kl=(0.045, 0.038, 0.055))))
    assert verdict.headline.startswith("Noticeably changed")
    assert any("from “close” to “changed”" in sentence for sentence in verdict.sentences)
    assert not any("from “" in sentence for sentence in judge(make_run()).sentences)


def test_verdict_without_interval_says_so() -> None:
    verdict = judge(make_run(evaluation=make_evaluation(kl=(0.03, None, None))))
    assert verdict.headline.startswith("Close")
    assert any("too little text" in sentence for sentence in verdict.sentences)


def test_verdict_names_size_ratio() -> None:
    run = make_run()
    ratio = run.source.bytes / run.result.bytes
    assert judge(run).headline == f"Close to the original, {ratio:.2f} times smaller"


def test_verdict_without_evaluation_claims_nothing() -> None:
    verdict = judge(make_run(evaluation=None))
    assert verdict.tone == "unknown"
    assert "quality was not measured" in verdict.headline


def test_verdict_without_reference_claims_nothing() -> None:
    evaluation = make_evaluation()
    evaluation["scores"] = {"perplexity": evaluation["scores"]["perplexity"]}
    verdict = judge(make_run(evaluation=evaluation))
    assert verdict.tone == "unknown"
    assert "quality was not compared" in verdict.headline
    assert any("Perplexity is 40.8 (95% interval 38.0 to 43.0)" in sentence for sentence in verdict.sentences)


def test_verdict_of_nothing_quantized() -> None:
    rows = tuple(replace(row, scheme=None, method=None, outcome=None, after=row.before) for row in make_rows(2))
    assert judge(make_run(rows)).headline == "Nothing was quantized"


def test_mismatch_outweighs_all_else() -> None:
    verdict = judge(make_run(verified=Verification(17, 2, 0.1)))
    assert verdict.tone == "bad"
    assert "2 of 17 tensors differ" in verdict.headline


def test_memory_over_its_limit_is_said() -> None:
    verdict = judge(make_run(memory=Memory(2 * 2**30, 2**29, 2**30)))
    assert any("2 GiB, where 1 GiB" in sentence for sentence in verdict.sentences)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((0.02, 0.015, 0.025), "went from 40.0 to 40.8, +2.02% (95% interval +1.51% to +2.53%)"),
        ((0.02, -0.001, 0.041), "cannot tell from no change (95% interval \N{MINUS SIGN}0.10% to +4.19%)"),
        ((-0.01, -0.02, -0.005), "\N{MINUS SIGN}1.00% (95% interval \N{MINUS SIGN}1.98% to \N{MINUS SIGN}0.50%)"),
        ((0.02, None, None), "went from 40.0 to 40.8, +2.02%."),
    ],
)
def test_perplexity_in_words(change: tuple[float, float | None, float | None], said: str) -> None:
    sentences = judge(make_run(evaluation=make_evaluation(change=change))).sentences
    assert any(said in sentence for sentence in sentences), sentences


def test_documented_borders_are_the_ones_in_use() -> None:
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "report.md").read_text().splitlines() if line.count(" | ") == 2
    ]
    tops = {
        row[2].removesuffix(" |"): re.findall(r"[\d.]+", row[0])[-1] for row in rows if re.search(r"\d\.\d", row[0])
    }
    assert tops == {band.like: str(band.top if band.top < inf else BANDS[-2].top) for band in BANDS}


def test_scale_gives_every_band_a_fifth() -> None:
    borders = [0.001, 0.01, 0.05, 0.15, 0.5]
    assert [position(border) for border in borders] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert position(0.0) == 0
    assert position(1e9) == position(nan) == 1


def test_an_evaluation_as_it_is_stored_can_be_read(tmp_path: Path) -> None:
    from lowbit.metrics import Score
    from lowbit.stages.evaluate import Conditions, Evaluation

    conditions = Conditions("t.txt", "00", 512, 512, 1024, 2, 1022, ("<s>",), "float32", 2, 0.95, 0)
    scores = {"perplexity": Score(12.5), "kl_mean": Score(0.02, 0.01, 0.03)}
    evaluation = Evaluation("out", None, conditions, scores).to_dict()
    _, _, page = written(make_run(evaluation=evaluation), tmp_path)
    assert "On 1,022 tokens of t.txt" in page.text
    assert "0.0100 to 0.0300" in page.text


def test_json_holds_the_whole_record(tmp_path: Path) -> None:
    run = make_run()
    document, _, _ = written(run, tmp_path)
    assert document["lowbit_report"] == 1
    assert document["verdict"]["headline"] == judge(run).headline
    assert document["command"] == run.command
    assert [row["name"] for row in document["rows"]] == [row.name for row in run.rows]
    outcome = document["rows"][-2]["outcome"]
    assert Outcome(**outcome) == run.rows[-2].outcome
    assert document["evaluation"] == run.evaluation
    assert tuple(document["histograms"][0]["edges"]) == run.histograms[0].edges


def test_json_writes_null_for_what_is_no_number(tmp_path: Path) -> None:
    document, markdown, page = written(make_run(evaluation=make_evaluation(kl=(nan, nan, inf))), tmp_path)
    assert document["evaluation"]["scores"]["kl_mean"] == {"value": None, "low": None, "high": None, "p_value": None}
    assert "not a number" in markdown
    assert "Broken" in page.text


def test_nothing_is_written_when_the_report_cannot_be_made(tmp_path: Path) -> None:
    write_report(make_run(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        write_report(make_run(evaluation={"scores": {}}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sorted(before) == ["report.html", "report.json", "report.md"]


def test_page_runs_no_script_but_its_own(tmp_path: Path) -> None:
    _, _, page = written(make_run(), tmp_path)
    policy = next(meta["content"] for meta in page.named("meta") if meta.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy
    data, *programs = page.scripts
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in programs]
    assert len(programs) == 2
    assert all(f"'sha256-{digest}'" in policy for digest in digests)
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert set(json.loads(data)) == {"error", "bytes", "bits", "grid-0"}


def test_page_reaches_for_nothing_outside(tmp_path: Path) -> None:
    _, _, page = written(make_run(), tmp_path)
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "style"} & attributes.keys() - (
            {"style"} if tag == "i" else set()
        )
    assert "url(" not in (DATA / "page.css").read_text()
    assert not any(name in (DATA / "page.js").read_text() for name in ("fetch(", "import(", "XMLHttpRequest"))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    rows = tuple(replace(row, name=f"{row.name}.{HOSTILE}", reason=HOSTILE) for row in make_rows(1))
    run = make_run(
        rows,
        command=HOSTILE,
        histograms=(replace(make_run().histograms[0], name=HOSTILE),),
        counts=(Count("fallback", HOSTILE, 1),),
    )
    run = replace(
        run, source=replace(run.source, path=HOSTILE, dtype=HOSTILE), machine=replace(run.machine, cpu=HOSTILE)
    )
    _, _, page = written(run, tmp_path)
    _, _, clean = written(make_run(make_rows(1)), tmp_path / "clean")
    assert len(page.scripts) == len(clean.scripts) == 3
    assert not page.named("img")
    assert page.text.count(HOSTILE) > len(rows)


def test_hostile_names_stay_in_their_cells_of_markdown(tmp_path: Path) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    names = [HOSTILE, "a|b`c", "line\nbreak | two", "\\|", "*_[x](y)_*"]
    rows = tuple(replace(row, name=name) for row, name in zip(make_rows(1)[2:], names, strict=False))
    _, markdown, _ = written(make_run(rows), tmp_path)
    tokens = parser.parse(markdown)
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or []}
    assert not {"html_block", "html_inline", "link_open", "em_open"} & kinds
    cells = [
        tokens[at + 1].children[0].content
        for at, token in enumerate(tokens)
        if token.type == "td_open" and tokens[at + 1].children
    ]
    for name in names:
        assert " ".join(name.replace("`", "\N{MODIFIER LETTER GRAVE ACCENT}").split()) in cells, name


@pytest.mark.parametrize("text", ["x86_64", "_a_ b", "__c__", "d_ _e", "f_g_h", "(_i_)", "_j_k_"])
def test_underscores_are_no_emphasis_and_escaped_at_the_ends_of_words_alone(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    (inline,) = [token for token in parser.parse(cell(text)) if token.type == "inline"]
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == text
    assert "\\" not in cell("x86_64")


def test_half_a_surrogate_in_a_name_can_be_written(tmp_path: Path) -> None:
    rows = (replace(make_rows(1)[2], name="bad\ud800name"),)
    document, markdown, _ = written(make_run(rows), tmp_path)
    assert document["rows"][0]["name"] == "bad\ud800name"
    assert "bad\\ud800name" in markdown


def test_page_of_a_huge_model_stays_small(tmp_path: Path) -> None:
    row = make_rows(1)[-2]
    rows = tuple(
        replace(row, name=f"model.layers.{n // 600}.mlp.experts.{n % 200}.kind{n % 600 // 200}_proj.weight")
        for n in range(6_000)
    ) + tuple(replace(row, name=f"x{n}.{'long' * 1000}") for n in range(1_000))
    document, _, page = written(make_run(rows), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert len(document["rows"]) == 7_000
    assert "of 7,000 tensors are listed" in page.text


def test_page_without_charts_or_evaluation(tmp_path: Path) -> None:
    rows = (replace(make_rows(1)[0], name="weight", before=0, after=0, shape=(0,)),)
    _, _, page = written(make_run(rows, evaluation=None, histograms=(), verified=None), tmp_path)
    assert json.loads(page.scripts[0]) == {}
    assert "Quality was not measured" in page.text
    assert "has not been read back" in page.text


def test_kept_tensors_are_listed_by_reason_and_folded(tmp_path: Path) -> None:
    _, markdown, page = written(make_run(make_rows(5)), tmp_path)
    assert "model.layers.*.input_layernorm.weight" in page.text
    assert "| not a matrix | 10 | 2.812 KiB |" in markdown


def test_low_rank_terms_are_counted_beside_the_codes(tmp_path: Path) -> None:
    ranks = {"a.weight": 24, "b.weight": 3, "c.weight": 7}
    write_report(make_run(adapter=TermsRecord("out/adapter", 3 * 2**20, 0.25, ranks)), tmp_path)
    said = "3 MiB in an adapter, 0.25 bits per quantized weight, ranks 3 to 24, median 7 in 3 tensors"
    assert f"| low-rank terms | {said} |" in (tmp_path / "report.md").read_text()
    assert "ranks 3 to 24" in Page((tmp_path / "report.html").read_text()).text
    assert json.loads((tmp_path / "report.json").read_text())["adapter"]["ranks"] == ranks
    write_report(make_run(), tmp_path)
    assert "low-rank" not in (tmp_path / "report.md").read_text()


def test_how_schemes_were_chosen_is_told(tmp_path: Path) -> None:
    said = ("plan of 7 MiB, at most 0.03: passes", "plan of <6> | MiB, predicted 0.04")
    record, markdown, page = written(make_run(decided=said), tmp_path)
    assert tuple(record["decided"]) == said and all(line in page.text for line in said)
    assert "How the schemes were chosen:\n\n- plan of 7 MiB, at most 0.03: passes\n- plan of" in markdown
    assert "\\| MiB, predicted 0.04" in markdown
    _, markdown, page = written(make_run(), tmp_path)
    assert "schemes were chosen" not in markdown + page.text


def test_fallback_names_both_methods(tmp_path: Path) -> None:
    row = make_rows(1)[2]
    assert row.outcome is not None
    fell = replace(row, method="gptq", outcome=replace(row.outcome, method="rtn", against_rtn=1.25))
    _, _, page = written(make_run((fell,)), tmp_path)
    assert "rtn, not gptq" in page.text
    assert "1.25" in page.text


def test_roles_are_the_shortest_endings_that_tell_apart() -> None:
    names = {
        "model.layers.3.self_attn.q_proj.weight": (3, "q"),
        "model.layers.10.mlp.experts.7.gate_proj.weight": (10, "experts.gate"),
        "model.layers.10.mlp.shared_experts.gate_proj.weight": (10, "shared_experts.gate"),
        "model.layers.0.mlp.gate_proj.weight": (0, "mlp.gate"),
        "transformer.h.1.attn.c_proj.weight": (1, "attn.c"),
        "transformer.h.1.mlp.c_proj.weight": (1, "mlp.c"),
        "lm_head.weight": (None, "lm_head"),
        "weight": (None, "weight"),
    }
    found = _charts.places(names)
    assert {name: (place.layer, place.role) for name, place in found.items()} == names


def values(spec: dict[str, Any], layer: int = 0) -> list[dict[str, Any]]:
    """The data that one layer of a chart draws."""
    found: list[dict[str, Any]] = spec["datasets"][(spec["layer"][layer].get("data") or spec["data"])["name"]]
    return found


def test_error_chart_has_every_quantized_tensor() -> None:
    run = make_run(make_rows(3))
    points = values(_charts.draw(run)["error"])
    wanted = sorted(row.outcome.error for row in run.rows if row.outcome)
    assert sorted(point["error"] for point in points) == wanted
    assert {(point["layer"], point["role"]) for point in points} == {
        (layer, role) for layer in range(3) for role in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_error_chart_turns_logarithmic_for_mixed_precision() -> None:
    rows = list(make_rows(2))
    assert _charts.draw(make_run(tuple(rows)))["error"]["layer"][0]["encoding"]["y"]["scale"].get("type") != "log"
    rows[2] = replace(rows[2], outcome=Outcome("rtn", 1e-6, 0.1, 0.1))
    encoding = _charts.draw(make_run(tuple(rows)))["error"]["layer"][0]["encoding"]
    assert encoding["y"]["scale"] == {"type": "log", "domain": [pytest.approx(1e-6), pytest.approx(0.1)]}


def test_error_axis_never_writes_a_value_twice() -> None:
    """Ticks as the reader's program writes them, where errors lie close together."""
    compiler = pytest.importorskip("vl_convert")
    row = make_rows(1)[2]
    rows = tuple(
        replace(row, name=f"layers.{n}.q_proj.weight", outcome=Outcome("rtn", error, 0.1, 0.1))
        for n, error in enumerate((0.0091, 0.0098, 0.0107, 0.0121))
    )
    spec = _charts.draw(make_run(rows))["error"] | {"width": 300}
    ticks = re.findall(r">([\d.]+%)<", compiler.vegalite_to_svg(spec, vl_version="6.4"))
    assert len(ticks) >= 4
    assert len(set(ticks)) == len(ticks)


def test_bytes_chart_loses_no_byte_and_counts_ties_once() -> None:
    tied = replace(
        make_rows(1)[0], name="lm_head.weight", after=0, reason="shares the storage of model.embed_tokens.weight"
    )
    run = make_run((*make_rows(4), tied))
    spec = _charts.draw(run)["bytes"]
    assert spec["layer"][0]["encoding"]["x"]["axis"]["title"] == "MiB"
    bars = values(spec)
    for what, wanted in (("as it came", run.source.bytes - tied.before), ("as stored", run.result.bytes)):
        assert sum(bar["size"] * 2**20 for bar in bars if bar["what"] == what) == pytest.approx(wanted)


def test_bits_chart_shows_stored_bits() -> None:
    cells = values(_charts.draw(make_run())["bits"])
    assert {cell["label"] for cell in cells} == {"4.12"}
    assert {cell["class"] for cell in cells} == {"4 bits"}


def test_histogram_densities_are_shares() -> None:
    run = make_run()
    spec = _charts.draw(run)["grid-0"]
    bars, curve = values(spec, 0), values(spec, 1)
    assert [bar["count"] for bar in bars] == ["25", "50", "25"]  # the two zeros of a small float are one level
    assert sum(bar["density"] * (bar["high"] - bar["low"]) for bar in bars) == pytest.approx(1)
    assert [(bar["low"], bar["high"]) for bar in bars] == [(-4.5, -1.5), (-1.5, 1.0), (1.0, 3.0)]
    widths = [high - low for low, high in pairwise(run.histograms[0].edges)]
    assert [point["density"] * width for point, width in zip(curve, widths, strict=True)] == pytest.approx(
        [0.1, 0.3, 0.4, 0.2]
    )


def test_charts_follow_the_schema_of_vega_lite() -> None:
    """No run validates them."""
    altair = pytest.importorskip("altair")
    point = {
        "name": "a",
        "method": "rtn",
        "scheme": "int4",
        "bytes": 2**22,
        "divergence": 0.1,
        "low": 0.05,
        "high": 0.2,
    }
    frontier = _charts.frontier_chart([{**point, "frontier": True, "knee": True}])
    charts = _charts.draw(make_run())
    assert set(charts) >= {"error", "bytes", "bits", "grid-0"}
    for spec in (*charts.values(), frontier):
        altair.Chart.from_dict(spec)


def test_histogram_of_nothing_is_left_out() -> None:
    empty = Histogram("x", (0.0, 1.0), (0,), (0.0, 1.0), (0, 0))
    assert "grid-0" not in _charts.draw(make_run(histograms=(empty,)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02444, "0.0244"),
        (91.0, "91.0"),
        (999.6, "1,000"),
        (1204.4, "1,204"),
        (0.0000787, "0.0000787"),
        (0.0, "0"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (3e9, "3.00e+09"),
        (nan, "not a number"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert _words.short(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.877, "87.7%"),
        (0.99264, "99.26%"),
        (1.0, "100.0%"),
        (0.0065, "0.65%"),
        (0.00004, "0.0040%"),
        (3.7, "370.0%"),
        (-0.00034, "\N{MINUS SIGN}0.034%"),
        (inf, "not a number"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert _words.percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.312, "0.31 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (89.6, "1 min 30 s"),
        (7500.0, "2 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert _words.duration(seconds) == text


def test_vega_is_the_bundle_that_it_says(tmp_path: Path) -> None:
    """The copy in the repository is what the package makes, under the licences at its head."""
    source = pytest.importorskip("vl_convert", minversion="1.9")
    if source.get_vega_version() != "6.2.0" or source.get_vega_embed_version() != "7.0.2":
        pytest.skip("another version of Vega than the copy's")
    head, _, body = (DATA / "vega.js").read_text().partition("*/\n")
    assert "University of Washington Interactive Data Lab" in head
    assert body.strip() == source.javascript_bundle("window.vegaEmbed = vegaEmbed;").strip()


def test_charts_compile_without_warnings() -> None:
    """The reader's program takes every chart; Vega-Lite's compiler of the same version says what it would ignore."""
    compiler = pytest.importorskip("vl_convert")
    for name, spec in _charts.draw(make_run()).items():
        svg = compiler.vegalite_to_svg(spec | {"width": 300}, vl_version="6.4")
        assert svg.count("<path") > 3, name


LEARNED: dict[str, Any] = {
    "sources": [{"name": "train.txt"}, {"name": "chats.jsonl"}], "recipe": "awq+gptq+tune", "samples": 1024,
    "length": 512, "sha256": "0123456789abcdef", "dtype": "bfloat16", "folded": 24,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tuned", "wanted", "absent"),
    [
        ({"before": 0.125, "after": 0.0625, "fixed": 0.0}, "held-out windows fell from 0.125 to 0.0625 nats", "can be"),
        ({"before": 0.125, "after": 0.0625, "fixed": 3.0}, "3 quantized tensors have no scales that can", "left out"),
        (
            {"before": 0.125, "after": 0.125, "fixed": 0.0},
            "did not lower the loss on held-out windows, and was left out",
            "fell",
        ),
        (None, "24 tensors were rescaled before", "tuned"),
    ],
)
def test_the_report_tells_what_was_learned_from(tuned: Any, wanted: str, absent: str) -> None:
    run = make_run(calibration={**LEARNED, "tuned": tuned}, warnings=("few tokens",))
    sentences = " ".join(judge(run).sentences)
    assert wanted in sentences
    assert absent not in sentences
    learned = "awq+gptq+tune learned from 1,024 windows of 512 tokens of train.txt, chats.jsonl (tokens 0123456789ab)"
    assert learned in sentences
    assert "Few tokens." in sentences


def test_a_rotation_is_told_of(tmp_path: Path) -> None:
    write_report(make_run(recipe="rotate+rtn"), tmp_path)
    assert "The model was rotated before (rotate+rtn)" in (tmp_path / "report.html").read_text()
    assert "| method | rotate+rtn |" in (tmp_path / "report.md").read_text()
    assert not any("rotated" in sentence for sentence in judge(make_run(recipe="gptq")).sentences)


def test_experts_that_saw_few_tokens_are_named_fewest_first(tmp_path: Path) -> None:
    few = tuple(Starved(f"layers.{block}.mlp", expert, 20 - expert) for block in range(9) for expert in range(20))
    write_report(make_run(starved=few), tmp_path)
    text = (tmp_path / "report.md").read_text()
    first = "19 (1 token), 18 (2 tokens), 17 (3 tokens)"
    assert f"- layers.0.mlp: {first}" in text and "and 12 experts more" in text
    assert "- 20 experts in 1 block more" in text
    assert "layers.8.mlp" not in text and first in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["starved"][179] == {
        "block": "layers.8.mlp", "expert": 19, "tokens": 1
    }  # fmt: skip


def test_one_window_is_no_windows() -> None:
    run = make_run(calibration={**LEARNED, "samples": 1, "length": 8, "folded": 1})
    sentences = " ".join(judge(run).sentences)
    assert "learned from 1 window of 8 tokens of" in sentences and "1 tensor was rescaled" in sentences


def test_where_nothing_was_quantized_nothing_was_learned() -> None:
    kept = tuple(row for row in make_rows(2) if not row.scheme)
    sentences = " ".join(judge(make_run(kept, calibration=LEARNED)).sentences)
    assert "learned nothing from the calibration text" in sentences and "learned from" not in sentences


@pytest.mark.parametrize("scheme", ["int4-g48", "int4-g48-asym", "int8-row", "q4_k", "int4-16x32"])
def test_histograms_count_every_weight(scheme: str) -> None:
    """Bin by bin as numpy counts weights in units of their scales, block by block; what is beyond is at the ends."""
    weight = torch.randn(70, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    q: QTensor = load("methods", "ggml" if scheme == "q4_k" else "rtn").quantize(weight, {}, parse(scheme), NoOptions())
    found = record.histogram("w", weight, q)
    (high, wide), scales, zeros = block_size(q.shape, q.scheme.block), q.scale_values(), q.zero_values()
    units = np.empty((70, 512))
    for row, col in np.ndindex(70, 512):
        block = row // high, col // wide
        value, scale = float(weight[row, col]), float(scales[block])
        zero = 0.0 if zeros is None else float(zeros[block])
        units[row, col] = (value + zero) / scale if q.scheme.zero == "min" else value / scale + zero
    counts, _ = np.histogram(units.clip(found.edges[0], found.edges[-1]), found.edges)
    assert sum(found.counts) == weight.numel() and np.abs(counts - found.counts).sum() < 180  # float32 at the edges
    assert sum(found.codes) == weight.numel()


def test_a_value_that_is_no_number_is_in_no_bin() -> None:
    values = torch.tensor([float("nan"), -9.0, 0.0, 9.0, float("inf")])
    counts = record._binned(values, -1.0, 1.0)
    assert counts[[0, record.BINS // 2, -1]].tolist() == [1, 1, 2] and counts.sum() == 4
